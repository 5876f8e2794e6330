"""Intervals of means and ratios by resampling whole groups."""

from __future__ import annotations

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
    """Mean with a percentile interval from resampling whole units (the first axis), those of a group together."""
    x = np.asarray(values, dtype=float)
    if x.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    means = bootstrap_means(x, seed=seed, resamples=resamples, groups=groups)
    low, high = np.quantile(means, edges(level, len(x) if groups is None else len(set(groups))))
    return Interval(float(x.mean()), float(low), float(high), len(x))


def edges(level: float, n: int) -> tuple[float, float]:
    """Where to cut the bootstrap's distribution of a mean of n units: a little outside the percentiles.

    Those are too narrow by as much as the normal quantile is below Student's, and the resamples' spread below that of
    n - 1 (Hesterberg, "What SourceRuns Should Know about the Bootstrap", 2015, section 4.3).
    """
    if n < 2:
        return 0.0, 1.0
    tail = float(st.norm.cdf(st.t.ppf((1 - level) / 2, n - 1) * np.sqrt(n / (n - 1))))
    return tail, 1 - tail


def bootstrap_means(
    values: NDArray[np.floating], *, seed: int, resamples: int, groups: Groups = None
) -> NDArray[np.floating]:
    """Means of `resamples` resamples of the first axis; shape (resamples, ...). Units of one group stay together."""
    sums, sizes = group_sums(values, groups), group_sums(np.ones(len(values)), groups)
    counts = _resampled(len(sizes), seed, resamples)
    drawn = (counts @ sizes).reshape(-1, *[1] * (values.ndim - 1))
    return np.tensordot(counts, sums, axes=(1, 0)) / drawn


def _resampled(n: int, seed: int, resamples: int) -> NDArray[np.int64]:
    """How often each of n units is drawn, with replacement, in each resample; shape (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def half_sample_means(
    values: NDArray[np.floating], *, seed: int, splits: int, groups: Groups = None
) -> NDArray[np.floating]:
    """Means of both halves of random splits of the first axis, groups kept whole; shape (2 * splits, ...).

    An odd group is left out of its split. Fewer than two groups have no halves: zeros.
    """
    sums, sizes = group_sums(values, groups), group_sums(np.ones(len(values)), groups)
    rng, half = np.random.default_rng(seed), len(sizes) // 2
    chosen = np.zeros((2 * splits, len(sizes)))
    for split in range(splits):
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
    """Mean of values that lie within bounds, with a percentile interval from resampling whole groups.

    One group more at each bound (after Agresti & Coull, Am. Stat. 1998) keeps n equal values from giving zero width.

    Args:
        groups: of which group each value is; None: each value is its own.
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
    """Mean of numerators by mean of denominators, with a percentile interval from resampling whole groups.

    One group more, of the mean denominator, at each bound as in `mean_interval`. A resample whose denominator has not
    the sign of the whole one's counts as the lower bound at the lower end and as the upper one at the upper.

    Args:
        bounds: where such a ratio is expected; values beyond are kept. The whole interval if nothing is known: no
            values, or denominators of mean zero. None: of continuous values no group is added, and such a resample
            counts as the most extreme of the others.

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
    counts = _resampled(len(tops), seed, resamples)
    top, bottom = counts @ tops, counts @ bottoms
    known = bottom * whole > 0
    ratio = np.divide(top, bottom, out=np.full_like(top, value), where=known)
    ends = bounds or (float(ratio.min()), float(ratio.max()))
    lower, upper = edges(level, len(tops))
    low = float(np.quantile(np.where(known, ratio, ends[0]), lower))
    high = float(np.quantile(np.where(known, ratio, ends[1]), upper))
    return Interval(value, min(low, value), max(high, value), int(x.size))
