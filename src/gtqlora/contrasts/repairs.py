"""Whether a repair of over-refusal could be seen on the held-out lookalike prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.config.stages import REPAIR
from gtqlora.contrasts.near import beside, stand_alone
from gtqlora.contrasts.rows import Row
from gtqlora.stats import fewest_changed


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Whether a repair of some size would show.

    Attributes:
        share: the part of the lookalike prompts that is repaired.
        prompts: held-out lookalike prompts, but for those nearly the same as another or as one outside of the split.
        fewest: prompts on which the 95 % interval of so large a repair is above 0, if nothing is lost beside it.
        note: what is missing, as a sentence; "" if nothing is.
    """

    share: float
    prompts: int
    fewest: int
    note: str


def repair_of(rows: Sequence[Row], share: float = REPAIR) -> Repair:
    """Return whether a repair of this share of the held-out lookalike prompts would show, and what is missing."""
    held = [row.prompt for row in rows if (row.split, row.kind) == ("heldout", "lookalike")]
    trained = beside((row for row in rows if row.split != "heldout"), "lookalike")
    own, fewest = len(stand_alone(held, trained)), fewest_changed(share)
    missing = (
        f"{own:,} held-out lookalike prompts; a repair of {share:.0%} of them can be told from chance on {fewest:,} or "
        "more, so hold out more (prompts that are nearly the same count once)"
    )
    return Repair(share=share, prompts=own, fewest=fewest, note="" if own >= fewest else missing)
