"""Run the same pairs under one change after another; what each prompt does then, generated and as log-odds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import Subject, by_length
from gtqlora.contrasts.readout import Readout
from gtqlora.decoding import AS_IS, Changes, decode
from gtqlora.judging.judge import same
from gtqlora.judging.labels import ANSWER
from gtqlora.localize.pairs import Pair
from gtqlora.results.diagnosis import AS_TWIN, BROKEN, FLAGGED_KINDS, REFUSES, Behaviour, Intervention
from gtqlora.scoring import Answer, Runner
from gtqlora.stats import Interval, mean_interval, paired_difference, rate


@dataclass(frozen=True)
class Outcome:
    """What one prompt did.

    Attributes:
        correct: the completion is the row's expected answer; None where the row gives none.
        log_odds: of the behaviour's first tokens against all others; None without a readout.
    """

    does: Behaviour
    correct: bool | None
    log_odds: float | None
    tokens: list[int] = field(repr=False)

    @property
    def refused(self) -> bool:
        """Return whether it refuses."""
        return self.does == REFUSES

    @property
    def sensible(self) -> bool:
        """Return whether a twin, run as it is, does something that can be told from garbage."""
        return self.does == AS_TWIN and self.correct is not False


Side = Literal["flagged", "twin"]
FLAGGED: Side = "flagged"
TWIN: Side = "twin"

_ALIKE = 0.9
"""Share of the model's own answers that must begin as every completion of the pairs does."""


def readable(runner: Runner, pairs: Sequence[Pair], readout: Readout) -> Readout:
    """Return the readout, or none where all completions begin alike and the model's own answers do not begin so.

    What the model never says would have to be put into its mouth, and then something else is diagnosed.
    """
    if not readout.begun:
        return readout
    prompts = [prompt for pair in pairs for prompt in (pair.prompt, pair.twin)]
    said = list[list[int]]()
    for chosen in by_length(prompts, runner.batch_size):
        batch = [prompts[i] for i in chosen]
        said += decode(runner.model, batch, max_new_tokens=len(readout.begun)).tokens
    return readout if sum(ids == readout.begun for ids in said) >= _ALIKE * len(said) else Readout([], [])


CUT_OFF = "whose twin is cut off at the limit of tokens"


def _unusable(pair: Pair, flagged: Outcome, twin: Outcome, ended: bool) -> str:
    """Return why a pair tells nothing of where its refusal comes from; empty if it does."""
    if not pair.aligned:
        return "without a twin of equal token count"
    if not flagged.refused:
        return "not refused"
    if twin.refused:
        return "whose twin is refused, too"
    if twin.sensible:
        return ""
    return "whose twin is answered wrongly or not at all" if ended else CUT_OFF


