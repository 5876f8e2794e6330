"""Which layers keep their activations for the backward pass, and which are computed again: as many keep as fit.

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gtqlora.ranks import least

_SPARE = 0.1
"""Share of the GPU's memory that stays free, for what allocators lose."""
_TRIED = 2
_GIB = 2**30


class Recomputation:
    """Decides once, before the second batch, what the first one's peak of memory leaves room for.

    Args:
        longest: tokens of the largest batch that is to come.
        limit: GiB for activations that are kept; None: what is free, less a tenth of the GPU's memory.
    """

    def __init__(self, model: nn.Module, *, longest: int, limit: float | None) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._longest, self._limit = longest, limit
        self._seen = 0 if limit != 0 else -1  # then all are computed again, as they are set to begin with
        self.kept = 0

    def before(self, tokens: int, run: Callable[[], object]) -> None:
        """Be told that a batch is about to run.

        Args:
            run: runs it forward with gradients, and returns what holds its graph.
        """
        if not any(layer.gradient_checkpointing for layer in self._layers):
            return
        if self._seen == 0:
            torch.cuda.reset_peak_memory_stats()
            self._seen = tokens
        elif self._seen > 0:
            needed = (torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()) / self._seen * self._longest
            self._seen = -1
            self._decide(tokens, run, needed)

    def _decide(self, tokens: int, run: Callable[[], object], needed: float) -> None:
        bare = _held(run)
        self._keep(_TRIED)
        each = max(1.0, (_held(run) - bare) / min(_TRIED, len(self._layers)) / tokens * self._longest)
        room = _free() - needed if self._limit is None else self._limit * _GIB
        # a layer that is computed again exchanges tokens again, so all ranks have to do the same
        self._keep(least(max(0, min(len(self._layers), int(room / each)))))

    def _keep(self, count: int) -> None:
        # the last ones, which the backward pass comes to first: theirs are gone when the others' are computed again
        self.kept = count
        for index, layer in enumerate(self._layers):
            layer.gradient_checkpointing = index < len(self._layers) - count


def _held(run: Callable[[], object]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass."""
    before = torch.cuda.memory_allocated()
    graph = run()
    held = torch.cuda.memory_allocated() - before
    del graph
    return held


def _free() -> float:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return free - _SPARE * total
