"""One bit a weight: the sign of a difference of two matrices, times a scale for its row and one for its column.

BitDelta (arXiv 2402.10193) keeps the sign of each difference and one scale for a matrix. A scale for every row and
every column costs K + N numbers more for N x K bits, and loses less than half as much of the difference's energy.

Shape letters: N rows (outputs), K columns (inputs), B bytes of a row, 8 columns each. A stack of experts [E, N, K] has
its own scales for each expert, and `...` stands for that dimension or for none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_DTYPE = torch.bfloat16
"""Of scales on disk: the range of fp32, as small differences have scales that fp16 rounds to zero."""
_BITS = 8
_STEPS = 10
"""Of the alternating fit; it is a power iteration on a matrix with one dominant singular value, and settles sooner."""


@dataclass(frozen=True, kw_only=True)
class OneBit:
    """A difference in one bit a weight: delta[n, k] ~ (+1 or -1) * row[n] * column[k].

    Attributes:
        signs_NB: uint8 [..., N, ceil(K / 8)]; bit j of byte b (the lowest is 0) is set where column 8 b + j rises.
        row_N, column_K: scales, at least 0. A row that does not change has scale 0, and so does such a column.
    """

    signs_NB: Tensor
    row_N: Tensor
    column_K: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the difference, [N, K] or [E, N, K]."""
        return (*self.row_N.shape, self.column_K.shape[-1])

    @property
    def nbytes(self) -> int:
        """Return how many bytes its tensors take."""
        return sum(tensor.nbytes for tensor in (self.signs_NB, self.row_N, self.column_K))


def packed(rises_NK: Tensor) -> Tensor:
    """Return flags [..., N, K] as bits [..., N, ceil(K / 8)], the lowest bit first."""
    # columns that fill up the last byte are cut off again by `signs`
    padded = pad(rises_NK.to(torch.uint8), (0, -rises_NK.shape[-1] % _BITS))
    places = torch.arange(_BITS, dtype=torch.uint8, device=rises_NK.device)
    return (padded.unflatten(-1, (-1, _BITS)) << places).sum(-1, dtype=torch.uint8)


def signs(delta: OneBit) -> Tensor:
    """Return the signs, +1 or -1, in fp32 [..., N, K]."""
    places = torch.arange(_BITS, dtype=torch.uint8, device=delta.signs_NB.device)
    bits = (delta.signs_NB[..., None] >> places) & 1
    return bits.flatten(-2)[..., : delta.shape[-1]].float().mul_(2).sub_(1)


def encode(delta_NK: Tensor) -> OneBit:
    """Return the one-bit form of a difference [N, K], or of a stack of them [E, N, K], each by itself."""
    # experts one by one: their changes differ in size, and fp32 copies of a layer's experts are large
    if delta_NK.ndim == 3:
        each = [encode(matrix) for matrix in delta_NK]
        return OneBit(
            signs_NB=torch.stack([one.signs_NB for one in each]),
            row_N=torch.stack([one.row_N for one in each]),
            column_K=torch.stack([one.column_K for one in each]),
        )
    row_N, column_K = fitted(delta_NK.float().abs())
    # the sign of a zero is lost; scales are the best with it, and rows without change have none
    return OneBit(signs_NB=packed(delta_NK >= 0), row_N=row_N.to(SCALE_DTYPE), column_K=column_K.to(SCALE_DTYPE))


def fitted(sizes_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column scales whose product is nearest to a matrix of values that are at least 0.

    With the signs kept, |delta - sign row column|^2 = ||delta| - row column|^2, so this is the best rank-1 form of
    |delta|, found by alternating least squares. The scales of columns have a mean of 1 where a column changes.
    """
    # means and not ones: a row without change starts, and stays, at exactly 0
    row_N, column_K = sizes_NK.mean(-1), sizes_NK.new_ones(sizes_NK.shape[-1])
    for _ in range(_STEPS):
        column_K = _divided(sizes_NK.mT @ row_N, row_N.square().sum())
        row_N = _divided(sizes_NK @ column_K, column_K.square().sum())
        # in every step: squares of scales of 1e-20 are no fp32 numbers any more
        length = _divided(column_K.sum(), column_K.count_nonzero())
        column_K, row_N = _divided(column_K, length), row_N * length
    return row_N, column_K


def _divided(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, values / by, torch.zeros_like(values))


def matrix(delta: OneBit, expert: int) -> OneBit:
    """Return one expert's difference [N, K] of a stack of them."""
    return OneBit(signs_NB=delta.signs_NB[expert], row_N=delta.row_N[expert], column_K=delta.column_K[expert])


def decode(delta: OneBit) -> Tensor:
    """Return the difference in fp32, [N, K] or [E, N, K]."""
    # in place: the signs in fp32 are as large as the result
    return signs(delta).mul_(delta.row_N.float()[..., None]).mul_(delta.column_K.float()[..., None, :])


def decode_rows(delta: OneBit, part: slice) -> Tensor:
    """Return some rows of the difference in fp32; of a stack, its matrices' rows follow each other."""
    signs_NB, row_N = delta.signs_NB.flatten(0, -2)[part], delta.row_N.flatten()[part]
    # a row is its expert's, and so are the scales of its columns
    if delta.column_K.ndim == 1:
        return decode(OneBit(signs_NB=signs_NB, row_N=row_N, column_K=delta.column_K))
    experts_N = torch.arange(delta.row_N.numel())[part] // delta.row_N.shape[-1]
    column_NK = delta.column_K.float()[experts_N]
    ones_K = torch.ones(column_NK.shape[-1])
    return decode(OneBit(signs_NB=signs_NB, row_N=row_N, column_K=ones_K)).mul_(column_NK)


def energy_lost(delta_NK: Tensor, one_bit: OneBit) -> float:
    """Return the share of a difference's squared length that its one-bit form misses; 0 of no difference."""
    whole = float(delta_NK.norm())
    return (float((delta_NK - decode(one_bit)).norm()) / whole) ** 2 if whole else 0.0
