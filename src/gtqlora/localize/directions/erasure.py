"""Erase a direction from residual states, and check with a newly trained probe what is still there.

A probe trained on the very states that an eraser was made from finds nothing, whichever eraser it is: the two means
are equal there, and no linear probe beats that (Belrose et al., arXiv 2306.03819, theorem 3.1). So erasers are made
from the fit half, and the probe is trained on one fold of the held-out half and judged on the other, both ways round.

Shape letters: N rows, R coordinates of a state.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize, special

from gtqlora.localize.directions.areas import Fold, auroc_interval
from gtqlora.localize.directions.named import Array
from gtqlora.localize.directions.separability import Parts, mean_difference
from gtqlora.results.directions import Erasure
from gtqlora.stats import Interval

Eraser = Callable[[Array], Array]
"""A function states_NR -> states_NR."""

# Strength of the probe's L2 penalty, in whitened coordinates: enough for a unique optimum where rows are few.
_RIDGE = 1e-2


def erasure(
    flagged_NR: Array, twins_NR: Array, groups_N: NDArray[np.str_], parts: Parts, hidden: int, *, level: float
) -> Erasure:
    """Measure what a probe finds before and after each way of erasing, and how much of the states each way costs.

    Args:
        hidden: D; the states may be given in fewer coordinates.
    """
    fit = flagged_NR[parts.fit], twins_NR[parts.fit]
    mean_removed, erased = without(mean_difference(*fit)), leace(*fit, hidden)
    folds = [(flagged_NR[rows], twins_NR[rows]) for rows in parts.folds]
    held_out_NR = np.concatenate([states for fold in folds for states in fold])

    def found(erase: Eraser) -> Interval:
        ends = [[erase(states) for states in fold] for fold in folds]
        # trained on one fold, judged on the other, both ways round
        judged = [_probed(ends[1 - i], ends[i], hidden) for i in (0, 1)]
        scored = [Fold(f_N, t_N, groups_N[rows]) for (f_N, t_N), rows in zip(judged, parts.folds, strict=True)]
        return auroc_interval(scored, seed=0, level=level)

    return Erasure(
        before=found(lambda states_NR: states_NR),
        mean_removed=found(mean_removed),
        leace=found(erased),
        mean_removed_cost=_cost(mean_removed, held_out_NR),
        leace_cost=_cost(erased, held_out_NR),
    )


def _cost(erase: Eraser, states_NR: Array) -> float:
    """Return the share of the states' variance that an eraser removes."""
    whole = states_NR.var(0).sum()
    return float((states_NR - erase(states_NR)).var(0).sum() / whole) if whole > 0 else 0.0


def without(direction_R: Array) -> Eraser:
    """Return the orthogonal projection that removes a direction of unit length (or 0)."""
    return lambda states_NR: states_NR - np.outer(states_NR @ direction_R, direction_R)


def leace(flagged_NR: Array, twins_NR: Array, hidden: int) -> Eraser:
    """Return the least change that makes the two means equal (LEACE: Belrose et al., arXiv 2306.03819, theorem 4.3).

    x - W^+ P W (x - mean), W whitening, P the projection on W times the cross-covariance. With two classes that is of
    rank one: x - d a.(x - mean) / a.d, d the difference of means and a = S^+ d, S the covariance. S is shrunk towards
    a multiple of the identity, so that it inverts, and does not follow noise, where rows are fewer than dimensions.
    """
    states_NR = np.concatenate([flagged_NR, twins_NR])
    mean_R, difference_R = states_NR.mean(0), flagged_NR.mean(0) - twins_NR.mean(0)
    # the means are equal already; a would divide by 0
    if np.linalg.norm(difference_R) < 1e-9:
        return lambda states: states
    a_R = np.linalg.solve(_shrunk_covariance(states_NR - mean_R, hidden), difference_R)
    a_R /= a_R @ difference_R
    return lambda states: states - np.outer((states - mean_R) @ a_R, difference_R)


def _shrunk_covariance(centred_NR: Array, hidden: int) -> Array:
    """Estimate a covariance by oracle approximating shrinkage (Chen et al., IEEE TSP 58:5016, 2010, eq. 23).

    Args:
        hidden: dimensions of the space; the states may be given in fewer coordinates.
    """
    n, r = centred_NR.shape
    covariance_RR = centred_NR.T @ centred_NR / n
    trace, of_square = np.trace(covariance_RR), (covariance_RR**2).sum()
    rho = ((1 - 2 / hidden) * of_square + trace**2) / ((n + 1 - 2 / hidden) * (of_square - trace**2 / hidden))
    # never quite 0, so that the covariance can be inverted
    rho = np.clip(rho, 1e-9, 1.0)
    return (1 - rho) * covariance_RR + rho * trace / hidden * np.eye(r)


def _probed(train: list[Array], judged: list[Array], hidden: int) -> list[Array]:
    """Train a probe on one (flagged, twins), and return its scores of another."""
    weights_R = probe(train[0], train[1], hidden)
    return [states_NR @ weights_R for states_NR in judged]


def probe(flagged_NR: Array, twins_NR: Array, hidden: int) -> Array:
    """Fit a logistic regression of flagged against twins, and return its weights_R.

    The L2 penalty acts in whitened coordinates, so that coordinates of small variance count as much as others. There
    is no intercept: both classes have as many rows, and their common mean is subtracted.
    """
    states_NR = np.concatenate([flagged_NR, twins_NR])
    centred_NR = states_NR - states_NR.mean(0)
    if not centred_NR.any():
        return np.zeros(states_NR.shape[1])
    root_RR = np.linalg.cholesky(_shrunk_covariance(centred_NR, hidden))
    signed_NR = linalg.solve_triangular(root_RR, centred_NR.T, lower=True).T
    # With the twins' signs turned, every row wants a positive margin, and one formula serves both classes.
    # with signs turned both classes have one loss, log(1 + exp(-margin))
    signed_NR[len(flagged_NR) :] *= -1

    def loss(weights_R: Array) -> tuple[float, Array]:
        margin_N = signed_NR @ weights_R
        value = -special.log_expit(margin_N).mean() + _RIDGE / 2 * weights_R @ weights_R
        gradient_R = -signed_NR.T @ special.expit(-margin_N) / len(margin_N) + _RIDGE * weights_R
        return value, gradient_R

    found_R = optimize.minimize(loss, np.zeros(signed_NR.shape[1]), jac=True, method="L-BFGS-B").x
    return linalg.solve_triangular(root_RR, found_R, lower=True, trans=1)
