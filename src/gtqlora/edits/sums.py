"""What the losses of an optimizer batch are divided by, however many parts and ranks it comes in."""

from __future__ import annotations

from dataclasses import dataclass


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
