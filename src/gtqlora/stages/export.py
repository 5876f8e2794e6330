"""The `export` stage: plan -> write beside -> validate -> publish, only for a certified edit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gtqlora.capture import open_subject
from gtqlora.certificate import Certificate, certify, check_model
from gtqlora.edits.edited import Edited
from gtqlora.edits.merging import Edit, merged, plan
from gtqlora.errors import RunError
from gtqlora.experts.loading import BF16
from gtqlora.families import bind, load_config, meta_model, quantization, tensor_names
from gtqlora.families.copying import copy_changed
from gtqlora.families.files import checked_file, small_files
from gtqlora.families.packed import OURS
from gtqlora.judging.judge import judge_of
from gtqlora.reporting.model_card import Base, kept_metadata, model_card
from gtqlora.results.adapter import PROJECTION
from gtqlora.results.export import FILE, ExportRecord, VerdictOnEdit, public_name, write_export
from gtqlora.results.verdict import Outcome, of_kind
from gtqlora.run import Run, atomic_write, sha256_file, versions
from gtqlora.scoring import Answer, Runner
from gtqlora.storage.atomic import refuse_existing

_PROBES = 16
"""Held-out prompts of a kind on which the written weights are compared with the edited model."""
_POSITIONS = 16
"""Last tokens of each of these prompts at which their distributions are compared."""
_LONGEST_CARD = 2**20
"""Characters of the base's model card that are read."""
_KL_ALLOWED = 1e-3
"""Nats per token. The weights are the same, bit for bit; kernels may add up in another order."""


@dataclass(frozen=True)
class Exported:
    """Where the weights are, how many tensors changed, and the largest divergence from the edited model.

    Attributes:
        divergence: largest KL(edited || written) of any probed token, in nats.
    """

    folder: Path
    tensors_changed: int
    gate_values_changed: int
    divergence: float


def export(run: Run, out: Path, *, to: str = "safetensors", judge: str | None = None) -> Exported:
    """Write the certified edit as plain merged weights in hub layout; routed experts stay as the checkpoint has them.

    Args:
        judge: the judge that `verify` used, where it is code: it is imported only if this call names it.

    Raises:
        FloorError: no certificate for this very adapter and model, as `certificate.certify`.
        RunError: unknown format, OUT exists or lies in the run's own folders, a projection of packed experts, or the
            written weights do not compute what the edited model does.
    """
    if to != "safetensors":
        raise RunError(f"--to {to}: unknown format; known: safetensors")
    certificate = certify(run, judge)
    verdict = certificate.verdict
    refuse_existing(out)
    if run.owns(out):
        raise RunError(f"{out}: lies where the run keeps its own files, and would go with them; choose another folder")
    if verdict.kind == PROJECTION and verdict.expert_format != BF16:
        raise RunError(
            f"{run.path}: a projection changes the routed experts, which {verdict.model} holds in 4 bits; export it "
            "from the bf16, fp16 or fp32 checkpoint"
        )
    with atomic_write(out, replace=False) as staged:
        result = _write(certificate, run, staged, out)
        # whatever was swapped meanwhile: the same question again, just before the weights appear
        again = certify(run, judge)
        if again.adapter.digest != certificate.adapter.digest or again.floor != certificate.floor:
            raise RunError(f"{run.path}: was changed while it was exported; nothing was written")
    return result


def _write(certificate: Certificate, run: Run, staged: Path, out: Path) -> Exported:
    family, config = load_config(certificate.verdict.model)
    skeleton = meta_model(family, config)
    anatomy, names = bind(skeleton, family), tensor_names(certificate.verdict.model, family, skeleton)
    edits = plan(certificate.adapter, anatomy, names)
    gates = [names.whole(f"{path}.weight") for path in anatomy.routers]
    changed, moved, digest = _merge(certificate.verdict.model, staged, edits, gates)
    check_model(run, certificate, digest)
    divergence = validate(staged, certificate)
    result = Exported(out, changed, moved, divergence)
    _describe(staged, certificate, result)
    return result


def _merge(model: str, staged: Path, edits: dict[str, Edit], gates: Iterable[str]) -> tuple[int, int, str]:
    """Write MODEL with the edits; return how many tensors and gate values came out different, and MODEL's digest."""
    gates, moved = set(gates), 0

    def change(name: str, tensor: Tensor) -> Tensor:
        nonlocal moved
        if name not in edits:
            return tensor
        edited = merged(tensor, edits[name])
        if name in gates:
            moved += int((edited != tensor).sum())
        return edited

    copied = copy_changed(model, staged, change)
    if absent := sorted(set(edits) - copied.changed):
        raise RunError(f"{len(absent)} edited tensors are not in the checkpoint, e.g. {absent[0]}")
    return len(copied.changed), moved, copied.digest


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


# --- what is said of it ----------------------------------------------------------------------------------------------


def _describe(staged: Path, certificate: Certificate, result: Exported) -> None:
    """Write `export.json` and the model card."""
    record = _record(staged, certificate, result)
    write_export(staged, record)
    card = model_card(certificate.verdict, record, _base(certificate))
    (staged / "README.md").write_text(card, encoding="utf-8")


def _record(staged: Path, certificate: Certificate, result: Exported) -> ExportRecord:
    verdict = certificate.verdict
    files = {
        path.relative_to(staged).as_posix(): sha256_file(path)
        for path in sorted(staged.rglob("*"))
        if path.suffix in (".safetensors", ".json") and path.name != FILE
    }
    return ExportRecord(
        base=public_name(verdict.model),
        base_fingerprint=certificate.model,
        ancestors=[*certificate.ancestry.names, public_name(verdict.model)],
        spent=certificate.spent,
        adapter=verdict.adapter,
        expert_format=verdict.expert_format,
        judge=verdict.judge,
        prompts=replace(verdict.prompts, source=public_name(verdict.prompts.source)),
        floor=certificate.floor,
        lost=verdict.lost,
        tries=certificate.tries,
        verdicts=[
            VerdictOnEdit(finished=e.finished, verdict=e.verdict, reason=e.reason, judge=e.judge, shipped=e.shipped)
            for e in certificate.history
        ],
        tensors_changed=result.tensors_changed,
        gate_values_changed=result.gate_values_changed,
        divergence=result.divergence,
        versions=versions(),
        files=files,
    )


def _base(certificate: Certificate) -> Base:
    model, info = certificate.verdict.model, certificate.adapter.info
    return Base(
        metadata=kept_metadata(_own_card(model)),
        hub_id=None if info.revision is None else info.base,
        packed_by_us=quantization(model) == OURS,
    )


def _own_card(model: str) -> str:
    """Return the beginning of the base's own card, empty if it has none."""
    folder = small_files(model)
    if not (folder / "README.md").exists():
        return ""
    with checked_file(folder, "README.md").open(encoding="utf-8", errors="replace") as stream:
        return stream.read(_LONGEST_CARD)
