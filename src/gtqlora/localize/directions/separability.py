"""Measure how well a direction tells flagged prompts from twins, on groups that were not used to make it.

Shape letters: N pairs, R coordinates of a state, G groups, C components.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy import stats as st

from gtqlora.localize.directions.named import Array, unit
from gtqlora.results.directions import Components
from gtqlora.stats import Interval, ratio_interval

_COMPONENTS, _RESAMPLES = 5, 500
# Scores closer than this count as equal; states have unit spread.
_TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Which rows belong to the fit half, and to two folds of the held-out half; a group is whole in one part."""

    fit: NDArray[np.bool_]
    folds: tuple[NDArray[np.bool_], NDArray[np.bool_]]

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """Both folds together."""
        return ~self.fit


def split(groups: Sequence[str], seed: int) -> Parts:
    """Split rows by group into a half to fit on and two quarters to judge on."""
    order = sorted(set(groups))
    random.Random(seed).shuffle(order)
    half, quarter = len(order) // 2, (3 * len(order)) // 4

    def rows(chosen: list[str]) -> NDArray[np.bool_]:
        return np.isin(np.asarray(groups), chosen)

    return Parts(fit=rows(order[:half]), folds=(rows(order[half:quarter]), rows(order[quarter:])))


def auroc(flagged: Array, twins: Array) -> float:
    """Return the share of flagged-twin pairs in which the flagged score is higher; a tie counts half."""
    gap = np.subtract.outer(flagged, twins)
    return float(np.sign(np.where(np.abs(gap) < _TIE, 0.0, gap)).mean() / 2 + 0.5)


def auroc_interval(area: float, n_groups: int, level: float) -> Interval:
    """Return the score interval of an AUROC of `n_groups` flagged prompts against as many twins.

    It is Newcombe's method 5 (Stat. Med. 25:559, 2006): Hanley & McNeil's variance at the tested value, so that it has
    a width at 0 and 1, too. Rows of one group count as one, and the pairing is not used; both make it wider.
    """
    z = float(st.norm.ppf(0.5 + level / 2))

    def gap(theta: float) -> float:
        spread = 1 + (n_groups - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return (area - theta) ** 2 - z**2 * theta * (1 - theta) * spread / n_groups**2

    # At 0 and 1 the estimate itself is also a root, and not the one that bounds the interval.
    inside = min(max(area, 1e-9), 1 - 1e-9)
    low = 0.0 if area == 0 else float(optimize.brentq(gap, 0.0, inside))  # pyright: ignore[reportArgumentType]
    high = 1.0 if area == 1 else float(optimize.brentq(gap, inside, 1.0))  # pyright: ignore[reportArgumentType]
    return Interval(area, min(low, area), max(high, area), n_groups)


def separation(flagged_NR: Array, twins_NR: Array, direction_R: Array, n_groups: int, *, level: float) -> Interval:
    """Return the AUROC of all rows given, along a direction."""
    return auroc_interval(auroc(flagged_NR @ direction_R, twins_NR @ direction_R), n_groups, level)


def mean_difference(flagged_NR: Array, twins_NR: Array) -> Array:
    """Return the mean difference as direction_R of unit length, or 0."""
    return unit((flagged_NR - twins_NR).mean(0))


def principal(differences_NR: Array, count: int) -> Array:
    """Return the first components_CR of paired differences about 0 (Zou et al., arXiv 2310.01405).

    Each points to the side of the mean difference.
    """
    # Eigenvectors of the N x N inner products give the same components, and R may be far larger than N.
    _, vectors_NC = np.linalg.eigh(differences_NR @ differences_NR.T)
    components_CR = unit(vectors_NC[:, : -count - 1 : -1].T @ differences_NR)
    return components_CR * np.where(components_CR @ differences_NR.mean(0) < 0, -1.0, 1.0)[:, None]


def components(
    flagged_NR: Array, twins_NR: Array, groups: Sequence[str], parts: Parts, *, seed: int, level: float
) -> Components | None:
    """Compare the mean difference with the first principal components on the held-out half.

    None where flagged prompts and twins have the same states.
    """
    fit, held_out = parts.fit, parts.held_out
    differences_NR = flagged_NR - twins_NR
    mean_R = mean_difference(flagged_NR[fit], twins_NR[fit])
    if not mean_R.any() or not differences_NR[held_out].any():
        return None
    found_CR = principal(differences_NR[fit], _COMPONENTS)
    group_N = np.asarray(groups)[held_out].tolist()

    def share(direction_R: Array) -> Interval:
        of_N = differences_NR[held_out]
        along_N, whole_N = (of_N @ direction_R) ** 2, (of_N**2).sum(1)
        return ratio_interval(
            along_N, whole_N, groups=group_N, bounds=(0.0, 1.0), seed=seed, level=level, resamples=_RESAMPLES
        )

    return Components(
        share_mean=share(mean_R),
        shares=list(map(share, found_CR)),
        cosine=float(mean_R @ found_CR[0]),
        separation=separation(flagged_NR[held_out], twins_NR[held_out], found_CR[0], len(set(group_N)), level=level),
    )
