"""Intervals of rates and of paired differences, paired tests and multiplicity control."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special
from scipy import stats as st


@dataclass(frozen=True)
class Interval:
    """A point estimate with a two-sided interval at the stated level."""

    value: float
    low: float
    high: float
    n: int


Groups = Sequence[Hashable] | None
"""The group of each value, as values of one group are not independent; None where each value is a group of its own."""

LEAST_CORRELATION = 0.05
"""The least correlation within a group that is assumed. Where all outcomes are equal, none can be measured."""


def rate(hits: ArrayLike, level: float = 0.95, groups: Groups = None) -> Interval:
    """Return the share of true values with its exact interval (Clopper & Pearson, Biometrika 1934).

    The interval is that of the number of independent values (Korn & Graubard, Survey Methodology 1998), which `groups`
    makes smaller.
    """
    x = np.asarray(hits, dtype=bool)
    if x.size == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    p, one_side = float(x.mean()), 0.5 + level / 2
    n = effective_number(x, groups, one_side)
    return Interval(p, *one_sided(p * n, n, one_side), int(x.size))


def one_sided(count: float, n: float, level: float) -> tuple[float, float]:
    """Return one-sided lower and upper Clopper-Pearson bounds of a share, each at `level`; counts may be fractions."""
    if n <= 0:
        return 0.0, 1.0
    # The exact binomial bounds are quantiles of beta distributions, which also take fractional counts.
    low = float(special.betaincinv(count, n - count + 1, 1 - level)) if count > 0 else 0.0
    high = float(special.betaincinv(count + 1, n - count, level)) if count < n else 1.0
    return low, high


def design_effect(values: ArrayLike, groups: Groups) -> float:
    """Return how many values count as one because the values of a group resemble each other.

    It is the variance of the mean computed over groups, divided by the variance computed as if all values were
    independent (Kish, Survey Sampling, 1965; Rao & Scott, Biometrics 1992), and no less than that of
    `LEAST_CORRELATION`: what cannot be seen in few values may be there. It lies between 1 and the largest group.
    """
    x = np.asarray(values, dtype=float)
    if groups is None or x.size == 0:
        return 1.0
    sizes = group_sums(np.ones(x.size), groups)
    n_groups, spread = len(sizes), x.var()
    least = 1 + (float((sizes**2).sum() / x.size) - 1) * LEAST_CORRELATION
    if n_groups < 2 or n_groups == x.size or spread < 1e-12:
        return least
    # The variance of a ratio of sums over groups (linearized), as groups differ in size.
    off = group_sums(x, groups) - x.mean() * sizes
    variance = n_groups / (n_groups - 1) * float((off**2).sum()) / x.size**2
    return max(least, min(variance / (spread / x.size), float(sizes.max())))


def effective_number(values: ArrayLike, groups: Groups, level: float) -> float:
    """Return how many independent values these count as, for a one-sided bound at `level`."""
    n = float(np.size(values))
    return n if groups is None else independent(n, len(set(groups)), design_effect(values, groups), level)


def independent(n: float, groups: float, effect: float, level: float) -> float:
    """Return the effective number of n values that come in `groups` groups, when `effect` of them count as one."""
    if groups >= n:
        return n
    if groups < 2:
        return min(n, 1.0)
    # Few groups measure the effect badly: Student's quantile for their number takes the place of the one for n.
    return max(1.0, n / effect * float(special.stdtrit(n - 1, level) / special.stdtrit(groups - 1, level)) ** 2)


def _tango_z(b: float, c: float, n: float, delta: float) -> float:
    """Compute Tango's score statistic for a paired difference of proportions (Stat. Med. 17:891, 1998, eq. 4)."""
    # q21 is the likeliest share of gains if the difference were delta: the root of a quadratic.
    a2 = -b - c + (2 * n - b + c) * delta
    a3 = -c * delta * (1 - delta)
    q21 = (np.sqrt(max(a2 * a2 - 8 * n * a3, 0.0)) - a2) / (4 * n)
    variance = n * (2 * q21 + delta * (1 - delta))
    numerator = b - c - n * delta
    if variance <= 1e-12:
        return 0.0 if abs(numerator) < 1e-9 else float(np.sign(numerator) * np.inf)
    return float(numerator / np.sqrt(variance))


