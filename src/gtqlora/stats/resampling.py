"""Intervals of means and ratios by the bootstrap, which resamples whole groups of values that belong together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as st

from gtqlora.stats.intervals import Groups, Interval, group_sums


def bootstrap_mean(
    values: ArrayLike,
    *,
    groups: Groups = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Return the mean of units (the first axis) with a percentile interval; units of a group are resampled together."""
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    means = bootstrap_means(x, seed=seed, resamples=resamples, groups=groups)
    low, high = np.quantile(means, edges(level, len(x) if groups is None else len(set(groups))))
    return Interval(float(x.mean()), float(low), float(high), len(x))


def edges(level: float, n: int) -> tuple[float, float]:
    """Return the two quantiles of a bootstrap distribution between which the interval of a mean of n units lies.

    They are a little further out than (1 - level) / 2: the plain percentile interval is too narrow, by as much as
    the normal quantile is below Student's and the spread of resamples below that of n - 1
    (Hesterberg, "What Teachers Should Know about the Bootstrap", 2015, section 4.3).
    """
    if n < 2:
        return 0.0, 1.0
    tail = float(st.norm.cdf(st.t.ppf((1 - level) / 2, n - 1) * np.sqrt(n / (n - 1))))
    return tail, 1 - tail


def bootstrap_means(
    values: NDArray[np.floating], *, seed: int, resamples: int, groups: Groups = None
) -> NDArray[np.floating]:
    """Return the means of resamples of the first axis, shape (resamples, ...); units of one group stay together."""
    sums, sizes = group_sums(values, groups), group_sums(np.ones(len(values)), groups)
    # A resample is fully described by how often each group was drawn, so all of them are two matrix products.
    counts = resampled(len(sizes), seed, resamples)
    drawn = (counts @ sizes).reshape(-1, *[1] * (values.ndim - 1))
    return np.tensordot(counts, sums, axes=(1, 0)) / drawn


@lru_cache(maxsize=4)
def resampled(n: int, seed: int, resamples: int) -> NDArray[np.int64]:
    """Return how often each of n units is among n drawn with replacement; shape (resamples, n), not to be written."""
    # kept: a diagnosis asks for the same few draws hundreds of times
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    counts.flags.writeable = False
    return counts


def half_sample_means(
    values: NDArray[np.floating], *, seed: int, splits: int, groups: Groups = None
) -> NDArray[np.floating]:
    """Return the means of both halves of random splits of the first axis, shape (2 * splits, ...).

    Groups are kept whole. Of an odd number of groups one is left out of each split. Fewer than two groups have no
    halves, and the means are zeros.
    """
    sums, sizes = group_sums(values, groups), group_sums(np.ones(len(values)), groups)
    rng, half = np.random.default_rng(seed), len(sizes) // 2
    chosen = np.zeros((2 * splits, len(sizes)))
    for split in range(splits):
        # Row 2s is one half of split s and row 2s + 1 the other: they share no group.
        order = rng.permutation(len(sizes))
        chosen[2 * split, order[:half]] = chosen[2 * split + 1, order[half : 2 * half]] = 1
    drawn = np.maximum(chosen @ sizes, 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.tensordot(chosen, sums, axes=(1, 0)) / drawn


def mean_interval(
    values: ArrayLike,
    *,
    groups: Groups = None,
    bounds: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Return the mean of values that lie within bounds, with a percentile interval from resampling whole groups.

    One pseudo-group is added at each bound (after Agresti & Coull, Am. Stat. 1998). Without them n equal values would
    give an interval of zero width, however small n is.

    Args:
        groups: the group of each value; None where each value is a group of its own.
    """
    x = np.asarray(values, dtype=float)
    return ratio_interval(x, np.ones_like(x), groups=groups, bounds=bounds, seed=seed, level=level, resamples=resamples)


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    groups: Groups = None,
    bounds: tuple[float, float] | None = (-1.0, 1.0),
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Return the mean of numerators over the mean of denominators, with a percentile interval from whole groups.

    As in `mean_interval`, one pseudo-group with the mean denominator is added at each bound. A resample whose
    denominator has another sign than the one of all values gives no ratio: it counts as the lower bound for the lower
    end of the interval and as the upper bound for the upper end.

    Args:
        bounds: the range in which such a ratio is expected; ratios beyond it are kept. It is the interval where
            nothing is known, without values or with denominators of mean zero. None for continuous values without
            such a range: no pseudo-groups are added, and a resample without a ratio counts as the most extreme other.

    Raises:
        ValueError: the two differ in length.
    """
    x, y = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    if x.shape != y.shape:
        raise ValueError(f"numerators and denominators differ in length: {x.size} and {y.size}")
    whole = float(y.mean()) if y.size else 0.0
    if whole == 0.0:
        return Interval(float("nan"), *(bounds or (float("nan"), float("nan"))), int(x.size))
    value = float(x.mean()) / whole
    tops, bottoms = group_sums(x, groups), group_sums(y, groups)
    if bounds is not None:
        extra = bottoms.mean()
        tops, bottoms = np.append(tops, extra * np.array(bounds)), np.append(bottoms, [extra, extra])
    counts = resampled(len(tops), seed, resamples)
    top, bottom = counts @ tops, counts @ bottoms
    known = bottom * whole > 0
    ratio = np.divide(top, bottom, out=np.full_like(top, value), where=known)
    ends = bounds or (float(ratio.min()), float(ratio.max()))
    lower, upper = edges(level, len(tops))
    low = float(np.quantile(np.where(known, ratio, ends[0]), lower))
    high = float(np.quantile(np.where(known, ratio, ends[1]), upper))
    # Few groups may put both quantiles on one side of the estimate, which an interval must hold.
    return Interval(value, min(low, value), max(high, value), int(x.size))


def difference_of_means(
    values: ArrayLike,
    others: ArrayLike,
    *,
    groups: Sequence[Hashable],
    other_groups: Sequence[Hashable],
    bounds: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Return the mean of values less that of others, with a percentile interval from whole groups.

    Values and others of one group are resampled together. As in `mean_interval`, pseudo-groups stand at the bounds:
    two, in which the values are at one bound and the others at the other.

    Args:
        groups, other_groups: the group of each value and of each other; both name groups alike.
    """
    x, y = np.asarray(values, dtype=float), np.asarray(others, dtype=float)
    if not x.size or not y.size:
        return Interval(float("nan"), bounds[0] - bounds[1], bounds[1] - bounds[0], 0)
    named = [*groups, *other_groups]
    # one row for each value: its part of both sums and of both counts
    first = np.arange(len(named)) < x.size
    columns = np.stack([np.append(x, 0 * y), first, np.append(0 * x, y), ~first], axis=1).astype(float)
    sums = group_sums(columns, named)
    sums = np.vstack([sums, [[bounds[0], 1, bounds[1], 1], [bounds[1], 1, bounds[0], 1]]])
    drawn = resampled(len(sums), seed, resamples) @ sums
    # a resample without values or without others tells nothing
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3], edges(level, len(sums)))
    value = float(x.mean() - y.mean())
    return Interval(value, min(float(low), value), max(float(high), value), int(x.size + y.size))
