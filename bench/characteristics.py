"""How often the statistics err, and how often they can tell: rates, paired differences, verdicts, floor, tests, AUROC.

    python bench/characteristics.py            # under three minutes on one core
    python bench/characteristics.py --quick    # seconds, for the test: the same tables from few draws

Every table calls the package's own functions. Without groups all outcomes are enumerated; with groups (K topics of m
prompts, of which some do what is counted more often than others: Dirichlet-multinomial, intra-topic correlation rho)
they are drawn. A size is marked with * where it is above its nominal value by more than one point and the simulation's
own error (two standard errors).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats as st

from gtqlora import stats
from gtqlora.localize.directions.areas import Fold, auroc_interval, over_splits
from gtqlora.localize.directions.separability import mean_difference, splits
from gtqlora.stats import Interval
from gtqlora.stats.noninferiority import Question, counted

LEVEL, POINT = 0.95, 0.01
SIZES = (30, 60, 100, 200, 400, 1000)
DESIGNS = ((40, 5), (40, 21), (100, 8), (200, 4))
"""Topics, and prompts of each."""
CORRELATIONS = (0.0, 0.05, 0.1, 0.3)
MARGIN = 0.02
THIRDS = (1 / 3, 2 / 3)

Outcomes = NDArray[np.bool_]
beyond: list[str] = []
"""Rows of tables with a size that is not nominal."""


def size(where: str, share: float, nominal: float, draws: int | None = None) -> str:
    """A size as a cell of a table, marked and remembered where it is not nominal; enumerated without `draws`."""
    doubt = 2 * (nominal * (1 - nominal) / draws) ** 0.5 if draws else 0.0
    mark = share > nominal + POINT + doubt
    if mark:
        beyond.append(f"{where}: {share:.3f}, nominal {nominal:g}")
    return f"{share:.3f}{'*' if mark else ' '}"


def row(*cells: object) -> None:
    print(f"{cells[0]!s:<26}" + "".join(f"{cell!s:>11}" for cell in cells[1:]), flush=True)


def drawn(design: tuple[int, int], shares: Sequence[float], rho: float, draws: int, seed: int = 0) -> NDArray[np.int64]:
    """Counts [draws, topics, kinds] of what the prompts of each topic do, the kinds having these shares."""
    topics, each = design
    rng, mean = np.random.default_rng(seed), np.array(shares)
    if rho == 0:
        return rng.multinomial(each, mean, size=(draws, topics))
    gammas = rng.gamma(np.maximum(mean * (1 / rho - 1), 1e-12), size=(draws, topics, len(mean)))
    return rng.multinomial(each, gammas / gammas.sum(-1, keepdims=True))


def missed(found: Interval, truth: float) -> NDArray[np.bool_]:
    return np.array([truth < found.low - 1e-9, truth > found.high + 1e-9])


# --- rates and paired differences


def rates(draws: int) -> None:
    print("\nrate: intervals that miss the true share (nominal 0.050)")
    shares = (0.02, 0.1, 0.5, 0.9)
    row("prompts", *shares)
    for n in SIZES:
        found = [stats.rate(np.arange(n) < hits) for hits in range(n + 1)]
        errors = [st.binom.pmf(range(n + 1), n, p) @ [missed(i, p).any() for i in found] for p in shares]
        row(n, *(size(f"rate, {n}, {p}", float(e), 0.05) for p, e in zip(shares, errors, strict=True)))
    row("topics x each, rho", *shares)
    for design, rho in clustered():
        name = f"{design[0]} x {design[1]}, {rho:g}"
        row(name, *(size(f"rate, {name}, {p}", _rate_missed(design, p, rho, draws), 0.05, draws) for p in shares))


def clustered() -> Iterator[tuple[tuple[int, int], float]]:
    yield from ((design, rho) for design in DESIGNS for rho in CORRELATIONS)


def _rate_missed(design: tuple[int, int], p: float, rho: float, draws: int) -> float:
    topics, each = design
    groups = np.repeat(np.arange(topics), each).tolist()
    counts = drawn(design, (p, 1 - p), rho, draws)[..., 0]
    hits = np.arange(each) < counts[..., None]
    return float(np.mean([missed(stats.rate(h.ravel(), LEVEL, groups), p).any() for h in hits]))


@cache
def _difference(drops: int, gains: int, n: int) -> Interval:
    return stats.paired_difference(*outcomes(n, drops, gains), LEVEL)


def outcomes(n: int, drops: int, gains: int) -> tuple[Outcomes, Outcomes]:
    """Before and after: all are true before, but for those that are gained."""
    x, y = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    y[:drops] = x[drops : drops + gains] = False
    return x, y


def differences(draws: int) -> None:
    print("\npaired difference, 2 % gained: truths below and above the interval (nominal 0.025 each)")
    truths = (0.0, *THIRDS)
    row("pairs", *(side for t in truths for side in (f"{t:.2f} below", "above")))
    for n in SIZES:
        row(n, *_both_sides(f"difference, {n}", [_sides(n, t, draws) for t in truths], 10 * draws))
    row("topics x each, rho")
    for design, rho in clustered():
        name = f"{design[0]} x {design[1]}, {rho:g}"
        row(name, *_both_sides(f"difference, {name}", [_sides_in(design, t, rho, draws) for t in truths], draws))


def _both_sides(where: str, found: Sequence[NDArray[np.floating]], draws: int) -> list[str]:
    return [size(where, float(share), 0.025, draws) for sides in found for share in sides]


def _of(truth: float, gained: float = 0.02) -> tuple[float, float, float]:
    return truth + gained, gained, 1 - truth - 2 * gained


def _sides(n: int, truth: float, draws: int) -> NDArray[np.floating]:
    sums = np.random.default_rng(0).multinomial(n, _of(truth), size=10 * draws)
    kinds, times = np.unique(sums, axis=0, return_counts=True)
    found = np.array([missed(_difference(int(b), int(c), n), truth) for b, c, _ in kinds])
    return times @ found / times.sum()


def _sides_in(design: tuple[int, int], truth: float, rho: float, draws: int) -> NDArray[np.floating]:
    topics, each = design
    groups = np.repeat(np.arange(topics), each).tolist()
    place = np.arange(each)
    found = np.zeros(2)
    for counts in drawn(design, _of(truth), rho, draws):
        lost, gained = counts[:, 0, None], counts[:, 1, None]
        y, x = place >= lost, (place < lost) | (place >= lost + gained)
        found += missed(stats.paired_difference(x.ravel(), y.ravel(), LEVEL, groups), truth)
    return found / draws


def thirds() -> None:
    print(
        "\nthirds rule: share above 2/3 / below 1/3 / between, else it cannot tell (control moves none; nominal 0.025)"
    )
    shares = (0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.9, 1.0)
    print(f"{'pairs':<8}" + "".join(f"{share:>16.2f}" for share in shares))
    for n in (30, 60, 100, 200, 400):
        found = [_difference(moved, 0, n) for moved in range(n + 1)]
        said = np.array([[i.low > 2 / 3, i.high < 1 / 3, i.low > 1 / 3 and i.high < 2 / 3] for i in found])
        cells = []
        for share in shares:
            told = st.binom.pmf(range(n + 1), n, share) @ said
            wrong = told * [share <= 2 / 3 + 1e-9, share >= 1 / 3 - 1e-9, not 1 / 3 < share < 2 / 3]
            mark = size(f"thirds rule, {n}, {share:.2f}", float(wrong.max()), 0.025)[-1]
            cells.append("/".join(f"{t:.2f}" for t in told) + mark)
        print(f"{n:<8}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


# --- the floor


def floors(draws: int) -> None:
    print(f"\nfloor, margin {MARGIN:g}: passes at a loss of the margin (size, nominal 0.050) and of a quarter (power)")
    gains = (0.0, 0.01, 0.05)
    row("prompts, gained", *(f"{what}, {g:g}" for g in gains for what in ("size", "power")))
    for n in (60, 150, 200, 300, 840, 1000):
        cells = []
        for g in gains:
            cells.append(size(f"floor, {n}, {g:g}", _enumerated(n, MARGIN + g, g), 0.05))
            cells.append(f"{_enumerated(n, MARGIN / 4, g):.3f} ")
        row(n, *cells)
    row("topics x each, rho", *(f"{what}, {r:g}" for r in CORRELATIONS for what in ("size", "power")))
    for design in ((6, 140), (20, 40), *DESIGNS[1:]):
        cells = []
        for rho in CORRELATIONS:
            name = f"floor, {design[0]} x {design[1]}, {rho:g}"
            cells.append(size(name, _passed(design, MARGIN, rho, draws), 0.05, draws))
            cells.append(f"{_passed(design, MARGIN / 4, rho, draws // 2):.3f} ")
        row(f"{design[0]} x {design[1]}", *cells)


def passes(x: Outcomes, y: Outcomes, groups: list[int] | None = None) -> bool:
    return Question([counted(x, y, g) for g in (None, groups)], MARGIN, LEVEL, 0.5).passes()


@cache
def _most_lost(n: int, gained: int) -> int:
    """The largest number of losses that passes beside so many gains; -1 if none does."""
    low, high = -1, n - gained
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passes(*outcomes(n, middle, gained)) else (low, middle - 1)
    return low


def _enumerated(n: int, lost: float, gain: float) -> float:
    """P(pass) where each prompt is lost, gained or neither."""
    total = 0.0
    for gained, weight in enumerate(st.binom.pmf(range(n + 1), n, gain)):
        if weight > 1e-7 and (most := _most_lost(n, gained)) >= 0:
            total += weight * float(st.binom.cdf(most, n - gained, lost / (1 - gain)))
    return total


def _passed(design: tuple[int, int], lost: float, rho: float, draws: int) -> float:
    """P(pass) where topics differ in how much they lose."""
    topics, each = design
    groups = np.repeat(np.arange(topics), each).tolist()
    before = np.ones(topics * each, dtype=bool)
    counts = np.sort(drawn(design, (lost, 1 - lost), rho, draws)[..., 0], axis=1)
    kinds, times = np.unique(counts, axis=0, return_counts=True)
    found = [passes(before, (np.arange(each) >= kind[:, None]).ravel(), groups) for kind in kinds]
    return float(times @ np.array(found) / times.sum())


# --- tests of means, and directions

SHAPES: dict[str, Callable[[np.random.Generator, tuple[int, int]], NDArray[np.floating]]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy tails (t, 2)": lambda rng, shape: rng.standard_t(2, size=shape),
    "right-skewed": lambda rng, shape: rng.exponential(size=shape) - 1,
    "left-skewed": lambda rng, shape: 1 - rng.exponential(size=shape),
    "1 in 10 undoes all": lambda rng, shape: np.where(rng.random(shape) < 0.1, -9.0, 1.0),
}
"""Distributions of mean zero. Of the last two no test of the mean of a few groups knows the tail that it has not seen;
they are printed, and not held to the nominal size."""


def means(draws: int) -> None:
    groups = (8, 12, 20, 24, 25, 50, 100)
    print("\nexpert effects: p below 0.05 where the mean is zero (signs turned below 25 groups, then Student's t)")
    row("groups", *groups)
    for name, draw in SHAPES.items():
        nominal = 0.05 if name not in list(SHAPES)[-2:] else 1.0
        cells = []
        for n in groups:
            values = draw(np.random.default_rng(n), (draws, n))
            share = float(np.mean([stats.mean_above_zero(row_N, None) < 0.05 for row_N in values]))
            cells.append(size(f"means, {name}, {n}", share, nominal, draws))
        row(name, *cells)


def areas(draws: int) -> None:
    correlations = (-0.5, 0.0, 0.5)
    print(
        "\nAUROC along the difference of means, held out, 5 splits: intervals that miss (nominal 0.050); 8 dimensions"
    )
    row("groups, shift", *(f"pairs {r:g}" for r in correlations))
    for groups in (8, 20, 40, 100):
        for shift in (0.0, 1.0, 2.5):
            cells = []
            for r in correlations:
                share = _area_missed(groups, shift, r, draws)
                cells.append(size(f"AUROC, {groups}, {shift:g}, {r:g}", share, 0.05, draws))
            row(f"{groups}, {shift:g}", *cells)


def _area_missed(groups: int, shift: float, r: float, draws: int) -> float:
    """States of unit variance, a pair's with correlation r; the truth is Phi of the projected shift / sqrt 2."""
    rng, names = np.random.default_rng(1), np.arange(groups).astype(str)
    found, truths = [], []
    for seed in range(draws):
        flagged, own = rng.normal(size=(2, groups, 8))
        twins = r * flagged + (1 - r * r) ** 0.5 * own
        flagged[:, 0] += shift
        intervals = []
        for part in splits(names.tolist(), seed):
            direction = mean_difference(flagged[part.fit], twins[part.fit])
            held_out = [states[part.held_out] @ direction for states in (flagged, twins)]
            fold = Fold(held_out[0], held_out[1], names[part.held_out])
            intervals.append(auroc_interval([fold], seed=seed, level=LEVEL))
            truths.append(float(st.norm.cdf(shift * direction[0] / 2**0.5)))
        found.append(over_splits(intervals))
    return float(np.mean([missed(i, float(np.mean(truths))).any() for i in found]))


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few draws")
    draws = 40 if parser.parse_args(given).quick else 800
    started = time.monotonic()
    beyond.clear()
    rates(draws)
    differences(draws)
    thirds()
    floors(draws)
    means(2 * draws)
    areas(draws // 4)
    print(f"\nbeyond the nominal size by more than a point (*): {len(beyond)}", *beyond, sep="\n  ")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
