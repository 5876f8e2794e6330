"""Generate once, score many: greedy completions, optionally with another run's routing replayed, then judged.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache

from gtqlora.capture import (
    ExpertHandler,
    Handler,
    Recorder,
    Replay,
    Subject,
    expert_hooks,
    left_padded,
    router_hooks,
)
from gtqlora.contrasts import Row, encode_prompt
from gtqlora.errors import ModelError
from gtqlora.judging.judge import Judge, refusals
from gtqlora.progress import track

Switch = Callable[[], AbstractContextManager[None]]
"""Makes the subject run as something else for a while, e.g. with the edit off."""


@dataclass(frozen=True)
class Score:
    """One prompt's outcome.

    Attributes:
        correct: None where the row gives no expected answer.
        tokens, ended: of the completion, and whether it ended by itself and not at the limit.
    """

    row: Row
    text: str
    refused: bool
    correct: bool | None
    tokens: int
    ended: bool


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
    prompts: Sequence[Sequence[int]] | None = None
    switch: Switch = nullcontext


class _Stream:
    """One run decoding a batch: its own cache, its own handlers, its own state of the model."""

    def __init__(self, subject: Subject, run: SourceRun) -> None:
        self.subject, self.run = subject, run
        self.cache = DynamicCache(config=subject.model.config)

    def step(self, ids_BS: Tensor, mask_BS: Tensor, positions_BS: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(self.run.switch())
            stack.enter_context(router_hooks(self.subject.model, self.subject.anatomy, *self.run.handlers))
            stack.enter_context(expert_hooks(self.subject.model, self.subject.anatomy, *self.run.expert_handlers))
            output = self.subject.model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=positions_BS,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]


@dataclass(frozen=True)
class Decoded:
    """Completions of B prompts as texts and as tokens without the stop, and the logits_BV of their first tokens.

    Attributes:
        ended: which of them ended by themselves and not at the limit of tokens.
    """

    texts: list[str]
    tokens: list[list[int]]
    first_BV: Tensor
    ended: list[bool]


@torch.no_grad()
def decode(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    handlers: Sequence[Handler] = (),
    expert_handlers: Sequence[ExpertHandler] = (),
    source_runs: Sequence[SourceRun] = (),
    switch: Switch = nullcontext,
) -> Decoded:
    """Greedy completions of a batch of prompts.

    Args:
        handlers, expert_handlers: see and may replace decisions of routers and calls of routed experts at every step.
        source_runs: runs made first at every step.
        switch: the state of the model we run in.

    Raises:
        ModelError: the logits hold NaN.
        ValueError: a source_run's prompts differ from ours in their token counts.
    """
    ids_BS, mask_BS = left_padded(prompts, subject.pad_id, subject.device)
    beside = [
        (_Stream(subject, source_run), _source_ids(subject, source_run, ids_BS, mask_BS)) for source_run in source_runs
    ]
    student = _Stream(subject, SourceRun(handlers, expert_handlers, switch=switch))
    stops = subject.stop_ids
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=subject.device)
    step_BS, positions_BS, logits, out = ids_BS, (mask_BS.cumsum(-1) - 1).clamp(min=0), [], []
    for index in range(max_new_tokens):
        for stream, own_ids_BS in beside:
            stream.step(own_ids_BS if index == 0 else step_BS, mask_BS, positions_BS)
        logits_BV = student.step(step_BS, mask_BS, positions_BS)
        if not torch.isfinite(logits_BV).all():
            raise ModelError("the model's logits hold NaN or infinity; check its weights and dtype")
        logits = logits or [logits_BV]
        next_B = logits_BV.argmax(-1).masked_fill(done_B, subject.pad_id)
        out.append(next_B)
        done_B = done_B | torch.isin(next_B, stops)
        if bool(done_B.all()):
            break
        step_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
        mask_BS = torch.cat([mask_BS, torch.ones_like(step_BS)], dim=1)
    tokens = _cut(torch.stack(out, 1), stops)
    texts = subject.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Decoded([text.strip() for text in texts], tokens, logits[0], done_B.tolist())


def _source_ids(subject: Subject, source_run: SourceRun, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    if source_run.prompts is None:
        return ids_BS
    own_BS, own_mask_BS = left_padded(source_run.prompts, subject.pad_id, subject.device)
    if not torch.equal(own_mask_BS, mask_BS):
        raise ValueError("a source_run's prompts must have the same token counts as ours")
    return own_BS


def _cut(ids_BS: Tensor, stops: Tensor) -> list[list[int]]:
    """Each row up to its first stop token."""
    ends = set(stops.tolist())
    return [list(takewhile(lambda token: token not in ends, row)) for row in ids_BS.tolist()]


def batches(rows: Sequence[Row], subject: Subject, size: int) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Row positions and prompt tokens, in batches of prompts of similar length (less padding)."""
    tokens = [encode_prompt(subject.tokenizer, row.prompt) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, [tokens[i] for i in chosen]


def score(
    subject: Subject,
    rows: Sequence[Row],
    judge: Judge,
    *,
    batch_size: int,
    max_new_tokens: int,
    label: str,
    handlers: Sequence[Handler] = (),
    routing_from: Switch | None = None,
) -> list[Score]:
    """Complete every row's prompt and judge it; in the order of `rows`.

    Args:
        handlers: see and may replace router decisions at every step.
        routing_from: run a source_run in this state beside, and replay its routing decisions at every step.
    """
    scores: dict[int, Score] = {}
    recorder = Recorder()
    source_runs = () if routing_from is None else (SourceRun(handlers=(recorder,), switch=routing_from),)
    taps = handlers if routing_from is None else (Replay(recorder), *handlers)
    total = -(-len(rows) // batch_size)
    for chosen, prompts in track(batches(rows, subject, batch_size), label, total):
        found = decode(subject, prompts, max_new_tokens=max_new_tokens, handlers=taps, source_runs=source_runs)
        scores.update((i, judged(rows[i], found, at, judge)) for at, i in enumerate(chosen))
    return [scores[i] for i in range(len(rows))]


def judged(row: Row, decoded: Decoded, at: int, judge: Judge) -> Score:
    """One of the completions with its refusal verdict, and whether it is the expected answer (but for whitespace)."""
    text = decoded.texts[at]
    return Score(
        row=row,
        text=text,
        refused=refusals(judge, [row.prompt], [text])[0],
        correct=None if row.answer is None else " ".join(text.split()) == " ".join(row.answer.split()),
        tokens=len(decoded.tokens[at]),
        ended=decoded.ended[at],
    )
