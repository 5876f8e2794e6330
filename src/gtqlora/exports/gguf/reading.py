"""Reads the header of a GGUF file from anywhere: nothing in it is believed before it is checked.

Format: ggml/docs/gguf.md. Little-endian, versions 2 and 3, which are laid out alike.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gtqlora.errors import ModelError
from gtqlora.exports.gguf.types import TYPES, GgmlType
from gtqlora.families.files import checked_file

Scalar = int | float | bool | str
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_PAIRS, _MAX_TENSORS, _MAX_ARRAY = 2**16, 2**20, 2**24
_MAX_STRING, _MAX_NAME, _MAX_DIMENSIONS = 2**26, 2**16, 4
_MAX_SIZE = 2**48
"""Values of one tensor, above which sizes could overflow somewhere."""
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Types of metadata, by GGUF's numbers."""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata that are numbers -> how `struct` calls them."""
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Value:
    """One entry of the metadata: its type by GGUF's numbers, of the items where it is a list."""

    kind: int
    value: Scalar | Sequence[Scalar]

    @property
    def is_list(self) -> bool:
        """Return whether it is a list."""
        return isinstance(self.value, list)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is; `shape` as torch has it, the contiguous dimension last, and `offset` from the file's start."""

    file: Path
    offset: int
    kind: GgmlType
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Return how many bytes it takes."""
        return self.kind.n_bytes(self.shape)


@dataclass(frozen=True)
class Gguf:
    """A GGUF, in one file or several.

    Attributes:
        files: in their order.
        metadata: of the first file.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]

    def get(self, key: str) -> Scalar | Sequence[Scalar] | None:
        """Return a metadata value, or None."""
        found = self.metadata.get(key)
        return None if found is None else found.value


def read_gguf(path: Path) -> Gguf:
    """Return what a GGUF's header says, of all its files where it is split.

    Raises:
        ModelError: not a GGUF, malformed, cut short, of an unknown version or type, or a part is missing.
    """
    first = _read_file(path)
    count = first.get("split.count")
    # a file of its own may say that it is the only part
    if count is None or count == 1:
        return first
    parts = [first, *map(_read_file, _other_parts(path, first, count))]
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        if part.get("split.no") != number or part.get("split.count") != count:
            raise ModelError(f"{part.files[0]}: does not say that it is part {number + 1} of {count}; get it again")
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise ModelError(f"{part.files[0]}: tensor {twice[0]!r} is in another part, too; get the files again")
        tensors |= part.tensors
    if first.get("split.tensors.count") != len(tensors):
        raise ModelError(f"{path}: its parts hold {len(tensors)} tensors, not as many as it says; get them again")
    return Gguf(tuple(part.files[0] for part in parts), first.metadata, tensors)


def _other_parts(path: Path, first: Gguf, count: object) -> list[Path]:
    named = _SPLIT.fullmatch(path.name)
    if first.get("split.no") != 0 or named is None or int(named[2]) != 1 or int(named[3]) != count:
        raise ModelError(f"{path}: is one part of a split GGUF, and not the first as llama.cpp names it; give that one")
    return [path.with_name(f"{named[1]}-{n:05}-of-{named[3]}.gguf") for n in range(2, int(named[3]) + 1)]


def _read_file(path: Path) -> Gguf:
    if not path.exists():
        parts = "; a split GGUF needs all its parts beside each other" if _SPLIT.fullmatch(path.name) else ""
        raise ModelError(f"{path}: no such file; give a GGUF of the model{parts}")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the .gguf in it, of several the first")
    # Before it is opened: a pipe would be waited for.
    checked_file(path.parent, path.name)
    try:
        with path.open("rb") as stream:
            return _Header(path, stream).read()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from error


