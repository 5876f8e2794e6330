"""How well scores tell flagged prompts from twins: the area under the ROC curve (AUROC), with an interval over groups.

Shape letters: N pairs, G groups, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy import stats as st

from gtqlora.localize.directions.named import Array
from gtqlora.stats import Interval, edges, resampled

_RESAMPLES = 500
# Scores closer than this count as equal; states have unit spread.
_TIE = 1e-6


@dataclass(frozen=True)
class Fold:
    """Scores of flagged prompts and of their twins by something that was fitted on other groups, and their groups."""

    flagged_N: Array
    twins_N: Array
    groups_N: NDArray[np.str_]


def auroc(flagged: Array, twins: Array) -> float:
    """Return the share of flagged-twin pairs in which the flagged score is higher; a tie counts half."""
    return float(_higher(flagged, twins).mean())


def _higher(flagged: Array, twins: Array) -> Array:
    gap = np.subtract.outer(flagged, twins)
    return np.sign(np.where(np.abs(gap) < _TIE, 0.0, gap)) / 2 + 0.5


def auroc_interval(folds: Sequence[Fold], *, seed: int, level: float) -> Interval:
    """Return the mean AUROC over folds that share no group, with an interval from resampling whole groups.

    Pairs may be alike or unlike, as they are resampled whole. The percentile interval (`stats.edges`) has no width
    where every fold is told perfectly; so it is never shorter than the score interval of as many independent pairs as
    there are groups.
    """
    n_groups = sum(len(set(fold.groups_N.tolist())) for fold in folds)
    draws = [_drawn(fold, seed + i) for i, fold in enumerate(folds)]
    area = float(np.mean([auroc(fold.flagged_N, fold.twins_N) for fold in folds]))
    low, high = np.quantile(np.mean(draws, axis=0), edges(level, n_groups))
    score = score_interval(area, n_groups, level)
    return Interval(area, min(float(low), score.low), max(float(high), score.high), n_groups)


def _drawn(fold: Fold, seed: int) -> Array:
    """Return the AUROC_B of one fold with its groups resampled."""
    names, of_N = np.unique(fold.groups_N, return_inverse=True)
    member_NG = np.eye(len(names))[of_N]
    higher_GG = member_NG.T @ _higher(fold.flagged_N, fold.twins_N) @ member_NG
    counts_BG = _counts(len(names), seed)
    return ((counts_BG @ higher_GG) * counts_BG).sum(1) / (counts_BG @ member_NG.sum(0)) ** 2


@lru_cache(maxsize=32)
def _counts(groups: int, seed: int) -> NDArray[np.int64]:
    """Return resamples, which all layers share."""
    counts_BG = resampled(groups, seed, _RESAMPLES)
    counts_BG.setflags(write=False)
    return counts_BG


def over_splits(found: Sequence[Interval]) -> Interval:
    """Return the mean of intervals of the same quantity from several random splits.

    A mean over splits varies no more than the value of one, so edges that are averaged too still hold it.
    """
    value, low, high = (float(np.mean([getattr(i, name) for i in found])) for name in ("value", "low", "high"))
    return Interval(value, low, high, found[0].n)


def score_interval(area: float, n: int, level: float) -> Interval:
    """Return the score interval of an AUROC of n flagged prompts against as many twins, all of them independent.

    It is Newcombe's method 5 (Stat. Med. 25:559, 2006): Hanley & McNeil's variance at the tested value, so that it has
    a width at 0 and 1, too.
    """
    z = float(st.norm.ppf(0.5 + level / 2))

    def gap(theta: float) -> float:
        spread = 1 + (n - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (area - theta) ** 2 - z**2 * theta * (1 - theta) * spread / n**2

    # At 0 and 1 the estimate itself is also a root, and not the one that bounds the interval.
    inside = min(max(area, 1e-9), 1 - 1e-9)
    low = 0.0 if area == 0 else float(optimize.brentq(gap, 0.0, inside))  # pyright: ignore[reportArgumentType]
    high = 1.0 if area == 1 else float(optimize.brentq(gap, inside, 1.0))  # pyright: ignore[reportArgumentType]
    return Interval(area, min(low, area), max(high, area), n)
