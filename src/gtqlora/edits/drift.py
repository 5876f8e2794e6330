"""How far an edited model drifted from the original: its next-token distributions, and its routing.

Shape letters: B batch, S sequence, V vocabulary, T tokens (B x S), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gtqlora import routing
from gtqlora.capture import Recorder, Subject
from gtqlora.contrasts import Contrast, Row, encode_row
from gtqlora.decoding import Change
from gtqlora.edits.edited import Edited
from gtqlora.results.verdict import Drift
from gtqlora.scoring import Runner
from gtqlora.stats import Interval, bootstrap_mean


@dataclass(frozen=True, kw_only=True)
class Drifted:
    """How far an edited model drifted.

    Attributes:
        kl_benign: KL(original || edited) on benign completions, in nats per token.
        routing: kind of prompts -> drift of their routing.
    """

    kl_benign: Interval
    routing: dict[str, Drift]


def drift(runner: Runner, edited: Edited, rows: Contrast, *, seed: int) -> Drifted:
    """Measure how far the edited model drifted on held-out rows of every kind.

    Args:
        runner: of the edited model.
        seed: of the bootstrap over rows.
    """
    return Drifted(
        kl_benign=kl_from_original(runner, edited, rows.of_kind("benign"), seed=seed),
        routing={kind: routing_drift(runner, edited, rows.of_kind(kind), seed=seed) for kind in rows.kinds},
    )


def kl_from_original(runner: Runner, edited: Edited, rows: Sequence[Row], *, seed: int) -> Interval:
    """Return KL(original || edited) of the next token in nats, mean over the tokens of each row's chosen completion.

    Args:
        runner: of the edited model.
        seed: of the bootstrap over rows.
    """
    prompts, completions = zip(*(encode_row(runner.model.tokenizer, row) for row in rows), strict=True)
    before = runner.logits(prompts, Change(switch=edited.original), completions=completions)
    after = runner.logits(prompts, completions=completions, label="KL on benign")
    found: list[float] = []
    for old, new in zip(before, after, strict=True):
        old_BSV, new_BSV = old.values_BSV.log_softmax(-1), new.values_BSV.log_softmax(-1)
        kl_BS = (old_BSV.exp() * (old_BSV - new_BSV)).sum(-1)
        found += [float(kl_S.mean()) for kl_S in new.rows(kl_BS)]
    return _mean(found, seed)


def routing_drift(runner: Runner, edited: Edited, rows: Sequence[Row], *, seed: int) -> Drift:
    """Return divergence and overlap of the routing of prompts, mean over layers, with intervals over prompts.

    Args:
        runner: of the edited model.
        seed: of the bootstrap over rows.
    """
    prompts, old, new = runner.encoded(rows), Recorder(), Recorder()
    before = runner.logits(prompts, Change(switch=edited.original, handlers=(old,)))
    after = runner.logits(prompts, Change(handlers=(new,)))
    kl: list[float] = []
    overlap: list[float] = []
    for _, batch in zip(before, after, strict=True):  # the recorders hold this batch, until the next one runs
        kl += _per_prompt(old, new, batch.mask_BS, runner.model, divergence=True)
        overlap += _per_prompt(old, new, batch.mask_BS, runner.model, divergence=False)
    return Drift(kl=_mean(kl, seed), overlap=_mean(overlap, seed))


def _mean(values: Sequence[float], seed: int) -> Interval:
    return bootstrap_mean(np.array(values), seed=seed)


def _per_prompt(old: Recorder, new: Recorder, mask_BS: Tensor, subject: Subject, *, divergence: bool) -> list[float]:
    """Return the mean over a prompt's tokens and all layers, of the divergence or else of the overlap."""
    layers = []
    for position, was in old.decisions.items():
        now = new.decisions[position]
        value_T = (
            routing.divergence_T(was.logits_TE, now.logits_TE, subject.anatomy.spec, was.bias_E)
            if divergence
            else routing.overlap_T(now.indices_TK, was.indices_TK)
        )
        layers.append((value_T.view(mask_BS.shape) * mask_BS).sum(1) / mask_BS.sum(1))
    return torch.stack(layers).mean(0).tolist()
