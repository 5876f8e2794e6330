"""One bit a weight as the two factors of a LoRA that llama.cpp computes: signs in Q1_0, and a diagonal in Q2_K.

Q1_0 has the sign of each value, and a scale in fp16 for every 128 of a row. Q2_K holds a diagonal as well as fp16
does, as no block of it has more than one value. So one side's scales go into the diagonal, and the other's into the
blocks: those of rows hold there, and those of columns become their mean over 128. Where a width is no multiple of a
type's block, the next type takes its place, which costs more bytes and loses no more.

Shape letters: N rows (outputs), K columns (inputs), C blocks of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gtqlora.bitdelta.onebit import OneBit, signs
from gtqlora.exports.gguf.types import BY_NAME, GgmlType, dequantized, quantized

_SIGNS = (BY_NAME["Q1_0"], BY_NAME["Q8_0"], BY_NAME["F16"])
_DIAGONALS = (BY_NAME["Q2_K"], BY_NAME["Q4_0"], BY_NAME["F16"])
_LARGEST = {"Q1_0": 1, "Q2_K": 45, "Q4_0": 8, "Q8_0": 127, "F16": 1}
"""The size of a type's largest number in units of its scale."""
_SMALLEST = 2.0**-18
"""Of a scale in fp16: below, its steps of 2^-24 are no longer small."""


@dataclass(frozen=True)
class Form:
    """How a difference [..., N, K] is written.

    Attributes:
        rows: whether the diagonal [N, N] is of rows; else [K, K] of columns, where the scales of both hold.
    """

    shape: tuple[int, ...]
    rows: bool

    @staticmethod
    def smallest(shape: tuple[int, ...]) -> Form:
        """Return the form with the diagonal on the smaller side, of two alike on the columns'."""
        return Form(shape, rows=shape[-2] < shape[-1])

    @property
    def signs(self) -> GgmlType:
        """Return the type of the signs."""
        return _fitting(_SIGNS, self.shape[-1])

    @property
    def side(self) -> int:
        """Return the size of the diagonal."""
        return self.shape[-2 if self.rows else -1]

    @property
    def diagonal(self) -> GgmlType:
        """Return the type of the diagonal."""
        return _fitting(_DIAGONALS, self.side)

    def factors(self, delta: OneBit) -> Factors:
        """Return the factors of one matrix of this form."""
        row_N, column_K = delta.row_N.float(), delta.column_K.float()
        lift = _lift(row_N / _LARGEST[(self.diagonal if self.rows else self.signs).name])
        row_N, column_K = row_N * lift, column_K / lift
        if self.rows:
            # of all values the mean is nearest to the columns' own scales, whatever the row's
            block = self.signs.block
            mean_K = column_K.view(-1, block).mean(-1).repeat_interleave(block)
            return Factors(self._signs(delta, mean_K), self._diagonal(row_N))
        return Factors(self._signs(delta, row_N[:, None]), self._diagonal(column_K))

    def _signs(self, delta: OneBit, scales: Tensor) -> bytes:
        return quantized(signs(delta).mul_(scales), self.signs)

    def _diagonal(self, scales: Tensor) -> bytes:
        return quantized(scales.diag(), self.diagonal)

    def written(self, found: Factors) -> Tensor:
        """Return the difference [N, K] that the bytes stand for, in fp32."""
        signs_NK = dequantized(found.signs, self.signs, self.shape[-1])
        scales = dequantized(found.diagonal, self.diagonal, self.side).diagonal()
        return signs_NK.mul_(scales[:, None] if self.rows else scales)


@dataclass(frozen=True)
class Factors:
    """The bytes of both factors of one matrix."""

    signs: bytes
    diagonal: bytes


def _fitting(kinds: tuple[GgmlType, ...], width: int) -> GgmlType:
    return next(kind for kind in kinds if width % kind.block == 0)


def _lift(scales_N: Tensor) -> float:
    """Return a power of two that brings the largest of these scales up to where fp16 has small steps; mostly 1."""
    # no further: the other side's scales go down by as much, and with them what is rounded to 8 bits in between
    largest = float(scales_N.max())
    if not 0 < largest < _SMALLEST:
        return 1.0
    return 2.0 ** math.ceil(math.log2(_SMALLEST / largest))
