"""`bitdelta apply`: a variant on its base, as dense weights again: bit for bit those that were judged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gtqlora.bitdelta.card import weights_card
from gtqlora.bitdelta.container import Variant, read_variant
from gtqlora.bitdelta.verdict import verdicts_on
from gtqlora.errors import ModelError
from gtqlora.families import ModelIdentity, bind, identify, load_config, meta_model, tensor_names
from gtqlora.families.copying import copy_changed
from gtqlora.families.files import CONFIG, checked_file, small_names, weight_files
from gtqlora.families.headers import Header, read_headers
from gtqlora.results.export import CARD, FILE, ExportRecord, asked_with, write_export
from gtqlora.run import sha256_file, versions
from gtqlora.storage.atomic import atomic_write, refuse_existing, refuse_inside


@dataclass(frozen=True)
class Applied:
    """Where the weights are, and how many tensors are not the base's."""

    folder: Path
    tensors_changed: int


def apply(base: str, delta: Path, out: Path) -> Applied:
    """Write the dense weights of a variant into a new folder in hub layout.

    Raises:
        ModelError: the variant is not in order, was made from another model, or the base changes meanwhile.
        RunError: OUT exists, or lies in the variant or the base.
    """
    variant = fitting(base, delta, out)
    found = identified(base, variant)
    gates = _gates(found.model)
    with atomic_write(out, replace=False) as staged:
        copied = copy_changed(found.model, staged, variant.edits)
        # of the bytes that were copied, so that nothing can be swapped between the check and the copy
        if copied.digest != found.digest:
            raise ModelError(f"{base}: was changed while it was read; run the command again")
        _own_files(variant, staged)
        # the base's own record, if it has one, was copied with its other files
        (staged / FILE).unlink(missing_ok=True)
        moved = sum(tally.values for name, tally in copied.changed.items() if name in gates)
        export = _record(variant, staged, len(copied.changed), moved)
        (staged / CARD).write_text(weights_card(variant.record, export, found.folder), encoding="utf-8")
        write_export(staged, export)
    return Applied(out, len(copied.changed))


def fitting(base: str, delta: Path, out: Path) -> Variant:
    """Return a variant, when the base has its tensors and OUT can be written; the base's values are not read.

    Raises:
        ModelError: the variant is not in order, or the base lacks a tensor.
        RunError: OUT exists, or lies in the variant or the base.
    """
    refuse_existing(out)
    variant = read_variant(delta)
    folder, shards = weight_files(base)
    refuse_inside(out, delta, folder)
    _check_names(base, variant, read_headers(folder, shards))
    return variant


def identified(base: str, variant: Variant) -> ModelIdentity:
    """Return the base as it is, when a variant was made from it; every byte is read.

    Raises:
        ModelError: it was made from another model.
    """
    found = identify(base)
    if found.digest != variant.base_fingerprint:
        raise ModelError(
            f"{base}: is not the model that {variant.name} was made from and judged on; give {variant.record.base}, "
            f"whose files have the digest {variant.base_fingerprint} (these have {found.digest})"
        )
    return found


def _check_names(base: str, variant: Variant, headers: Mapping[str, Header]) -> None:
    if absent := [name for name in variant.edits if name not in headers]:
        raise ModelError(
            f"{base}: {len(absent)} of the variant's tensors are not there, e.g. {absent[0]}; it was made from "
            f"{variant.record.base}"
        )


def _gates(base: str) -> frozenset[str]:
    """Return the names on disk of the routers' weights."""
    family, config = load_config(base)
    skeleton = meta_model(family, config)
    names = tensor_names(base, family, skeleton)
    return frozenset(names.whole(f"{path}.weight") for path in bind(skeleton, family).routers)


def _own_files(variant: Variant, staged: Path) -> None:
    """Put the fine-tune's tokenizer, template and generation settings in the place of the base's."""
    if variant.tokenizer is None:
        return
    # the base's go first: one that the fine-tune does not have would still be found and read
    for name in small_names(staged):
        if name != CONFIG:
            (staged / name).unlink()
    for name in small_names(variant.tokenizer):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checked_file(variant.tokenizer, name), staged / name)


def _record(variant: Variant, staged: Path, changed: int, moved: int) -> ExportRecord:
    """Return the provenance in the form that every export has, so that a later edit counts what was spent here."""
    record, floor = variant.record, variant.record.against_tuned.floor
    # all but the card, which people edit, and the record itself
    names = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()} - {CARD, FILE}
    return ExportRecord(
        base=record.base,
        base_fingerprint=record.base_fingerprint,
        ancestors=record.ancestors,
        spent=record.spent,
        adapter=variant.digest,
        expert_format="bf16",
        judge=record.judge,
        prompts=record.prompts,
        floor=floor,
        lost=record.against_tuned.lost,
        tries=record.tries,
        verdicts=verdicts_on(record.finished, record.judge, record.against_tuned, record.against_base),
        tensors_changed=changed,
        gate_values_changed=moved,
        divergence=None,
        format="bitdelta",
        form=record.against_tuned,
        notes=[
            *asked_with(record.template),
            f"One-bit differences of {record.tuned} from {record.base} lose {record.energy_lost:.1%} of their energy.",
        ],
        template=record.template,
        versions=versions(),
        files={name: sha256_file(staged / name) for name in sorted(names)},
    )
