"""Runs a model on prompts under a change, and has its answers judged: the one loop that all stages share.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gtqlora.capture import Subject, by_length, forward, left_padded
from gtqlora.config import StageConfig
from gtqlora.contrasts import Asked, encode_prompt, is_correct
from gtqlora.contrasts.template import answer_length, encode_answers
from gtqlora.decoding import (
    AS_IS,
    Change,
    Changes,
    Decoded,
    Tokens,
    changed,
    decode,
    decode_by_row,
    goes_by_row,
    source_ids,
)
from gtqlora.errors import ModelError
from gtqlora.judging.judge import Judge, labels
from gtqlora.judging.labels import REFUSAL, Label
from gtqlora.progress import track


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


class Speaker(Protocol):
    """Says in a model's place what that would say, such as a server of it."""

    def __call__(self, prompts: Sequence[Tokens], max_new_tokens: int, label: str | None = None) -> Decoded:
        """Return what is said to prompts, greedily; `label` is shown as progress."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A model with its judge, and how much runs at once.

    Attributes:
        speaker: says the model's plain answers, those without a change and a readout; without one the model does.
        judge: built once for a stage.
        batch_size: prompts that run together.
        max_new_tokens: at which a completion is cut off.
    """

    model: Subject
    judge: Judge
    batch_size: int
    max_new_tokens: int
    speaker: Speaker | None = None

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
        """Complete every row's prompt under a change and have it judged.

        They run in batches of like length, or row by row where a GPU and the change allow it, see `decode_by_row`; the
        judge is asked in batches of like length either way.

        Args:
            label: shown as progress; None: whoever asks shows its own.
            prompts: the rows' prompts in tokens, where they are at hand.
            begun: what their answers have said already at the end of `prompts`.
            readout: tokens whose log-odds as the first token are wanted.
        """
        tokens, found = self.encoded(rows) if prompts is None else prompts, dict[int, Answer]()
        for chosen, decoded in self._decoded(tokens, change, label, begun, readout):
            found.update(zip(chosen, self._judged([rows[i] for i in chosen], decoded), strict=True))
        return [found[i] for i in range(len(rows))]

    def _decoded(
        self, prompts: Sequence[Tokens], change: Changes, label: str | None, begun: Tokens, readout: Sequence[int]
    ) -> Iterator[tuple[list[int], Decoded]]:
        """Yield the completions of prompts of like length, with the places of these prompts."""
        model, most, batches = self.model, self.max_new_tokens, by_length(prompts, self.batch_size)
        if self.speaker is not None and change is AS_IS and not (begun or readout):
            whole = self.speaker(prompts, most, label)
            yield from ((chosen, whole.of(chosen)) for chosen in batches)
            return
        with _fitting(self.batch_size):
            if goes_by_row(model, prompts, change, most):
                whole = decode_by_row(
                    model,
                    prompts,
                    change([]),
                    rows=self.batch_size,
                    max_new_tokens=most,
                    begun=begun,
                    readout=readout,
                    label=label,
                )
                yield from ((chosen, whole.of(chosen)) for chosen in batches)
                return
            for chosen in _shown(batches, label):
                batch = [prompts[i] for i in chosen]
                found = decode(model, batch, change(chosen), max_new_tokens=most, begun=begun, readout=readout)
                yield chosen, found

    def _judged(self, rows: Sequence[Asked], decoded: Decoded) -> list[Answer]:
        found = labels(self.judge, [row.prompt for row in rows], decoded.texts)
        odds = decoded.odds or [None] * len(rows)
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
            batch = [prompts[i] for i in chosen]
            with _fitting(self.batch_size):
                decoded = decode(self.model, batch, change(chosen), max_new_tokens=1, readout=readout)
            found.update(zip(chosen, decoded.odds, strict=True))
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
        with _fitting(self.batch_size):
            for run in change.source_runs:
                with changed(self.model, run):
                    forward(self.model, source_ids(self.model, run, ids_BS, mask_BS), mask_BS)
            with changed(self.model, change):
                values_BSV = forward(self.model, ids_BS, mask_BS, keep).float()
        return Logits(chosen=chosen, values_BSV=values_BSV, spans=spans, mask_BS=mask_BS)


@contextmanager
def _fitting(prompts: int) -> Iterator[None]:
    """Say in one line what to do where so many prompts at once do not fit the memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"out of memory with {prompts} prompts at once; lower --batch-size") from error


def _shown(batches: list[list[int]], label: str | None) -> Iterable[list[int]]:
    return batches if label is None else track(batches, label, len(batches))


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
