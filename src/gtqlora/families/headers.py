"""Headers of a checkpoint's safetensors files: which tensor is where, with its shape and dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gtqlora.errors import ModelError
from gtqlora.families.files import checked_file, first_line


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


def read_headers(folder: Path, names: Iterable[str], mapped: Mapping[str, str] | None = None) -> dict[str, Header]:
    """Return every tensor in the files, by name; reading a header also checks that its file is whole.

    Args:
        mapped: tensor -> file, as the index has it.

    Raises:
        ModelError: a file is corrupt or cut short, a tensor is in two files, or files and index disagree.
    """
    found: dict[str, Header] = {}
    for file in names:
        checked_file(folder, file)
        with opened(folder / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file is no mapping
                if name in found:
                    raise ModelError(f"{folder}: tensor {name} is in {found[name].file} and in {file}; remove one")
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