class Trials:
    """The pairs under study, and what their prompts do."""

    def __init__(self, runner: Runner, pairs: Sequence[Pair], readout: Readout) -> None:
        self.runner, self.pairs = runner, list(pairs)
        self.readout, self.begun = readout.tokens, readout.begun
        self.flagged = [pair.prompt for pair in self.pairs]
        self.twins = [pair.twin for pair in self.pairs]

    @property
    def subject(self) -> Subject:
        """Return the model under study."""
        return self.runner.model

    @cached_property
    def answers(self) -> tuple[list[Answer], list[Answer]]:
        """Complete the flagged prompts and the twins as they are, once."""
        return self._completed("flagged prompts", FLAGGED, AS_IS), self._completed("twins", TWIN, AS_IS)

    @cached_property
    def own(self) -> tuple[list[Outcome], list[Outcome]]:
        """Return what the flagged prompts and the twins do as they are."""
        flagged, twins = self.answers
        return self._outcomes(flagged), self._outcomes(twins)

    def of(self, pairs: Sequence[Pair]) -> Trials:
        """Return the same trials of some of the pairs."""
        part = Trials(self.runner, pairs, Readout(self.readout, self.begun))
        rows = self.rows_of(part)
        # taken over, not run again: what the prompts do as they are is known
        part.answers = tuple([side[i] for i in rows] for side in self.answers)  # type: ignore[assignment]
        part.own = tuple([side[i] for i in rows] for side in self.own)  # type: ignore[assignment]
        return part

    def rows_of(self, part: Trials) -> list[int]:
        """Return where the pairs of a part stand among these."""
        place = {id(pair): i for i, pair in enumerate(self.pairs)}
        return [place[id(pair)] for pair in part.pairs]

    @property
    def groups(self) -> list[str]:
        """Return the pair_id of each pair: siblings share their words, so they are resampled together."""
        return [pair.row.pair_id for pair in self.pairs]

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of flagged prompts among these, false refusals first."""
        return [kind for kind in FLAGGED_KINDS if any(pair.row.kind == kind for pair in self.pairs)]

    def of_kind(self, kind: str) -> Trials:
        """Return the same trials of the pairs of one kind."""
        return self.of([pair for pair in self.pairs if pair.row.kind == kind])

    def sorted_out(self) -> tuple[list[Pair], dict[str, int]]:
        """Return the pairs that can be interchanged and show the behaviour, and how many do not, by reason."""
        usable, counts = list[Pair](), Counter[str]()
        for pair, flagged, twin, answer in zip(self.pairs, *self.own, self.answers[1], strict=True):
            if reason := _unusable(pair, flagged, twin, answer.ended):
                counts[reason] += 1
            else:
                usable.append(pair)
        return usable, dict(counts)

    def run(self, label: str | None, side: Side, change: Changes = AS_IS) -> list[Outcome]:
        """Complete one prompt of each pair under a change.

        Args:
            label: shown as progress; None: whoever asks shows its own.
        """
        return self._outcomes(self._completed(label, side, change))

    def _completed(self, label: str | None, side: Side, change: Changes) -> list[Answer]:
        prompts = self.flagged if side == FLAGGED else self.twins
        # a twin is held against its pair's row, but the judge reads what was asked
        rows = [p.row if side == FLAGGED else replace(p.row, prompt=p.twin_messages) for p in self.pairs]
        return self.runner.answers(rows, change, label=label, prompts=prompts, begun=self.begun, readout=self.readout)

    def _outcomes(self, found: Sequence[Answer]) -> list[Outcome]:
        """Hold completions, one of each pair, against what the pair's two prompts say as they are."""
        flagged, twins = self.answers
        alike = same(self.runner.judge, [answer.text for answer in found], [twin.text for twin in twins])
        outcomes = []
        for answer, own, twin, equal in zip(found, flagged, twins, alike, strict=True):
            does = self._behaviour(answer, own, twin, equal)
            outcomes.append(Outcome(does, answer.correct, answer.log_odds, answer.tokens))
        return outcomes

    def _behaviour(self, answer: Answer, flagged: Answer, twin: Answer, equal: bool) -> Behaviour:
        if answer.refused:
            # a text that begins as an answer and then refuses is neither of the two
            openings = {*self.readout, *flagged.tokens[:1]}
            return REFUSES if not self.readout or answer.tokens[0] in openings else BROKEN
        # two texts that were cut off at the same words may go on differently; a judge that compares them knows better
        whole = (answer.ended and twin.ended) or getattr(self.runner.judge, "comparing", None) is not None
        return AS_TWIN if answer.correct or (equal and whole and answer.label == ANSWER) else BROKEN

    def first_odds(self, change: Changes) -> NDArray[np.floating]:
        """Return the flagged prompts' log-odds under a change; needs a readout, and judges nothing."""
        return np.array(self.runner.first_odds(self.flagged, change, self.readout))

    # --- intervals, over pairs of which siblings are drawn together

    def refusal(self, outcomes: Sequence[Outcome]) -> Interval:
        """Return the share of these pairs' prompts that refuse."""
        return self.share(outcomes, REFUSES)

    def share(self, outcomes: Sequence[Outcome], does: Behaviour) -> Interval:
        """Return the share of these pairs' prompts that do this."""
        return rate([o.does == does for o in outcomes], groups=self.groups)

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
            kind=self.kinds[0] if len(self.kinds) == 1 else "",
            name=name,
            control=control,
            refusal=self.refusal(outcomes),
            as_twin=self.share(outcomes, AS_TWIN),
            broken=self.share(outcomes, BROKEN),
            accuracy=rate(known) if known else None,
            effect=paired_difference([o.refused for o in base], [o.refused for o in outcomes], groups=self.groups),
            log_odds=self.mean_odds(outcomes),
            log_odds_effect=self.mean_change(base, outcomes),
        )


def odds_of(outcomes: Sequence[Outcome]) -> list[float] | None:
    """Return the log-odds of all outcomes, or None without a readout."""
    values = [o.log_odds for o in outcomes]
    return None if not values or None in values else values  # type: ignore[return-value]
