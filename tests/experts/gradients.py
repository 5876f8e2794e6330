"""What experts compute, forward and backward; apart from `helpers`, which imports all that trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Tensors = tuple[Tensor, Tensor, Tensor]


def outputs_and_gradients(experts: Callable[..., Tensor], batch: Tensors) -> Tensors:
    """Outputs_TD, and gradients of hidden states_TD and weights_TK, for a fixed gradient of the outputs."""
    states, index, weights = batch
    states, weights = states.detach().requires_grad_(), weights.detach().requires_grad_()
    out = experts(states, index, weights)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
    assert states.grad is not None and weights.grad is not None
    return out.detach(), states.grad, weights.grad
