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

from gtqlora.experts.messages import Group, Messages, Way
from gtqlora.experts.peer_memory import PeerMemory, are_readable

SAME, OWN = "same", "own"

Sums = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_TD, index_TK, weights_TK) -> weighted sums_TD over the experts held here."""


class Exchange:
    """The ranks that hold a model's experts together.

    Attributes:
        group: of these ranks.
        tokens: whether every rank has the same tokens, or each its own.
        early: on a GPU, send hidden states while the router computes, and gradients while a layer is computed again;
            this takes memory of its own.
        direct: where there is `early`, let GPUs read one another's memory if they can; this takes memory, too.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.early, self.direct = group, True, True
        self._ways: list[Way] = []
        self.tokens: Literal["same", "own"] = SAME
        self._side: _Beside | None = None
        self._sent: tuple[Tensor, Tensor] | None = None
        self._sends = True

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
        way = self._way(hidden_TD.device)
        index_NK, weights_NK = _Routed.apply(way, index_TK, weights_TK)  # type: ignore[misc]
        hidden_ND = self._sent_before(hidden_TD)
        if hidden_ND is None:
            hidden_ND = _Gathered.apply(way, hidden_TD)
        sums_ND = sums(hidden_ND, index_NK, weights_NK)
        if self.early and sums_ND.is_cuda:
            beside = self._beside(sums_ND.device)
            sums_ND = _Awaited.apply(beside, sums_ND, weights_NK)
            return _ScatteredEarly.apply(way, beside, sums_ND)  # type: ignore[return-value]
        return _Scattered.apply(way, sums_ND)  # type: ignore[return-value]

    def send(self, hidden: Tensor) -> None:
        """Send what a router is given [..., D], which nearly always is what its experts are given, too."""
        if self.tokens == SAME or not (self.early and self._sends and hidden.is_cuda):
            return
        way, beside = self._way(hidden.device), self._beside(hidden.device)
        sent: Any = _GatheredEarly.apply(way, beside, hidden.flatten(0, -2))
        self._sent = hidden, sent

    def forget(self) -> None:
        """As `Way`."""
        for way in self._ways:
            way.forget()

    @property
    def nbytes(self) -> int:
        """As `Way`."""
        return sum(way.nbytes for way in self._ways)

    def _way(self, device: torch.device, *, beside: bool = False) -> Way:
        """Return how tensors travel in the stream of the model's passes, or beside it."""
        if not self._ways:
            direct = self.early and self.direct and device.type == "cuda" and are_readable(self.group, device)
            self._ways = [PeerMemory(self.group, device) if direct else Messages(self.group) for _ in range(2)]
        return self._ways[beside]

    def _beside(self, device: torch.device) -> _Beside:
        self._side = self._side or _Beside(self._way(device, beside=True), device)
        return self._side

    def _sent_before(self, hidden_TD: Tensor) -> Tensor | None:
        """Return hidden_ND of all ranks, if this rank's were sent."""
        if self._sent is None or self._side is None:
            return None
        (given, sent), self._sent = self._sent, None
        self._side.wait()
        same = given.data_ptr() == hidden_TD.data_ptr() and given.numel() == hidden_TD.numel()
        self._sends = same and given.dtype == hidden_TD.dtype  # of a model that has it otherwise, for nothing
        return sent if self._sends else None

    def all_of(self, values: Tensor) -> Tensor:
        """Return values [T, ...] of the tokens that all ranks have together, which get no gradients."""
        return values if self.tokens == SAME else self._way(values.device).gathered(values)[0]

    def sum_of(self, values: Tensor) -> Tensor:
        """Return what all ranks found [N, ...] for these tokens, added up; of this rank's tokens."""
        if self.tokens == SAME:
            return _Added.apply(self.group, values)  # type: ignore[return-value]
        return _Scattered.apply(self._way(values.device), values)  # type: ignore[return-value]


class _Beside:
    """A stream for what is sent while others compute: it keeps what it reads until it is waited for.

    Nothing says so to autograd, which otherwise would keep memory from being used again for as long as passes are
    recorded. What is made here is freed here, and nothing else is begun here before all that was given to others.
    """

    def __init__(self, way: Way, device: torch.device) -> None:
        self._way, self._stream = way, torch.cuda.Stream(device)
        self._read: list[Tensor] = []

    def gathered(self, values_TD: Tensor) -> Tensor:
        """Return values_ND of all ranks, which are there once they are waited for."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._read.append(values_TD)
        with torch.cuda.stream(self._stream):
            return self._way.gathered(values_TD)[0]

    def wait(self) -> None:
        """Wait for all that was sent."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._read.clear()


def exchange_of(model: nn.Module) -> Exchange | None:
    """Return the exchange of a model whose experts are held by several ranks."""
    return next((found for module in model.modules() if (found := getattr(module, "exchange", None)) is not None), None)


def _added(values: Tensor, group: Group) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Passed(Protocol):
    """What a forward pass leaves for its backward pass."""

    group: Group
    way: Way
    beside: _Beside
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Say that these outputs have no gradients."""
        ...

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Keep tensors for the backward pass."""
        ...


class _Gathered(torch.autograd.Function):
    """What each rank's tokens have -> what all ranks' have; the gradients of all ranks are added up."""

    @staticmethod
    def forward(ctx: _Passed, way: Way, values_TD: Tensor) -> Tensor:
        ctx.way = way
        return way.gathered(values_TD)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.way.scattered(grads[0])


class _Routed(torch.autograd.Function):
    """Which experts each rank's tokens chose, and with which weights -> of all ranks."""

    @staticmethod
    def forward(ctx: _Passed, way: Way, index_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        ctx.way = way
        index_NK, weights_NK = way.gathered(index_TK.int(), weights_TK)
        index_NK = index_NK.to(index_TK.dtype)
        ctx.mark_non_differentiable(index_NK)
        return index_NK, weights_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.way.scattered(grads[1]) if ctx.needs_input_grad[2] else None


class _Scattered(torch.autograd.Function):
    """What each rank adds to the sums of all tokens -> the sums of this rank's."""

    @staticmethod
    def forward(ctx: _Passed, way: Way, values_ND: Tensor) -> Tensor:
        ctx.way = way
        return way.scattered(values_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.way.gathered(grads[0])[0]


class _GatheredEarly(torch.autograd.Function):
    """`_Gathered`, whose values are there once they are waited for."""

    @staticmethod
    def forward(ctx: _Passed, way: Way, beside: _Beside, values_TD: Tensor) -> Tensor:
        ctx.way = way
        return beside.gathered(values_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.way.scattered(grads[0])


class _ScatteredEarly(torch.autograd.Function):
    """`_Scattered`, whose gradients are there once `_Awaited` has waited for them."""

    @staticmethod
    def forward(ctx: _Passed, way: Way, beside: _Beside, values_ND: Tensor) -> Tensor:
        ctx.beside = beside
        return way.scattered(values_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, ctx.beside.gathered(grads[0])


class _Awaited(torch.autograd.Function):
    """Values -> the same; in the backward pass gradients are waited for once the layer is computed again.

    A layer is computed again when the first tensor is asked for that its forward pass saved: so one is saved here.
    """

    @staticmethod
    def forward(ctx: _Passed, beside: _Beside, values_ND: Tensor, saved: Tensor) -> Tensor:
        ctx.beside = beside
        ctx.save_for_backward(saved)
        return values_ND.view_as(values_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Passed, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        ctx.beside.wait()
        return None, grads[0], None


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
