"""What the losses of an optimizer batch are divided by, however many parts and ranks it comes in."""

from __future__ import annotations

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
    """An optimizer batch in progress: its sums, parts still to come, and the anchor so far."""

    sums: Sums
    left: int
    anchor: float = 0.0


def mean_of_ranks(sums: Sums) -> Sums:
    """Return the mean of the ranks' sums: gradients are averaged over ranks, so each divides by it."""
    return Sums(*(sum(values) / ranks().count for values in zip(*all_of(astuple(sums)), strict=True)))
