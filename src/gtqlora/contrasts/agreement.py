"""Whether a judge sees in the pairs what they are meant to be: answers and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.contrasts.rows import Row
from gtqlora.judging.judge import Judge, refusals

ENOUGH = 0.9
"""Share of the completions on which the judge and the pairs should agree."""
# Of benign rows nothing is expected of `rejected`: it may be a refusal or any other bad answer.
_EXPECTED = {
    ("benign", "chosen"): False,
    ("lookalike", "chosen"): False,
    ("lookalike", "rejected"): True,
    ("harmful", "chosen"): True,
    ("harmful", "rejected"): False,
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the judge makes of one column of the rows of one kind.

    Attributes:
        refusal: whether it is meant to be a refusal.
        agreeing: how many the judge takes for what they are meant to be.
    """

    kind: str
    column: str
    refusal: bool
    rows: int
    agreeing: int

    @property
    def enough(self) -> bool:
        """Return whether judge and pairs agree on most of them."""
        return self.agreeing >= ENOUGH * self.rows


def agreements(rows: Sequence[Row], judge: Judge) -> list[Agreement]:
    """Return what the judge makes of `chosen` and `rejected` of each kind."""
    found = list[Agreement]()
    for (kind, column), refusal in _EXPECTED.items():
        own = [row for row in rows if row.kind == kind]
        texts = [row.chosen if column == "chosen" else row.rejected for row in own]
        agreeing = sum(refused == refusal for refused in refusals(judge, [row.prompt for row in own], texts))
        found.append(Agreement(kind=kind, column=column, refusal=refusal, rows=len(own), agreeing=agreeing))
    return [one for one in found if one.rows]
