"""`bitdelta apply --to llama.cpp`: a variant as a LoRA adapter that llama.cpp switches for each request.

llama.cpp rounds what passes through the factors to 8 bits, and the base may be quantized: that is not what `compress`
judged. So the variant is held here to itself as it was judged, which stands for the fine-tune, and to the base in the
same GGUF, by the same rule; and what either may lose adds to what the variant may have lost before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from gtqlora import contrasts
from gtqlora.bitdelta.apply import fitting, identified
from gtqlora.bitdelta.card import JUDGED, adapter_card
from gtqlora.bitdelta.container import Record, Variant
from gtqlora.bitdelta.llama_adapter import Lost, Plan
from gtqlora.bitdelta.placing import place
from gtqlora.bitdelta.verdict import (
    Judged,
    Original,
    check_rows,
    check_settings,
    judged,
    said,
    verdicts_on,
)
from gtqlora.capture import open_subject
from gtqlora.config import VerifyConfig
from gtqlora.contrasts import Contrast
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.errors import RunError
from gtqlora.exports.gguf.reading import read_gguf
from gtqlora.exports.gguf.values import Checkpoint
from gtqlora.exports.gguf_adapter import FILE as ADAPTER
from gtqlora.exports.gguf_adapter import base_of
from gtqlora.exports.job import EditedModel, Said, edited_model
from gtqlora.exports.llama_cpp import LlamaCpp
from gtqlora.exports.llama_server import require_llama_cpp
from gtqlora.families import ModelIdentity, load_config
from gtqlora.families.coverage import check_tensors_covered
from gtqlora.families.llama_cpp.layout import Layout
from gtqlora.floor.ancestry import Ancestry
from gtqlora.judging.judge import NamedJudge
from gtqlora.judging.pair import judges_of
from gtqlora.results.export import CARD, ExportRecord, asked_with, public_name, write_export
from gtqlora.results.verdict import HeldOut
from gtqlora.run import fingerprint, sha256_file, versions
from gtqlora.scoring import Runner
from gtqlora.storage.atomic import atomic_write, refuse_existing


@dataclass(frozen=True)
class Adapted:
    """Where an adapter is, and what was measured of it.

    Attributes:
        energy_lost: share of the variant's one-bit differences that the adapter misses.
        n_bytes: how large the adapter is.
        judged: the verdicts against the variant as it was judged, and against the base.
    """

    folder: Path
    energy_lost: float
    n_bytes: int
    judged: Judged
    notes: list[str]


def adapt(base: str, delta: Path, out: Path, config: VerifyConfig, *, gguf: Path | None = None) -> Adapted:
    """Write a variant as an adapter for llama.cpp into a new folder.

    Args:
        config: `split` of its pairs is what the floor is judged on.
        gguf: the GGUF of the base that it will be loaded on; without one, it is judged on one in the base's own type.

    Raises:
        ModelError: the variant is not in order, or it or the GGUF is of another model.
        RunError: OUT exists, llama.cpp is not there, or would not apply all of the variant.
        FloorError: the adapter does not keep the variant's refusals in llama.cpp, or not the base's.
    """
    check_settings(config)
    refuse_existing(out)
    require_llama_cpp()
    if gguf is not None:
        read_gguf(gguf.expanduser())
    case = _opened(base, delta, out, config)
    with atomic_write(out, replace=False) as staged:
        staged.mkdir()
        file, kind, made = base_of(case.edited, staged, None if gguf is None else str(gguf), "--gguf")
        checkpoint = Checkpoint.of(case.edited)
        architecture = Layout.of(case.edited.model, case.edited.names).architecture
        plan = Plan.of(checkpoint, case.variant, architecture, made)
        lost = plan.write(staged / ADAPTER)
        form = LlamaCpp(
            case.edited.model,
            config.max_new_tokens,
            file,
            adapter=staged / ADAPTER,
            label=f"one-bit adapter on {kind}",
            template=case.config.template,
        )
        found = _judged(case, form, staged)
        notes = [*asked_with(case.config.template), *_notes(plan, kind, gguf, lost), *form.notes(case.rows.rows)]
        record = _record(case, staged, found, lost, notes, checkpoint.gate_values_changed())
        card = adapter_card(_with(case.variant.record, record, found), record, case.identity.folder)
        (staged / CARD).write_text(card, encoding="utf-8")
        write_export(staged, record)
        case.identity.check_unchanged()
        n_bytes = (staged / ADAPTER).stat().st_size
    return Adapted(out, lost.share, n_bytes, found, notes)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A variant on its base, and how it is judged."""

    variant: Variant
    identity: ModelIdentity
    edited: EditedModel
    config: VerifyConfig
    rows: Contrast
    judge: NamedJudge


