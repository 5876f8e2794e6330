"""The fused kernel: a grouped product in Triton that dequantizes 4-bit weights on the way to the multiplication.

Shape letters as in `rows`; N outputs and K inputs of one expert's matrices together, C contraction, S results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.experts.kernels import hopper
from gtqlora.experts.kernels.codes import code_at, codes_in, codes_of, integer, level, scales_of
from gtqlora.experts.kernels.layer import run
from gtqlora.experts.kernels.row_kernels import launch, power_of_two, tl, triton
from gtqlora.experts.kernels.rows import Experts, Placed, compute_dtype
from gtqlora.experts.layout import Fused


def fused(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sums_TD of the experts' outputs; no dequantized weight is ever in memory.

    Raises:
        ModelError: a dtype or format that the kernels do not take.
    """
    if not hopper.takes(module, hidden_states, compute_dtype(hidden_states)):
        return run(module, hidden_states, top_k_index, top_k_weights, triton_multiply)
    return run(module, hidden_states, top_k_index, top_k_weights, hopper.multiply, hopper.sort)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What one program computes: `m` rows by `n` results, `k` of the contraction at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def blocks_for(rows_per_expert: float, results: int, contraction: int, dtype: torch.dtype) -> Blocks:
    """Few rows are bound by memory and want long runs of weights; fp32 has no tensor cores here and little room."""
    m = min(max(16, power_of_two(math.ceil(rows_per_expert))), 128)
    if dtype == torch.float32:
        m, n, k, warps, stages = 32, 64, 32, 4, 2
    elif m <= 32:
        n, k, warps, stages = 64, 128, 4, 3
    else:
        n, k, warps, stages = 128, 64, 8 if m == 128 else 4, 3
    return Blocks(m=m, n=_fit(n, results), k=_fit(k, contraction), warps=warps, stages=stages)


def _fit(block: int, size: int) -> int:
    return min(block, max(16, power_of_two(size)))


@triton.jit
def _find_tile(offsets_E1, tile, EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr, M: tl.constexpr):
    """The expert, first row and end of its rows for a tile of M rows, and whether there is such a tile."""
    expert = tl.arange(0, EXPERTS_PADDED)
    begin = tl.load(offsets_E1 + expert, mask=expert < EXPERTS, other=0)
    end = tl.load(offsets_E1 + expert + 1, mask=expert < EXPERTS, other=0)
    tiles = (end - begin + M - 1) // M
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    exists = mine < EXPERTS
    before = tl.sum(tl.where(expert < mine, tiles, 0), 0)
    row = tl.load(offsets_E1 + mine, mask=exists, other=0) + (tile - before) * M
    return mine, row, tl.load(offsets_E1 + mine + 1, mask=exists, other=0), exists


