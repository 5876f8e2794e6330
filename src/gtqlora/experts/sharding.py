"""Frozen dense weights split among ranks, and gathered a layer at a time when it runs.

Fully sharded data parallelism (Zhao et al. 2023, arXiv 2304.11277) for what does not train: there are no gradients to
scatter, and layers are whole in two places that stay where they are, so that passes can be recorded as CUDA graphs.
While one layer computes, the next one of the pass comes to the other place. Embeddings and heads are in `vocabulary`.

Experts are split by `exchange`, so they are none of these weights; routers are small and stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora.experts import vocabulary
from gtqlora.experts.exchange import Exchange
from gtqlora.experts.messages import Group, gather_into
from gtqlora.experts.packed_memory import ALIGNED, aligned, starts_of, tensor_at
from gtqlora.families import Family
from gtqlora.families.layers import moe_layers_of
from gtqlora.planning.memory import is_split
from gtqlora.ranks import ranks

_SHARDS = "shards"


def is_worth_it(model: nn.Module, family: Family) -> bool:
    """Tell whether there are ranks, and so much of dense weights that none should hold all."""
    if ranks().here == 1 or not torch.cuda.is_available():
        return False
    size = sum(weight.nbytes for weight in _dense(model, family))
    return is_split(size, ranks().here, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def shards_of(model: nn.Module) -> Shards | None:
    """Return the shards of a model whose dense weights are split."""
    return next((found for module in model.modules() if (found := getattr(module, _SHARDS, None)) is not None), None)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a rank holds a part of the model's dense weights."""
    return shards_of(model) is not None


def shard(model: PreTrainedModel, family: Family) -> None:
    """Leave each rank of this machine its part of every dense weight of the layers, of the embedding and of the head.

    What trains is added afterwards, and is whole on every rank.
    """
    dense = {id(weight) for weight in _dense(model, family)}
    layers = list(model.get_submodule(family.layers).children())
    weights = [[weight for weight in layer.parameters() if id(weight) in dense] for layer in layers]
    shards = Shards(layers, weights, ranks().machine)
    exchange = Exchange(ranks().machine)
    exchange.early = False  # memory is short
    vocabulary.split(model, exchange, shards.lent)


@dataclass
class _Place:
    """Memory in which one layer is whole at a time.

    Attributes:
        holds: the number of that layer.
        ready: what has to be over before it is.
    """

    memory: Tensor
    holds: int | None = None
    ready: torch.cuda.Event | None = None


