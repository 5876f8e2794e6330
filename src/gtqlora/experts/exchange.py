"""How tokens come to the experts that other ranks hold, and how these experts' outputs come back.

A rank holds a range of every layer's experts and computes what that range adds to the sums. Where every rank has the
same tokens, the sums are added up (`SAME`). Where each has its own, which are as many, all ranks are given the tokens
of all, and each gets back the sums of its own (`OWN`): with K experts a token and fewer ranks than that, nearly every
token is wanted on every rank, so this moves hardly more than sending each token only where it is wanted, in passes
whose shapes are known, so that nothing waits for the GPU. Gradients go the same ways back.

Shape letters: T tokens of a rank, N of all ranks, D hidden, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SAME, OWN = "same", "own"

# torch 2.13 calls them otherwise, and warns of the old names
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup
Sums = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_TD, index_TK, weights_TK) -> weighted sums_TD over the experts held here."""


class Exchange:
    """The ranks that hold a model's experts together.

    Attributes:
        group: of these ranks.
        tokens: whether every rank has the same tokens, or each its own.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.tokens: Literal["same", "own"] = SAME

    @property
    def count(self) -> int:
        """Return the number of ranks."""
        return dist.get_world_size(self.group)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Let each rank run tokens of its own for a while; all have to bring as many."""
        before, self.tokens = self.tokens, OWN
        try:
            yield
        finally:
            self.tokens = before

    def __call__(self, sums: Sums, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the weighted sums_TD over the experts of all ranks."""
        if self.tokens == SAME:
            hidden_TD, weights_TK = _Copied.apply(self.group, hidden_TD, weights_TK)  # type: ignore[misc]
            return _Added.apply(self.group, sums(hidden_TD, index_TK, weights_TK))  # type: ignore[return-value]
        index_NK = self.all_of(index_TK.int()).to(index_TK.dtype)
        hidden_ND, weights_NK = _Gathered.apply(self.group, hidden_TD, weights_TK)  # type: ignore[misc]
        return _Scattered.apply(self.group, sums(hidden_ND, index_NK, weights_NK))  # type: ignore[return-value]

    def all_of(self, values: Tensor) -> Tensor:
        """Return values [T, ...] of the tokens that all ranks have together, which get no gradients."""
        return values if self.tokens == SAME else gathered(values, self.group)

    def sum_of(self, values: Tensor) -> Tensor:
        """Return what all ranks found [N, ...] for these tokens, added up; of this rank's tokens."""
        sums = _Added if self.tokens == SAME else _Scattered
        return sums.apply(self.group, values)  # type: ignore[return-value]


def exchange_of(model: nn.Module) -> Exchange | None:
    """Return the exchange of a model whose experts are held by several ranks."""
    return next((found for module in model.modules() if (found := getattr(module, "exchange", None)) is not None), None)


def gather_into(whole: Tensor, part: Tensor, group: Group) -> None:
    """Put the parts [P, ...] of all ranks into whole [ranks * P, ...], in their order."""
    _all_gather(whole, part, group=group)


def gathered(values_TD: Tensor, group: Group) -> Tensor:
    """Return values_ND of all ranks, in their order."""
    whole = values_TD.new_empty(dist.get_world_size(group) * len(values_TD), *values_TD.shape[1:])
    gather_into(whole, values_TD.contiguous(), group)
    return whole


def scattered(values_ND: Tensor, group: Group) -> Tensor:
    """Return this rank's values_TD of the sums over all ranks."""
    mine = values_ND.new_empty(len(values_ND) // dist.get_world_size(group), *values_ND.shape[1:])
    _reduce_scatter(mine, values_ND.contiguous(), group=group)
    return mine


def _added(values: Tensor, group: Group) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Passed(Protocol):
    """What a forward pass leaves for its backward pass."""

    group: Group
    needs_input_grad: tuple[bool, ...]


class _Gathered(torch.autograd.Function):
    """Tensors of each rank -> of all; the gradients of all ranks are added up."""

    @staticmethod
    def forward(ctx: _Passed, group: Group, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(gathered(value, group) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(grads, ctx.needs_input_grad[1:], strict=True)
        return None, *(scattered(grad, ctx.group) if needed else None for grad, needed in wanted)


class _Scattered(torch.autograd.Function):
    """What each rank adds to the sums of all tokens -> the sums of this rank's."""

    @staticmethod
    def forward(ctx: _Passed, group: Group, values_ND: Tensor) -> Tensor:
        ctx.group = group
        return scattered(values_ND, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, gathered(grads[0], ctx.group)


class _Copied(torch.autograd.Function):
    """Tensors that all ranks have -> the same; each rank's gradients are a part of theirs."""

    @staticmethod
    def forward(ctx: _Passed, group: Group, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(grads, ctx.needs_input_grad[1:], strict=True)
        return None, *(_added(grad, ctx.group) if needed else None for grad, needed in wanted)


class _Added(torch.autograd.Function):
    """What each rank adds to the sums of the tokens that all have -> the sums."""

    @staticmethod
    def forward(ctx: _Passed, group: Group, values_TD: Tensor) -> Tensor:
        return _added(values_TD, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0]
