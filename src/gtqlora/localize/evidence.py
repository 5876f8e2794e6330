"""What decides which component mediates a behaviour: what each does alone, less what a control does.

Two measures, the rates of what is generated and the log-odds of its first token, give evidence of one form, so that
one rule can be put to both. N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gtqlora.localize.interchange import Cell, Interchanges
from gtqlora.localize.trials import FLAGGED, TWIN, Outcome, odds_of
from gtqlora.results.diagnosis import AS_TWIN, REFUSES, Behaviour
from gtqlora.stats import Interval, bootstrap_mean, paired_difference, ratio_interval

COMPONENTS = ("routing", "experts", "residual")

WITHOUT: dict[str, Cell] = {
    "routing": (TWIN, FLAGGED, FLAGGED),
    "experts": (FLAGGED, TWIN, FLAGGED),
    "residual": (FLAGGED, FLAGGED, TWIN),
}
"""Cells in which only this component is the twin's."""
ALONE: dict[str, Cell] = {
    "routing": (FLAGGED, TWIN, TWIN),
    "experts": (TWIN, FLAGGED, TWIN),
    "residual": (TWIN, TWIN, FLAGGED),
}
"""Cells in which only this component is the flagged prompt's."""


Question = Literal["necessary", "sufficient"]
Values = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What each component does alone, as parts of the behaviour.

    Attributes:
        necessary: what goes when only this component is the twin's, less what goes under the control.
        sufficient: what comes when only this component is the flagged prompt's, less what comes under the control.
        disturbed: what goes under the controls of routing and of experts.
        moved: what each of N pairs contributes to the two, by question and component.
    """

    necessary: dict[str, Interval]
    sufficient: dict[str, Interval]
    disturbed: dict[str, float]
    moved: dict[tuple[Question, str], Values]


@dataclass(frozen=True, kw_only=True)
class _Measure:
    """How outcomes become parts of the behaviour, pair by pair.

    Attributes:
        went: how much of it is gone in these outcomes of flagged prompts.
        came: how much of it is there in these outcomes of twins.
        interval: of the mean of an effect less that of its control.
        part: the mean of what N pairs moved, as part of the behaviour.
    """

    went: Callable[[Sequence[Outcome]], Values]
    came: Callable[[Sequence[Outcome]], Values]
    interval: Callable[[Values, Values], Interval]
    part: Callable[[Values], float]


def from_rates(found: Interchanges) -> Evidence:
    """Return the evidence of what is generated: a refusal goes where a prompt does what its twin does, else not."""
    groups = found.trials.groups

    def doing(does: Behaviour) -> Callable[[Sequence[Outcome]], Values]:
        return lambda outcomes: np.array([o.does == does for o in outcomes], float)

    return _gathered(
        found,
        _Measure(
            went=doing(AS_TWIN),
            came=doing(REFUSES),
            interval=lambda effect_N, control_N: paired_difference(effect_N > 0.5, control_N > 0.5, groups=groups),
            part=lambda values_N: float(values_N.mean()),
        ),
    )


def from_odds(found: Interchanges) -> Evidence | None:
    """Return the evidence of the log-odds, as parts of the mean gap between flagged prompts and twins.

    None without a readout, or where there is no gap.
    """
    flagged, twins = odds_of(found.flagged), odds_of(found.twins)
    if flagged is None or twins is None:
        return None
    flagged_N, twins_N, groups = np.array(flagged), np.array(twins), found.trials.groups
    gap_N = flagged_N - twins_N
    if bootstrap_mean(gap_N, groups=groups).low <= 0:
        return None

    def odds(outcomes: Sequence[Outcome]) -> Values:
        return np.array(odds_of(outcomes), float)

    return _gathered(
        found,
        _Measure(
            went=lambda outcomes: flagged_N - odds(outcomes),
            came=lambda outcomes: odds(outcomes) - twins_N,
            interval=lambda effect_N, control_N: ratio_interval(effect_N - control_N, gap_N, groups=groups),
            part=lambda values_N: float(values_N.mean() / gap_N.mean()),
        ),
    )


def _gathered(found: Interchanges, measure: _Measure) -> Evidence:
    controls = list(found.controls.values())
    nothing_N = np.zeros(len(found.pairs))

    def strongest(outcomes: Sequence[Values]) -> Values:
        # of two controls the one that does more counts, so that neither is chosen to please
        return max(outcomes, key=measure.part, default=nothing_N)

    routing_N = strongest([measure.went(control.routing) for control in controls])
    experts_N = strongest([measure.went(control.experts) for control in controls])
    twins_N = strongest([measure.came(control.twins) for control in controls])
    control: dict[tuple[Question, str], Values] = {
        ("necessary", "routing"): routing_N,
        ("necessary", "experts"): experts_N,
        ("sufficient", "routing"): twins_N,
    }
    effects: dict[tuple[Question, str], Values] = {
        **{("necessary", part): measure.went(found.cells[cell]) for part, cell in WITHOUT.items()},
        **{("sufficient", part): measure.came(found.cells[cell]) for part, cell in ALONE.items()},
    }
    intervals = {key: measure.interval(effect_N, control.get(key, nothing_N)) for key, effect_N in effects.items()}
    return Evidence(
        necessary={part: intervals["necessary", part] for part in COMPONENTS},
        sufficient={part: intervals["sufficient", part] for part in COMPONENTS},
        disturbed={"routing": measure.part(routing_N), "experts": measure.part(experts_N)},
        moved={key: effect_N - control.get(key, nothing_N) for key, effect_N in effects.items()},
    )
