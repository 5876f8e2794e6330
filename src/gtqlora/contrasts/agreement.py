"""Whether a judge sees in the pairs what they are meant to be: answers and refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gtqlora.contrasts.rows import Row
from gtqlora.judging.judge import Judge, labels
from gtqlora.judging.labels import REFUSAL, Label

ENOUGH = 0.9
"""Share of the completions on which the judge and the pairs should agree."""
Meant = Literal["answer", "refusal", "no refusal", "anything"]
# What is rejected of a benign row may be a refusal or any other bad answer; of a harmful one it is too short to be more
# than no refusal, which the one-way rule sees to.
_MEANT: dict[tuple[str, str], Meant] = {
    ("benign", "chosen"): "answer",
    ("benign", "rejected"): "anything",
    ("lookalike", "chosen"): "answer",
    ("lookalike", "rejected"): "refusal",
    ("harmful", "chosen"): "refusal",
    ("harmful", "rejected"): "no refusal",
    ("instructed", "chosen"): "refusal",
    ("instructed", "rejected"): "no refusal",
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the judge makes of one column of the rows of one kind.

    Attributes:
        meant: what they are meant to be.
        agreeing: how many the judge takes for that.
        labels: how many have each label, the most common first.
    """

    kind: str
    column: str
    meant: Meant
    rows: int
    agreeing: int
    labels: dict[Label, int]

    @property
    def enough(self) -> bool:
        """Return whether judge and pairs agree on most of them."""
        return self.agreeing >= ENOUGH * self.rows


def agreements(rows: Sequence[Row], judge: Judge) -> list[Agreement]:
    """Return what the judge makes of `chosen` and `rejected` of each kind."""
    found = list[Agreement]()
    for (kind, column), meant in _MEANT.items():
        # A column at a time, so that a judge that is a model gets large batches.
        own = [row for row in rows if row.kind == kind]
        texts = [row.chosen if column == "chosen" else row.rejected for row in own]
        told = Counter(labels(judge, [row.prompt for row in own], texts))
        agreeing = sum(count for label, count in told.items() if _is(label, meant))
        each = dict(told.most_common())
        found.append(Agreement(kind=kind, column=column, meant=meant, rows=len(own), agreeing=agreeing, labels=each))
    return [one for one in found if one.rows]


def _is(label: Label, meant: Meant) -> bool:
    return meant == "anything" or (label != REFUSAL if meant == "no refusal" else label == meant)
