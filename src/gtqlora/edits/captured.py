"""A model's decoder stack run forward and backward as CUDA graphs: one launch for tens of thousands of kernels.

Every batch of the same shape runs the same kernels, so they are recorded once and replayed. Recomputation under
gradient checkpointing is part of the graph of the backward pass. Kernels and their order are those of an eager pass.

Shape letters: B rows, S sequence, T = B*S tokens, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_outputs import BaseModelOutputWithPast

from gtqlora.capture import Decision, Recorder, router_hooks
from gtqlora.capture.waiting import watched
from gtqlora.edits.host_inputs import HostInputs
from gtqlora.edits.packing import PackedStack, Places, Sequences
from gtqlora.edits.recomputing import Recomputation
from gtqlora.edits.wrapping import trainable
from gtqlora.errors import TrainingError
from gtqlora.experts.exchange import Exchange, exchange_of
from gtqlora.experts.kernels.rows import Room
from gtqlora.experts.module import FrozenExperts
from gtqlora.experts.sharding import Shards, shards_of
from gtqlora.experts.streaming import waiting
from gtqlora.families import Anatomy
from gtqlora.machine import uncollected
from gtqlora.planning.memory import FIRST_ROOM
from gtqlora.progress import note
from gtqlora.ranks import all_of, average, ranks

_SPARE_ROOM = 1.25
"""Room for rows of the experts held here, once there was too little: times the most that was seen."""

_Handed = list[tuple[Tensor, Tensor]]
"""Trained parameters, and the memory of graphs that has their gradients."""


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """Both passes over batches of one shape, between tensors that stay where they are.

    Attributes:
        inputs: what the forward pass reads, in the order of `_tensors`.
        parameters: all that train.
        reached: MoE layers whose router logits depend on them.
        outputs: hidden_BSD, then the router logits_TE of those layers.
        grads: of the outputs, which the backward pass reads.
        found: gradients of the trained parameters, which it writes; None for one that nothing reaches.
        handed: gradients that are still in any graph's memory.
        shards: whose places for whole layers it writes to.
        exchange: which writes to memory that other ranks read.
    """

    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    reached: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    decisions: dict[int, Decision]
    grads: tuple[Tensor, ...]
    found: tuple[Tensor | None, ...]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    handed: _Handed
    shards: Shards | None
    exchange: Exchange | None

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Run one of both passes, which begins with no layer whole, and leaves none that others know of."""
        _keep_handed(self.handed)
        if self.shards is not None:
            self.shards.forget()
        if self.exchange is not None:
            self.exchange.forget()
        graph.replay()


