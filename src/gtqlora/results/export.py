# pyright: strict
"""What `export` leaves: `export.json` beside the files, what they are and what was measured; its hash in the run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gtqlora.config.values import Scalar
from gtqlora.errors import RunError
from gtqlora.results.typed import Mismatch, from_json, to_json
from gtqlora.results.verdict import HeldOut, KindRow
from gtqlora.results.wrapped import WrappedFloor
from gtqlora.stats import Floor
from gtqlora.storage.atomic import named_errors, write_json
from gtqlora.storage.contents import read_json, sha256_file
from gtqlora.storage.lines import append_line

FILE, CARD = "export.json", "README.md"
EXPORTS = "exports.jsonl"
"""In a run: the hash of every `export.json` that was written of it, a line each."""
_RENAMED = {"experts": "expert_format"}
"""Keys of older versions under their present names."""


@dataclass(frozen=True, kw_only=True)
class VerdictOnEdit:
    """One verdict that was ever given on the edit: when, what, why, by which judge, and on what would be written."""

    finished: str
    verdict: str
    reason: str
    judge: str
    shipped: bool


@dataclass(frozen=True, kw_only=True)
class FormVerdict:
    """What was measured of an edit in the form that ships, against the base in the same form.

    Attributes:
        name: of the form, e.g. "GGUF Q4_K in llama.cpp".
        lost: why refusals count as lost -> how many.
        table: kind of prompts -> their rates before and after.
        wrapped: the floor on prompts inside plain frames, in this form; None in older records, and of a variant in one
            bit a weight, which is asked plain prompts only.
    """

    name: str
    floor: Floor
    lost: dict[str, int]
    table: dict[str, KindRow]
    wrapped: WrappedFloor | None = None


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """What `export.json` holds.

    Attributes:
        base: public name of the model that was edited; `base_fingerprint` is the digest of its files.
        ancestors: the models that were edited one upon another, the first one first and `base` last.
        spent: share of the first original's refusals that all these edits may have lost, by their bounds.
        adapter: hash of the adapter that was verified.
        expert_format: of the routed experts in the written weights.
        floor: over every prompt that the edit was ever judged on.
        lost: why refusals count as lost -> how many.
        tries: edits judged on these prompts.
        verdicts: every verdict on this edit.
        divergence: largest KL(edited || written) of any probed token, in nats; None where `form` was judged instead.
        format: what the edit was written as, and `target` for which program, where it is for one.
        kept: by name of a changed tensor, the share of its change that survives rounding to its type.
        form: the verdict in the form that ships; None where that is what `verify` judged.
        wrapped: the floor on prompts inside plain frames, of what `verify` judged; None in older records.
        wrappers: fingerprint (sha256) of the file with the user's own frames; None where there was none.
        instructed: the floor on instructed prompts, of what `verify` judged; None where none was asked for.
        notes: what a user of the files should know, a sentence each.
        template: variables of the chat template that it was trained and judged with.
        rank: what vLLM's --max-lora-rank has to be, for an adapter that is for vLLM.
        revision: the hub's commit of the base; None for a folder.
        trained_on: fingerprint (sha256) of the pairs that the edit was made with; None where the run does not tell.
        recipe: the settings that the edit was made with.
        versions: package -> version.
        files: every written file -> sha256, but this record's and the card's, which is free to be edited.
    """

    base: str
    base_fingerprint: str
    ancestors: list[str]
    spent: float
    adapter: str
    expert_format: str
    judge: str
    prompts: HeldOut
    floor: Floor
    lost: dict[str, int]
    tries: int
    verdicts: list[VerdictOnEdit]
    tensors_changed: int
    gate_values_changed: int
    divergence: float | None
    format: str = "safetensors"
    target: str | None = None
    kept: dict[str, float] = field(default_factory=dict[str, float])
    form: FormVerdict | None = None
    wrapped: WrappedFloor | None = None
    wrappers: str | None = None
    instructed: Floor | None = None
    notes: list[str] = field(default_factory=list[str])
    template: dict[str, Scalar] = field(default_factory=dict[str, Scalar])
    rank: int | None = None
    revision: str | None = None
    trained_on: str | None = None
    recipe: dict[str, object] = field(default_factory=dict[str, object])
    versions: dict[str, str]
    files: dict[str, str]


def asked_with(template: Mapping[str, Scalar]) -> list[str]:
    """Return a sentence on the variables of the chat template, which who serves the model has to set likewise."""
    if not template:
        return []
    given = ", ".join(
        f"`{name}={str(value).lower() if isinstance(value, bool) else value}`" for name, value in template.items()
    )
    return [f"Trained and judged with the chat template's {given}; ask it with the same (`chat_template_kwargs`)."]


def public_name(name: str) -> str:
    """Return a model's or a set's name without the folders it lies in here, which are nobody else's business."""
    return Path(name).name if Path(name).is_absolute() else name


def write_export(folder: Path, record: ExportRecord) -> None:
    """Write the record into the folder of the weights."""
    write_json(folder / FILE, to_json(record))


def read_export(folder: Path, *, older: bool = False) -> ExportRecord:
    """Return the record in a folder of exported weights.

    Args:
        older: also one of an older version, whose keys had other names.

    Raises:
        RunError: it is not there, or not what this version writes; the message names the version that did.
    """
    # there is no manifest beside exported weights; the record itself says which version wrote it
    file, remedy = folder / FILE, "run `gtqlora export` again"
    if not os.path.lexists(file):
        raise RunError(f"{folder}: {_without_record(folder)}")
    value = read_json(file, remedy)
    try:
        return from_json(ExportRecord, _under_present_names(value) if older else value)
    except Mismatch as error:
        versions: object = value.get("versions")
        version: object = versions.get("gtqlora") if isinstance(versions, dict) else None  # pyright: ignore
        writer = f"gtqlora {version}" if isinstance(version, str) else "another version of gtqlora"
        raise RunError(f"{file}: {error} (written by {writer}); {remedy}") from error


def _without_record(folder: Path) -> str:
    if os.path.lexists(folder / "bitdelta.json"):
        return (
            "is what `gtqlora bitdelta compress` wrote, and no export; `bitdelta serve` and `apply` check its files "
            "themselves, against bitdelta.json"
        )
    return f"no {FILE} there; give a folder that `gtqlora export` wrote, with the record that was published in it"


def _under_present_names(value: Mapping[str, object]) -> dict[str, object]:
    return {_RENAMED.get(key, key): entry for key, entry in value.items()}


def remember_export(run: Path, folder: Path) -> None:
    """Enter the record in a folder into its run, so that the run knows the folder again."""
    file = run / EXPORTS
    with named_errors(file):
        append_line(file, json.dumps({"record": sha256_file(folder / FILE)}))


def is_remembered(run: Path, folder: Path) -> bool:
    """Tell whether the record in a folder is, byte for byte, one that was written of this run.

    Raises:
        RunError: the run's list is no plain file.
    """
    file = run / EXPORTS
    if not os.path.lexists(file):
        return False
    if file.is_symlink() or not file.is_file():
        raise RunError(f"{file}: not a plain file; the exports of this run are listed there, so move it away")
    # a line that a kill tore holds no whole hash, and so matches nothing
    return json.dumps({"record": sha256_file(folder / FILE)}) in file.read_text(errors="replace").splitlines()
