"""Whether a judge sees in the pairs what they are meant to be: answers and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.contrasts.rows import Row
from gtqlora.judging.judge import Judge, labels
from gtqlora.judging.labels import ANSWER, REFUSAL, Label

ENOUGH = 0.9
"""Share of the completions on which the judge and the pairs should agree."""
# Of benign rows nothing is expected of `rejected`, which may be a refusal or any other bad answer; and of harmful ones
# it is too short to be more than no refusal, which the one-way rule sees to; no refusal is enough of instructed ones.
_MEANT: dict[tuple[str, str], Label] = {
    ("benign", "chosen"): ANSWER,
    ("lookalike", "chosen"): ANSWER,
    ("lookalike", "rejected"): REFUSAL,
    ("harmful", "chosen"): REFUSAL,
    ("instructed", "chosen"): REFUSAL,
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the judge makes of one column of the rows of one kind.

    Attributes:
        meant: what they are meant to be.
        agreeing: how many the judge takes for that.
    """

    kind: str
    column: str
    meant: Label
    rows: int
    agreeing: int

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
        agreeing = sum(label == meant for label in labels(judge, [row.prompt for row in own], texts))
        found.append(Agreement(kind=kind, column=column, meant=meant, rows=len(own), agreeing=agreeing))
    return [one for one in found if one.rows]
