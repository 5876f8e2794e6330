"""One bit a weight as the two factors of a LoRA that llama.cpp computes: signs in Q1_0, and a diagonal in Q4_0.

Q1_0 has the sign of each value, and a scale in fp16 for every 128 of a row. A diagonal is exact in Q4_0 but for
rounding to fp16, as no block of it has more than one value. So one side's scales go into the diagonal, and the other's
into the blocks: those of rows hold there, those of columns are the same for 128 of them.

Shape letters: N rows (outputs), K columns (inputs), B bytes of a row of signs, 8 columns each, C blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.bitdelta.onebit import OneBit
from gtqlora.errors import RunError
from gtqlora.exports.gguf.types import BY_NAME, dequantized, quantized

SIGNS, DIAGONAL = BY_NAME["Q1_0"], BY_NAME["Q4_0"]
_SHARE = 8
"""Of a block's largest value, what Q4_0 holds of it as the scale."""
_SMALLEST = 2.0**-18
"""Of a scale in fp16: below, its steps of 2^-24 are no longer small. The largest of a side is brought up to this."""


@dataclass(frozen=True)
class Factors:
    """The bytes of both factors of one matrix: `signs` [N, K] and a `diagonal` [N, N] of rows, or [K, K] of columns."""

    signs: bytes
    diagonal: bytes


def check_width(name: str, shape: tuple[int, ...]) -> None:
    """Check that a difference [..., N, K] fits the blocks of both types.

    Raises:
        RunError: it does not.
    """
    rows, columns = shape[-2:]
    wanted = {"columns": (columns, SIGNS.block), "rows": (rows if by_rows(shape) else 0, DIAGONAL.block)}
    for what, (count, block) in wanted.items():
        if count % block:
            raise RunError(
                f"tensor {name} has {count} {what}, and signs for llama.cpp need a multiple of {block}; make weights "
                "of the variant (`gtqlora bitdelta apply` without --to) and convert those"
            )


def by_rows(shape: tuple[int, ...]) -> bool:
    """Return whether the diagonal is of rows: it stands on the smaller side, of two alike on the columns'."""
    return shape[-2] < shape[-1]


def factors(delta: OneBit, *, rows: bool) -> Factors:
    """Return the factors of a difference [N, K], with the rows' scales in the diagonal or the columns'."""
    row_N, column_K = delta.row_N.float(), delta.column_K.float()
    if rows:
        # the mean is nearest to the columns' own scales, whatever the row's
        blocks_NC = column_K.view(1, -1, SIGNS.block).mean(-1).expand(len(row_N), -1)
        lift = _lift(row_N / _SHARE)
        return Factors(_signs(delta, blocks_NC / lift), _diagonal(row_N * lift))
    lift = _lift(row_N)
    blocks_NC = (row_N * lift)[:, None].expand(-1, len(column_K) // SIGNS.block)
    return Factors(_signs(delta, blocks_NC), _diagonal(column_K / lift))


def _lift(scales_N: Tensor) -> float:
    """Return a power of two that brings the largest of these up to where fp16 still has small steps; mostly 1."""
    # no more than that: what the other factor loses, activations lose, which llama.cpp rounds to 8 bits in between
    largest = float(scales_N.max())
    return 1.0 if largest in (0.0, float("inf")) else max(1.0, 2.0 ** -round_down(largest / _SMALLEST))


def round_down(ratio: float) -> int:
    """Return the exponent of the largest power of two that is no larger."""
    return int(torch.tensor(ratio).log2().floor())


def _signs(delta: OneBit, scales_NC: Tensor) -> bytes:
    blocks_NCB = delta.signs_NB.view(*scales_NC.shape, SIGNS.block // 8)
    halves_NCB = scales_NC.half()[..., None].contiguous().view(torch.uint8)
    return torch.cat([halves_NCB, blocks_NCB], dim=-1).numpy().tobytes()


def _diagonal(scales: Tensor) -> bytes:
    return quantized(scales.diag(), DIAGONAL)


def written(found: Factors, *, rows: bool, columns: int) -> Tensor:
    """Return the difference [N, K] that the bytes stand for, in fp32."""
    signs_NK = dequantized(found.signs, SIGNS, columns)
    side = len(signs_NK) if rows else columns
    scales = dequantized(found.diagonal, DIAGONAL, side).diagonal()
    return signs_NK * (scales[:, None] if rows else scales)
