"""The header of a GGUF as bytes, version 3 and little-endian; `reading` reads it back."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from gtqlora.exports.gguf.reading import ARRAY, NUMBERS, STRING, Scalar, Value
from gtqlora.exports.gguf.types import GgmlType

ALIGNMENT = 32
"""Bytes at a multiple of which every tensor begins."""


def header(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[GgmlType, tuple[int, ...]]]) -> bytes:
    """Return everything before the first tensor, which are to follow in this order, each padded."""
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _value(value)
    offset = 0
    for name, (kind, shape) in tensors.items():
        out += _string(name) + struct.pack("<I", len(shape))
        out += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind.number, offset)
        offset += padded(kind.n_bytes(shape))
    return bytes(out.ljust(padded(len(out)), b"\0"))


def padded(size: int) -> int:
    """Return the size with what fills it up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    found = value.value
    if isinstance(found, int | float | str):
        return struct.pack("<I", value.kind) + _scalar(value.kind, found)
    items = b"".join(_scalar(value.kind, item) for item in found)
    return struct.pack("<IIQ", ARRAY, value.kind, len(found)) + items


def _scalar(kind: int, value: Scalar) -> bytes:
    return _string(str(value)) if kind == STRING else struct.pack(f"<{NUMBERS[kind]}", value)