def _opened(base: str, delta: Path, out: Path, config: VerifyConfig) -> _Case:
    """Return the case, when everything about it that can be refused without running a model has been looked at."""
    variant = fitting(base, delta, out)
    edited = _edited(base, variant)
    judge = judges_of(config.judge, config.second_judge)
    rows = contrasts.load(config.contrast, judge.judges[0]).split(config.split)
    check_rows(rows, config.split)
    # last, as every byte is read
    identity = identified(base, variant)
    return _Case(
        variant=variant,
        identity=identity,
        edited=replace(edited, model=identity.model),
        # the variant's own variables hold, unless this call has others
        config=replace(config, model=identity.model, template=config.template or variant.record.template),
        rows=rows,
        judge=judge,
    )


def _edited(base: str, variant: Variant) -> EditedModel:
    """Return the base with the variant's edits, when llama.cpp applies them all."""
    if variant.tokenizer is not None:
        raise RunError(
            f"{variant.folder}: has a tokenizer, template or stops of its own, and an adapter speaks with those of the "
            "base's GGUF; make weights of it (`gtqlora bitdelta apply` without --to) and convert those"
        )
    edited = edited_model(base, lambda _anatomy, _names: variant.edits)
    headers = Checkpoint.of(edited).headers
    changed = {edited.names.places[name].name: len(headers[name].shape) for name in variant.edits}
    check_tensors_covered(edited.anatomy.family, changed, tied=load_config(base)[1].tie_word_embeddings)
    return edited


# --- judging ---------------------------------------------------------------------------------------------------------


def _judged(case: _Case, form: LlamaCpp, staged: Path) -> Judged:
    """Ask the variant as it was judged, the base in llama.cpp, and the adapter on it; decide on that."""
    record, base, rows = case.variant.record, case.edited.model, case.rows.rows
    past = Ancestry(record.spent, (*record.ancestors, record.name))
    inputs = {
        "adapter": case.variant.digest,
        "tuned": record.tuned_fingerprint,
        "base": case.identity.digest,
        "contrast": fingerprint(case.config.contrast),
        "judge": case.judge.identity,
    }
    held = {
        "tuned": Original(model=base, whom=JUDGED, past=past, said=_said_as_judged(case)),
        "base": Original.of(base, "the base", form.said(rows, edited=False)),
    }
    return judged(
        case.config,
        staged,
        held,
        form.said(rows, edited=True),
        rows=rows,
        inputs=inputs,
        judge=case.judge,
        form=form.name,
    )


def _said_as_judged(case: _Case) -> list[Said]:
    """Return what the variant says in transformers, from just the weights that `compress` judged."""
    subject = open_subject(case.config)
    check_rendering(case.rows, subject.tokenizer, subject.max_length, subject.vocabulary)
    place(subject, case.edited.names, case.identity, case.variant.edits)
    return said(Runner.of(subject, case.judge.judges[0], case.config), case.rows.rows, "the variant")


# --- what is said of it ----------------------------------------------------------------------------------------------


def _notes(plan: Plan, kind: str, gguf: Path | None, lost: Lost) -> list[str]:
    name = "BASE.gguf" if gguf is None else gguf.name
    found = [
        f"llama.cpp loads it with `llama-server -m {name} --lora {ADAPTER}`, beside others; a request switches it off "
        'or on with "lora": [{"id": 0, "scale": 0.0}] or 1.0.',
        f"The floor was judged with the adapter on a GGUF of the base in {kind}, on a CPU; with another one, or "
        "another scale, nothing was shown.",
        f"Of the energy of the variant's one-bit differences {lost.share:.2%} is lost in llama.cpp's types, which take "
        f"{plan.bits:.1f} bits for each of their weights.",
    ]
    if plan.odd:
        found.append(f"{len(plan.odd)} tensors have a width that Q1_0 or Q2_K has no blocks for, and take more.")
    return found


def _with(variant: Record, adapter: ExportRecord, found: Judged) -> Record:
    """Return what is on record of a variant, with what was found of its adapter."""
    return replace(
        variant,
        spent=adapter.spent,
        judge=adapter.judge,
        prompts=adapter.prompts,
        tries=adapter.tries,
        against_tuned=found.tuned,
        against_base=found.base,
    )


def _record(case: _Case, staged: Path, found: Judged, lost: Lost, notes: list[str], moved: int) -> ExportRecord:
    record, config, judge = case.variant.record, case.config, case.judge.identity
    names = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    now = datetime.now(UTC).isoformat(timespec="seconds")
    source, contrast = public_name(config.contrast), fingerprint(config.contrast)
    return ExportRecord(
        base=record.base,
        base_fingerprint=record.base_fingerprint,
        ancestors=record.ancestors,
        spent=found.spent,
        adapter=case.variant.digest,
        expert_format=config.expert_format,
        judge=judge,
        prompts=HeldOut(source=source, fingerprint=contrast, split=config.split),
        floor=found.tuned.floor,
        lost=found.tuned.lost,
        tries=found.tries,
        verdicts=verdicts_on(now, judge, found.tuned, found.base),
        tensors_changed=len(case.variant.edits),
        gate_values_changed=moved,
        divergence=None,
        format="gguf-adapter",
        target="llama.cpp",
        kept=lost.kept,
        form=found.tuned,
        notes=notes,
        template=dict(config.template),
        versions=versions(),
        files={name: sha256_file(staged / name) for name in names},
    )
