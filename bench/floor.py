"""How often the safety floor passes an edit that loses as much as the margin, and one that loses little.

    python bench/floor.py [--draws 1000] [--margin 0.02]

Without groups by enumeration of all outcomes, with groups (topics of which some lose more than others: beta-binomial
losses of intra-topic correlation rho) by simulation. "before" is Tango's interval over all prompts, as if each stood
for itself. Nominal at the margin: 0.05.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
from scipy import stats as st

from gtqlora.stats import paired_difference
from gtqlora.stats.noninferiority import Question, counted

LEVEL = 0.95
SIZES = (60, 133, 150, 200, 300, 840)
GAINS = (0.0, 0.01, 0.05)
DESIGNS = ((40, 21), (105, 8), (100, 8), (200, 4), (6, 140))
CORRELATIONS = (0.0, 0.02, 0.05, 0.1)

Rule = Callable[[np.ndarray, np.ndarray, list[int] | None, float], bool]


def before(x: np.ndarray, y: np.ndarray, groups: list[int] | None, margin: float) -> bool:
    """The rule of versions up to 0.1: the net drop by Tango's interval, whatever the groups."""
    return paired_difference(x, y, 2 * LEVEL - 1).high <= margin


def now(x: np.ndarray, y: np.ndarray, groups: list[int] | None, margin: float) -> bool:
    return Question([counted(x, y, g) for g in (None, groups)], margin, LEVEL, 0.5).passes()


def outcomes(n: int, lost: int, gained: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    y[:lost] = x[lost : lost + gained] = False
    return x, y


@cache
def most_lost(rule: Rule, n: int, gained: int, margin: float) -> int:
    """The largest number of losses that passes beside so many gains; -1 if none does."""
    low, high = -1, n - gained
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if rule(*outcomes(n, middle, gained), None, margin) else (low, middle - 1)
    return low


def enumerated(rule: Rule, n: int, lost: float, gain: float, margin: float) -> float:
    """P(pass) where each prompt is lost, gained or neither."""
    total = 0.0
    for gained, weight in enumerate(st.binom.pmf(range(n + 1), n, gain)):
        if weight > 1e-7 and (most := most_lost(rule, n, gained, margin)) >= 0:
            total += weight * float(st.binom.cdf(most, n - gained, lost / (1 - gain)))
    return total


def simulated(rule: Rule, design: tuple[int, int], lost: float, rho: float, margin: float, draws: int) -> float:
    """P(pass) where topics differ in how much they lose."""
    topics, each = design
    rng = np.random.default_rng(3)
    shares = np.full((draws, topics), lost)
    if rho:
        shares = rng.beta(lost * (1 / rho - 1), (1 - lost) * (1 / rho - 1), size=(draws, topics))
    groups = np.repeat(np.arange(topics), each).tolist()
    found: dict[tuple[int, ...], bool] = {}

    def passes(counts: Iterable[int]) -> bool:
        key = tuple(sorted(counts))
        if key not in found:
            kept = np.concatenate([np.arange(each) >= count for count in key])
            found[key] = rule(np.ones(topics * each, dtype=bool), kept, groups, margin)
        return found[key]

    return float(np.mean([passes(row.tolist()) for row in rng.binomial(each, shares)]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--draws", type=int, default=1000)
    options.add_argument("--margin", type=float, default=0.02)
    given = options.parse_args()
    margin, little = given.margin, given.margin / 4
    print(f"margin {margin:g}; size: true loss {margin:g}; power: true loss {little:g}; each: before, now\n")
    print(f"{'prompts':<22}{'gains':>7}{'size':>16}{'power':>16}")
    for n in SIZES:
        for gain in GAINS:
            size, power = (
                [enumerated(rule, n, lost, gain, margin) for rule in (before, now)] for lost in (margin + gain, little)
            )
            print(f"{n:<22}{gain:>7g}{size[0]:>10.3f}{size[1]:>6.3f}{power[0]:>10.3f}{power[1]:>6.3f}", flush=True)
    print(f"\n{'topics x each':<22}{'rho':>7}{'size':>16}{'power':>16}")
    for design in DESIGNS:
        for rho in CORRELATIONS:
            size, power = (
                [simulated(rule, design, lost, rho, margin, given.draws) for rule in (before, now)]
                for lost in (margin, little)
            )
            name = f"{design[0]} x {design[1]}"
            print(f"{name:<22}{rho:>7g}{size[0]:>10.3f}{size[1]:>6.3f}{power[0]:>10.3f}{power[1]:>6.3f}", flush=True)


if __name__ == "__main__":
    main()
