"""Write figures as the terminal shows them: shares, intervals, and big counts in three digits with a unit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gtqlora.stats import Interval

_EXACT_BELOW = 1_000_000
"""Counts of parameters below it are short enough to be shown whole."""
_COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6))
_BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def share(value: float | None) -> str:
    """Return a share with three decimals, or "-" where there is none."""
    return "-" if value is None else f"{value:.3f}"


def interval(found: Interval | None, digits: int = 3) -> str:
    """Return an estimate with its 95 % interval, as in `0.988 [0.976, 0.997]`, or "-" where there is none.

    Of nothing there is no share, which is said, too.
    """
    if found is None:
        return "-"
    if math.isnan(found.value):
        return f"cannot tell (n={found.n:,})"
    # adding 0.0 turns the -0.0 of a rounded small negative number into 0.0
    value, low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def count(number: int) -> str:
    """Return a count of parameters: exact below a million, else as in `1.03 T` (thousand, million and so on: 1e3)."""
    return f"{number:,}" if number < _EXACT_BELOW else _short(number, _COUNTS)


def many(number: int, noun: str) -> str:
    """Return how many things there are, as in `1 row` and `1,200 rows`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(number: int) -> str:
    """Return a number of bytes with a decimal unit, as in `594 GB`."""
    return f"{number} B" if number < 1000 else _short(number, _BYTES)


def _short(number: int, units: tuple[tuple[str, float], ...]) -> str:
    rounded = float(f"{number:.3g}")  # before the unit is chosen, so that 999,999 kB becomes 1.00 GB
    unit, factor = next((unit, factor) for unit, factor in units if rounded >= factor)
    scaled = rounded / factor
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:.{digits}f} {unit}"