class _Header:
    """A header that is being read; whatever is wrong with it is said of its file."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path, self._stream = path, stream
        self._size = os.fstat(stream.fileno()).st_size

    def read(self) -> Gguf:
        self._check_start()
        n_tensors, n_pairs = self._count(_MAX_TENSORS, "tensors"), self._count(_MAX_PAIRS, "metadata entries")
        metadata: dict[str, Value] = {}
        for _ in range(n_pairs):
            key = self._string(_MAX_NAME)
            if key in metadata:
                raise self._error(f"has {key!r} twice")
            metadata[key] = self._value()
        infos = [self._info() for _ in range(n_tensors)]
        return Gguf((self._path,), metadata, self._placed(infos, metadata))

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self._path}: {what}; it is no GGUF that llama.cpp would load, get it again")

    def _check_start(self) -> None:
        if self._bytes(4) != _MAGIC:
            raise self._error("does not begin as a GGUF")
        version = self._bytes(4)
        if int.from_bytes(version, "big") in _VERSIONS:
            raise ModelError(f"{self._path}: is a big-endian GGUF; give the little-endian one")
        if int.from_bytes(version, "little") not in _VERSIONS:
            raise ModelError(
                f"{self._path}: GGUF version {int.from_bytes(version, 'little')}, known are 2 and 3; convert it again"
            )

    def _bytes(self, count: int) -> bytes:
        # by the file's size, so that a length from a stranger takes no memory
        if self._stream.tell() + count > self._size:
            raise self._error("is cut short")
        return self._stream.read(count)

    def _number(self, code: str) -> int | float:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _int(self, code: str) -> int:
        return int(self._number(code))

    def _count(self, most: int, what: str) -> int:
        count = self._int("Q")
        if count > most:
            raise self._error(f"says that it has {count} {what}")
        return count

    def _string(self, most: int = _MAX_STRING) -> str:
        length = self._int("Q")
        if length > most:
            raise self._error(f"has a text of {length} bytes")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._error("has a text that is not UTF-8") from error

    def _value(self) -> Value:
        kind = self._int("I")
        if kind != ARRAY:
            return Value(kind, self._scalar(kind))
        kind, length = self._int("I"), self._count(_MAX_ARRAY, "items in a list")
        if kind == STRING:
            return Value(kind, [self._string() for _ in range(length)])
        code = self._code(kind)
        # Read at once: a vocabulary's scores are hundreds of thousands of numbers.
        raw = self._bytes(length * struct.calcsize(code))
        items = struct.unpack(f"<{length}{code}", raw)
        return Value(kind, [bool(item) for item in items] if kind == BOOL else list(items))

    def _scalar(self, kind: int) -> Scalar:
        if kind == STRING:
            return self._string()
        found = self._number(self._code(kind))
        return bool(found) if kind == BOOL else found

    def _code(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise self._error(f"has a metadata value of the unknown type {kind}")
        return NUMBERS[kind]

    def _info(self) -> tuple[str, TensorInfo]:
        name, n_dimensions = self._string(_MAX_NAME), self._int("I")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {n_dimensions} dimensions")
        shape = tuple(reversed([self._int("Q") for _ in range(n_dimensions)]))
        number, offset = self._int("I"), self._int("Q")
        if number not in TYPES:
            raise ModelError(f"{self._path}: tensor {name!r} has the type {number}, which this version does not know")
        total = 1
        for size in shape:
            total *= size
            # in the loop: Python's numbers do not overflow, but those of whoever loads the file do
            if not 1 <= total <= _MAX_SIZE:
                raise self._error(f"tensor {name!r} has the shape {shape}")
        if shape[-1] % TYPES[number].block:
            raise self._error(f"tensor {name!r} of {TYPES[number].name} has rows of {shape[-1]}")
        return name, TensorInfo(self._path, offset, TYPES[number], shape)

    def _placed(self, infos: list[tuple[str, TensorInfo]], metadata: dict[str, Value]) -> dict[str, TensorInfo]:
        """Return the tensors by name, with offsets in the file, each with bytes of its own."""
        align = metadata.get("general.alignment", Value(UINT32, 32)).value
        if not isinstance(align, int) or not 8 <= align <= 2**20 or align & (align - 1):
            raise self._error(f"has an alignment of {align!r}")
        # Offsets count from the first aligned byte behind the header, and not from the file's start.
        start = -(-self._stream.tell() // align) * align
        found: dict[str, TensorInfo] = {}
        for name, info in infos:
            if name in found:
                raise self._error(f"has tensor {name!r} twice")
            if info.offset % align or start + info.offset + info.n_bytes > self._size:
                raise self._error(f"tensor {name!r} does not lie where its file could hold it")
            found[name] = TensorInfo(info.file, start + info.offset, info.kind, info.shape)
        end = 0
        for name, info in sorted(found.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise self._error(f"tensor {name!r} overlaps another")
            end = info.offset + info.n_bytes
        return found


def raw_bytes(info: TensorInfo, first: int = 0, count: int | None = None) -> bytes:
    """Return bytes of a tensor.

    Raises:
        ModelError: the file cannot be read, or is shorter than its header says.
    """
    count = info.n_bytes - first if count is None else count
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.offset + first)
            found = stream.read(count)
    except OSError as error:
        raise ModelError(f"{info.file}: cannot be read ({error.strerror})") from error
    if len(found) != count:
        raise ModelError(f"{info.file}: was cut short while it was read; run the command again")
    return found
