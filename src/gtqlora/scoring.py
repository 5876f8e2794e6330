"""Runs a model on prompts under a change, and has its answers judged: the one loop that all stages share.

A change is whatever a run differs in from the model as it is: hooks on routers and experts, another state of the
model, or source runs beside it whose routing or inputs its hooks replay.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache

from gtqlora.capture import (
    ExpertHandler,
    Handler,
    Subject,
    by_length,
    expert_hooks,
    forward,
    left_padded,
    log_odds,
    positions,
    router_hooks,
)
from gtqlora.config import StageConfig
from gtqlora.contrasts import Asked, encode_prompt, is_correct
from gtqlora.contrasts.template import answer_length, completions, encode_answers
from gtqlora.errors import ModelError
from gtqlora.judging.judge import Judge, labels
from gtqlora.judging.labels import REFUSAL, Label
from gtqlora.progress import track

Tokens = Sequence[int]

Switch = Callable[[], AbstractContextManager[None]]
"""Makes the subject run as something else for a while, e.g. with the edit off."""


# --- what a run differs in


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


Changes = Callable[[list[int]], Change]
"""The change for the prompts at these positions."""

AS_IS = Change()
"""The model as it is."""


@contextmanager
def _changed(subject: Subject, run: SourceRun | Change) -> Iterator[None]:
    """Put the subject into a run's state, with its hooks on."""
    with (
        run.switch(),
        router_hooks(subject.model, subject.anatomy, *run.handlers),
        expert_hooks(subject.model, subject.anatomy, *run.expert_handlers),
    ):
        yield


