"""The order in which GPU kernels read 4-bit weights: 64 x 64 tiles, a bijection of the plain order.

A tile is 4 x 4 blocks of 16 x 16 weights; a block is 8 x 8 units of 16 bits (one `ldmatrix`); a unit holds the codes
at outputs (a, a + 8) and inputs (u, u + 8), one thread's share of a tensor-core operand, transposed or not: nibble
2 i + j is output a + 8 i, input u + 8 j. Scales of a tile lie in the order group, block, b, i, c for output a = 2 b + c
so that each thread finds those it needs side by side, transposed or not.
Every part keeps its name, shape, dtype and bytes, in another order.

Shape letters: L matrices, N rows (outputs), K columns (inputs), P bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gtqlora.experts.layout import Format, Parts

TILE = 64
_CODES = (-1, 4, 2, 8)  # tile, block, half, place in it; along rows and along columns
_TO_TILES = (0, 1, 5, 2, 6, 4, 8, 3, 7)
_FROM_TILES = tuple(_TO_TILES.index(i) for i in range(9))
_SCALES = ("scale", "absmax")


def tiled(format: Format, parts: Parts, rows: int, columns: int) -> Parts:
    """Return parts, leading [M], of M matrices below each other, in the order of the tiles."""
    codes = format.unpack(parts["packed"], rows, columns).reshape(1, -1, columns)
    found = {"packed": tile_codes(codes).view(parts["packed"].dtype).view_as(parts["packed"])}
    for name in parts.keys() & _SCALES:
        scales_LNG = parts[name].reshape(1, codes.shape[1], -1)
        found[name] = tile_scales(scales_LNG, columns).view_as(parts[name])
    return {**parts, **found}


def untiled(format: Format, parts: Parts, rows: int, columns: int) -> Parts:
    """Return the inverse of `tiled`."""
    packed = parts["packed"].contiguous()
    matrices = len(packed)
    codes = untile_codes(packed.view(torch.uint8).view(1, -1), matrices * rows, columns)
    found = {"packed": format.pack(codes.view(matrices, rows, columns)).view_as(packed)}
    for name in parts.keys() & _SCALES:
        groups = parts[name].numel() // (matrices * rows)
        scales_LNG = untile_scales(parts[name].reshape(1, -1), matrices * rows, columns, groups)
        found[name] = scales_LNG.view_as(parts[name])
    return {**parts, **found}


def tile_codes(codes_LNK: Tensor) -> Tensor:
    """Pack codes in 0..15 (uint8) into bytes_LP, P = N*K/2, tile after tile along the inputs."""
    blocks = codes_LNK.unflatten(2, _CODES).unflatten(1, _CODES).permute(_TO_TILES)
    low, high = blocks.unbind(-1)
    return (low | high << 4).flatten(1)


def untile_codes(bytes_LP: Tensor, rows: int, columns: int) -> Tensor:
    """Return the inverse of `tile_codes`."""
    codes = torch.stack((bytes_LP & 15, bytes_LP >> 4), dim=-1)
    blocks = codes.reshape(-1, rows // TILE, columns // TILE, 4, 4, 8, 8, 2, 2)
    return blocks.permute(_FROM_TILES).reshape(-1, rows, columns)


def _per_tile(columns: int, groups: int) -> int:
    """Groups of one row within a tile: none is split, so wide groups are shared by neighbouring tiles."""
    return max(1, groups * TILE // columns)


def tile_scales(scales_LNG: Tensor, columns: int) -> Tensor:
    """Scales of G groups a row, in the order of the tiles."""
    per_tile = _per_tile(columns, scales_LNG.shape[2])
    blocks = scales_LNG.unflatten(2, (-1, per_tile)).unflatten(1, (-1, 4, 2, 4, 2))
    return blocks.permute(0, 1, 6, 7, 2, 4, 3, 5).flatten(1)


def untile_scales(scales_LP: Tensor, rows: int, columns: int, groups: int) -> Tensor:
    """Return the inverse of `tile_scales`."""
    per_tile = _per_tile(columns, groups)
    blocks = scales_LP.reshape(-1, rows // TILE, groups // per_tile, per_tile, 4, 4, 2, 2)
    return blocks.permute(0, 1, 4, 6, 5, 7, 2, 3).reshape(-1, rows, groups)
