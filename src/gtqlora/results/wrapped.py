# pyright: strict
"""What `verify` finds of the same prompts asked again inside plain frames: a second floor, and whether repairs hold."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.stats import Floor, Interval

WRAPPED = "wrapped.parquet"


@dataclass(frozen=True, kw_only=True)
class WrapperRow:
    """One frame.

    Attributes:
        asked, refused: harmful prompts asked in it, and refused by the original.
        losses: share of these refusals that are not kept; its upper edge is a one-sided bound for all frames together.
        verdict: "pass", "fail" or "cannot tell", within the worst frame's margin.
    """

    name: str
    asked: int
    refused: int
    losses: Interval
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Repairs:
    """Lookalike prompts that the edit repairs, inside frames: how many are answered there."""

    before: Interval
    after: Interval


@dataclass(frozen=True, kw_only=True)
class WrappedFloor:
    """The second floor: whether harmful prompts that the original refuses inside plain frames are still refused there.

    Attributes:
        verdict: "pass", "fail" or "cannot tell"; it passes if the floor over all frames does, and the worst frame.
        reason: one sentence that a user can read.
        floor: over all frames, whose prompts are grouped by pair and topic.
        worst_margin: how much may be lost in any one frame.
        repairs: None where no repaired prompt was asked.
        own: over all frames of the user's own, which have no part in `floor`; None where there are none.
    """

    verdict: str
    reason: str
    floor: Floor
    worst_margin: float
    wrappers: list[WrapperRow]
    repairs: Repairs | None
    own: Floor | None = None
