# pyright: strict
"""What `diagnose` leaves of every routed expert: how often flagged prompts and their twins choose it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gtqlora.results.files import read_rows, write_rows

FILE = "association.parquet"
"""In the folder `diagnosis`."""

STABLE, EXPECTED_FALSE = 0.9, 1.0
"""Experts in this share of half-samples are stable, and at most so many of these are expected to be there by chance."""


def first_of(experts: int) -> int:
    """Return how many of a model's experts are looked at in each half-sample: fixed before anything is seen.

    It is the largest k for which k^2 / ((2 `STABLE` - 1) experts) bounds the number of stable experts that are no
    likelier among the first k than a random one by `EXPECTED_FALSE` (Meinshausen & Buehlmann, JRSS-B 2010, theorem 1;
    for complementary halves Shah & Samworth, JRSS-B 2013, theorem 1).
    """
    return min(experts, max(1, math.isqrt(int(EXPECTED_FALSE * (2 * STABLE - 1) * experts + 1e-9))))


@dataclass(frozen=True, kw_only=True)
class Association:
    """One expert on flagged prompts and on their twins.

    Attributes:
        kind: of the flagged prompts; empty for all of them.
        layer: of the decoder.
        rate_flagged, rate_twin: share of prompt tokens, from the first one that can differ on, that choose it.
        difference, low, high: flagged less twin, with a bootstrap interval.
        q: of no difference, over all experts (Benjamini & Hochberg).
        mass, mass_low, mass_high, mass_q: the same of its share of the layer's routing weight; 0 and 1 in records from
            before it was measured.
        stability: share of half-samples of the prompts in which it is among the first `first_of` by difference.
        gradient, gradient_low, gradient_high: mean of `gradient_scores` over flagged prompts; None if not computed.
        weight_*: mean routing weight when chosen. last_*: rate at the last prompt token. answer_*: rate over the
            tokens of the model's own answer; None if there were none.
    """

    kind: str = ""
    layer: int
    expert: int
    rate_flagged: float
    rate_twin: float
    difference: float
    low: float
    high: float
    q: float
    mass: float = 0.0
    mass_low: float = 0.0
    mass_high: float = 0.0
    mass_q: float = 1.0
    stability: float
    gradient: float | None
    gradient_low: float | None
    gradient_high: float | None
    weight_flagged: float
    weight_twin: float
    last_flagged: float
    last_twin: float
    answer_flagged: float | None
    answer_twin: float | None


def of_kind(associations: Iterable[Association], kind: str = "") -> list[Association]:
    """Return those on the flagged prompts of one kind, or on all of them."""
    return [row for row in associations if row.kind == kind]


def read_associations(run: Path) -> list[Association]:
    """Return every expert's association, by layer and expert: on all flagged prompts, then on those of each kind.

    Raises:
        RunError: they are not there, or not what this version writes.
    """
    return read_rows(Association, run, f"diagnosis/{FILE}", "diagnose")


def write_associations(folder: Path, associations: Iterable[Association]) -> None:
    """Write them into the folder `diagnosis`, wherever that is being made."""
    write_rows(folder / FILE, associations)
