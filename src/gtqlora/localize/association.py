"""Which experts are chosen more on flagged prompts than on their twins: differences, intervals, q-values, stability.

Association only: that an expert is chosen more does not say that it causes anything.

Shape letters: N prompts, G groups, L MoE layers, E experts, R resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as st

from gtqlora.capture import Observation
from gtqlora.results.association import Association, first_of
from gtqlora.stats import benjamini_hochberg, bootstrap_means, edges, group_means, half_sample_means

HALVINGS = 50
"""Random splits of the prompts in two (Shah & Samworth 2013 use 50)."""


@dataclass(frozen=True)
class _Side:
    """Values_NLE whose mean is one part of the difference, and of which group each prompt is (None: its own)."""

    values: np.ndarray
    groups: Sequence[Hashable] | None
    seed: int


def associate(
    flagged: Observation,
    twins: Observation,
    layers: Sequence[int],
    *,
    kind: str = "",
    groups: Sequence[Hashable] | None = None,
    matched: bool = True,
    gradients: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> list[Association]:
    """Return every expert's association, by layer and expert.

    Args:
        layers: decoder index of each MoE layer.
        kind: of all the flagged prompts; empty for several.
        groups: of which group each flagged prompt (and its twin) is; groups are resampled and halved whole.
        matched: prompt i of `twins` is the twin of prompt i of `flagged`. If not, the two are compared as independent
            samples: unpaired bootstrap, Welch's test.
        gradients: scores_NLE of the flagged prompts.
    """
    x_NLE, y_NLE = (o.prompt.rates_NLE for o in (flagged, twins))
    sides = _sides(x_NLE, y_NLE, groups, matched, seed)
    mass = _sides(flagged.prompt.mass_NLE, twins.prompt.mass_NLE, groups, matched, seed)
    q_LE = benjamini_hochberg(_p_values(sides))
    columns = {
        "rate_flagged": x_NLE.mean(0, dtype=float),
        "rate_twin": y_NLE.mean(0, dtype=float),
        **dict(zip(("difference", "low", "high"), _estimates(sides, resamples, level), strict=True)),
        "q": q_LE,
        **dict(zip(("mass", "mass_low", "mass_high"), _estimates(mass, resamples, level), strict=True)),
        "mass_q": benjamini_hochberg(_p_values(mass)),
        "stability": _stability(sides, first_of(q_LE.size)),
        **_gradient_columns(gradients, groups, seed, resamples, level),
        **_rate_columns("flagged", flagged),
        **_rate_columns("twin", twins),
    }
    return [
        Association(
            kind=kind, layer=layer, expert=expert, **{name: _at(c, position, expert) for name, c in columns.items()}
        )
        for position, layer in enumerate(layers)
        for expert in range(q_LE.shape[1])
    ]


def _sides(
    x_NLE: np.ndarray, y_NLE: np.ndarray, groups: Sequence[Hashable] | None, matched: bool, seed: int
) -> list[_Side]:
    x_NLE, y_NLE = x_NLE.astype(np.float64), y_NLE.astype(np.float64)
    # the mean of paired differences is one side; two independent samples are two, of which one counts negative
    if matched:
        return [_Side(x_NLE - y_NLE, groups, seed)]
    return [_Side(x_NLE, groups, seed), _Side(-y_NLE, None, seed + 1)]


def _estimates(sides: Sequence[_Side], resamples: int, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the difference_LE and both ends of its interval."""
    low_LE, high_LE = _interval(sides, resamples, level)
    return np.sum([side.values.mean(0) for side in sides], axis=0), low_LE, high_LE


def _at(column_LE: np.ndarray | None, position: int, expert: int) -> Any:
    return None if column_LE is None else float(column_LE[position, expert])


def _rate_columns(side: str, seen: Observation) -> dict[str, np.ndarray | None]:
    return {
        f"weight_{side}": seen.prompt.weight_LE,
        f"last_{side}": seen.last.rates_NLE.mean(0),
        f"answer_{side}": None if seen.answer is None else seen.answer.rates_NLE.mean(0),
    }


def _gradient_columns(
    gradients: np.ndarray | None, groups: Sequence[Hashable] | None, seed: int, resamples: int, level: float
) -> dict[str, np.ndarray | None]:
    names = ("gradient", "gradient_low", "gradient_high")
    if gradients is None:
        return dict.fromkeys(names)
    side = _Side(gradients.astype(np.float64), groups, seed)
    return dict(zip(names, (side.values.mean(0), *_interval([side], resamples, level)), strict=True))


def _interval(sides: Sequence[_Side], resamples: int, level: float) -> np.ndarray:
    """Return percentile edges_2LE of the sum of the sides' means, a layer at a time: all resamples would not fit."""
    cut = edges(level, min(len(s.values) if s.groups is None else len(set(s.groups)) for s in sides))
    # a layer at a time: the resamples of all experts at once would not fit into memory
    layers = [
        np.quantile(
            sum(bootstrap_means(s.values[:, i], seed=s.seed, resamples=resamples, groups=s.groups) for s in sides),
            cut,
            axis=0,
        )
        for i in range(sides[0].values.shape[1])
    ]
    return np.stack(layers, axis=1)


def _p_values(sides: Sequence[_Side]) -> np.ndarray:
    """Return two-sided p_LE that the sides' means add up to 0: t-test over groups, Welch's if there are two sides.

    Where nothing varies, that of the exact sign test.
    """
    groups = [group_means(s.values, s.groups) for s in sides]
    fewest = min(map(len, groups))
    mean_LE = np.sum([g.mean(0) for g in groups], axis=0)
    if fewest < 2:
        return np.ones_like(mean_LE)
    squares = [g.var(0, ddof=1) / len(g) for g in groups]
    error_LE = np.sqrt(np.sum(squares, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom_LE = error_LE**4 / np.sum([v**2 / (len(g) - 1) for v, g in zip(squares, groups, strict=True)], axis=0)
        p_LE = 2 * st.t.sf(np.abs(mean_LE) / error_LE, df=freedom_LE)
    # where nothing varies the t statistic is infinite or 0/0; the sign test knows what n equal signs say
    exact_LE = np.where(np.abs(mean_LE) < 1e-9, 1.0, 2.0 ** (1 - min(fewest, 1000)))
    return np.where(error_LE < 1e-9, exact_LE, p_LE)


def _stability(sides: Sequence[_Side], first: int) -> np.ndarray:
    """Return the share_LE of half-samples in which an expert is among the `first` by difference, and chosen more.

    Stability selection (Meinshausen & Buehlmann, JRSS-B 2010) over complementary halves (Shah & Samworth, JRSS-B
    2013).
    """
    halves_RLE = sum(half_sample_means(s.values, seed=s.seed, splits=HALVINGS, groups=s.groups) for s in sides)
    flat_RX = np.reshape(halves_RLE, (len(halves_RLE), -1))  # type: ignore[arg-type]
    cut_R1 = np.partition(flat_RX, -first, axis=1)[:, -first, None]
    return ((flat_RX >= cut_R1) & (flat_RX > 0)).mean(0).reshape(sides[0].values.shape[1:])


def top_experts(
    associations: Sequence[Association], *, level: float, min_difference: float, limit: int
) -> list[Association]:
    """Return the experts chosen clearly more on flagged prompts, by difference.

    Their difference is significant, and surely three quarters of the largest one.
    """
    sure = [a for a in associations if a.q < 1 - level and a.low > 0]
    ranked = sorted(sure, key=lambda a: -a.difference)
    cut = max(min_difference, 0.75 * ranked[0].difference) if ranked else 0.0
    return [a for a in ranked if a.low >= cut][:limit]
