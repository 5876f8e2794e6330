"""How far an edited model drifted from the original: its next-token distributions, and its routing.

Shape letters: B batch, S sequence, V vocabulary, T tokens (B x S), E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gtqlora import routing
from gtqlora.capture import Recorder, Subject, left_padded, router_hooks
from gtqlora.contrasts import Row, encode_row
from gtqlora.edits.edited import Edited
from gtqlora.progress import track
from gtqlora.results.verdict import Drift
from gtqlora.scoring import batches
from gtqlora.stats import Interval, bootstrap_mean


def kl_from_original(edited: Edited, rows: Sequence[Row], *, batch_size: int, seed: int) -> Interval:
    """Return KL(original || edited) of the next token in nats, mean over the tokens of each row's chosen completion.

    Args:
        seed: of the bootstrap over rows.
    """
    subject, found = edited.subject, []
    encoded = [encode_row(subject.tokenizer, row) for row in rows]
    starts = range(0, len(rows), batch_size)
    for start in track(starts, "KL on benign", len(starts)):
        chunk = encoded[start : start + batch_size]
        ids_BS, mask_BS = left_padded([p + c for p, c in chunk], subject.pad_id, subject.device)
        # logits of all positions would be B x S x V numbers
        keep = max(len(c) for _, c in chunk) + 1
        with edited.original():
            old_BSV = last_logits(subject, ids_BS, mask_BS, keep).log_softmax(-1)
        new_BSV = last_logits(subject, ids_BS, mask_BS, keep).log_softmax(-1)
        kl_BS = (old_BSV.exp() * (old_BSV - new_BSV)).sum(-1)
        # the token before each completion token predicts it
        found += [float(kl_BS[i, -len(c) - 1 : -1].mean()) for i, (_, c) in enumerate(chunk)]
    return _mean(found, seed)


def routing_drift(edited: Edited, rows: Sequence[Row], *, batch_size: int, seed: int) -> Drift:
    """Return divergence and overlap of the routing of prompts, mean over layers, with intervals over prompts.

    Args:
        seed: of the bootstrap over rows.
    """
    subject = edited.subject
    kl: list[float] = []
    overlap: list[float] = []
    for _, prompts in batches(rows, subject, batch_size):
        ids_BS, mask_BS = left_padded(prompts, subject.pad_id, subject.device)
        # both runs see the same prompt tokens, so that decisions can be compared token by token
        old, new = Recorder(), Recorder()
        with edited.original():
            last_logits(subject, ids_BS, mask_BS, 1, old)
        last_logits(subject, ids_BS, mask_BS, 1, new)
        kl += _per_prompt(old, new, mask_BS, subject, divergence=True)
        overlap += _per_prompt(old, new, mask_BS, subject, divergence=False)
    return Drift(kl=_mean(kl, seed), overlap=_mean(overlap, seed))


def _mean(values: Sequence[float], seed: int) -> Interval:
    return bootstrap_mean(np.array(values), seed=seed)


def _per_prompt(old: Recorder, new: Recorder, mask_BS: Tensor, subject: Subject, *, divergence: bool) -> list[float]:
    """Return the mean over a prompt's tokens and all layers, of the divergence or else of the overlap."""
    layers = []
    for position, was in old.decisions.items():
        now = new.decisions[position]
        value_T = (
            routing.divergence_T(was.logits_TE, now.logits_TE, subject.anatomy.spec)
            if divergence
            else routing.overlap_T(now.indices_TK, was.indices_TK)
        )
        layers.append((value_T.view(mask_BS.shape) * mask_BS).sum(1) / mask_BS.sum(1))
    return torch.stack(layers).mean(0).tolist()


@torch.no_grad()
def last_logits(
    subject: Subject, ids_BS: Tensor, mask_BS: Tensor, keep: int, recorder: Recorder | None = None
) -> Tensor:
    """Return logits_BSV of the last `keep` positions, in fp32; `recorder` sees every routing decision."""
    handlers = () if recorder is None else (recorder,)
    with router_hooks(subject.model, subject.anatomy, *handlers):
        return subject.model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            # padded on the left, so that positions count from a row's first real token
            position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=keep,
        ).logits.float()
