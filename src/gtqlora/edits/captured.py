"""A model's decoder stack run forward and backward as CUDA graphs: one launch for tens of thousands of kernels.

Every batch of the same shape runs the same kernels, so they are recorded once and replayed. Rows are padded on the
right, where causal attention never looks back from, so the stack needs no mask. Recomputation under gradient
checkpointing is part of the graph of the backward pass. Kernels and their order are those of an eager pass.

Shape letters: B rows, S sequence, T = B*S tokens, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

from gtqlora.capture import Decision, Recorder, router_hooks
from gtqlora.capture.waiting import watched
from gtqlora.edits.recomputing import Recomputation
from gtqlora.edits.wrapping import trainable
from gtqlora.errors import TrainingError
from gtqlora.experts.module import FrozenExperts
from gtqlora.families import Anatomy, language_model
from gtqlora.machine import uncollected
from gtqlora.progress import note

_ATTENTION = "gtqlora_right_padded"
"""Causal attention over rows that are padded on the right: no mask is ever made."""


@contextmanager
def without_mask(model: nn.Module) -> Iterator[None]:
    """Let the model's attention ignore padding masks for a while, in which all rows are padded on the right."""
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)  # pyright: ignore[reportArgumentType]
    config: Any = language_model(model).config
    before, config._attn_implementation = config._attn_implementation, _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """Both passes over batches of one shape, between tensors that stay where they are.

    Attributes:
        parameters: all that train.
        reached: MoE layers whose router logits depend on them.
        outputs: hidden_BSD, then the router logits_TE of those layers.
        grads: of the outputs, which the backward pass reads.
        found: gradients of the trained parameters, which it writes; None for one that nothing reaches.
    """

    ids_BS: Tensor
    parameters: tuple[Tensor, ...]
    reached: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    decisions: dict[int, Decision]
    grads: tuple[Tensor, ...]
    found: tuple[Tensor | None, ...]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class _Replay(torch.autograd.Function):
    """The stack as one function of its trained parameters."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, ids_BS: Tensor, *_parameters: Tensor) -> tuple[Tensor, ...]:
        graphs.ids_BS.copy_(ids_BS)
        graphs.forward.replay()
        ctx.graphs = graphs
        return tuple(output.detach() for output in graphs.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.graphs
        for mine, given in zip(graphs.grads, grads, strict=True):
            mine.zero_() if given is None else mine.copy_(given)
        graphs.backward.replay()
        return None, None, *(None if grad is None else grad.detach() for grad in graphs.found)


class CapturedStack:
    """Stands in for the forward of a wrapped model's decoder stack, inside `running`.

    The first batch of a shape runs eagerly, which compiles and loads what its kernels need; the second is recorded. A
    model that waits for the GPU cannot be recorded: it runs eagerly throughout, and the user is told why.

    Args:
        recomputation: decides which layers keep their activations.
        graphs: False runs every batch eagerly.
    """

    def __init__(self, model: PeftModel, anatomy: Anatomy, recomputation: Recomputation, *, graphs: bool) -> None:
        self.model, self.anatomy, self.recomputation = model, anatomy, recomputation
        self.stack: Any = language_model(model).base_model  # transformers' name for a model without its head
        self._eager = self.stack.forward
        self._experts = [module for module in model.modules() if isinstance(module, FrozenExperts)]
        self._tiled: list[bool] = []
        self._capture, self._waited = graphs, False
        self._graphs: dict[torch.Size, _Graphs | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._recorder = Recorder()

    @contextmanager
    def running(self, recorder: Recorder) -> Iterator[None]:
        """Run the stack by its graphs, with every router's decision in the recorder."""
        self._recorder = recorder
        self.stack.forward = self._forward
        try:
            yield
        finally:
            self.stack.forward = self._eager

    def _forward(self, input_ids: Tensor, **settings: Any) -> BaseModelOutputWithPast:
        self.recomputation.before(input_ids.numel(), lambda: self._eager(input_ids=input_ids, **settings))
        shape = input_ids.shape
        if not self._capture or shape not in self._graphs:
            return self._as_it_is(input_ids, settings)
        graphs = self._graphs[shape] = self._graphs[shape] or self._captured(input_ids)
        for experts, tiled in zip(self._experts, self._tiled, strict=True):
            experts.arrange(tiled=tiled)  # whoever saved or read the weights may have put them in another order
        hidden_BSD, *logits = _Replay.apply(graphs, input_ids, *graphs.parameters)  # type: ignore[misc]
        self._recorder.decisions.update(graphs.decisions)
        for position, logits_TE in zip(graphs.reached, logits, strict=True):
            self._recorder.decisions[position] = replace(graphs.decisions[position], logits_TE=logits_TE)
        return BaseModelOutputWithPast(last_hidden_state=hidden_BSD)

    def _as_it_is(self, ids_BS: Tensor, settings: dict[str, Any]) -> BaseModelOutputWithPast:
        def run() -> BaseModelOutputWithPast:
            # not in the backward pass: a decision on record when a layer is recomputed keeps all of the layer
            with router_hooks(self.model, self.anatomy, self._recorder):
                return self._eager(input_ids=ids_BS, **settings)

        if not self._capture:
            return run()
        found, waits = watched(run)
        if waits is None:
            self._graphs[ids_BS.shape] = None
        elif self._waited:
            self._capture = False
            note(f"training runs without CUDA graphs: {waits} waits for the GPU")
        self._waited = waits is not None  # once may be a table that a kernel is given when it first runs
        return found

    def _captured(self, ids_BS: Tensor) -> _Graphs:
        """Record both passes.

        Raises:
            TrainingError: a model does what cannot be recorded, such as to wait for the GPU.
        """
        try:
            with uncollected():  # to destroy a graph of another model breaks off a capture
                return self._recorded(ids_BS.clone())
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise TrainingError(
                f"this model's passes cannot be recorded as CUDA graphs ({' '.join(str(error).split())[:300]}); set "
                "cuda_graphs = false"
            ) from error

    def _recorded(self, ids_BS: Tensor) -> _Graphs:
        recorder, forward, backward = Recorder(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # every graph lives in one pool, as no two shapes are ever in use together
        with torch.cuda.graph(forward, pool=self._pool), router_hooks(self.model, self.anatomy, recorder):
            hidden_BSD = self._eager(input_ids=ids_BS, use_cache=False).last_hidden_state
        reached = tuple(place for place, seen in recorder.decisions.items() if seen.logits_TE.requires_grad)
        outputs = (hidden_BSD, *(recorder.decisions[place].logits_TE for place in reached))
        parameters, grads = tuple(trainable(self.model).values()), tuple(torch.zeros_like(output) for output in outputs)
        with torch.cuda.graph(backward, pool=self._pool):
            found = torch.autograd.grad(outputs, parameters, grads, allow_unused=True)
        self._tiled = [experts.tiled for experts in self._experts]
        return _Graphs(
            ids_BS=ids_BS,
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
        )
