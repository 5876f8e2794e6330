"""What earlier edits of a model may have lost: an export of an export adds up, so that loss upon loss has an end."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.errors import FloorError, RunError
from gtqlora.families.files import PROVENANCE, read_json, small_files

BUDGET = 0.05
"""What all edits of a model, one upon another, may have lost together, by their bounds."""


@dataclass(frozen=True)
class Ancestry:
    """What earlier edits of a model may have lost: a base that was itself exported says so in its `export.json`.

    Attributes:
        spent: sum of the bounds of the losses.
        names: the models that were edited, the first one first.
    """

    spent: float = 0.0
    names: tuple[str, ...] = ()

    def margin(self, wanted: float) -> float:
        """Return what may still be lost.

        Raises:
            FloorError: nothing.
        """
        left = min(wanted, BUDGET - self.spent)
        if left <= 0:
            raise FloorError(
                f"{self.names[-1]}: this model was edited before ({' -> '.join(self.names)}), and by their bounds "
                f"these edits may have lost {self.spent:.2%} of the refusals; {BUDGET:.0%} is all there is, so edit "
                "the first one"
            )
        return left


def ancestry(model: str) -> Ancestry:
    """Read what a base's `export.json` says; a base without one was never edited.

    Raises:
        RunError: it is not what we write.
    """
    file = small_files(model) / PROVENANCE
    if not file.exists():
        return Ancestry()
    found = read_json(file)
    spent, names = found.get("spent"), found.get("ancestors")
    if not isinstance(spent, int | float) or not isinstance(names, list) or not 0 <= spent <= 1:
        raise RunError(f"{file}: has no readable 'spent' and 'ancestors'; get the model again")
    return Ancestry(float(spent), tuple(str(name) for name in names))
