"""Rank experts for each kind of flagged prompts on one half of the pairs, so that they can be tested on the other.

Shape letters: N pairs, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import gradient_scores
from gtqlora.config import DiagnoseConfig
from gtqlora.localize.association import associate, top_experts
from gtqlora.localize.directions import Directions, study
from gtqlora.localize.masks import Expert
from gtqlora.localize.observed import Observed
from gtqlora.localize.trials import Trials
from gtqlora.results.association import Association


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Experts by their association with the refusals of one kind of prompts, each list with the strongest first.

    Attributes:
        by_difference: chosen, or weighed, more on flagged prompts, surely and by a difference that counts.
        by_gradient: whose routing weight raises the log-odds of refusing, surely.
        top: chosen clearly more; association only.
        candidates: to be tested one at a time.
    """

    by_difference: list[Expert] = field(default_factory=list[Expert])
    by_gradient: list[Expert] = field(default_factory=list[Expert])
    top: list[Expert] = field(default_factory=list[Expert])
    candidates: list[Expert] = field(default_factory=list[Expert])


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Experts as they are ranked for each kind of flagged prompts, and directions.

    Attributes:
        associations: of every expert, by layer and expert: on all flagged prompts, then on those of each kind.
    """

    associations: list[Association]
    directions: Directions
    kinds: dict[str, Ranking]

    def of_kind(self, kind: str) -> Ranking:
        """Return the ranking for one kind; empty where the discovering half has no such prompts."""
        return self.kinds.get(kind, Ranking())

    @property
    def candidates(self) -> list[Expert]:
        """Return the candidates of all kinds."""
        return _each(ranking.candidates for ranking in self.kinds.values())

    @property
    def top(self) -> list[Expert]:
        """Return the experts that are chosen clearly more on flagged prompts of some kind."""
        return _each(ranking.top for ranking in self.kinds.values())


def _each(lists: Iterable[Sequence[Expert]]) -> list[Expert]:
    return list(dict.fromkeys(expert for experts in lists for expert in experts))


def rank_experts(config: DiagnoseConfig, observed: Observed) -> Ranked:
    """Rank experts on the discovering half of the pairs; directions are studied on all, with a split of their own."""
    found, gradients_NLE = observed.discovery, _gradients(observed.discovery)
    parts = {"": found, **{kind: found.of_kind(kind) for kind in found.kinds}}
    associations = {kind: _associations(config, observed, kind, part, gradients_NLE) for kind, part in parts.items()}
    return Ranked(
        associations=[row for rows in associations.values() for row in rows],
        directions=_directions(config, observed),
        kinds={kind: _ranking(config, observed, associations[kind]) for kind in found.kinds},
    )


def _gradients(trials: Trials) -> NDArray[np.floating] | None:
    # they are of the log-odds, which need tokens that tell refusals from answers
    if not trials.readout:
        return None
    batch_size, label = trials.runner.batch_size, "gradients of routing weights"
    return gradient_scores(trials.subject, trials.flagged, trials.readout, batch_size=batch_size, label=label)


def _associations(
    config: DiagnoseConfig, observed: Observed, kind: str, part: Trials, gradients_NLE: NDArray[np.floating] | None
) -> list[Association]:
    rows = observed.trials.rows_of(part)
    return associate(
        observed.flagged.of(rows),
        observed.twins.of(rows),
        observed.layers,
        kind=kind,
        groups=part.groups,
        matched=observed.matched,
        gradients=None if gradients_NLE is None else gradients_NLE[observed.discovery.rows_of(part)],
        seed=config.seed,
        resamples=config.bootstrap,
        level=config.level,
    )


def _ranking(config: DiagnoseConfig, observed: Observed, associations: Sequence[Association]) -> Ranking:
    position = {layer: i for i, layer in enumerate(observed.layers)}

    def places(found: Sequence[Association]) -> list[Expert]:
        return [(position[a.layer], a.expert) for a in found]

    by_difference, by_gradient = (
        places(ranked(associations, config)[: config.max_experts]) for ranked in (_by_difference, _by_gradient)
    )
    most = config.max_candidates
    return Ranking(
        by_difference=by_difference,
        by_gradient=by_gradient,
        top=places(
            top_experts(
                associations, level=config.level, min_difference=config.min_difference, limit=config.max_experts
            )
        ),
        # half as many by gradient: it is a first-order guess where difference is a measurement
        candidates=list(dict.fromkeys([*by_difference[:most], *by_gradient[: most // 2]])),
    )


def _by_difference(associations: Sequence[Association], config: DiagnoseConfig) -> list[Association]:
    def more(row: Association) -> float:
        chosen = row.difference if row.q < 1 - config.level and row.low > 0 else 0.0
        weighed = row.mass if row.mass_q < 1 - config.level and row.mass_low > 0 else 0.0
        return max(chosen, weighed)

    return sorted((a for a in associations if more(a) >= max(config.min_difference, 1e-9)), key=lambda a: -more(a))


def _by_gradient(associations: Sequence[Association], _config: DiagnoseConfig) -> list[Association]:
    sure = [a for a in associations if a.gradient_low is not None and a.gradient_low > 0]
    return sorted(sure, key=lambda a: -(a.gradient or 0.0))


def _directions(config: DiagnoseConfig, observed: Observed) -> Directions:
    trials = observed.trials
    return study(
        observed.flagged.states_NSD,
        observed.twins.states_NSD,
        [pair.row.kind for pair in trials.pairs],
        trials.groups,
        seed=config.seed,
        level=config.level,
    )