def _source_ids(subject: Subject, source_run: SourceRun, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    if source_run.prompts is None:
        return ids_BS
    own_BS, own_mask_BS = left_padded(source_run.prompts, subject.pad_id, subject.device)
    if not torch.equal(own_mask_BS, mask_BS):
        raise ValueError("a source run's prompts must have the same token counts as ours")
    return own_BS


# --- decoding


class _Stream:
    """One run decoding a batch, with a cache of its own."""

    def __init__(self, subject: Subject, run: SourceRun | Change) -> None:
        self.subject, self.run = subject, run
        self.cache = DynamicCache(config=subject.model.config)

    def step(self, ids_BS: Tensor, mask_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Return the last token's logits_BV; what came before these tokens is in the cache."""
        with _changed(self.subject, self.run):
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

    A text begins with the mark of a thought where the prompt ends in it, see `contrasts.template.completions`.

    Attributes:
        ended: which of them ended by themselves and not at the limit of tokens.
    """

    texts: list[str]
    tokens: list[list[int]]
    first_BV: Tensor
    ended: list[bool]


@torch.no_grad()
def decode(
    subject: Subject, prompts: Sequence[Tokens], change: Change = AS_IS, *, max_new_tokens: int, begun: Tokens = ()
) -> Decoded:
    """Complete a batch of prompts under a change, greedily unless it draws.

    Args:
        begun: the last tokens of every prompt, where they are part of the answer and so of its text.

    Raises:
        ModelError: the logits hold NaN.
        ValueError: a source run's prompts differ from ours in their token counts.
    """
    ids_BS, mask_BS = left_padded(prompts, subject.pad_id, subject.device)
    beside = [(_Stream(subject, run), _source_ids(subject, run, ids_BS, mask_BS)) for run in change.source_runs]
    ours, stops = _Stream(subject, change), subject.stop_ids
    done_B = torch.zeros(len(prompts), dtype=torch.bool, device=subject.device)
    step_BS, positions_BS, logits, out = ids_BS, positions(mask_BS), [], []
    for index in range(max_new_tokens):
        for stream, own_ids_BS in beside:
            stream.step(own_ids_BS if index == 0 else step_BS, mask_BS, positions_BS)
        logits_BV = ours.step(step_BS, mask_BS, positions_BS)
        if not torch.isfinite(logits_BV).all():
            raise ModelError("the model's logits hold NaN or infinity; check its weights and dtype")
        logits = logits or [logits_BV]
        next_B = (change.draw(logits_BV) if change.draw else logits_BV.argmax(-1)).masked_fill(done_B, subject.pad_id)
        out.append(next_B)
        done_B = done_B | torch.isin(next_B, stops)
        if bool(done_B.all()):
            break
        step_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
        mask_BS = torch.cat([mask_BS, torch.ones_like(step_BS)], dim=1)
    tokens = _cut(torch.stack(out, 1), stops)
    asked, said = [ids[: len(ids) - len(begun)] for ids in prompts], [[*begun, *ids] for ids in tokens]
    return Decoded(completions(subject.tokenizer, asked, said), tokens, logits[0], done_B.tolist())


def _cut(ids_BS: Tensor, stops: Tensor) -> list[list[int]]:
    """Return each row up to its first stop token."""
    ends = set(stops.tolist())
    return [list(takewhile(lambda token: token not in ends, row)) for row in ids_BS.tolist()]


# --- the runner


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says to one row's prompt.

    Attributes:
        text: of the completion, thoughts and all.
        label: by the judge.
        correct: it is the row's expected answer, but for white space; None where the row gives none.
        tokens: of the completion, without the stop.
        length: in tokens, without thoughts.
        ended: by itself, and not at the limit of tokens.
        log_odds: of the readout's tokens as the first one against all others; None without a readout.
    """

    text: str
    label: Label
    correct: bool | None
    tokens: list[int]
    length: int
    ended: bool
    log_odds: float | None

    @property
    def refused(self) -> bool:
        """Return whether it refuses, in full."""
        return self.label == REFUSAL


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Logits of a batch's last positions, in fp32.

    Attributes:
        chosen: which of the prompts they are of.
        values_BSV: padded on the left; see `rows`.
        spans: which of the S positions were asked for, row by row.
        mask_BS: which tokens of the whole batch are real.
    """

    chosen: list[int]
    values_BSV: Tensor
    spans: list[slice]
    mask_BS: Tensor

    def rows(self, values_BS: Tensor) -> list[Tensor]:
        """Cut what was computed from `values_BSV` to each row's own positions."""
        return [values_S[span] for values_S, span in zip(values_BS, self.spans, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A model with its judge, and how much runs at once.

    Attributes:
        judge: built once for a stage.
        batch_size: prompts that run together.
        max_new_tokens: at which a completion is cut off.
    """

    model: Subject
    judge: Judge
    batch_size: int
    max_new_tokens: int

    @staticmethod
    def of(model: Subject, judge: Judge, config: StageConfig) -> Runner:
        """Return a runner with a stage's settings."""
        return Runner(model=model, judge=judge, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens)

    def encoded(self, rows: Iterable[Asked]) -> list[list[int]]:
        """Return the tokens of the rows' prompts."""
        return [encode_prompt(self.model.tokenizer, row.prompt) for row in rows]

    def answers(
        self,
        rows: Sequence[Asked],
        change: Changes = AS_IS,
        *,
        label: str | None,
        prompts: Sequence[Tokens] | None = None,
        begun: Tokens = (),
        readout: Sequence[int] = (),
    ) -> list[Answer]:
        """Complete every row's prompt under a change and have it judged, in batches of like length.

        Args:
            label: shown as progress; None: whoever asks shows its own.
            prompts: the rows' prompts in tokens, where they are at hand.
            begun: what their answers have said already at the end of `prompts`.
            readout: tokens whose log-odds as the first token are wanted.
        """
        tokens, found = self.encoded(rows) if prompts is None else prompts, dict[int, Answer]()
        for chosen in _shown(by_length(tokens, self.batch_size), label):
            batch = [tokens[i] for i in chosen]
            decoded = decode(self.model, batch, change(chosen), max_new_tokens=self.max_new_tokens, begun=begun)
            found.update(zip(chosen, self._judged([rows[i] for i in chosen], decoded, readout), strict=True))
        return [found[i] for i in range(len(rows))]

    def _judged(self, rows: Sequence[Asked], decoded: Decoded, readout: Sequence[int]) -> list[Answer]:
        found = labels(self.judge, [row.prompt for row in rows], decoded.texts)
        odds = _odds(decoded.first_BV, readout) if readout else [None] * len(rows)
        return [
            Answer(
                text=text,
                label=label,
                correct=is_correct(row, text),
                tokens=tokens,
                length=answer_length(self.model.tokenizer, text, tokens),
                ended=ended,
                log_odds=value,
            )
            for row, text, label, tokens, ended, value in zip(
                rows, decoded.texts, found, decoded.tokens, decoded.ended, odds, strict=True
            )
        ]

    def first_odds(self, prompts: Sequence[Tokens], change: Changes, readout: Sequence[int]) -> list[float]:
        """Return the log-odds of the readout's tokens as each answer's first, under a change; nothing is judged."""
        found: dict[int, float] = {}
        for chosen in by_length(prompts, self.batch_size):
            decoded = decode(self.model, [prompts[i] for i in chosen], change(chosen), max_new_tokens=1)
            found.update(zip(chosen, _odds(decoded.first_BV, readout), strict=True))
        return [found[i] for i in range(len(prompts))]

    def logits(
        self,
        prompts: Sequence[Tokens],
        change: Changes = AS_IS,
        *,
        completions: Sequence[Tokens] | None = None,
        last: int = 1,
        label: str | None = None,
    ) -> Iterator[Logits]:
        """Yield logits batch by batch: of the prompts' last tokens, or those that predict given completions.

        Args:
            completions: what follows the prompts; then batches are in the order of the prompts. Otherwise prompts of
                like length come together. Sums are rounded by how rows are padded, so this order is part of a verdict.
            last: of how many last tokens of each prompt, where there are no completions.
            label: shown as progress.
        """
        starts = range(0, len(prompts), self.batch_size)
        in_order = [list(range(len(prompts)))[start : start + self.batch_size] for start in starts]
        grouped = in_order if completions is not None else by_length(prompts, self.batch_size)
        for chosen in _shown(grouped, label):
            batch = [prompts[i] for i in chosen]
            if completions is None:
                spans = [slice(-min(last, len(prompt)), None) for prompt in batch]
                yield self._logits(chosen, batch, spans, last, change(chosen))
            else:
                ends = [completions[i] for i in chosen]
                # the token before each token of a completion predicts it
                spans = [slice(-len(end) - 1, -1) for end in ends]
                texts = [[*p, *end] for p, end in zip(batch, ends, strict=True)]
                yield self._logits(chosen, texts, spans, max(map(len, ends)) + 1, change(chosen))

    @torch.no_grad()
    def _logits(
        self, chosen: list[int], texts: Sequence[Tokens], spans: list[slice], keep: int, change: Change
    ) -> Logits:
        ids_BS, mask_BS = left_padded(texts, self.model.pad_id, self.model.device)
        for run in change.source_runs:
            with _changed(self.model, run):
                forward(self.model, _source_ids(self.model, run, ids_BS, mask_BS), mask_BS)
        with _changed(self.model, change):
            values_BSV = forward(self.model, ids_BS, mask_BS, keep).float()
        return Logits(chosen=chosen, values_BSV=values_BSV, spans=spans, mask_BS=mask_BS)


def _shown(batches: list[list[int]], label: str | None) -> Iterable[list[int]]:
    return batches if label is None else track(batches, label, len(batches))


def _odds(first_BV: Tensor, readout: Sequence[int]) -> list[float]:
    return log_odds(first_BV, torch.tensor(readout, device=first_BV.device)).tolist()


def log_probs(runner: Runner, rows: Sequence[Asked], completions: Sequence[str], *, label: str) -> list[float]:
    """Return the total log-probability, in nats, of a given completion of each row's prompt."""
    tokenizer, found = runner.model.tokenizer, list[float]()
    encoded = [encode_answers(tokenizer, row.prompt, text) for row, text in zip(rows, completions, strict=True)]
    prompts, tokens = [prompt for prompt, _ in encoded], [completion for _, (completion,) in encoded]
    for batch in runner.logits(prompts, completions=tokens, label=label):
        for i, log_SV in zip(batch.chosen, batch.rows(batch.values_BSV.log_softmax(-1)), strict=True):
            # what the template puts behind the completion is no part of it
            words = len(tokenizer.encode(completions[i], add_special_tokens=False))
            said_S = torch.tensor(tokens[i][:words], device=log_SV.device)
            found.append(float(log_SV[: len(said_S)].gather(-1, said_S[:, None]).sum()))
    return found
