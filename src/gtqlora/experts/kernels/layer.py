"""One layer of experts as an autograd function, shared by the kernels for GPUs, which differ in how they multiply.

All T*K rows are sorted by expert, those for experts held elsewhere last; these are never read, so what they hold does
not matter. Nothing here waits for the GPU, unless the module gives room to no such row (`rows.Room`).
Shape letters as in `rows`; I intermediate size, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation

from gtqlora.errors import ModelError
from gtqlora.experts.kernels import row_kernels
from gtqlora.experts.kernels.rows import Context, Experts, Placed, activated, compute_dtype, place_rows, sum_of
from gtqlora.experts.layout import Fused

Multiply = Callable[[Tensor, Experts, Fused, Placed, bool], Tensor]
"""(values_RC, module, projection, rows, transposed) -> contiguous products, in the values' dtype, of the rows
offsets[e] to offsets[e + 1] with expert e's matrix, or back from its outputs to its inputs if transposed.
Rows from offsets[-1] on may hold anything, and hold anything afterwards."""

Sort = Callable[[Tensor, int, int], Placed]
"""(top_k_index_TK, first, count) -> rows sorted by expert, as `rows.place_rows` does it."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(
    module: Experts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    multiply: Multiply,
    sort: Sort = place_rows,
) -> Tensor:
    """Return the weighted sums_TD of the experts' outputs, with gradients for hidden_states_TD and top_k_weights_TK.

    Args:
        multiply: kept for backward; it is given the same rows there.
        sort: how rows are sorted; what it does beyond `rows.place_rows` is for `multiply`.

    Raises:
        ModelError: a dtype that the kernels do not take.
    """
    if not len(hidden_states):
        # No tokens: an empty result that still has gradients.
        return hidden_states * top_k_weights.sum()
    hidden = hidden_states.to(compute_dtype(hidden_states))
    if hidden.dtype not in _DTYPES:
        raise ModelError(f'this kernel takes bf16, fp16 or fp32, not {hidden.dtype}; set kernel = "reference"')
    with _without_autocast(hidden), torch.cuda.device_of(hidden):
        out: Any = _Layer.apply(hidden, top_k_weights.contiguous(), top_k_index, module, multiply, sort)
    return out.to(hidden_states.dtype)


class LayerContext(Context, Protocol):
    """An autograd context that also keeps how to multiply, and the height of the rows' tiles."""

    multiply: Multiply
    most: int


class _Layer(torch.autograd.Function):
    """Keeps the rows' gate_up_R2I and who they are for backward; no outputs of down, and no weights."""

    @staticmethod
    def forward(
        ctx: LayerContext,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        index_TK: Tensor,
        module: Experts,
        multiply: Multiply,
        sort: Sort,
    ) -> Tensor:
        rows = sort(index_TK, module.first, module.count)
        rows = rows if module.room is None else module.room(rows)
        hidden_RD = row_kernels.gather(hidden_TD, rows.order_R, rows.offsets_E1, rows.top_k)
        here = module.fetch(returns=any(ctx.needs_input_grad))
        gate_up_R2I = multiply(hidden_RD, here, "gate_up", rows, False)
        # Each [R, D] tensor goes as soon as it may: the peak of memory is here.
        del hidden_RD
        outputs_RD = multiply(_gated(gate_up_R2I, module, rows.offsets_E1), here, "down", rows, False)
        module.leave()
        if any(ctx.needs_input_grad):
            of_rows = (rows.order_R, rows.offsets_E1, rows.places_TK, rows.tiles, rows.n_tiles)
            ctx.save_for_backward(gate_up_R2I, weights_TK, *of_rows)
            ctx.module, ctx.multiply, ctx.most = module, multiply, rows.most
        return row_kernels.combine(outputs_RD, rows.places_TK, rows.offsets_E1, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: LayerContext, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        gate_up_R2I, weights_TK, *of_rows = ctx.saved_tensors
        rows, module, multiply = _kept_rows(of_rows, weights_TK.shape[-1], ctx.most), ctx.module, ctx.multiply
        with _without_autocast(grad_TD), torch.cuda.device_of(grad_TD):
            grad_RD = row_kernels.gather(grad_TD.to(gate_up_R2I.dtype), rows.order_R, rows.offsets_E1, rows.top_k)
            here = module.fetch(back=True)
            grad_RI = multiply(grad_RD, here, "down", rows, True)
            del grad_RD
            grad_R2I, grad_weights = _gated_backward(grad_RI, gate_up_R2I, weights_TK, rows, module)
            del grad_RI
            grad_hidden = None
            if ctx.needs_input_grad[0]:
                grad_RD = multiply(grad_R2I, here, "gate_up", rows, True)
                grad_hidden = row_kernels.combine(grad_RD, rows.places_TK, rows.offsets_E1)
            module.leave()
        of_weights = grad_weights.to(weights_TK.dtype) if ctx.needs_input_grad[1] else None
        return grad_hidden, of_weights, None, None, None, None


def _kept_rows(tensors: list[Tensor], top_k: int, most: int) -> Placed:
    """Return the rows of the forward pass."""
    order_R, offsets_E1, places_TK, tiles, n_tiles = tensors
    return Placed(
        order_R=order_R,
        offsets_E1=offsets_E1,
        top_k=top_k,
        places_TK=places_TK,
        tiles=tiles,
        n_tiles=n_tiles,
        most=most,
    )


def _without_autocast(values: Tensor) -> AbstractContextManager[object]:
    kind = values.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _is_silu(act_fn: Any) -> bool:
    """Return whether this is SiLU: torch's, or transformers' class of its own, which every loaded model has."""
    return isinstance(act_fn, nn.SiLU | SiLUActivation) or act_fn is nn.functional.silu


def _gated(gate_up_R2I: Tensor, module: Experts, offsets_E1: Tensor) -> Tensor:
    if _is_silu(module.act_fn):
        return row_kernels.gated(gate_up_R2I, offsets_E1)
    return activated(gate_up_R2I, module)


def _gated_backward(
    grad_RI: Tensor,
    gate_up_R2I: Tensor,
    weights_TK: Tensor,
    rows: Placed,
    module: Experts,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate_up_R2I and the routing weights_TK, from that of the unweighted gated values."""
    if _is_silu(module.act_fn):
        return row_kernels.gated_backward(grad_RI, gate_up_R2I, weights_TK, rows.order_R, rows.offsets_E1)
    dtype = sum_of(grad_RI.dtype)
    with torch.enable_grad():
        leaf_R2I = gate_up_R2I.detach().requires_grad_()
        inner_RI = activated(leaf_R2I, module)
    weights_R1 = weights_TK.flatten()[rows.order_R].unsqueeze(-1)
    (grad_R2I,) = torch.autograd.grad(inner_RI, leaf_R2I, (grad_RI.to(dtype) * weights_R1).to(grad_RI.dtype))
    # The gradient of a routing weight is the dot product of its row's output and gradient.
    dots_R = (grad_RI.to(dtype) * inner_RI.detach()).sum(-1)
    dots_TK = dots_R[rows.places_TK.clamp(max=len(dots_R) - 1)]  # rows held elsewhere may be left out
    return grad_R2I, dots_TK.masked_fill(rows.places_TK >= rows.offsets_E1[-1], 0)