class Shards:
    """A rank's part of each layer's weights, and two places where layers are whole in turn.

    A layer's weights are one after the other in its place: the even layers' in the first, the odd ones' in the second.
    Whoever runs a layer has its weights by a hook, forward, and before a backward pass comes to it.

    Args:
        weights: of each layer; all are frozen.
        group: the ranks that split them.
    """

    def __init__(self, layers: Sequence[nn.Module], weights: Sequence[Sequence[nn.Parameter]], group: Group) -> None:
        self.group, self._step = group, 1
        self._last: int | None = None
        whole = [_starts(of_layer, group.size()) for of_layer in weights]
        self._device = weights[0][0].device
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        sizes = [max((starts[-1] for starts in whole[first::2]), default=0) for first in (0, 1)]
        self._places = [_Place(torch.empty(size, dtype=torch.uint8, device=self._device)) for size in sizes]
        self._weights, self._views = weights, list[list[Tensor]]()
        self._parts = [self._split(i, *of_layer) for i, of_layer in enumerate(zip(weights, whole, strict=True))]
        for index, layer in enumerate(layers):
            setattr(layer, _SHARDS, self)
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index))

    def _place(self, index: int) -> _Place:
        return self._places[index % 2]

    @torch.no_grad()
    def _split(self, index: int, weights: Sequence[nn.Parameter], starts: Sequence[int]) -> Tensor:
        memory, piece = self._place(index).memory, starts[-1] // self.group.size()
        first = piece * self.group.rank()
        views = [
            tensor_at(memory, at, weight.shape, weight.dtype) for at, weight in zip(starts[:-1], weights, strict=True)
        ]
        for view, weight in zip(views, weights, strict=True):
            view.copy_(weight)
        part = memory[first : first + piece].clone()
        for at, view, weight in zip(starts[:-1], views, weights, strict=True):
            weight.data = view
            begin, end = (min(max(edge - first, 0), piece) for edge in (at, at + weight.nbytes))
            vocabulary.note_split(weight, _OfLayer(part[begin:end], begin + first - at, self))
        self._views.append(views)
        return part

    def _before(self, index: int, *_: object) -> None:
        self.have(index)

    def _after(self, index: int, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:  # of a layer that is computed again this is told to its first pass
            hidden.register_hook(lambda _grad: self.have(index))

    def have(self, index: int) -> None:
        """Have a layer whole before what this stream is given next, and let the one after it come meanwhile."""
        for weight, view in zip(self._weights[index], self._views[index], strict=True):
            if weight.data_ptr() != view.data_ptr():  # whoever moves a model may copy it, from "cpu" to "cpu:0" too
                weight.data = view
        self._gather(index)
        place = self._place(index)
        if place.ready is not None:
            torch.cuda.current_stream(self._device).wait_event(place.ready)
        if self._last is not None and index != self._last:
            self._step = 1 if index > self._last else -1
        self._last = index
        # at either end a pass turns round
        ahead = index + (1 if index == 0 else -1 if index == len(self._parts) - 1 else self._step)
        if self._side is not None and 0 <= ahead < len(self._parts):
            self._gather(ahead)

    def _gather(self, index: int) -> None:
        place, part = self._place(index), self._parts[index]
        if place.holds == index:
            return
        place.holds = index
        whole = place.memory[: self.group.size() * len(part)]
        if self._side is None:
            gather_into(whole, part, self.group)
            return
        # what this stream was given so far may read the layer that is there
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            gather_into(whole, part, self.group)
            place.ready = torch.cuda.Event()
            place.ready.record(self._side)

    def forget(self) -> None:
        """Take for granted nothing of what the places hold: others have written there, or will."""
        for place in self._places:
            if place.ready is not None:
                torch.cuda.current_stream(self._device).wait_event(place.ready)
            place.holds = place.ready = None

    def lent(self, size: int) -> Tensor:
        """Return so many bytes of memory for a while: until the next layer runs."""
        self.forget()
        memory = max((place.memory for place in self._places), key=len)
        return memory[:size] if size <= len(memory) else torch.empty(size, dtype=torch.uint8, device=self._device)


class _OfLayer:
    """A rank's bytes of one weight of a layer, beginning at `start` of the whole."""

    def __init__(self, held: Tensor, start: int, shards: Shards) -> None:
        self._held, self._start, self._shards = held, start, shards

    def part_of(self, values: Tensor) -> Tensor:
        flat = values.contiguous().view(-1).view(torch.uint8)
        return flat[self._start : self._start + len(self._held)].clone()

    def exchanged(self, values: Tensor) -> Tensor:
        before = self._held.clone()
        self._held.copy_(values)
        self._shards.forget()
        return before


def _starts(weights: Sequence[Tensor], ranks_here: int) -> list[int]:
    """Return the byte at which each weight of a layer begins, and where all end; each rank has as many of them."""
    *starts, end = starts_of(weight.nbytes for weight in weights)
    return [*starts, aligned(end, ranks_here * ALIGNED)]


def part_of(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Return what a rank holds of values that a parameter could have: all of them, unless it is split."""
    split = vocabulary.split_of(parameter)
    return values if split is None else split.part_of(values)


@torch.no_grad()
def exchanged(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Give a parameter other values, of which a rank has its part, and return those that it had."""
    split = vocabulary.split_of(parameter)
    if split is not None:
        return split.exchanged(values)
    before, parameter.data = parameter.data, values
    return before


def _dense(model: nn.Module, family: Family) -> list[nn.Parameter]:
    """Return the weights that are split."""
    paths = map(family.router_of, moe_layers_of(model, family))
    routers = {id(weight) for path in paths for weight in model.get_submodule(path).parameters()}
    return [weight for weight in model.parameters() if id(weight) not in routers and weight.dim() > 1]