class _Replay(torch.autograd.Function):
    """The stack as one function of its trained parameters."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, inputs: tuple[Tensor, ...], *_parameters: Tensor) -> tuple[Tensor, ...]:
        for mine, given in zip(graphs.inputs, inputs, strict=True):
            mine.copy_(given)
        graphs.replay(graphs.forward)
        ctx.graphs = graphs
        return tuple(output.detach() for output in graphs.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.graphs
        for mine, given in zip(graphs.grads, grads, strict=True):
            mine.zero_() if given is None else mine.copy_(given)
        graphs.replay(graphs.backward)
        for parameter, found in zip(graphs.parameters, graphs.found, strict=True):
            if found is not None and parameter.grad is not None:
                parameter.grad.add_(found)
            elif found is not None:  # without a copy, as long as no graph writes there again
                parameter.grad = found
                graphs.handed.append((parameter, found))
        return None, None, *(None for _ in graphs.parameters)


def _keep_handed(handed: _Handed) -> None:
    """Copy the gradients that are still where a graph wrote them: the next replay of any writes there."""
    for parameter, found in handed:
        if parameter.grad is found:
            parameter.grad = found.clone()
    handed.clear()


_Inputs = dict[str, Any]
"""What the stack is called with: tensors, how a batch is packed, and settings."""


def _tensors(inputs: _Inputs) -> tuple[Tensor, ...]:
    given = [*inputs.values(), *(vars(inputs["packing"]).values() if "packing" in inputs else ())]
    return tuple(value for value in given if isinstance(value, Tensor))


def _shape(inputs: _Inputs) -> tuple[object, ...]:
    """Return what a recorded pass depends on, but for the numbers in its tensors."""
    return (*(tensor.shape for tensor in _tensors(inputs)), getattr(inputs.get("packing"), "most", 0))


def _copied(inputs: _Inputs) -> _Inputs:
    return {name: _copy(value) for name, value in inputs.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Places | Sequences):
        return replace(value, **{name: _copy(part) for name, part in vars(value).items()})
    return value


class CapturedStack:
    """Stands in for the forward of a wrapped model's decoder stack, inside `running`.

    The first batch of a shape runs eagerly, which compiles and loads what its kernels need; the second is recorded. A
    model that waits for the GPU cannot be recorded: it runs eagerly throughout, and the user is told why.

    Attributes:
        averages: whether the last batch's backward pass averages gradients over ranks.

    Args:
        packed: the stack as it is installed, which packs what this one is given.
        recomputation: decides which layers keep their activations.
        graphs: False runs every batch eagerly, and so do experts that wait on the host.
        averaged: record with a backward pass that ranks average what it found; see `averages`.
        inputs: where layers that are computed again have what they were given; None for the GPU.
    """

    def __init__(
        self,
        model: PeftModel,
        anatomy: Anatomy,
        packed: PackedStack,
        recomputation: Recomputation,
        *,
        graphs: bool,
        averaged: bool,
        inputs: HostInputs | None,
    ) -> None:
        self.model, self.anatomy, self.packed, self.recomputation = model, anatomy, packed, recomputation
        self._inputs, self._averaged, self.averages = inputs, averaged, False
        self._shards, self._exchange = shards_of(model), exchange_of(model)
        self._experts = [module for module in model.modules() if isinstance(module, FrozenExperts)]
        self._tiled, self._handed = list[bool](), _Handed()
        # what is replayed cannot ask for experts that wait on the host
        waits = any(all_of(bool(waiting(self._experts))))
        self._capture, self._waited = graphs and not waits, False
        self._room = _room(self._experts)
        self._graphs: dict[tuple[object, ...], _Graphs | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._recorder = Recorder()

    @contextmanager
    def running(self, recorder: Recorder) -> Iterator[None]:
        """Run the stack by its graphs, with every router's decision in the recorder."""
        self._recorder = recorder
        self.packed.run = self._forward
        try:
            with self.limited():
                yield
        finally:
            self.packed.run = self.packed.eager

    def limited(self, yes: bool = True) -> AbstractContextManager[None]:
        """Let layers have room for a share of the rows, if passes are recorded: `running` sees to it that it is enough.

        A layer that is computed again has to have the room that it had, so the backward pass is inside as well.
        """
        return nullcontext() if self._room is None else self._room.limited(yes and self._capture)

    def _forward(self, **inputs: Any) -> BaseModelOutputWithPast:
        self.recomputation.before(inputs["input_ids"].numel(), lambda: self._eager(inputs))
        found = self._run(inputs)
        while self._overflowed():
            del found
            self._graphs.clear()
            found = self._run(inputs)
        return found

    def _overflowed(self) -> bool:
        """Tell whether more rows came to some rank's experts than have room; from now on as many have."""
        if self._room is None or self._room.exact:
            return False
        seen = max(all_of(float(self._room.seen_1)))
        if seen <= self._room.share:
            return False
        self._room.share = min(1.0, _SPARE_ROOM * seen)
        return True

    def _run(self, inputs: _Inputs) -> BaseModelOutputWithPast:
        shape = _shape(inputs)
        self.averages = self._averaged and self._capture and shape in self._graphs
        if not self._capture or shape not in self._graphs:
            return self._as_it_is(inputs, shape)
        graphs = self._graphs[shape] = self._graphs[shape] or self._captured(inputs)
        for experts, tiled in zip(self._experts, self._tiled, strict=True):
            experts.arrange(tiled=tiled)  # whoever saved or read the weights may have put them in another order
        hidden_BSD, *logits = _Replay.apply(graphs, _tensors(inputs), *graphs.parameters)  # type: ignore[misc]
        self._recorder.decisions.update(graphs.decisions)
        for position, logits_TE in zip(graphs.reached, logits, strict=True):
            self._recorder.decisions[position] = replace(graphs.decisions[position], logits_TE=logits_TE)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BSD)

    def _eager(self, inputs: _Inputs) -> BaseModelOutputWithPast:
        with nullcontext() if self._inputs is None else self._inputs.kept():
            return self.packed.eager(**inputs)

    def _settle(self) -> None:
        """Let what runs beside this stream come to its end, as a recording has to."""
        if self._shards is not None:
            self._shards.forget()
        if self._exchange is not None:
            self._exchange.forget()
        if self._inputs is not None:
            self._inputs.settle()

    def _as_it_is(self, inputs: _Inputs, shape: tuple[object, ...]) -> BaseModelOutputWithPast:
        def run() -> BaseModelOutputWithPast:
            # not in the backward pass: a decision on record when a layer is recomputed keeps all of the layer
            with router_hooks(self.model, self.anatomy, self._recorder):
                return self._eager(inputs)

        if not self._capture:
            return run()
        found, waits = watched(run)
        waits = next((there for there in all_of(waits) if there is not None), None)
        if waits is None:
            self._graphs[shape] = None
        elif self._waited:
            self._capture = False
            note(f"training runs without CUDA graphs: {waits} waits for the GPU")
        self._waited = waits is not None  # once may be a table that a kernel is given when it first runs
        return found

    def _captured(self, inputs: _Inputs) -> _Graphs:
        """Record both passes.

        Raises:
            TrainingError: a model does what cannot be recorded, such as to wait for the GPU.
        """
        try:
            with uncollected():  # to destroy a graph of another model breaks off a capture
                return self._recorded(_copied(inputs))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise TrainingError(
                f"this model's passes cannot be recorded as CUDA graphs ({' '.join(str(error).split())[:300]}); set "
                "cuda_graphs = false"
            ) from error

    def _recorded(self, inputs: _Inputs) -> _Graphs:
        recorder, forward, backward = Recorder(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # every graph lives in one pool, as no two shapes are ever in use together
        # NCCL looks after its work from threads of its own, which must not end a capture
        mode = "thread_local" if ranks().several else "global"
        self._settle()
        with (
            torch.cuda.graph(forward, pool=self._pool, capture_error_mode=mode),
            router_hooks(self.model, self.anatomy, recorder),
        ):
            hidden_BSD: Any = self._eager(inputs).last_hidden_state
            self._settle()
        reached = tuple(place for place, seen in recorder.decisions.items() if seen.logits_TE.requires_grad)
        outputs = (hidden_BSD, *(recorder.decisions[place].logits_TE for place in reached))
        parameters, grads = tuple(trainable(self.model).values()), tuple(torch.zeros_like(output) for output in outputs)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode=mode):
            found = torch.autograd.grad(outputs, parameters, grads, allow_unused=True)
            if self._averaged:
                average(each for each in found if each is not None)
            self._settle()
        self._tiled = [experts.tiled for experts in self._experts]
        return _Graphs(
            inputs=_tensors(inputs),
            parameters=parameters,
            reached=reached,
            outputs=tuple(output.detach() for output in outputs),
            decisions={
                place: replace(seen, logits_TE=seen.logits_TE.detach(), weights_TK=seen.weights_TK.detach())
                for place, seen in recorder.decisions.items()
            },
            grads=grads,
            found=found,
            forward=forward,
            backward=backward,
            handed=self._handed,
            shards=self._shards,
            exchange=self._exchange,
        )


def _room(experts: list[FrozenExperts]) -> Room | None:
    """Return the room of layers that hold a part of their experts, if these do."""
    if not experts or experts[0].count == experts[0].n_experts:
        return None
    room = Room(min(1.0, FIRST_ROOM * experts[0].count / experts[0].n_experts), experts[0].device)
    for module in experts:
        module.room = room
    return room
