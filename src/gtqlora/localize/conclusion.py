"""Which component carries the behaviour: shares and a verdict from the interchange of twin prompts' computation.

Letters: v(C) is the share of pairs whose prompt refuses when the components in C come from the flagged prompt and the
others from its twin; R routing, X experts' own computation, S the rest of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtqlora.localize.interchange import CELLS, FLAGGED, TWIN, Interchanges
from gtqlora.localize.trials import Outcome, odds_of
from gtqlora.results.diagnosis import CANNOT_TELL, MIN_PAIRS, Localization
from gtqlora.stats import Interval, mean_interval, paired_difference, ratio_interval

COMPONENTS = ("routing", "experts", "residual")

# Owen (1977): Shapley values of three players where experts and stream are a union (Level 1) against the routing
# (Level 2). Each term is a weight and the cells whose difference it is; 1 is the flagged prompt's component, in the
# order routing, experts, stream.
_OWEN: dict[str, tuple[tuple[float, str, str], ...]] = {
    "routing": ((0.5, "100", "000"), (0.5, "111", "011")),
    "experts": ((0.25, "010", "000"), (0.25, "011", "001"), (0.25, "110", "100"), (0.25, "111", "101")),
    "residual": ((0.25, "001", "000"), (0.25, "011", "010"), (0.25, "101", "100"), (0.25, "111", "110")),
    "interaction": ((1.0, "111", "011"), (-1.0, "100", "000")),
}
_NECESSARY = {"routing": ("111", "011"), "experts": ("111", "101"), "residual": ("111", "110")}
_SUFFICIENT = {"routing": ("100", "000"), "experts": ("010", "000"), "residual": ("001", "000")}
_BITS = {"".join("1" if part == FLAGGED else "0" for part in cell): cell for cell in CELLS}

Shares = dict[str, Interval]


def conclude(interchanges: Interchanges | None) -> Localization:
    """Return where the behaviour sits, from pairs whose flagged prompt refuses and whose twin does not."""
    usable = [] if interchanges is None else _usable(interchanges)
    # a share of few pairs has an interval that fits every answer
    if interchanges is None or len(usable) < MIN_PAIRS:
        reason = (
            f"only {len(usable)} aligned pairs show the behaviour and {MIN_PAIRS} are needed; add pairs, with twins of "
            "equal token count"
        )
        return Localization(CANNOT_TELL, f"Cannot tell: {reason}.", [reason], len(usable))
    groups = [interchanges.trials.groups[i] for i in usable]
    evidence = _evidence(interchanges, usable, groups)
    name, why = _decide(evidence)
    refused = {
        bits: np.array([interchanges.cells[cell][i].refused for i in usable], float) for bits, cell in _BITS.items()
    }
    return Localization(
        verdict=name,
        sentence=f"{name.capitalize()}: {why}.",
        reasons=_reasons(evidence),
        n_usable=len(usable),
        shares={
            part: mean_interval(_combined(terms, refused), groups=groups, bounds=_bounds(part))
            for part, terms in _OWEN.items()
        },
        shares_log_odds=_odds_shares(interchanges, usable, groups),
        necessary={part: _difference(refused, *cells, groups) for part, cells in _NECESSARY.items()},
        sufficient={part: _difference(refused, *cells, groups) for part, cells in _SUFFICIENT.items()},
    )


def _usable(interchanges: Interchanges) -> list[int]:
    both = zip(interchanges.flagged, interchanges.twins, strict=True)
    return [i for i, (flagged, twin) in enumerate(both) if flagged.refused and not twin.refused]


def _bounds(part: str) -> tuple[float, float]:
    """The ends of what one pair can contribute."""
    # the interaction is a difference of two differences
    return (-2.0, 2.0) if part == "interaction" else (-1.0, 1.0)


Values = dict[str, NDArray[np.floating]]


def _combined(terms: Sequence[tuple[float, str, str]], values: Values) -> NDArray[np.floating]:
    return np.sum([weight * (values[more] - values[less]) for weight, more, less in terms], axis=0)


def _difference(refused: Values, more: str, less: str, groups: Sequence[str]) -> Interval:
    return paired_difference(refused[more] > 0.5, refused[less] > 0.5, groups=groups)


def _odds_shares(interchanges: Interchanges, usable: Sequence[int], groups: Sequence[str]) -> Shares:
    """Shares of the mean gap in log-odds between flagged prompts and twins; empty without a readout."""
    odds = {bits: odds_of([interchanges.cells[cell][i] for i in usable]) for bits, cell in _BITS.items()}
    if any(values is None for values in odds.values()):
        return {}
    values: Values = {bits: np.array(found) for bits, found in odds.items()}
    gap = values["111"] - values["000"]
    return {
        part: ratio_interval(_combined(terms, values), gap, groups=groups, bounds=_bounds(part))
        for part, terms in _OWEN.items()
    }


@dataclass(frozen=True)
class _Evidence:
    """What decides: moved prompts against the disturbance that any such swap makes.

    Attributes:
        necessary: flagged prompts that the twin's routing moves, less those that another flagged prompt's moves.
        sufficient: twins that the flagged prompt's routing makes refuse, less those that another twin's does.
        experts: flagged prompts moved when experts compute on the twin's inputs, less the control; routing held.
        disturbed: shares moved by the controls of routing and of experts.
    """

    necessary: Interval
    sufficient: Interval
    experts: Interval
    disturbed: tuple[float, float]


def _evidence(interchanges: Interchanges, usable: Sequence[int], groups: Sequence[str]) -> _Evidence:
    def moved(outcomes: Sequence[Outcome]) -> list[bool]:
        return _moved([outcomes[i] for i in usable])

    def beyond(found: Sequence[bool], control: Sequence[bool]) -> Interval:
        return paired_difference(found, control, groups=groups)

    routing, experts = moved(interchanges.routing_control), moved(interchanges.experts_control)
    refused = [interchanges.cells[FLAGGED, TWIN, TWIN][i].refused for i in usable]
    by_control = [interchanges.twin_control[i].refused for i in usable]
    return _Evidence(
        necessary=beyond(moved(interchanges.cells[TWIN, FLAGGED, FLAGGED]), routing),
        sufficient=beyond(refused, by_control),
        experts=beyond(moved(interchanges.cells[FLAGGED, TWIN, FLAGGED]), experts),
        disturbed=(float(np.mean(routing)), float(np.mean(experts))),
    )


def _moved(outcomes: Sequence[Outcome]) -> list[bool]:
    """Whether a refusal went. One that only turned into garbage did not: an expected answer has to come, if known."""
    return [o.correct if o.correct is not None else not o.refused for o in outcomes]


def _decide(evidence: _Evidence) -> tuple[str, str]:
    """By 95 % intervals against thirds: is the twin's routing enough to move the behaviour, the flagged one to make it?

    Experts and stream are told apart by which carries more than half of Level 1.
    """
    necessary, sufficient, experts = evidence.necessary, evidence.sufficient, evidence.experts
    share = _percent(necessary)
    if evidence.disturbed[0] > 1 / 3:
        return CANNOT_TELL, (
            f"any change of routing disturbs this model (another flagged prompt's routing moves "
            f"{evidence.disturbed[0]:.0%})"
        )
    if necessary.low > 2 / 3:
        return "routing", f"giving a prompt its harmless twin's routing removes {share} of the refusals"
    if necessary.low > 1 / 3 and necessary.high < 2 / 3:
        return "both", f"routing carries {share} of the refusals, the residual stream the rest"
    if necessary.high >= 1 / 3:
        return "cannot tell", f"routing carries {share}, which fits more than one answer; add pairs"
    if sufficient.low > 2 / 3:
        return "both", (
            "routing and residual stream are each sufficient: with its harmless twin's routing a prompt is still "
            f"refused, and the flagged prompt's routing makes {_percent(sufficient)} of the twins refuse"
        )
    if sufficient.high >= 1 / 3:
        return CANNOT_TELL, (
            f"routing is not necessary, but by itself brings {_percent(sufficient)} of the refusals, which fits more "
            "than one answer; add pairs"
        )
    if evidence.disturbed[1] > 1 / 3 or experts.low <= 0.5 <= experts.high:
        return CANNOT_TELL, (
            f"it is not the routing ({share}), but whether experts or the rest of the residual stream carry it cannot "
            f"be told (experts' inputs: {_percent(experts)}, control {evidence.disturbed[1]:.0%})"
        )
    if experts.low > 0.5:
        return "experts", (
            f"with the routing held, {_percent(experts)} of the refusals go when the chosen experts compute on what "
            "they see in the harmless twin"
        )
    return "residual", f"with its harmless twin's routing a prompt is still refused; routing carries {share}"


def _percent(interval: Interval) -> str:
    return f"{interval.value:.0%} (95 % interval {interval.low:.0%} to {interval.high:.0%}, {interval.n} pairs)"


def _reasons(evidence: _Evidence) -> list[str]:
    return [
        f"Is the routing necessary? The harmless twin's routing moves {_percent(evidence.necessary)} of the refusals "
        f"beyond what another flagged prompt's routing moves ({evidence.disturbed[0]:.0%}).",
        f"Is the routing sufficient? The flagged prompt's routing makes {_percent(evidence.sufficient)} of the twins "
        "refuse.",
        f"Do the experts compute it? With the routing held, the twin's inputs to the experts move "
        f"{_percent(evidence.experts)} beyond what another flagged prompt's inputs move ({evidence.disturbed[1]:.0%}).",
    ]
