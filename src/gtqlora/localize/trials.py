"""Run the same pairs under one change after another; what each prompt does then, generated and as log-odds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import Subject
from gtqlora.contrasts import Row, encode_row
from gtqlora.localize.pairs import Pair
from gtqlora.results.diagnosis import Intervention
from gtqlora.scoring import AS_IS, Changes, Runner
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


Side = Literal["flagged", "twin"]
FLAGGED: Side = "flagged"
TWIN: Side = "twin"

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

    def __init__(self, runner: Runner, pairs: Sequence[Pair], readout: Sequence[int]) -> None:
        self.runner, self.pairs, self.readout = runner, list(pairs), list(readout)
        self.flagged = [pair.prompt for pair in self.pairs]
        self.twins = [pair.twin for pair in self.pairs]

    @property
    def subject(self) -> Subject:
        """Return the model under study."""
        return self.runner.model

    @cached_property
    def own(self) -> tuple[list[Outcome], list[Outcome]]:
        """Run the flagged prompts and the twins as they are, once."""
        return self.run("flagged prompts", FLAGGED), self.run("twins", TWIN)

    def of(self, pairs: Sequence[Pair]) -> Trials:
        """Return the same trials of some of the pairs."""
        part = Trials(self.runner, pairs, self.readout)
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

    def run(self, label: str | None, side: Side, change: Changes = AS_IS) -> list[Outcome]:
        """Complete one prompt of each pair under a change.

        Args:
            label: shown as progress; None: whoever asks shows its own.
        """
        prompts = self.flagged if side == FLAGGED else self.twins
        # a twin is held against its pair's row, but the judge reads what was asked
        rows = [p.row if side == FLAGGED else replace(p.row, prompt=p.twin_messages) for p in self.pairs]
        answers = self.runner.answers(rows, change, label=label, prompts=prompts, readout=self.readout)
        return [Outcome(a.refused, a.correct, a.log_odds, a.tokens) for a in answers]

    def first_odds(self, change: Changes) -> NDArray[np.floating]:
        """Return the flagged prompts' log-odds under a change; needs a readout, and judges nothing."""
        return np.array(self.runner.first_odds(self.flagged, change, self.readout))

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
