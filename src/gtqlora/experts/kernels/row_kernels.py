"""Triton kernels over rows, at the speed of memory: gathering, the gate, and the sums over a token's choices.

A row is one (token, choice) pair, sorted by expert; the rows from offsets_E1[-1] on belong to experts held elsewhere
and are neither read nor written. All sums are in fp32. Shape letters as in `rows`; C columns, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from gtqlora.errors import ModelError

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ModelError('the kernels for GPUs need Triton: pip install triton, or set kernel = "reference"') from missing

_WIDEST = 1024
"""Columns a program works on at a time: 16 bytes a thread of 4 warps in half precision."""


class Kernel(Protocol):
    """A function under `triton.jit`."""

    def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., object]:
        """Return what starts the kernel on a grid of programs."""
        ...


def launch(kernel: Kernel, grid: tuple[int, ...], *arguments: Tensor | int, **constants: int) -> None:
    """Start a Triton kernel; an empty grid starts nothing.

    Args:
        constants: what the kernel is compiled with, and Triton's own settings such as `num_warps`.
    """
    if all(grid):
        kernel[grid](*arguments, **constants)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _columns(columns: int) -> dict[str, int]:
    return {"COLUMNS": columns, "BLOCK": min(_WIDEST, power_of_two(columns))}


@triton.jit
def _gather(values_TC, order_R, offsets_E1, out_RC, experts, top_k, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row >= tl.load(offsets_E1 + experts):
        return
    values_TC += (tl.load(order_R + row) // top_k).to(tl.int64) * COLUMNS
    out_RC += row.to(tl.int64) * COLUMNS
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        tl.store(out_RC + column, tl.load(values_TC + column, mask=inside), mask=inside)


def gather(values_TC: Tensor, order_R: Tensor, offsets_E1: Tensor, top_k: int) -> Tensor:
    """Return values_RC of each row's token."""
    rows, columns = len(order_R), values_TC.shape[1]
    out_RC = values_TC.new_empty(rows, columns)
    arguments = (values_TC.contiguous(), order_R, offsets_E1, out_RC, len(offsets_E1) - 1, top_k)
    launch(_gather, (rows,), *arguments, **_columns(columns))
    return out_RC


@triton.jit
def _gated(gate_up_R2I, offsets_E1, out_RI, experts, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row >= tl.load(offsets_E1 + experts):
        return
    gate_up_R2I += row.to(tl.int64) * 2 * COLUMNS
    out_RI += row.to(tl.int64) * COLUMNS
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        gate = tl.load(gate_up_R2I + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_R2I + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_RI + column, (gate * tl.sigmoid(gate) * up).to(out_RI.dtype.element_ty), mask=inside)


def gated(gate_up_R2I: Tensor, offsets_E1: Tensor) -> Tensor:
    """Return silu(gate) * up, rounded once."""
    rows, inner = len(gate_up_R2I), gate_up_R2I.shape[1] // 2
    out_RI = gate_up_R2I.new_empty(rows, inner)
    launch(_gated, (rows,), gate_up_R2I, offsets_E1, out_RI, len(offsets_E1) - 1, **_columns(inner))
    return out_RI


@triton.jit
def _gated_backward(
    grad_RI, gate_up_R2I, weights_TK, order_R, offsets_E1, out_R2I, dots_TK, experts,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.load(order_R + row)
    if row >= tl.load(offsets_E1 + experts):
        tl.store(dots_TK + place, 0.0)
        return
    weight = tl.load(weights_TK + place).to(tl.float32)
    grad_RI += row.to(tl.int64) * COLUMNS
    gate_up_R2I += row.to(tl.int64) * 2 * COLUMNS
    out_R2I += row.to(tl.int64) * 2 * COLUMNS
    dots = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < COLUMNS
        grad = tl.load(grad_RI + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up_R2I + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_R2I + COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        active = gate * share
        dots += grad * active * up
        grad *= weight
        # The derivative of silu(g) = g s(g) is s + g s (1 - s), with s the sigmoid of g.
        grad_gate = grad * up * (share + active * (1.0 - share))
        tl.store(out_R2I + column, grad_gate.to(out_R2I.dtype.element_ty), mask=inside)
        tl.store(out_R2I + COLUMNS + column, (grad * active).to(out_R2I.dtype.element_ty), mask=inside)
    tl.store(dots_TK + place, tl.sum(dots, 0))


def gated_backward(
    grad_RI: Tensor, gate_up_R2I: Tensor, weights_TK: Tensor, order_R: Tensor, offsets_E1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate_up_R2I and of the routing weights_TK (fp32; 0 for experts held elsewhere).

    Args:
        grad_RI: the gradient of silu(gate) * up before the routing weight comes in.
    """
    out_R2I = torch.empty_like(gate_up_R2I)
    dots_TK = torch.zeros(weights_TK.shape, dtype=torch.float32, device=weights_TK.device)
    arguments = (grad_RI, gate_up_R2I, weights_TK, order_R, offsets_E1, out_R2I, dots_TK, len(offsets_E1) - 1)
    launch(_gated_backward, (len(grad_RI),), *arguments, **_columns(grad_RI.shape[1]))
    return out_R2I, dots_TK


@triton.jit
def _combine(
    values_RC, places_TK, weights_TK, offsets_E1, out_TC, experts,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    rows = tl.load(offsets_E1 + experts)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for choice in tl.static_range(TOP_K):
            row = tl.load(places_TK + token * TOP_K + choice).to(tl.int64)
            held = (column < COLUMNS) & (row < rows)
            value = tl.load(values_RC + row * COLUMNS + column, mask=held, other=0.0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(weights_TK + token * TOP_K + choice).to(tl.float32)
            total += value
        tl.store(out_TC + token * COLUMNS + column, total.to(out_TC.dtype.element_ty), mask=column < COLUMNS)


def combine(values_RC: Tensor, places_TK: Tensor, offsets_E1: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Return sums_TC over each token's choices, by their weights if given, rounded once.

    Args:
        places_TK: the row of each (token, choice).
    """
    (tokens, top_k), columns = places_TK.shape, values_RC.shape[1]
    out_TC = values_RC.new_empty(tokens, columns)
    # An unweighted kernel never reads the weights, but takes a pointer.
    weights = values_RC if weights_TK is None else weights_TK
    arguments = (values_RC, places_TK, weights, offsets_E1, out_TC, len(offsets_E1) - 1)
    constants = {"TOP_K": top_k, "WEIGHTED": weights_TK is not None, **_columns(columns)}
    launch(_combine, (tokens,), *arguments, **constants)
    return out_TC
