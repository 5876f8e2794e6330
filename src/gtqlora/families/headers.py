"""Headers of a checkpoint's safetensors files: which tensor is where, with its shape and dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypedDict, cast

from safetensors import SafetensorError, safe_open

from gtqlora.errors import ModelError
from gtqlora.families import strict_json
from gtqlora.families.files import checked_file, first_line

_OVERLAY = re.compile(r"z{2,}-overlay-\d\d\.safetensors")
LENGTH_BYTES = 8
"""A safetensors file begins with the header's length, little-endian; the header follows, then the tensors."""


@dataclass(frozen=True)
class Header:
    """One tensor on disk; `dtype` as safetensors spells it, e.g. `BF16`."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Return how many elements the tensor has."""
        return prod(self.shape)


def opened(path: Path) -> safe_open:
    """Return a safetensors file, open for reading.

    Raises:
        ModelError: it is corrupt or cut short.
    """
    # Before it is opened: the library would follow a link anywhere, and wait forever for a pipe.
    checked_file(path.parent, path.name)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: corrupt or cut short ({first_line(error)}); get it again") from error


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie in its file: from `start` up to `stop`."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str


def extents(path: Path) -> dict[str, Extent]:
    """Return where each tensor of a safetensors file lies.

    Raises:
        ModelError: it is corrupt or cut short.
    """
    opened(path)  # the library checks the header: extents follow each other, fit shapes and dtypes, and fill the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        try:
            entries = cast(dict[str, _Entry], strict_json.parse(file.read(length).decode()))
        except ValueError as error:
            raise ModelError(f"{path}: the header is not valid JSON ({error}); get it again") from error
    base = LENGTH_BYTES + length
    return {name: _extent(entry, base) for name, entry in entries.items() if name != "__metadata__"}


def _extent(entry: _Entry, base: int) -> Extent:
    start, stop = entry["data_offsets"]
    return Extent(base + start, base + stop, tuple(entry["shape"]), entry["dtype"])


def overlay_name(files: Iterable[str]) -> str:
    """Return a name for an overlay of these files: one that sorts last.

    An overlay holds tensors that other files of the checkpoint hold as well; transformers takes a tensor from the last
    file that has it, whatever the index says.

    Raises:
        ModelError: there is none.
    """
    taken = set(files)
    number = 1 + sum(_OVERLAY.fullmatch(name) is not None for name in taken)
    if max(taken) > "z" * 64 or number > 99:
        raise ModelError(f"{max(taken)}: sorts after any overlay, or is the last of 99; export without --overlay")
    stem = "zz"
    while f"{stem}-overlay-{number:02}.safetensors" <= max(taken):
        stem += "z"
    return f"{stem}-overlay-{number:02}.safetensors"


def holder(one: str, other: str) -> str | None:
    """Return which of two files a tensor is taken from that both hold: an overlay's, if it sorts last; else None."""
    last = max(one, other)
    return last if _OVERLAY.fullmatch(last) else None


def read_headers(folder: Path, names: Iterable[str], mapped: Mapping[str, str] | None = None) -> dict[str, Header]:
    """Return every tensor in the files, by name; reading a header also checks that its file is whole.

    Args:
        mapped: tensor -> file, as the index has it.

    Raises:
        ModelError: a file is corrupt or cut short, a tensor is in two files of which none is an overlay, or files and
            index disagree.
    """
    found: dict[str, Header] = {}
    for file in names:
        checked_file(folder, file)
        with opened(folder / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file is no mapping
                if name in found and (taken := holder(found[name].file, file)) != file:
                    if taken is None:
                        raise ModelError(f"{folder}: tensor {name} is in {found[name].file} and in {file}; remove one")
                    continue
                part = tensors.get_slice(name)
                found[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
    if mapped is not None:
        _check_index(folder, found, mapped)
    return found


def _check_index(folder: Path, found: Mapping[str, Header], mapped: Mapping[str, str]) -> None:
    for name, file in mapped.items():
        if name not in found or found[name].file != file:
            raise ModelError(f"{folder}: the index puts tensor {name} into {file}, which does not hold it")
    for name, header in found.items():
        if name not in mapped:
            raise ModelError(f"{folder}: {header.file} holds tensor {name}, which the index does not name")
