"""Variants that may be served: folders that gtqlora wrote behind the safety floor, checked, for one base."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from gtqlora.bitdelta import container
from gtqlora.bitdelta.onebit import OneBit
from gtqlora.bitdelta.voices import check_recorded
from gtqlora.config.values import Scalar
from gtqlora.edits.merging import LowRank
from gtqlora.errors import ModelError
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.exports import provenance
from gtqlora.families import TensorNames
from gtqlora.families.files import PROVENANCE, checked_file, has, read_json
from gtqlora.families.identity import state_of
from gtqlora.families.names import Place

_ADAPTER, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_LORA = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_WHOLE = re.compile(r"base_model\.model\.(?P<name>.+)")

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a variant has of its own, by names in memory.

    Attributes:
        bits: one-bit differences by the place of the matrix, or of the stack of experts' matrices.
        whole: tensors that take the place of the base's.
        lora: products that are added to linears, by the linear's path.
        tokenizer: folder with its own tokenizer, template and generation settings; None where the base's hold.
        template: variables of the chat template that it was judged with.
    """

    name: str
    folder: Path
    bits: Mapping[Place, OneBit] = field(default_factory=dict[Place, OneBit])
    whole: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    lora: Mapping[str, LowRank] = field(default_factory=dict[str, LowRank])
    tokenizer: Path | None = None
    template: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])


def read_variants(folders: Iterable[Path], names: TensorNames, *, base: str, expert_format: str) -> list[Variant]:
    """Return the variants in these folders, each named after its folder.

    Args:
        names: of the base's tensors.
        base: digest of the base's files, see `families.identity`.
        expert_format: of the routed experts in the base as it is served.

    Raises:
        ModelError: a folder is no certified variant of this base, or two have one name.
    """
    found: dict[str, Variant] = {}
    for folder in map(Path.absolute, folders):
        if folder.name in found:
            raise ModelError(f"{folder}: another variant is called {folder.name!r}, too; rename one of the folders")
        found[folder.name] = _read(folder, names, base, expert_format)
    return list(found.values())


@contextmanager
def unchanged(folders: Iterable[Path]) -> Iterator[None]:
    """See to it that what is read of these folders is what was checked.

    Raises:
        ModelError: a file was written to, exchanged, added or taken away meanwhile.
    """
    states = {folder: _states(folder) for folder in folders}
    yield
    for folder, before in states.items():
        if _states(folder) != before:
            raise ModelError(f"{folder}: was changed while it was read; start again")


def _states(folder: Path) -> dict[Path, tuple[int, ...]]:
    return {file: state_of(file) for file in folder.rglob("*") if file.is_file()}


def _read(folder: Path, names: TensorNames, base: str, expert_format: str) -> Variant:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if has(folder, container.RECORD):
        return _one_bit(folder, names, base)
    if has(folder, PROVENANCE):
        return _adapter(folder, base, expert_format)
    raise ModelError(
        f"{folder}: no variant that gtqlora certified; serve what `gtqlora export --to peft --for peft` or "
        "`gtqlora bitdelta compress` wrote"
    )


def _check_base(folder: Path, made_from: str, digest: str, base: str) -> None:
    if digest != base:
        raise ModelError(
            f"{folder}: made from another model, or another revision of it ({made_from}); serve it on that"
        )


# --- one-bit differences ---------------------------------------------------------------------------------------------


def _one_bit(folder: Path, names: TensorNames, base: str) -> Variant:
    found = container.read_variant(folder)
    _check_base(folder, found.record.base, found.base_fingerprint, base)
    return Variant(
        name=folder.name,
        folder=folder,
        bits=_by_place(folder, names, found.bits, lambda place: place),
        whole=_by_place(folder, names, found.dense, lambda place: _whole_name(folder, place)),
        tokenizer=found.tokenizer,
        template=found.record.template,
    )


def _by_place(folder: Path, names: TensorNames, tensors: Mapping[str, T], key: Callable[[Place], K]) -> dict[K, T]:
    # before the first is read: a container gives tensors only when they are asked for
    unknown = sorted(tensors.keys() - names.places.keys())
    if unknown:
        raise ModelError(f"{folder}: {len(unknown)} tensors are not the base's, e.g. {unknown[0]}")
    return {key(names.places[name]): tensor for name, tensor in tensors.items()}


def _whole_name(folder: Path, place: Place) -> str:
    if place.expert is not None:
        raise ModelError(f"{folder}: {place.name} has an expert of its own that is not in one bit, which is not served")
    return place.name


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapter(folder: Path, base: str, expert_format: str) -> Variant:
    # the whole folder, as a file beside the recorded ones may be what a loader takes
    checked = provenance.check(folder)
    if not checked.certified:
        raise ModelError(f"{folder}: not what was certified ({checked.problems[0]}); export it again")
    record = checked.record
    if (record.format, record.target) != ("peft", "peft"):
        what = f"{record.format} for {record.target}" if record.target else record.format
        raise ModelError(f"{folder}: written as {what}; serve what `gtqlora export --to peft --for peft` wrote")
    _check_base(folder, record.base, record.base_fingerprint, base)
    if record.expert_format != expert_format:
        raise ModelError(
            f"{folder}: judged with experts in {record.expert_format}, and the base is served with {expert_format}"
        )
    check_recorded(record.template, folder / PROVENANCE)
    return replace(_from_peft(folder), template=record.template)


def _from_peft(folder: Path) -> Variant:
    with TensorFiles([checked_file(folder, _ADAPTER)]) as files:
        tensors = {name: files.read(name) for name in files.where}
    factors = {(m["path"], m["part"]): tensors.pop(name) for name in [*tensors] if (m := _LORA.fullmatch(name))}
    scale = _scale(folder)
    try:
        lora = {
            path: LowRank(a, scale * factors[path, "B"].float()) for (path, part), a in factors.items() if part == "A"
        }
        whole = {_name(name): tensor for name, tensor in tensors.items()}
    except KeyError as error:
        raise ModelError(f"{folder}: {_ADAPTER} lacks {error}; export it again") from error
    return Variant(name=folder.name, folder=folder, whole=whole, lora=lora)


def _name(stored: str) -> str:
    match = _WHOLE.fullmatch(stored)
    if match is None:
        raise KeyError(f"the prefix of {stored}")
    return match["name"]


def _scale(folder: Path) -> float:
    file = checked_file(folder, _SETTINGS)
    settings = read_json(file)
    alpha, rank = settings.get("lora_alpha"), settings.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        raise ModelError(f"{file}: r and lora_alpha must be numbers")
    return alpha / rank
