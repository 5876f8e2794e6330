"""Format `safetensors`: the edit merged into the checkpoint's own files, in hub layout."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gtqlora.capture import open_subject
from gtqlora.certificate import Certificate
from gtqlora.edits.edited import Edited
from gtqlora.errors import RunError
from gtqlora.experts.loading import BF16
from gtqlora.exports.job import Job, Written
from gtqlora.families.copying import Copied, copy_changed
from gtqlora.judging.judge import judge_of
from gtqlora.results.adapter import PROJECTION
from gtqlora.results.verdict import Outcome, of_kind
from gtqlora.scoring import Answer, Runner

_KEPT_LEAST = 0.9
"""Share of a change that has to survive rounding, or its user is told."""
_PROBES = 16
"""Held-out prompts of a kind on which the written weights are compared with the edited model."""
_POSITIONS = 16
"""Last tokens of each of these prompts at which their distributions are compared."""
_KL_ALLOWED = 1e-3
"""Nats per token. The weights are the same, bit for bit; kernels may add up in another order."""


def write(job: Job, staged: Path) -> Written:
    """Write the merged weights.

    Raises:
        RunError: a projection of packed experts, or the written weights do not compute what the edited model does.
    """
    verdict = job.certificate.verdict
    if verdict.kind == PROJECTION and verdict.expert_format != BF16:
        raise RunError(
            f"a projection changes the routed experts, which {verdict.model} holds in 4 bits; export it from the bf16, "
            "fp16 or fp32 checkpoint"
        )
    written = _merge(job, staged)
    return replace(written, divergence=validate(staged, job.certificate))


def _merge(job: Job, staged: Path) -> Written:
    config = job.config
    share = config.link or config.overlay
    copied = copy_changed(job.model, staged, job.edits, share=share, overlay=config.overlay)
    kept = {name: tally.kept for name, tally in sorted(copied.changed.items())}
    return Written(
        changed=sorted(copied.changed),
        gate_values_changed=sum(tally.values for name, tally in copied.changed.items() if name in job.gates),
        digest=copied.digest,
        hashes=copied.hashes,
        kept=kept,
        notes=[*_lossy(kept), *_shared(copied)],
    )


def _lossy(kept: Mapping[str, float]) -> Iterator[str]:
    """Warn of changes that rounding took too much of."""
    low = [name for name, share in kept.items() if share < _KEPT_LEAST]
    if low:
        worst = min(low, key=kept.__getitem__)
        yield (
            f"Of {len(low)} of {len(kept)} changed tensors less than {_KEPT_LEAST:.0%} of the change survives rounding "
            f"to the checkpoint's type, least of {worst} ({kept[worst]:.0%}); the adapter is the lossless form "
            "(--to peft)."
        )


def _shared(copied: Copied) -> Iterator[str]:
    """Say which weight files hold bytes that are the base's as well."""
    ways = list(copied.moved.values())
    if links := ways.count("hard link"):
        yield (
            f"{links} weight files are hard links to the base's: the same files, so writing into one writes into both."
        )
    if clones := ways.count("reflink"):
        yield f"{clones} weight files share disk blocks with the base's; writing into one leaves the other as it is."


# --- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Behaviour:
    """What a model says to the probes, and log-probabilities_TV of the next token at their last ones, on the CPU."""

    answers: list[Answer]
    log_TV: Tensor


def validate(staged: Path, certificate: Certificate) -> float:
    """Check that the written weights, loaded anew, behave as what was verified; return the largest divergence.

    Compared are refusals and next-token distributions on harmful and benign held-out prompts, drawn by the edit's
    hash, so that nobody orders them.

    Raises:
        RunError: they do not.
    """
    config, probes = certificate.config, _probes(certificate)
    judge = judge_of(config.judge)
    written = _behaviour(Runner.of(open_subject(replace(config, model=str(staged))), judge, config), probes)
    edited = Edited(open_subject(config), certificate.adapter, shipped=config.model)
    wanted = _behaviour(Runner.of(edited.subject, judge, config), probes)
    differing = sum(a.refused != b.refused for a, b in zip(written.answers, wanted.answers, strict=True))
    kl_T = (wanted.log_TV.exp() * (wanted.log_TV - written.log_TV)).sum(-1)
    if differing or not kl_T.max() <= _KL_ALLOWED:  # also when it is NaN
        raise RunError(
            f"the written weights do not behave as the edit that was verified: {differing} of {len(probes)} refusals "
            f"differ, and a token's distribution by {float(kl_T.max()):.3g} nats; nothing was written"
        )
    return max(float(kl_T.max()), 0.0)


def _probes(certificate: Certificate) -> list[Outcome]:
    draw, probes = random.Random(certificate.adapter.digest), []
    for kind in ("harmful", "benign"):
        rows = of_kind(certificate.outcomes, kind)
        probes += draw.sample(rows, min(_PROBES, len(rows)))
    return probes


def _behaviour(runner: Runner, probes: Sequence[Outcome]) -> _Behaviour:
    """Run the probes; the model goes out of memory when its caller lets go of it."""
    answers = runner.answers(probes, label=None)
    batches = runner.logits(runner.encoded(probes), last=_POSITIONS)
    log_TV = torch.cat([torch.cat(batch.rows(batch.values_BSV)).log_softmax(-1).cpu() for batch in batches])
    return _Behaviour(answers, log_TV)
