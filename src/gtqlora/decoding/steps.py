"""One step of a model under a change, with a cache for every run of it: all runs beside ours first, then ours.

Shape letters: B rows, S sequence, C columns of a cache, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gtqlora.capture import Subject
from gtqlora.capture.waiting import watched
from gtqlora.decoding.change import Change, SourceRun, changed
from gtqlora.errors import ModelError
from gtqlora.machine import uncollected

_log = logging.getLogger(__name__)

Run = SourceRun | Change


def runs_of(change: Change) -> list[Run]:
    """Return all runs that a step makes, in their order; the last is ours."""
    return [*change.source_runs, change]


def forward(
    subject: Subject,
    runs: Sequence[Run],
    caches: Sequence[Cache],
    ids: Sequence[Tensor],
    mask: Tensor,
    positions_BS: Tensor,
) -> Tensor:
    """Return the last token's logits_BV of the last run; what came before these tokens is in the caches.

    Args:
        ids: what each run reads, ids_BS.
        mask: 1 for real tokens, mask_BS over all so far, or the bias_B11C of a cache's columns.
    """
    found: list[Tensor] = []
    for run, cache, ids_BS in zip(runs, caches, ids, strict=True):
        with changed(subject, run):
            output = subject.model(
                input_ids=ids_BS,
                attention_mask=mask,
                position_ids=positions_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        found = [output.logits[:, -1]]
    return found[0]


def check(finite: bool) -> None:
    """Stop where logits are no numbers.

    Raises:
        ModelError: they are not.
    """
    if not finite:
        raise ModelError("the model's logits hold NaN or infinity; check its weights and dtype")


class Repeated:
    """A computation on tensors that stay in place: made once as it is, then captured on a GPU and replayed.

    A computation that waits for the GPU cannot be captured; it runs as it is every time, and the log says so.

    Args:
        capture: False leaves it as it is.
    """

    def __init__(self, *, capture: bool) -> None:
        self.capture = capture
        self._warm = self._waited = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Return whether it has been captured."""
        return self._graph is not None

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return what it computes, the same function every time; the next call may overwrite it."""
        if not self.capture:
            return compute()
        if not self._warm:
            # Kernels are compiled and libraries set up now, which no capture allows.
            found, waits = watched(compute)
            self._warm = waits is None
            # once may be a kernel that is loaded when it first runs
            if waits is not None and self._waited:
                self.capture = False
                _log.warning("decoding is not captured: %s waits for the GPU at every step", waits)
            self._waited = waits is not None
            return found
        if self._graph is None or self._found is None:
            self._graph, self._found = _captured(compute)
        self._graph.replay()
        return self._found


def _captured(compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    # Garbage may hold an older graph, and to destroy one breaks off a capture.
    with uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = compute()
    return graph, found
