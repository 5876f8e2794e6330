"""Triton kernels for batches whose rows are of different variants: one-bit differences, and small dense matrices.

A group is up to M rows of one variant. A program computes N outputs of one group: it reads the group's own matrix, once
for its rows, and nothing of other variants. Sums are in fp32, in an order that does not depend on the other groups.

Shape letters: T rows of the batch, G groups, M rows of a group, V matrices of variants, K inputs (columns of a matrix),
N outputs, W words of 16 signs each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.bitdelta.onebit import OneBit
from gtqlora.errors import ModelError
from gtqlora.experts.kernels.row_kernels import launch, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ModelError("serving variants on a GPU needs Triton: pip install triton, or use --device cpu") from missing

_WORDS = 16
"""Words of a row that are read at a time: 256 signs."""
_SIGNS = 16 * _WORDS
_ROWS = (8, 16, 64)
"""Rows of a group: the fewest that hold a variant's, and of the largest as many groups as it takes."""
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Groups:
    """Rows of a batch by variant.

    Attributes:
        variant_G: int32, the variant of each group.
        rows_GM: int32, the rows of each group; -1 fills up.
    """

    variant_G: Tensor
    rows_GM: Tensor

    @staticmethod
    def of(variants: Sequence[int], device: torch.device | str) -> Groups:
        """Return the groups of rows whose variants these are."""
        rows: dict[int, list[int]] = {}
        for row, variant in enumerate(variants):
            rows.setdefault(variant, []).append(row)
        longest = max(map(len, rows.values()))
        most = next((size for size in _ROWS if longest <= size), _ROWS[-1])
        parts = [(v, mine[i : i + most]) for v, mine in rows.items() for i in range(0, len(mine), most)]
        return Groups(
            torch.tensor([v for v, _ in parts], dtype=torch.int32, device=device),
            torch.tensor([part + [-1] * (most - len(part)) for _, part in parts], dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Settings:
    """How a product is cut: outputs of a program, and Triton's own."""

    outputs: int = 64
    warps: int = 2
    stages: int = 3

    @staticmethod
    def for_signs(outputs: int, rows: int) -> Settings:
        """Return the fastest for a one-bit matrix on an H100, by `bench/serving.py`."""
        # Unpacking takes longer than reading, so wide blocks, which share the inputs; but of a narrow matrix these
        # would be too few to fill the GPU. Four warps make Triton pass every tile of inputs through a barrier.
        if rows > _ROWS[-2]:
            return Settings(64, 2, 3)
        return Settings(128, 2, 3) if outputs >= 2048 else Settings(32, 1, 3)


@dataclass(frozen=True)
class Signs:
    """One-bit differences of one linear, of those variants that have one.

    Attributes:
        words_VNW: int16. Bit 15 - b of word w of a span of 256 columns is set where column 16 b + w of it rises, so
            that one bit of all words is 16 neighbouring columns.
        row_VN, column_VK: scales in the model's dtype.
        slot_V: int32; by variant, which of these is its own, -1 for none.
    """

    words_VNW: Tensor
    row_VN: Tensor
    column_VK: Tensor
    slot_V: Tensor


@dataclass(frozen=True)
class Matrices:
    """Small dense matrices of one linear, of those variants that have one.

    Attributes:
        values_VNK: in the dtype in which they are multiplied.
        slot_V: as in `Signs`.
    """

    values_VNK: Tensor
    slot_V: Tensor


def slots(owners: Sequence[int], variants: int, device: torch.device | str) -> Tensor:
    """Return slot_V for matrices that belong to these variants, in order."""
    slot_V = torch.full((variants,), -1, dtype=torch.int32)
    slot_V[list(owners)] = torch.arange(len(owners), dtype=torch.int32)
    return slot_V.to(device)


def signs_of(deltas: Mapping[int, OneBit], variants: int, dtype: torch.dtype, device: torch.device | str) -> Signs:
    """Return what the kernel reads of these variants' differences."""
    return Signs(
        torch.stack([words(delta).to(device) for delta in deltas.values()]),
        torch.stack([delta.row_N.to(device, dtype) for delta in deltas.values()]),
        torch.stack([delta.column_K.to(device, dtype) for delta in deltas.values()]),
        slots(list(deltas), variants, device),
    )


def words(delta: OneBit) -> Tensor:
    """Return a difference's signs in the kernel's order, int16 [N, W]; columns beyond the last one never count."""
    bytes_NB = torch.nn.functional.pad(delta.signs_NB, (0, -delta.signs_NB.shape[-1] % (_SIGNS // 8)))
    bits = (bytes_NB[..., None] >> torch.arange(8, dtype=torch.uint8, device=bytes_NB.device)) & 1
    bits_NSBW = bits.view(len(bytes_NB), -1, 16, _WORDS).int()
    places_B = torch.arange(15, -1, -1, dtype=torch.int32, device=bits.device)
    words_NW = (bits_NSBW << places_B[:, None]).sum(-2, dtype=torch.int32).flatten(1)
    # the sum is of 16 unsigned bits, and torch has no such type that it can shift
    return torch.where(words_NW >= 2**15, words_NW - 2**16, words_NW).to(torch.int16)


@triton.jit
def _next_signs(words, TYPE: tl.constexpr, PACKED: tl.constexpr):
    """Return +1 or -1 for the highest bit of each word, and the words shifted to the next one."""
    if PACKED:  # two words in a register: flip 1.0's sign where the bit is not set, and shift both at once
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $2, 0x80008000, 0xbf80bf80, 0x6a; shl.b32 $1, $2, 1;",
            "=r,=r,r", [words], dtype=(tl.bfloat16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.where(words < 0, 1.0, -1.0).to(TYPE), (words << 1).to(tl.int16)


@triton.jit
def _one_bit(
    x_TK, out_TN, words_VNW, row_VN, column_VK, slot_V, variant_G, rows_GM,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    # in 64 bits: signs of many variants of a large matrix are more than 2^31 words
    slot = tl.load(slot_V + tl.load(variant_G + group)).to(tl.int64)
    if slot < 0:
        return
    WORDS: tl.constexpr = (COLUMNS + 16 * W - 1) // (16 * W) * W
    TYPE: tl.constexpr = x_TK.dtype.element_ty
    n = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.load(rows_GM + group * M + tl.arange(0, M))
    w = tl.arange(0, W)
    words_VNW += slot * OUTPUTS * WORDS
    column_VK += slot * COLUMNS
    x_TK += row.to(tl.int64)[None, :] * COLUMNS
    sums_NM = tl.zeros((N, M), tl.float32)
    for span in range(0, WORDS, W):
        words = tl.load(words_VNW + n[:, None] * WORDS + (span + w)[None, :], mask=(n < OUTPUTS)[:, None], other=0)
        # One bit of all words at a time: the signs never leave the registers in which the words came, and the order
        # of the columns, which a sum does not depend on, is such that these are neighbours.
        for bit in tl.static_range(16):
            k = span * 16 + bit * W + w
            scale = tl.load(column_VK + k, mask=k < COLUMNS, other=0.0).to(tl.float32)
            x = tl.load(x_TK + k[:, None], mask=(row >= 0)[None, :] & (k < COLUMNS)[:, None], other=0.0)
            signs, words = _next_signs(words, TYPE, PACKED)
            sums_NM = tl.dot(signs, (x.to(tl.float32) * scale[:, None]).to(TYPE), sums_NM, input_precision="ieee")
    scale = tl.load(row_VN + slot * OUTPUTS + n, mask=n < OUTPUTS, other=0.0).to(tl.float32)
    place = out_TN + row.to(tl.int64)[None, :] * OUTPUTS + n[:, None]
    inside = (row >= 0)[None, :] & (n < OUTPUTS)[:, None]
    sums_NM = tl.load(place, mask=inside, other=0.0).to(tl.float32) + sums_NM * scale[:, None]
    tl.store(place, sums_NM.to(out_TN.dtype.element_ty), mask=inside)


def add_one_bit(out_TN: Tensor, x_TK: Tensor, signs: Signs, groups: Groups, settings: Settings | None = None) -> None:
    """Add to every row what its variant's one-bit difference makes of it, in place; rows of others stay."""
    columns, outputs, rows = x_TK.shape[1], out_TN.shape[1], groups.rows_GM.shape[1]
    settings = settings or Settings.for_signs(outputs, rows)
    blocks = min(settings.outputs, max(16, power_of_two(outputs)))
    launch(
        _one_bit, (-(-outputs // blocks), len(groups.variant_G)),
        x_TK.contiguous(), out_TN, signs.words_VNW, signs.row_VN, signs.column_VK, signs.slot_V,
        groups.variant_G, groups.rows_GM,
        COLUMNS=columns, OUTPUTS=outputs, N=blocks, M=rows, W=_WORDS,
        PACKED=x_TK.dtype == torch.bfloat16 and not _INTERPRETED,
        num_warps=settings.warps, num_stages=settings.stages,
    )  # fmt: skip


@triton.jit
def _product(
    x_TK, out_TN, values_VNK, slot_V, variant_G, rows_GM,
    COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    slot = tl.load(slot_V + tl.load(variant_G + group)).to(tl.int64)
    if slot < 0:
        return
    n = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.load(rows_GM + group * M + tl.arange(0, M))
    values_VNK += slot * OUTPUTS * COLUMNS + n[:, None] * COLUMNS
    x_TK += row.to(tl.int64)[None, :] * COLUMNS
    sums_NM = tl.zeros((N, M), tl.float32)
    for start in range(0, COLUMNS, K):
        k = start + tl.arange(0, K)
        inside = k < COLUMNS
        values = tl.load(values_VNK + k[None, :], mask=(n < OUTPUTS)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_TK + k[:, None], mask=(row >= 0)[None, :] & inside[:, None], other=0.0)
        sums_NM = tl.dot(values, x.to(values.dtype), sums_NM, input_precision="ieee")
    place = out_TN + row.to(tl.int64)[None, :] * OUTPUTS + n[:, None]
    inside = (row >= 0)[None, :] & (n < OUTPUTS)[:, None]
    if ADDED:
        sums_NM += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, sums_NM.to(out_TN.dtype.element_ty), mask=inside)


def product(
    out_TN: Tensor, x_TK: Tensor, matrices: Matrices, groups: Groups, *, added: bool, settings: Settings | None = None
) -> None:
    """Put into every row its variant's matrix times the row, or add it to what is there; rows of others stay."""
    columns, outputs, rows = x_TK.shape[1], out_TN.shape[1], groups.rows_GM.shape[1]
    # few outputs of many inputs, as LoRA's first matrix has: small blocks, so that many programs share the reading
    settings = settings or Settings(outputs=16 if outputs < columns else 64)
    blocks = min(settings.outputs, max(16, power_of_two(outputs)))
    launch(
        _product, (-(-outputs // blocks), len(groups.variant_G)),
        x_TK.contiguous(), out_TN, matrices.values_VNK, matrices.slot_V, groups.variant_G, groups.rows_GM,
        COLUMNS=columns, OUTPUTS=outputs, N=blocks, M=rows, K=min(128, max(16, power_of_two(columns))), ADDED=added,
        num_warps=settings.warps, num_stages=settings.stages,
    )  # fmt: skip


def add_low_rank(out_TN: Tensor, x_TK: Tensor, a_VRK: Matrices, b_VNR: Matrices, groups: Groups) -> None:
    """Add to every row its variant's low-rank product B A x, in place; ranks are filled up with zeros."""
    # in the model's dtype, as PEFT's layers have it between the two matrices
    inner_TR = x_TK.new_empty(len(x_TK), a_VRK.values_VNK.shape[1])
    product(inner_TR, x_TK, a_VRK, groups, added=False)
    product(out_TN, inner_TR, b_VNR, groups, added=True)
