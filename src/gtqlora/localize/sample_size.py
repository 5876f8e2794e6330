"""How many pairs an answer needs, so that nobody waits for one that cannot come."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from scipy import stats as st

from gtqlora.results.diagnosis import MIN_PAIRS
from gtqlora.stats import paired_difference

_POWER = 0.8
_MOST, _RARE = 1000, 1e-4
# a share that is clear of its thirds by as much as the least clear ones that are worth telling, and these thirds
_ANSWERS = {"routing": (0.9, 2 / 3, 1.0), "both": (0.5, 1 / 3, 2 / 3), "residual": (0.1, 0.0, 1 / 3)}


@cache
def needed(answer: str) -> int:
    """Return the fewest pairs of which four fifths of samples give this answer, at a typical share for it.

    By the interval that decides: its ends must lie between the thirds. Routing is taken to move 90 % of the refusals,
    both 50 %, residual 10 %.
    """
    share, low, high = _ANSWERS[answer]
    return next((n for n in range(MIN_PAIRS, _MOST, 5) if _power(n, share, low, high) >= _POWER), _MOST)


def _power(n: int, share: float, low: float, high: float) -> float:
    """Return how often an interval of n pairs lies within the two ends."""
    hits = [k for k in range(n + 1) if st.binom.pmf(k, n, share) > _RARE]
    # the interval that decides; the control is taken to do nothing
    intervals = [paired_difference(np.arange(n) < k, np.zeros(n)) for k in hits]
    # an end of the range cannot be passed
    told = [
        k for k, i in zip(hits, intervals, strict=True) if (i.low > low or not low) and (i.high < high or high == 1)
    ]
    return float(st.binom.pmf(told, n, share).sum()) if told else 0.0


def sample_sizes(usable: Mapping[str, int]) -> list[str]:
    """Return for each kind of prompts a warning of the answers that so many usable pairs cannot be expected to give."""
    found = []
    for kind, n in usable.items():
        scarce = [answer for answer in _ANSWERS if n < needed(answer)]
        if scarce:
            told = ", ".join(f"`{answer}` {needed(answer)}" for answer in scarce)
            found.append(f"{n} usable {kind} pairs: to be told in four cases of five, these answers need more: {told}.")
    return found
