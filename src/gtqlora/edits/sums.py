"""What the losses of an optimizer batch are divided by, however many parts and ranks it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from gtqlora.ranks import all_of, ranks


@dataclass
class Sums:
    """What losses are divided by: of a part of an optimizer batch, or of all its parts on all ranks.

    Attributes:
        chosen: tokens of chosen completions, over which the SFT term is a mean.
        anchored: tokens of rows that are held to the original's routing.
    """

    rows: float
    chosen: float
    anchored: float


@dataclass
class Whole:
    """An optimizer batch in progress: its sums, parts still to come, and the anchor so far.

    Attributes:
        sums: the mean of the ranks' sums: gradients are averaged over ranks, so each divides by it.
        compared: of each part, the most rows of a rank whose routing is compared: anchored ones, and others.
    """

    sums: Sums
    compared: list[tuple[int, int]]
    left: int
    anchor: float = 0.0


def whole_of(parts: Sequence[Sums], compared: Sequence[tuple[int, int]] = ()) -> Whole:
    """Return the optimizer batch that these parts on this rank, and as many on others, make; ranks tell it at once."""
    mine = [sum(values) for values in zip(*map(astuple, parts), strict=True)]
    sums, rows = zip(*all_of((mine, list(compared))), strict=True)
    mean = Sums(*(sum(values) / ranks().count for values in zip(*sums, strict=True)))
    most = [(max(a for a, _ in part), max(b for _, b in part)) for part in zip(*rows, strict=True)]
    return Whole(mean, most, left=len(parts))
