"""The steps of a diagnosis, each of which leaves one record: observe, rank, intervene.

How this connects: `observe_pairs` runs the pairs as they are, `rank_experts` finds candidates on one half of them, and
`intervene` tests these on the other half, so that nothing is confirmed on what suggested it. The `diagnose` stage draws
the conclusions.

Shape letters: N pairs, L MoE layers, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import Observation, gradient_scores, observe, top_tokens
from gtqlora.config import DiagnoseConfig
from gtqlora.localize.association import associate, top_experts
from gtqlora.localize.conclusion import conclude
from gtqlora.localize.direction_ablation import ablations, strongest_layer
from gtqlora.localize.directions import Directions, study
from gtqlora.localize.interchange import Interchanges, interventions_of, run_interchanges
from gtqlora.localize.masks import (
    Effect,
    Expert,
    ablatable,
    ablated_of,
    ablating,
    curve,
    expert_effects,
    random_curve,
)
from gtqlora.localize.pairs import halves, partners
from gtqlora.localize.trials import FLAGGED, Outcome, Trials
from gtqlora.results.association import Association
from gtqlora.results.diagnosis import CANNOT_TELL, Intervention, Localization
from gtqlora.results.experts import Curve, ExpertEffect, TokenChoice


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


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """Experts by their association with the behaviour, each list with the strongest first, and directions.

    Attributes:
        associations: of every expert, by layer and expert.
        by_difference: chosen more on flagged prompts, surely and by a difference that counts.
        by_gradient: whose routing weight raises the log-odds of refusing, surely.
        top: chosen clearly more; association only.
        candidates: to be tested one at a time.
    """

    associations: list[Association]
    directions: Directions
    by_difference: list[Expert]
    by_gradient: list[Expert]
    top: list[Expert]
    candidates: list[Expert]


def rank_experts(config: DiagnoseConfig, observed: Observed) -> Ranked:
    """Rank experts on the discovering half of the pairs; directions are studied on all, with a split of their own."""
    associations = _associations(config, observed)
    position = {layer: i for i, layer in enumerate(observed.layers)}

    def places(found: Sequence[Association]) -> list[Expert]:
        return [(position[a.layer], a.expert) for a in found]

    by_difference, by_gradient = (
        places(ranked(associations, config)[: config.max_experts]) for ranked in (_by_difference, _by_gradient)
    )
    most = config.max_candidates
    return Ranked(
        associations=associations,
        directions=_directions(config, observed),
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


def _associations(config: DiagnoseConfig, observed: Observed) -> list[Association]:
    trials, found = observed.trials, observed.discovery
    rows, gradients = trials.rows_of(found), None
    # gradients are of the log-odds, which need tokens that tell refusals from answers
    if trials.readout:
        gradients = gradient_scores(
            trials.subject,
            found.flagged,
            trials.readout,
            batch_size=trials.runner.batch_size,
            label="gradients of routing weights",
        )
    return associate(
        observed.flagged.of(rows),
        observed.twins.of(rows),
        observed.layers,
        groups=found.groups,
        matched=observed.matched,
        gradients=gradients,
        seed=config.seed,
        resamples=config.bootstrap,
        level=config.level,
    )


def _by_difference(associations: Sequence[Association], config: DiagnoseConfig) -> list[Association]:
    sure = [a for a in associations if a.q < 1 - config.level and a.low > 0]
    return sorted((a for a in sure if a.difference >= config.min_difference), key=lambda a: -a.difference)


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


@dataclass(frozen=True, kw_only=True)
class Intervened:
    """What the prompts do under interventions, and where that puts the behaviour.

    Attributes:
        interchanges: None where no pair is aligned.
        effects: of the candidates, one at a time.
        carriers: those candidates that carry the behaviour: the causal ones, or those that compute it if experts do.
    """

    interchanges: Interchanges | None
    localization: Localization
    effects: list[ExpertEffect]
    carriers: list[Expert]
    interventions: list[Intervention]
    curves: list[Curve]


def intervene(config: DiagnoseConfig, observed: Observed, ranked: Ranked) -> Intervened:
    """Interchange what twins compute, test candidates one at a time, remove directions, and ablate experts together."""
    interchanges = _interchanges(config, observed)
    measured = expert_effects(
        observed.confirmation,
        ranked.candidates,
        observed.frequency_LE,
        min_effect=config.min_effect,
        level=config.level,
        seed=config.seed,
    )
    # before the candidates are judged: what an expert's effect means depends on what the routing as a whole does
    localization = conclude(interchanges)
    effects = _effects(observed, ranked, measured, localization.verdict)
    computes = localization.verdict == "experts"
    carriers = [
        (found.position, found.expert)
        for found, effect in zip(measured, effects, strict=True)
        if (effect.computes if computes else effect.causal)
    ]
    return Intervened(
        interchanges=interchanges,
        localization=localization,
        effects=effects,
        carriers=carriers,
        interventions=_interventions(config, observed, ranked, interchanges, carriers),
        curves=_curves(config, observed, ranked),
    )


def _interchanges(config: DiagnoseConfig, observed: Observed) -> Interchanges | None:
    aligned = [pair for pair in observed.trials.pairs if pair.aligned]
    paired = zip(aligned, partners(aligned, config.seed), strict=True)
    usable = [(pair, partner) for pair, partner in paired if partner is not None]
    # no pair has both a twin of equal length and a partner to control for the disturbance
    if not usable:
        return None
    return run_interchanges(observed.trials.of([pair for pair, _ in usable]), [partner for _, partner in usable])


def _effects(observed: Observed, ranked: Ranked, measured: Sequence[Effect], verdict: str) -> list[ExpertEffect]:
    """Return what candidates do, and the tokens that choose them.

    Where all of the routing together carries nothing, no expert does by being chosen; without a verdict none is called
    anything.
    """
    chosen_more = ranked.by_difference if verdict in ("routing", "both") else []
    places = [(found.position, found.expert) for found in measured]
    return [
        ExpertEffect(
            layer=observed.layers[place[0]],
            expert=place[1],
            ablate=found.ablate,
            restore=found.restore,
            control=found.control,
            q=found.q,
            causal=found.acts and place in chosen_more,
            computes=found.acts and verdict != CANNOT_TELL and place not in chosen_more,
            tokens=tokens,
        )
        for found, place, tokens in zip(measured, places, _tokens(observed.trials, places), strict=True)
    ]


def _tokens(trials: Trials, experts: Sequence[Expert]) -> list[list[TokenChoice]]:
    """Return for each expert the tokens that choose it most, on either side."""
    found = top_tokens(
        trials.subject,
        [*trials.flagged, *trials.twins],
        [pair.common for pair in trials.pairs] * 2,
        experts,
        batch_size=trials.runner.batch_size,
    )
    return [[TokenChoice(t.token, t.rate, t.lift) for t in tokens] for tokens in found]


def _interventions(
    config: DiagnoseConfig,
    observed: Observed,
    ranked: Ranked,
    interchanges: Interchanges | None,
    carriers: Sequence[Expert],
) -> list[Intervention]:
    trials, (flagged, twins) = observed.trials, observed.trials.own
    return [
        trials.intervention("as it is", flagged, flagged),
        trials.intervention("twin as it is" if observed.matched else "benign as it is", twins, twins),
        *(interventions_of(interchanges) if interchanges else []),
        *_directions_removed(config, observed, ranked),
        *_ablated_together(observed.confirmation, "experts that carry it", carriers),
        *_ablated_together(observed.confirmation, "associated experts", ranked.top),
    ]


def _directions_removed(config: DiagnoseConfig, observed: Observed, ranked: Ranked) -> list[Intervention]:
    """Return what removing the direction does that was strongest on the discovering half; nothing without log-odds."""
    directions_LD = ranked.directions.tensors["direction"]
    layer = strongest_layer(observed.discovery, directions_LD)
    return [] if layer is None else ablations(observed.confirmation, directions_LD[layer], config.seed)


def _ablated_together(trials: Trials, name: str, experts: Sequence[Expert]) -> list[Intervention]:
    """Return what ablating all of these experts at once does; nothing if there are none."""
    if not experts:
        return []
    label = f"ablate the {len(experts)} {name}"
    # as many as the routers can do without
    change = ablating(trials, ablated_of(ablatable(experts, trials.subject.anatomy.spec)))
    return [trials.intervention(label, trials.run(label, FLAGGED, change), trials.own[0])]


def _curves(config: DiagnoseConfig, observed: Observed, ranked: Ranked) -> list[Curve]:
    """Return refusal over the number of ablated experts, in each order there is, and for random ones like the first."""
    orders = {"most associated": ranked.by_difference, "largest gradient": ranked.by_gradient}
    known = {name: order for name, order in orders.items() if order}
    curves = [curve(observed.confirmation, name, order) for name, order in known.items()]
    if known and config.random_controls:
        # the first order there is sets how many experts, and of which layers, are drawn
        first, draws = next(iter(known.values())), config.random_controls
        curves.append(random_curve(observed.confirmation, first, observed.frequency_LE, draws, config.seed))
    return curves
