"""Runs the same pairs under one change after another; what each prompt does then, generated and as log-odds.

Shape letters: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gtqlora.capture import ExpertHandler, Handler, Subject, log_odds
from gtqlora.contrasts import Row, encode_row
from gtqlora.judging.judge import Judge
from gtqlora.localize.pairs import Pair
from gtqlora.progress import track
from gtqlora.results.diagnosis import Intervention
from gtqlora.scoring import SourceRun, Switch, decode, judged
from gtqlora.stats import Interval, mean_interval, paired_difference, rate


@dataclass(frozen=True)
class Outcome:
    """What one prompt did.

    Attributes:
        correct: the completion is the row's expected answer; None where the row gives none.
        log_odds: of the behaviour's first tokens against all others; None without a readout.
    """

    refused: bool
    correct: bool | None
    log_odds: float | None
    tokens: list[int] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to a run of some of the prompts."""

    handlers: Sequence[Handler] = ()
    expert_handlers: Sequence[ExpertHandler] = ()
    source_runs: Sequence[SourceRun] = ()
    switch: Switch = nullcontext


Changes = Callable[[list[int]], Change]
"""The change for the prompts at these positions."""


_TELLING = 4
"""How many times more refusals than answers begin with a token that tells them apart: "I", say, begins some answers."""


def readout_tokens(subject: Subject, rows: Sequence[Row]) -> list[int]:
    """Return the first tokens of the rows' refusals that tell them from their answers; none if all begin alike."""
    refusals, answers = Counter[int](), Counter[int]()
    for row in rows:
        chosen, rejected = row.chosen, row.rejected
        refusal, answer = (chosen, rejected) if row.kind == "harmful" else (rejected, chosen)
        refusals[_first(subject, row, refusal)] += 1
        answers[_first(subject, row, answer)] += 1
    return sorted(token for token, count in refusals.items() if count >= _TELLING * answers[token])


def _first(subject: Subject, row: Row, completion: str) -> int:
    return encode_row(subject.tokenizer, replace(row, chosen=completion))[1][0]


class Trials:
    """The pairs under study, and what their prompts do."""

    def __init__(
        self,
        subject: Subject,
        pairs: Sequence[Pair],
        judge: Judge,
        readout: Sequence[int],
        *,
        batch_size: int,
        max_new_tokens: int,
    ) -> None:
        self.subject, self.pairs, self.judge, self.readout = subject, list(pairs), judge, list(readout)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.flagged = [pair.prompt for pair in self.pairs]
        self.twins = [pair.twin for pair in self.pairs]

    @cached_property
    def own(self) -> tuple[list[Outcome], list[Outcome]]:
        """Run the flagged prompts and the twins as they are, once."""
        return self.run("flagged prompts", self.flagged), self.run("twins", self.twins)

    def of(self, pairs: Sequence[Pair]) -> Trials:
        """Return the same trials of some of the pairs."""
        settings = {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}
        part = Trials(self.subject, pairs, self.judge, self.readout, **settings)
        rows, (flagged, twins) = self.rows_of(part), self.own
        # taken over, not run again: what the prompts do as they are is known
        part.own = [flagged[i] for i in rows], [twins[i] for i in rows]
        return part

    def rows_of(self, part: Trials) -> list[int]:
        """Return where the pairs of a part stand among these."""
        place = {id(pair): i for i, pair in enumerate(self.pairs)}
        return [place[id(pair)] for pair in part.pairs]

    @property
    def groups(self) -> list[str]:
        """Return the pair_id of each pair: siblings share their words, so they are resampled together."""
        return [pair.row.pair_id for pair in self.pairs]

    def run(
        self,
        label: str | None,
        prompts: Sequence[list[int]],
        change: Changes = lambda _: Change(),
        *,
        first_only: bool = False,
    ) -> list[Outcome]:
        """Complete one prompt of each pair under a change.

        Args:
            label: shown as progress; None: whoever asks shows its own.
            first_only: stop at the first token; good for log-odds only.
        """
        # prompts of like length go together, as padding is computed for nothing
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Outcome] = {}
        starts = range(0, len(order), self.batch_size)
        for start in starts if label is None else track(starts, label, len(starts)):
            chosen = order[start : start + self.batch_size]
            outcomes = self._batch(chosen, [prompts[i] for i in chosen], change(chosen), first_only)
            found.update(zip(chosen, outcomes, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _batch(self, chosen: list[int], prompts: list[list[int]], change: Change, first_only: bool) -> list[Outcome]:
        decoded = decode(
            self.subject,
            prompts,
            max_new_tokens=1 if first_only else self.max_new_tokens,
            handlers=change.handlers,
            expert_handlers=change.expert_handlers,
            source_runs=change.source_runs,
            switch=change.switch,
        )
        odds = self._log_odds(decoded.first_BV) or [None] * len(chosen)
        outcomes = []
        for at, (i, value) in enumerate(zip(chosen, odds, strict=True)):
            score = judged(self.pairs[i].row, decoded, at, self.judge)
            outcomes.append(Outcome(score.refused, score.correct, value, decoded.tokens[at]))
        return outcomes

    def _log_odds(self, logits_BV: Tensor) -> list[float] | None:
        if not self.readout:
            return None
        return log_odds(logits_BV, torch.tensor(self.readout, device=logits_BV.device)).tolist()

    # --- intervals, over pairs of which siblings are drawn together

    def refusal(self, outcomes: Sequence[Outcome]) -> Interval:
        """Return the share of these pairs' prompts that refuse."""
        return rate([o.refused for o in outcomes], groups=self.groups)

    def mean_odds(self, outcomes: Sequence[Outcome]) -> Interval | None:
        """Return the mean log-odds; a prompt that was not seen may still jump from a twin's to a flagged prompt's."""
        odds = odds_of(outcomes)
        return None if odds is None else mean_interval(odds, groups=self.groups, bounds=self._odds_range)

    def mean_change(self, before: Sequence[Outcome], after: Sequence[Outcome]) -> Interval | None:
        """Return the mean of before - after in log-odds."""
        old, new = odds_of(before), odds_of(after)
        if old is None or new is None:
            return None
        # one prompt's log-odds can change by no more than the whole range
        low, high = self._odds_range
        gone = [b - a for b, a in zip(old, new, strict=True)]
        return mean_interval(gone, groups=self.groups, bounds=(low - high, high - low))

    @property
    def _odds_range(self) -> tuple[float, float]:
        odds = [o.log_odds for outcomes in self.own for o in outcomes if o.log_odds is not None]
        return min(odds), max(odds)

    def intervention(
        self, name: str, outcomes: Sequence[Outcome], base: Sequence[Outcome], *, control: bool = False
    ) -> Intervention:
        """Compare the outcomes of the same prompts, changed and as they are."""
        known = [o.correct is True for o in outcomes if o.correct is not None]
        return Intervention(
            name=name,
            control=control,
            refusal=self.refusal(outcomes),
            accuracy=rate(known) if known else None,
            effect=paired_difference([o.refused for o in base], [o.refused for o in outcomes], groups=self.groups),
            log_odds=self.mean_odds(outcomes),
            log_odds_effect=self.mean_change(base, outcomes),
        )


def odds_of(outcomes: Sequence[Outcome]) -> list[float] | None:
    """Return the log-odds of all outcomes, or None without a readout."""
    values = [o.log_odds for o in outcomes]
    return None if not values or None in values else values  # type: ignore[return-value]
