"""How much of a behaviour each component carries: Owen values of the cells of an interchange.

Letters: v(C) is what pairs do on average when the components in C come from the flagged prompt and the others from its
twin; R routing, X experts' own computation, S the rest of the residual stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gtqlora.localize.interchange import CELLS, FLAGGED, Interchanges
from gtqlora.localize.trials import odds_of
from gtqlora.results.diagnosis import AS_TWIN, BROKEN, REFUSES, Behaviour
from gtqlora.stats import Interval, mean_interval, ratio_interval

Terms = tuple[tuple[float, str, str], ...]
"""Weights, each with the two cells whose difference it weighs; 1 is the flagged prompt's part, in the order R, X, S."""

_ROUTING_ALONE: Terms = ((0.5, "100", "000"), (0.5, "111", "011"))
_ROUTING_JOINED: Terms = ((0.25, "100", "000"), (0.25, "110", "010"), (0.25, "101", "001"), (0.25, "111", "011"))
_STREAM_ALONE: Terms = ((0.5, "001", "000"), (0.5, "111", "110"))
_STREAM_JOINED: Terms = ((0.25, "001", "000"), (0.25, "011", "010"), (0.25, "101", "100"), (0.25, "111", "110"))

# Owen (1977): Shapley values of three players two of whom are a union. Which two is a choice, so both are given:
# experts may count with the stream, as what is computed (Level 1), or with the routing, as what is done to the stream.
LEVELS: dict[str, Terms] = {
    "routing": _ROUTING_ALONE,
    "experts": ((0.25, "010", "000"), (0.25, "011", "001"), (0.25, "110", "100"), (0.25, "111", "101")),
    "residual": _STREAM_JOINED,
    "interaction": ((1.0, "111", "011"), (-1.0, "100", "000")),
}
WITH_ROUTING: dict[str, Terms] = {
    "routing": _ROUTING_JOINED,
    "experts": ((0.25, "010", "000"), (0.25, "110", "100"), (0.25, "011", "001"), (0.25, "111", "101")),
    "residual": _STREAM_ALONE,
    "interaction": ((1.0, "111", "110"), (-1.0, "001", "000")),
}
BITS = {"".join("1" if part == FLAGGED else "0" for part in cell): cell for cell in CELLS}
"""Each cell under the digits of the terms."""

Shares = dict[str, Interval]

_WORTH: dict[Behaviour, float] = {REFUSES: 1.0, BROKEN: 0.5, AS_TWIN: 0.0}


def shares(interchanges: Interchanges, unions: dict[str, Terms]) -> Shares:
    """Return the shares of what is generated: a refusal counts 1, what the twin does 0, and neither one half."""
    values = {bits: np.array([_WORTH[o.does] for o in interchanges.cells[cell]], float) for bits, cell in BITS.items()}
    return {
        part: mean_interval(_combined(terms, values), groups=interchanges.trials.groups, bounds=_bounds(part))
        for part, terms in unions.items()
    }


def odds_shares(interchanges: Interchanges, unions: dict[str, Terms]) -> Shares:
    """Return the shares of the mean gap in log-odds; empty without a readout."""
    columns = {bits: odds_of(interchanges.cells[cell]) for bits, cell in BITS.items()}
    if any(column is None for column in columns.values()):
        return {}
    values = {bits: np.array(column, float) for bits, column in columns.items()}
    gap_N = values["111"] - values["000"]
    return {
        part: ratio_interval(_combined(terms, values), gap_N, groups=interchanges.trials.groups, bounds=_bounds(part))
        for part, terms in unions.items()
    }


def _combined(terms: Terms, values: dict[str, NDArray[np.floating]]) -> NDArray[np.floating]:
    return np.sum([weight * (values[more] - values[less]) for weight, more, less in terms], axis=0)


def _bounds(part: str) -> tuple[float, float]:
    """The ends of what one pair can contribute."""
    # the interaction is a difference of two differences
    return (-2.0, 2.0) if part == "interaction" else (-1.0, 1.0)
