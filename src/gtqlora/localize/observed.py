"""The pairs as they are: what their prompts do, and how they are routed.

Shape letters: N pairs, L MoE layers, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import Observation, observe
from gtqlora.localize.pairs import halves
from gtqlora.localize.trials import Outcome, Trials


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What flagged prompts and their twins do as they are, and how they are routed.

    Attributes:
        trials: all pairs; experts are found on `discovery` and tested on `confirmation`, which is all of them if there
            is no second half.
        matched: all twins are true ones; else unrelated benign prompts stand in.
        layers: decoder index of each MoE layer.
        flagged, twins: routing and states of the prompts, pair by pair.
    """

    trials: Trials
    discovery: Trials
    confirmation: Trials
    matched: bool
    layers: list[int]
    flagged: Observation
    twins: Observation

    @property
    def frequency_LE(self) -> NDArray[np.floating]:
        """Return how often each expert is chosen, on average over both sides."""
        return (self.flagged.prompt.rates_NLE.mean(0) + self.twins.prompt.rates_NLE.mean(0)) / 2


def observe_pairs(trials: Trials) -> Observed:
    """Run the pairs as they are and record their routing and residual states."""
    discovery, confirmation = halves(trials.pairs)
    flagged, twins = trials.own
    return Observed(
        trials=trials,
        discovery=trials.of(discovery),
        confirmation=trials.of(confirmation or discovery),
        matched=all(pair.matched for pair in trials.pairs),
        layers=[layer.index for layer in trials.subject.anatomy.moe],
        flagged=_seen(trials, "flagged", trials.flagged, flagged),
        twins=_seen(trials, "twins", trials.twins, twins),
    )


def _seen(trials: Trials, name: str, prompts: Sequence[list[int]], outcomes: Sequence[Outcome]) -> Observation:
    return observe(
        trials.subject,
        prompts,
        answers=[o.tokens for o in outcomes],
        since=[pair.common for pair in trials.pairs],  # before that the two sides are the same
        batch_size=trials.runner.batch_size,
        label=f"routing of {name}",
    )
