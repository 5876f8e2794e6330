"""Measure how well a direction tells flagged prompts from twins, on groups that were not used to make it.

Shape letters: N pairs, R coordinates of a state, G groups, C components.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtqlora.localize.directions.areas import Fold, auroc_interval, over_splits
from gtqlora.localize.directions.named import Array, unit
from gtqlora.results.directions import Components
from gtqlora.stats import Interval, ratio_interval

_COMPONENTS, _RESAMPLES = 5, 500
# Seeds of the splits are this far apart, so that runs of neighbouring seeds share none.
_SPLITS, _APART = 5, 1_000_003


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


def splits(groups: Sequence[str], seed: int) -> list[Parts]:
    """Return several random splits, so that what is said does not rest on one."""
    return [split(groups, seed + _APART * i) for i in range(_SPLITS)]


Direction = Callable[[Array, Array], Array]
"""A function of flagged and twin states_NR -> direction_R."""


def separation(
    flagged_NR: Array,
    twins_NR: Array,
    groups_N: NDArray[np.str_],
    parts: Sequence[Parts],
    made: Direction,
    level: float,
) -> Interval:
    """Return the AUROC on held-out halves along the direction that is made from the other halves, over all splits."""
    found: list[Interval] = []
    for seed, part in enumerate(parts):
        direction_R, rows = made(flagged_NR[part.fit], twins_NR[part.fit]), part.held_out
        fold = Fold(flagged_NR[rows] @ direction_R, twins_NR[rows] @ direction_R, groups_N[rows])
        found.append(auroc_interval([fold], seed=seed, level=level))
    return over_splits(found)


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
    flagged_NR: Array, twins_NR: Array, groups_N: NDArray[np.str_], parts: Sequence[Parts], *, seed: int, level: float
) -> Components | None:
    """Compare the mean difference with the first principal components on the held-out half of the first split.

    None where flagged prompts and twins have the same states.
    """
    fit, held_out = parts[0].fit, parts[0].held_out
    differences_NR = flagged_NR - twins_NR
    mean_R = mean_difference(flagged_NR[fit], twins_NR[fit])
    if not mean_R.any() or not differences_NR[held_out].any():
        return None
    found_CR = principal(differences_NR[fit], _COMPONENTS)
    group_N = groups_N[held_out].tolist()

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
        separation=separation(flagged_NR, twins_NR, groups_N, parts, _first_component, level),
    )


def _first_component(flagged_NR: Array, twins_NR: Array) -> Array:
    return principal(flagged_NR - twins_NR, 1)[0]
