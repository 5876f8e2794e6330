"""The reference kernel, in plain torch: dequantize, multiply expert by expert, on any device in any float dtype.

Shape letters as in `rows`; I intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gtqlora.experts.kernels.rows import (
    Context,
    Experts,
    Rows,
    activated,
    combine,
    compute_dtype,
    fused_sizes,
    gather,
    sort_rows,
    spread,
    sum_of,
)
from gtqlora.experts.layout import Fused

_WEIGHTS_AT_ONCE = 2**24
"""Weights dequantized in one go: all experts of a small layer, one of a large one."""


def reference(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sums_TD of the experts' outputs, with gradients for hidden_states_TD and top_k_weights_TK."""
    rows = sort_rows(top_k_index, module.first, module.count)
    hidden = hidden_states.to(compute_dtype(hidden_states))
    with torch.autocast(hidden.device.type, enabled=False):
        out: Any = _Reference.apply(hidden, top_k_weights, rows, module)
    return out.to(hidden_states.dtype)


class ReferenceContext(Context, Protocol):
    """An autograd context that also keeps the rows' bounds."""

    offsets: list[int]


class _Reference(torch.autograd.Function):
    """Keeps the rows' gate_up_N2I for backward and no weights, which are dequantized again."""

    @staticmethod
    def forward(ctx: ReferenceContext, hidden_TD: Tensor, weights_TK: Tensor, rows: Rows, module: Experts) -> Tensor:
        offsets = rows.offsets_E1.tolist()
        here = module.fetch(returns=any(ctx.needs_input_grad))
        gate_up_N2I = _products(gather(hidden_TD, rows, offsets[-1]), here, "gate_up", offsets)
        outputs_ND = _products(activated(gate_up_N2I, module), here, "down", offsets)
        module.leave()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(gate_up_N2I, weights_TK, rows.order_R, rows.offsets_E1)
            ctx.offsets, ctx.module = offsets, module
        return combine(outputs_ND, weights_TK, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: ReferenceContext, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gate_up_N2I, weights_TK, order_R, offsets_E1 = ctx.saved_tensors
        rows = Rows(order_R=order_R, offsets_E1=offsets_E1, top_k=weights_TK.shape[-1])
        offsets, module, dtype = ctx.offsets, ctx.module, gate_up_N2I.dtype
        with torch.autocast(grad_TD.device.type, enabled=False):
            here = module.fetch(back=True)
            grad_NI = _products(gather(grad_TD.to(dtype), rows, offsets[-1]), here, "down", offsets, transposed=True)
            weights_N1 = weights_TK.flatten()[rows.order_R[: offsets[-1]]].unsqueeze(-1)
            with torch.enable_grad():
                leaf_N2I = gate_up_N2I.detach().requires_grad_()
                inner_NI = activated(leaf_N2I, module)
            grad_weights = grad_hidden = None
            if ctx.needs_input_grad[1]:
                dots_N = (grad_NI.to(sum_of(dtype)) * inner_NI.detach()).sum(-1)
                grad_weights = spread(dots_N, rows).to(weights_TK.dtype)
            if ctx.needs_input_grad[0]:
                (grad_N2I,) = torch.autograd.grad(inner_NI, leaf_N2I, (grad_NI * weights_N1).to(dtype))
                grad_ND = _products(grad_N2I, here, "gate_up", offsets, transposed=True)
                grad_hidden = spread(grad_ND, rows).sum(1)
            module.leave()
        return grad_hidden, grad_weights, None, None


def _products(
    values_NK: Tensor,
    module: Experts,
    projection: Fused,
    offsets: list[int],
    *,
    transposed: bool = False,
) -> Tensor:
    """Multiply each row by its expert's matrix; from the outputs back to the inputs if `transposed`."""
    outputs, inputs = fused_sizes(module, projection)
    dtype = values_NK.dtype
    # Half-precision products add up in fp32 anyway; most CPUs are several times faster on fp32 numbers.
    values_NK = values_NK.to(sum_of(dtype)) if values_NK.device.type == "cpu" else values_NK
    out = values_NK.new_empty(len(values_NK), inputs if transposed else outputs)
    for experts in _spans(offsets, outputs * inputs):
        matrices = module.weights(projection, experts, dtype).to(out.dtype)
        matrices = matrices if transposed else matrices.mT
        bounds = offsets[experts.start : experts.stop + 1]
        for matrix, (start, stop) in zip(matrices.unbind(), pairwise(bounds), strict=True):
            if start < stop:
                torch.mm(values_NK[start:stop], matrix, out=out[start:stop])
    return out.to(dtype)


def _spans(offsets: list[int], weights: int) -> Iterator[slice]:
    """Yield experts to dequantize together, `weights` each; spans without rows are left out."""
    step, count = max(1, _WEIGHTS_AT_ONCE // weights), len(offsets) - 1
    for start in range(0, count, step):
        stop = min(start + step, count)
        if offsets[start] < offsets[stop]:
            yield slice(start, stop)