def paired_difference(before: ArrayLike, after: ArrayLike, level: float = 0.95, groups: Groups = None) -> Interval:
    """Return before - after of paired 0/1 outcomes with Tango's score interval, which is good at rates near 0 and 1.

    Where pairs come in groups, the interval is that of the number of independent pairs.

    Raises:
        ValueError: the two differ in length.
    """
    x, y = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if x.shape != y.shape:
        raise ValueError(f"paired outcomes differ in length: {x.size} and {y.size}")
    b, c = discordant(x, y)
    share = effective_number(x.astype(float) - y, groups, 0.5 + level / 2) / max(x.size, 1)
    found = tango(b * share, c * share, x.size * share, level)
    return replace(found, n=int(x.size))


def discordant(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    """Count the pairs that went from true to false, and those that went from false to true."""
    return int((before & ~after).sum()), int((~before & after).sum())


@lru_cache(maxsize=4096)  # a floor asks the same of every way of grouping, and export of every floor again
def tango(b: float, c: float, n: float, level: float) -> Interval:
    """Return Tango's interval from the number of drops `b`, of gains `c` and of pairs `n`.

    The counts may be fractions, such as counts divided by a design effect: the statistic is smooth in them.
    """
    if n == 0:
        return Interval(float("nan"), -1.0, 1.0, 0)
    point, z = (b - c) / n, float(st.norm.ppf(0.5 + level / 2))

    def edge(sign: float) -> float:
        def gap(delta: float) -> float:
            # The statistic is infinite where the variance vanishes, and brentq needs finite values.
            return float(np.clip(_tango_z(b, c, n, delta), -1e6, 1e6)) - sign * z

        limit = -1 + 1e-9 if sign > 0 else 1 - 1e-9
        low, high = sorted((point, limit))
        # No crossing: the bound lies at the end of the range of differences.
        if gap(low) * gap(high) > 0:
            return float(np.sign(limit))
        return float(optimize.brentq(gap, low, high, xtol=1e-7))  # pyright: ignore[reportArgumentType]

    return Interval(point, edge(+1), edge(-1), round(n))


def fewest_changed(share: float, level: float = 0.95) -> int:
    """Return the least number of pairs of which a change in `share`, all one way, has an interval above 0."""
    sizes = (n for n in count(math.ceil(1 / share)) if tango(math.floor(share * n + 1e-9), 0, n, level).low > 0)
    return next(sizes)


def group_sums(values: NDArray[np.floating], groups: Groups) -> NDArray[np.floating]:
    """Sum the units of each group along the first axis; without groups each unit is one."""
    if groups is None:
        return values
    number: dict[Hashable, int] = {}
    of = np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.intp)
    shape = len(number), *values.shape[1:]
    each = math.prod(values.shape[1:])
    places = (of[:, None] * each + np.arange(each)).ravel()  # of all numbers, as bincount takes one axis
    sums = np.bincount(places, weights=values.ravel(), minlength=math.prod(shape))
    return sums.astype(float, copy=False).reshape(shape)


def group_means(values: NDArray[np.floating], groups: Groups) -> NDArray[np.floating]:
    """Average the units of each group along the first axis; without groups each unit is one."""
    sizes = group_sums(np.ones(len(values)), groups)
    return group_sums(values, groups) / sizes.reshape(-1, *[1] * (values.ndim - 1))


def benjamini_hochberg(p_values: ArrayLike) -> NDArray[np.floating]:
    """Return q-values that control the false discovery rate (Benjamini & Hochberg, JRSS-B 1995), in the order given."""
    p = np.asarray(p_values, dtype=float)
    return st.false_discovery_control(p.ravel(), method="bh").reshape(p.shape) if p.size else p


def mcnemar(before: ArrayLike, after: ArrayLike, groups: Groups = None) -> float:
    """Return the exact two-sided p-value that paired 0/1 outcomes changed (McNemar, Psychometrika 1947).

    Before and after are exchanged group by group, so that pairs of one group may be alike; pairs without change, and
    groups that gain as much as they lose, say nothing.
    """
    x, y = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    net = np.abs(np.rint(group_sums(x - y, groups))).astype(int)
    reach = int(net.sum())
    # law[i] is the probability that the net changes, with random signs, add up to i - reach
    law = np.zeros(2 * reach + 1)
    law[reach] = 1.0
    for change in net[net > 0]:
        law = (np.roll(law, change) + np.roll(law, -change)) / 2
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(round(float((x - y).sum())))
    return min(1.0, float(law[far].sum()))
