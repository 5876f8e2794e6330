"""4-bit NormalFloat with double-quantized scales (Dettmers et al., arXiv 2305.14314), bit for bit as bitsandbytes.

Shape letters as in `layout`; C nested blocks of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from gtqlora.errors import ModelError
from gtqlora.experts.layout import Format, Layout, Parts, scaled_pieces

# Scales that share a scale of their own (double quantization); bins to which bitsandbytes rounds on a CPU first; what
# it divides a block of zeros by.
_NESTED = 256
_BINS = 65536
_SMALLEST = 1e-38
# The quantiles of a normal distribution, as in bitsandbytes; zero is one of them.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def pack(codes: Tensor) -> Tensor:
    """Pack codes [..., n] in 0..15 (uint8) into bytes [..., n/2], the first in the high nibble."""
    high, low = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return high << 4 | low


def unpack(packed: Tensor) -> Tensor:
    """Return the inverse of `pack`."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


@cache
@torch.inference_mode(False)
def levels(device: torch.device) -> Tensor:
    """Return the value [16] of each 4-bit code, fp32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
@torch.inference_mode(False)
def nested_levels(device: torch.device) -> Tensor:
    """Return the value [256] of each byte of `absmax`, fp32: signed dynamic map of arXiv 1511.04561, 7 exponents."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        positive.append(10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    ends = torch.tensor([0.0, 1.0], device="cpu")
    return torch.cat([*positive, *(-part for part in positive), ends]).sort().values.to(device)


@cache
@torch.inference_mode(False)
def _pairs(device: torch.device) -> Tensor:
    """Return the two values [256, 2] that each byte of `packed` holds, fp32."""
    return levels(device)[unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)).int()]


@cache
@torch.inference_mode(False)
def _nested_codes(device: torch.device) -> Tensor:
    """Return the byte [65536] for each of equally wide bins of [-1, 1]; bitsandbytes' CPU code rounds to bins first."""
    bins = -1.0 + 2.0 * torch.arange(_BINS, dtype=torch.float32, device="cpu") / (_BINS - 1)
    return torch.bucketize(bins, _midpoints(nested_levels(torch.device("cpu")))).to(torch.uint8).to(device)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _codes(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Return the nearest level's code, uint8, of every weight in blocks; both fp32."""
    # Multiplied by the inverse, not divided: bitsandbytes does so, and the last bit differs.
    unit = blocks * (1.0 / absmax.clamp(min=_SMALLEST))
    return torch.bucketize(unit.clamp_(-1, 1), _midpoints(levels(unit.device)), out_int32=True).to(torch.uint8)


def _nested(centred_LB: Tensor) -> tuple[Tensor, Tensor]:
    """Return bytes_LB and their scales_LC for values around zero."""
    blocks = pad(centred_LB, (0, -centred_LB.shape[-1] % _NESTED)).unflatten(-1, (-1, _NESTED))
    scale_LC = blocks.abs().amax(-1)
    unit = (blocks * (1.0 / scale_LC).unsqueeze(-1)).clamp_(-1, 1).nan_to_num_(nan=0.0)
    # As on a CPU: first to the nearest of 65,536 bins, then to the nearest level. Rounding once gives other bits.
    bins = ((unit + 1.0) * 0.5 * (_BINS - 1) + 0.5).int()
    codes = _nested_codes(bins.device)[bins].masked_fill((scale_LC == 0).unsqueeze(-1), 0)
    return codes.flatten(-2)[:, : centred_LB.shape[-1]], scale_LC


@dataclass(frozen=True, kw_only=True)
class Nf4(Format):
    """Blocks of `group` weights along the flattened matrix, their absmax in 8 bits around the mean.

    Parts: `packed` uint8 [..., N*K/2], `absmax` uint8 [..., B], `absmax_scale` fp32 [..., C] with C = ceil(B/256),
    `absmax_offset` fp32 [...].
    """

    def check(self, rows: int, columns: int) -> None:
        """Check that the flattened matrix is whole blocks."""
        if rows < 1 or columns < 1 or rows * columns % self.group:
            raise ModelError(
                f"{self.name}: a matrix {rows} x {columns} does not divide into blocks of {self.group} weights"
            )

    def layout(self, rows: int, columns: int) -> Layout:
        """Return the shapes of `packed`, `absmax`, `absmax_scale` and `absmax_offset`."""
        blocks = rows * columns // self.group
        return {
            "packed": ((rows * columns // 2,), torch.uint8),
            "absmax": ((blocks,), torch.uint8),
            "absmax_scale": ((-(-blocks // _NESTED),), torch.float32),
            "absmax_offset": ((), torch.float32),
        }

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Return codes 0..15 in uint8; a code is the number of its level in `LEVELS`."""
        return unpack(packed).unflatten(-1, (rows, columns))

    def pack(self, codes: Tensor) -> Tensor:
        """Pack the codes of the flattened matrix into bytes, see `pack` above."""
        return pack(codes.flatten(-2))

    def _quantize(self, matrices_LNK: Tensor) -> Parts:
        blocks = matrices_LNK.flatten(1).unflatten(-1, (-1, self.group))
        absmax_LB = self._largest(blocks, *matrices_LNK.shape[1:])
        # Matrix by matrix: a mean over a dimension may add up in another order than a mean over everything.
        offset_L = torch.stack([absmax_B.mean() for absmax_B in absmax_LB])
        absmax, scale_LC = _nested(absmax_LB - offset_L.unsqueeze(-1))
        packed = torch.cat([pack(_codes(*piece)) for piece in scaled_pieces(blocks, absmax_LB)])
        return {
            "packed": packed.view(len(matrices_LNK), -1),
            "absmax": absmax,
            "absmax_scale": scale_LC,
            "absmax_offset": offset_L,
        }

    def _dequantize(self, parts: Parts, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        absmax = self.absmax(parts)
        pairs = embedding(parts["packed"].int(), _pairs(absmax.device)).flatten(-2)
        blocks = pairs.unflatten(-1, (-1, self.group)).mul_(absmax.unsqueeze(-1))
        return blocks.flatten(-2).unflatten(-1, (rows, columns)).to(dtype)

    def absmax(self, parts: Parts) -> Tensor:
        """Return the scale [..., B] of every block, fp32."""
        nested = embedding(parts["absmax"].int(), nested_levels(parts["absmax"].device).unsqueeze(-1)).squeeze(-1)
        scale = parts["absmax_scale"].repeat_interleave(_NESTED, dim=-1)[..., : nested.shape[-1]]
        return nested * scale + parts["absmax_offset"].unsqueeze(-1)
