"""Symmetric 4-bit integers with one bf16 scale a group, as compressed-tensors' `pack-quantized` stores them.

Shape letters as in `layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding

from gtqlora.errors import ModelError
from gtqlora.experts.layout import Format, Layout, Parts, scaled_pieces

# Eight 4-bit codes fill an int32 word; a code is the integer plus 8, so that none is negative.
_PER_WORD = 8
_OFFSET = 8
_LOWEST, _HIGHEST = -8, 7
# compressed-tensors scales a group so that its largest weight is 7.5: between the ends of both signs.
_HALF_RANGE = (_HIGHEST - _LOWEST) / 2
_ZERO_GROUP_SCALE = torch.finfo(torch.bfloat16).eps
"""What compressed-tensors gives a group of zeros for a scale; any number but zero would do."""


def pack(codes: Tensor) -> Tensor:
    """Pack codes [..., K] in 0..15 (uint8) into int32 [..., K/8], the first in the lowest bits."""
    # Little-endian: four bytes of two codes each, viewed as one word, have the first code in the lowest bits.
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).contiguous().view(torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """Return the inverse of `pack`."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


# Tensors made in inference mode cannot take part in autograd later, so what is cached is made outside of it.
@cache
@torch.inference_mode(False)
def _values(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two integers [256, 2] that each byte holds, the low nibble's first."""
    return unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)).to(dtype) - _OFFSET


def _codes(groups: Tensor, scales: Tensor) -> Tensor:
    """Return codes (uint8) of weights; both fp32."""
    return ((groups / scales).round_().clamp_(_LOWEST, _HIGHEST) + _OFFSET).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Int4(Format):
    """Codes in -8..7 times a scale for each `group` inputs of a row; a shorter row is one group.

    Parts: `packed` int32 [..., N, K/8] of codes + 8, `scale` bf16 [..., N, G].
    """

    def check(self, rows: int, columns: int) -> None:
        """Check that rows are whole words and whole groups."""
        if rows < 1 or columns < 1 or columns % _PER_WORD:
            raise ModelError(f"{self.name}: a matrix {rows} x {columns} needs columns in multiples of {_PER_WORD}")
        if columns % self._width(columns):
            raise ModelError(f"{self.name}: {columns} columns ({rows} rows) do not divide into groups of {self.group}")

    def _width(self, columns: int) -> int:
        return min(self.group, columns)

    def layout(self, rows: int, columns: int) -> Layout:
        """Return the shapes of `packed` and `scale`."""
        return {
            "packed": ((rows, columns // _PER_WORD), torch.int32),
            "scale": ((rows, columns // self._width(columns)), torch.bfloat16),
        }

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Return codes 0..15 in uint8; a code is the integer plus 8."""
        return unpack(packed)

    def pack(self, codes: Tensor) -> Tensor:
        """Pack codes into words, see `pack` above."""
        return pack(codes)

    def _quantize(self, matrices_LNK: Tensor) -> Parts:
        rows, columns = matrices_LNK.shape[1:]
        groups = matrices_LNK.unflatten(-1, (-1, self._width(columns)))
        scale_LNG = (self._largest(groups, rows, columns) / _HALF_RANGE).bfloat16()
        # A group of zeros has the scale 0, and codes are found by dividing by the scale.
        scale_LNG = scale_LNG.masked_fill(scale_LNG == 0, _ZERO_GROUP_SCALE)
        packed = [pack(_codes(*piece)) for piece in scaled_pieces(groups, scale_LNG)]
        return {"packed": torch.cat(packed).view(len(matrices_LNK), rows, -1), "scale": scale_LNG}

    def _dequantize(self, parts: Parts, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        # A product of bf16 tensors is computed in fp32, where it is exact, and rounded once.
        exact = dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32
        # One lookup gives both codes of a byte: several times faster than shifting and masking.
        pairs = parts["packed"].contiguous().view(torch.uint8).int()
        codes = embedding(pairs, _values(pairs.device, exact)).flatten(-2)
        groups = codes.unflatten(-1, (-1, self._width(columns)))
        return groups.mul_(parts["scale"].to(exact).unsqueeze(-1)).flatten(-2).to(dtype)
