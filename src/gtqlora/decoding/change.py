"""What a run differs in from the model as it is: hooks, another state of the model, source runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.capture import ExpertHandler, Handler, Subject, expert_hooks, left_padded, router_hooks

Tokens = Sequence[int]

Switch = Callable[[], AbstractContextManager[None]]
"""Makes the subject run as something else for a while, e.g. with the edit off."""


@dataclass(frozen=True)
class SourceRun:
    """Another run decoded beside ours and fed the tokens that we generate; its handlers record what ours replay.

    Attributes:
        handlers, expert_handlers: of its routers and of its routed experts.
        prompts: its own prompts, token for token as long as ours; None: the same.
        switch: the state of the model it runs in.
    """

    handlers: Sequence[Handler] = ()
    expert_handlers: Sequence[ExpertHandler] = ()
    prompts: Sequence[Tokens] | None = None
    switch: Switch = nullcontext


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to a run of some of the prompts; by default nothing.

    Handlers run at every step on a CPU; on a GPU a step is captured once and replayed. They compute with tensors, wait
    for none, and what they keep between calls of one step is tensors, too.

    Attributes:
        handlers, expert_handlers: see, and may replace, decisions of routers and calls of routed experts.
        source_runs: runs made first at every step, as ours replays what they record.
        switch: the state of the model we run in.
        draw: chooses the next token of each prompt by its logits_BV; without it the likeliest is.
    """

    handlers: Sequence[Handler] = ()
    expert_handlers: Sequence[ExpertHandler] = ()
    source_runs: Sequence[SourceRun] = ()
    switch: Switch = nullcontext
    draw: Callable[[Tensor], Tensor] | None = None

    def __call__(self, _chosen: list[int]) -> Change:
        """Return itself: the same for every batch."""
        return self

    @property
    def by_row(self) -> bool:
        """Return whether it does the same to a prompt whichever others run beside it."""
        return self.draw is None and all(run.prompts is None for run in self.source_runs)


Changes = Callable[[list[int]], Change]
"""The change for the prompts at these positions. A `Change` itself, and no function that makes one for each batch, says
that its handlers treat every row alike, whichever rows run together."""

AS_IS = Change()
"""The model as it is."""


@contextmanager
def changed(subject: Subject, run: SourceRun | Change) -> Iterator[None]:
    """Put the subject into a run's state, with its hooks on."""
    with (
        run.switch(),
        router_hooks(subject.model, subject.anatomy, *run.handlers),
        expert_hooks(subject.model, subject.anatomy, *run.expert_handlers),
    ):
        yield


def source_ids(subject: Subject, run: SourceRun | Change, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the tokens that a run beside ours begins with.

    Raises:
        ValueError: its prompts differ from ours in their token counts.
    """
    if isinstance(run, Change) or run.prompts is None:
        return ids_BS
    own_BS, own_mask_BS = left_padded(run.prompts, subject.pad_id, subject.device)
    if not torch.equal(own_mask_BS, mask_BS):
        raise ValueError("a source run's prompts must have the same token counts as ours")
    return own_BS
