"""The types that a GGUF's tensors have: their sizes, and values in them, bit for bit as ggml rounds them.

Shape letters: N rows, K columns.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from gtqlora.errors import RunError

_BLOCK_BYTES = 2**20
"""Bytes of fp32 values that are quantized in one go."""
_THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class GgmlType:
    """A tensor type of ggml: `block` values of a row take `size` bytes (ggml.c, `type_traits`)."""

    number: int
    name: str
    block: int
    size: int

    @property
    def is_plain(self) -> bool:
        """Return whether each value is a float of its own."""
        return self.name in _PLAIN

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Return how many bytes a tensor of this shape takes; its last dimension is a multiple of the block."""
        values = 1
        for size in shape:
            values *= size
        return values // self.block * self.size


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIZES = (
    *(("F32", 0, 1, 4), ("F16", 1, 1, 2), ("BF16", 30, 1, 2), ("F64", 28, 1, 8)),
    *(("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4), ("I64", 27, 1, 8)),
    *(("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34)),
    *(("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176)),
    *(("Q6_K", 14, 256, 210), ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98)),
    *(("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82)),
    *(("IQ4_XS", 23, 256, 136), ("IQ1_M", 29, 256, 56), ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66)),
    *(("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18)),
)
TYPES: dict[int, GgmlType] = {number: GgmlType(number, name, block, size) for name, number, block, size in _SIZES}
BY_NAME: dict[str, GgmlType] = {kind.name: kind for kind in TYPES.values()}

_NOT_WEIGHTS = {"F64", "I8", "I16", "I32", "I64"}
_NEED_IMATRIX = {"IQ2_XXS", "IQ2_XS", "IQ1_S"}
"""ggml itself does not quantize to these without an importance matrix."""


def why_not(kind: GgmlType) -> str | None:
    """Return why values cannot be written in a type; None where they can."""
    if kind.name in _NOT_WEIGHTS:
        return "is no type for weights"
    if kind.name in _NEED_IMATRIX:
        return "is only made with an importance matrix"
    return None


def _libgguf() -> ModuleType:
    try:
        return import_module("libgguf")
    except ImportError as error:
        raise RunError("quantized tensors need the package libgguf; pip install 'gtqlora[gguf]'") from error


def quantized(values_NK: Tensor, kind: GgmlType) -> bytes:
    """Return the bytes of fp32 rows in a type, as ggml would write them; without an importance matrix."""
    if kind.is_plain:
        return values_NK.to(_PLAIN[kind.name]).contiguous().view(torch.uint8).numpy().tobytes()
    # Rows are quantized each by itself, so that blocks of them give the same bytes.
    rows_NK = np.ascontiguousarray(values_NK.float().numpy())
    step = max(1, _BLOCK_BYTES // (4 * rows_NK.shape[1]))
    blocks = [rows_NK[first : first + step] for first in range(0, len(rows_NK), step)]
    with ThreadPoolExecutor(_THREADS) as pool:  # the library lets go of the interpreter
        return b"".join(pool.map(lambda block: _libgguf().quantize_rows(block, kind.number).tobytes(), blocks))


def dequantized(raw: bytes, kind: GgmlType, columns: int) -> Tensor:
    """Return the fp32 rows that bytes of a type stand for."""
    if kind.is_plain:
        # a copy, as torch wants memory that it may write to
        return torch.frombuffer(bytearray(raw), dtype=_PLAIN[kind.name]).float().view(-1, columns)
    packed = np.frombuffer(raw, np.uint8).reshape(-1, columns // kind.block * kind.size)
    return torch.from_numpy(_libgguf().dequantize_rows(packed, kind.number, columns))
