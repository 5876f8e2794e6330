"""The `export` stage: plan -> write beside -> judge or validate -> publish, only for a certified edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import cast

from gtqlora.certificate import ADAPTER, Certificate, certify, check_model
from gtqlora.config import ExportConfig, Format
from gtqlora.errors import RunError
from gtqlora.exports.forms import judge_form
from gtqlora.exports.job import Job, Writer, Written, survival
from gtqlora.families import quantization
from gtqlora.families.files import checked_file, is_local, local_path, small_files
from gtqlora.families.packed import OURS
from gtqlora.progress import track
from gtqlora.reporting.model_card import Base, kept_metadata, model_card, what_it_is
from gtqlora.results.export import (
    CARD,
    FILE,
    ExportRecord,
    FormVerdict,
    VerdictOnEdit,
    asked_with,
    public_name,
    remember_export,
    write_export,
)
from gtqlora.run import Run, atomic_write, sha256_file, versions
from gtqlora.storage.atomic import refuse_existing, refuse_inside

_LONGEST_CARD = 2**20
"""Characters of the base's model card that are read."""
_WRITERS: dict[Format, str] = {
    "safetensors": "merged",
    "gguf": "gguf",
    "gguf-adapter": "gguf_adapter",
    "peft": "peft",
}
"""Where each format's `write` stands in `gtqlora.exports`; imported when asked for, as some need extra packages."""
_OTHERWISE: dict[Format, str] = {
    "gguf": "Try --onto a GGUF with more bits, or the merged weights, which `verify` judged (--to safetensors)",
    "gguf-adapter": "Try a --base with more bits, or the edit merged into it (--to gguf --onto)",
    "peft": "Try the merged weights, which `verify` judged (--to safetensors)",
}
"""What may pass the floor where a format, which is not what `verify` judged, does not."""


@dataclass(frozen=True)
class Exported:
    """Where the weights are, and what was written.

    Attributes:
        what: the form of the files in words.
        divergence: largest KL(edited || written) of any probed token, in nats; None where `form` was judged instead.
        kept: by name of a changed tensor, the share of its change that survives rounding to its type.
        form: the verdict in the form that ships; None where that is what `verify` judged.
        notes: what a user of the files should know, a sentence each.
    """

    folder: Path
    what: str
    tensors_changed: int
    gate_values_changed: int
    divergence: float | None
    kept: dict[str, float]
    form: FormVerdict | None
    notes: list[str]


def export(run: Run, out: Path, config: ExportConfig | None = None, *, judge: str | None = None) -> Exported:
    """Write the certified edit into a new folder; routed experts stay as the checkpoint has them.

    Args:
        config: the format; by default merged weights in hub layout.
        judge: the judge that `verify` used, where it is code: it is imported only if this call names it.

    Raises:
        FloorError: no certificate for this very adapter and model, as `certificate.certify`, or the form that would
            ship does not keep the floor.
        RunError: OUT exists, or lies in the run, another run's own folders or the model; or as the format's `write`.
    """
    config = config or ExportConfig()
    certificate = certify(run, judge)
    refuse_existing(out)
    model = certificate.verdict.model
    refuse_inside(out, run.path, *([local_path(model)] if is_local(model) else []))
    if run.owns(out):
        raise RunError(f"{out}: lies where the run keeps its own files, and would go with them; choose another folder")
    with atomic_write(out, replace=False) as staged:
        staged.mkdir()
        written = _writer(config.to)(Job.of(certificate, config), staged)
        written = replace(written, notes=[*written.notes, *survival(written.kept)])
        check_model(run, certificate, written.digest)
        form = None if written.form is None else judge_form(written.form, certificate, _OTHERWISE[config.to])
        _describe(staged, _record(run, staged, certificate, config, written, form), certificate)
        # whatever was swapped meanwhile: the same question again, just before the weights appear
        again = certify(run, judge)
        if again.adapter.digest != certificate.adapter.digest or again.floor != certificate.floor:
            raise RunError(f"{run.path}: was changed while it was exported; nothing was written")
        # before the folder has its name: a kill in between leaves the hash of a record that nobody has
        remember_export(run.path, staged)
    return Exported(
        folder=out,
        what=what_it_is(config.to, config.target),
        tensors_changed=len(written.changed),
        gate_values_changed=written.gate_values_changed,
        divergence=written.divergence,
        kept=dict(written.kept),
        form=form,
        notes=[*asked_with(certificate.config.template), *written.notes],
    )


def _writer(to: Format) -> Writer:
    return cast(Writer, import_module(f"gtqlora.exports.{_WRITERS[to]}").write)


# --- what is said of it ----------------------------------------------------------------------------------------------


def _describe(staged: Path, record: ExportRecord, certificate: Certificate) -> None:
    """Write `export.json` and the model card."""
    write_export(staged, record)
    card = model_card(certificate.verdict, record, _base(certificate))
    (staged / CARD).write_text(card, encoding="utf-8")


def _record(
    run: Run,
    staged: Path,
    certificate: Certificate,
    config: ExportConfig,
    written: Written,
    form: FormVerdict | None,
) -> ExportRecord:
    verdict, info = certificate.verdict, certificate.adapter.info
    # `train` or `project`: whichever wrote the adapter last is on record with it
    made = [stage for stage in run.manifest()["stages"].values() if ADAPTER in stage["outputs"]]
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
        tensors_changed=len(written.changed),
        gate_values_changed=written.gate_values_changed,
        divergence=written.divergence,
        format=config.to,
        target=config.target,
        kept=dict(written.kept),
        form=form,
        wrapped=certificate.wrapped,
        wrappers=verdict.wrappers,
        instructed=certificate.instructed,
        notes=[*asked_with(certificate.config.template), *written.notes],
        template=dict(certificate.config.template),
        rank=written.rank,
        revision=info.revision,
        trained_on=made[0]["inputs"].get("contrast") if made else None,
        recipe=_recipe(info.config),
        versions=versions(),
        files=_files(staged, written),
    )


def _files(staged: Path, written: Written) -> dict[str, str]:
    """Return the hash of every file, but the card's: on the hub it is there to be edited."""
    names = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    for name in (CARD, FILE):
        names.pop(name, None)
    shown = track(names.items(), "hash files", len(names))
    return {name: written.hashes.get(name) or sha256_file(path) for name, path in shown}


def _recipe(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of an edit without folders of this machine and what was left as it is."""
    given = {name: value for name, value in settings.items() if value is not None and name != "model"}
    return {name: public_name(str(value)) if name == "contrast" else value for name, value in given.items()}


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