@triton.jit
def _weights(
    words, scales, scale_scales, offsets, scale_levels, n, start,
    NF4: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
    MATRICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """An expert's weights (fp32) at the outputs `n` and the inputs `start` to `start + WIDTH - 1`.

    SPAN inputs, a power of two, are certain to share a scale; from 8 on they are whole words.
    """
    height: tl.constexpr = n.shape[0]
    real = n < MATRICES * ROWS
    span = start + tl.arange(0, WIDTH // SPAN) * SPAN
    block = ((n % ROWS) * COLUMNS)[:, None] + span[None, :]
    inside = real[:, None] & (span < COLUMNS)[None, :]
    matrix = tl.broadcast_to((n // ROWS)[:, None], (height, WIDTH // SPAN))
    scale = scales_of(block // GROUP, matrix, inside, scales, scale_scales, offsets, scale_levels, NF4, BLOCKS, NESTED)
    if SPAN >= 8:
        word = start // 8 + tl.arange(0, WIDTH // 8)
        inside = real[:, None] & (word < COLUMNS // 8)[None, :]
        found = tl.load(words + n[:, None] * (COLUMNS // 8) + word[None, :], mask=inside, other=0)
        code = codes_in(found, NF4)
    else:
        k = start + tl.arange(0, WIDTH)
        place = n[:, None] * COLUMNS + k[None, :]
        found = tl.load(words + place // 8, mask=real[:, None] & (k < COLUMNS)[None, :], other=0)
        code = code_at(found, place % 8, NF4)
    value = level(code) if NF4 else integer(code)
    return tl.reshape(tl.reshape(value, (height, WIDTH // SPAN, SPAN)) * scale[:, :, None], (height, WIDTH))


@triton.jit
def _grouped(
    values_RC, out_RS, offsets_E1, words, scales, scale_scales, offsets, _levels, scale_levels,
    NF4: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    MATRICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr,
    TRANSPOSED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    RESULTS: tl.constexpr = COLUMNS if TRANSPOSED else MATRICES * ROWS
    CONTRACTION: tl.constexpr = MATRICES * ROWS if TRANSPOSED else COLUMNS
    ACROSS: tl.constexpr = (RESULTS + N - 1) // N
    tile = tl.program_id(0) // ACROSS
    expert, row, end, exists = _find_tile(  # pyright: ignore[reportGeneralTypeIssues]: JIT functions seem not to return
        offsets_E1, tile, EXPERTS, EXPERTS_PADDED, M
    )
    if not exists:
        return
    matrix = expert.to(tl.int64) * MATRICES
    words += matrix * (ROWS * COLUMNS // 8)
    scales += matrix * BLOCKS
    scale_scales += matrix * NESTED
    offsets += matrix
    first = (tl.program_id(0) % ACROSS) * N
    result = first + tl.arange(0, N)
    rows = row + tl.arange(0, M)
    values_RC += rows[:, None].to(tl.int64) * CONTRACTION
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, CONTRACTION, K):
        inner = start + tl.arange(0, K)
        inside = (rows < end)[:, None] & (inner < CONTRACTION)[None, :]
        value = tl.load(values_RC + inner[None, :], mask=inside, other=0.0)
        if TRANSPOSED:
            weight = _weights(
                words, scales, scale_scales, offsets, scale_levels, inner, first,
                NF4, GROUP, BLOCKS, NESTED, MATRICES, ROWS, COLUMNS, N, SPAN,
            ).to(value.dtype)  # fmt: skip
        else:
            weight = _weights(
                words, scales, scale_scales, offsets, scale_levels, result, start,
                NF4, GROUP, BLOCKS, NESTED, MATRICES, ROWS, COLUMNS, K, SPAN,
            ).to(value.dtype).trans(1, 0)  # fmt: skip
        total = tl.dot(value, weight, total, input_precision="ieee")
    out_RS += rows[:, None].to(tl.int64) * RESULTS + result[None, :]
    tl.store(out_RS, total.to(out_RS.dtype.element_ty), mask=(rows < end)[:, None] & (result < RESULTS)[None, :])


def triton_multiply(values_RC: Tensor, module: Experts, projection: Fused, rows: Placed, transposed: bool) -> Tensor:
    """Multiply as a `layer.Multiply` does, for sizes, group sizes and numbers of rows of any kind.

    Raises:
        ModelError: a format that the kernel does not know.
    """
    codes = codes_of(module, projection)
    outputs = codes.matrices * codes.rows
    results, contraction = (codes.columns, outputs) if transposed else (outputs, codes.columns)
    n_rows = len(values_RC)
    blocks = blocks_for(n_rows / codes.experts, results, contraction, values_RC.dtype)
    out_RS = values_RC.new_empty(n_rows, results)
    tiles = n_rows // blocks.m + min(codes.experts, n_rows)
    launch(
        _grouped,
        (tiles * -(-results // blocks.n),),
        *(values_RC.contiguous(), out_RS, rows.offsets_E1, *codes.tensors),
        **codes.constants,
        EXPERTS=codes.experts,
        EXPERTS_PADDED=power_of_two(codes.experts),
        MATRICES=codes.matrices,
        ROWS=codes.rows,
        COLUMNS=codes.columns,
        SPAN=math.gcd(codes.group, codes.columns, blocks.n if transposed else blocks.k),
        TRANSPOSED=transposed,
        M=blocks.m,
        N=blocks.n,
        K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out_RS
