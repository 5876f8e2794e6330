"""The steps of a diagnosis, each of which leaves one record: observe, rank, intervene.

How this connects: `observe_pairs` runs the pairs as they are, `rank_experts` finds candidates on one half of them, and
`intervene` tests these on the other half, so that nothing is confirmed on what suggested it. The `diagnose` stage draws
the conclusions.

Shape letters: N pairs, L MoE layers, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import Observation, gradient_scores, observe, top_tokens
from gtqlora.config import DiagnoseConfig
from gtqlora.localize.association import associate, top_experts
from gtqlora.localize.conclusion import conclude
from gtqlora.localize.controls import controlled
from gtqlora.localize.difference import difference
from gtqlora.localize.direction_ablation import ablations, strongest_layers
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
from gtqlora.localize.pairs import halves
from gtqlora.localize.sample_size import sample_sizes
from gtqlora.localize.trials import FLAGGED, Outcome, Trials
from gtqlora.progress import note
from gtqlora.results.association import Association
from gtqlora.results.diagnosis import CANNOT_TELL, Difference, Intervention, Localization
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
    """What the prompts do under interventions, and what that says mediates the behaviour.

    Attributes:
        n_aligned: pairs that have a twin of equal token count.
        effects: of the candidates, one at a time, for each kind.
        carriers: those candidates that carry the behaviour of a kind: the causal ones, or those that compute it if
            experts do.
    """

    n_aligned: int
    localizations: list[Localization]
    difference: Difference
    effects: list[ExpertEffect]
    carriers: list[Expert]
    interventions: list[Intervention]
    curves: list[Curve]


def intervene(config: DiagnoseConfig, observed: Observed, ranked: Ranked) -> Intervened:
    """Interchange what twins compute, test candidates one at a time, remove directions, and ablate experts together."""
    interchanges, found = _interchanged(observed)
    measured = expert_effects(
        observed.confirmation,
        ranked.candidates,
        observed.frequency_LE,
        min_effect=config.min_effect,
        level=config.level,
        seed=config.seed,
    )
    tokens = dict(zip(ranked.candidates, _tokens(observed.trials, ranked.candidates), strict=True))
    effects = [
        effect
        for kind, of_kind in measured.items()
        # after the verdict: what an expert's effect means depends on what the routing as a whole does
        for effect in _effects(observed, ranked, of_kind, found[kind], tokens)
    ]
    carriers = {kind: _carriers(observed, effects, found[kind]) for kind in found}
    interventions = _interventions(config, observed, ranked, interchanges, carriers)
    return Intervened(
        n_aligned=sum(pair.aligned for pair in observed.trials.pairs),
        localizations=[_held_against(one, interventions) for one in found.values()],
        difference=difference(found, interchanges),
        effects=effects,
        carriers=list(dict.fromkeys(expert for experts in carriers.values() for expert in experts)),
        interventions=interventions,
        curves=_curves(config, observed, ranked),
    )


def _interchanged(observed: Observed) -> tuple[dict[str, Interchanges], dict[str, Localization]]:
    """Return the interchanges of each kind that has usable pairs, and what each kind's say."""
    trials = observed.trials
    sorted_out = {kind: trials.of_kind(kind).sorted_out() for kind in trials.kinds}
    usable = [pair for pairs, _ in sorted_out.values() for pair in pairs]
    pairs = controlled(trials.subject, usable, trials.runner.batch_size)
    for warning in sample_sizes({kind: len(usable) for kind, (usable, _) in sorted_out.items()}):
        note(warning)
    whole = run_interchanges(trials, pairs) if pairs else None
    interchanges = {kind: part for kind in trials.kinds if whole and (part := whole.of(kind)).pairs}
    found = {}
    for kind, (of_kind, counts) in sorted_out.items():
        alone = len(of_kind) - (len(interchanges[kind].pairs) if kind in interchanges else 0)
        unusable = {**counts, **({"without another of equal token count as control": alone} if alone else {})}
        found[kind] = conclude(kind, interchanges.get(kind), unusable)
    return interchanges, found


def _effects(
    observed: Observed,
    ranked: Ranked,
    measured: Sequence[Effect],
    found: Localization,
    tokens: dict[Expert, list[TokenChoice]],
) -> list[ExpertEffect]:
    """Return what candidates do for one kind of prompts, and the tokens that choose them.

    Where all of the routing together carries nothing, no expert does by being chosen; without a verdict none is called
    anything.
    """
    chosen_more = ranked.by_difference if found.verdict in ("routing", "both") else []
    return [
        ExpertEffect(
            kind=found.kind,
            layer=observed.layers[effect.position],
            expert=effect.expert,
            ablate=effect.ablate,
            restore=effect.restore,
            control=effect.control,
            q=effect.q,
            causal=effect.acts and (effect.position, effect.expert) in chosen_more,
            computes=effect.acts
            and found.verdict != CANNOT_TELL
            and (effect.position, effect.expert) not in chosen_more,
            contributes=effect.contributes and found.verdict != CANNOT_TELL,
            tokens=tokens[effect.position, effect.expert],
        )
        for effect in measured
    ]


def _carriers(observed: Observed, effects: Sequence[ExpertEffect], found: Localization) -> list[Expert]:
    """Return the experts that carry the behaviour of one kind."""
    position = {layer: i for i, layer in enumerate(observed.layers)}
    return [
        (position[effect.layer], effect.expert)
        for effect in effects
        if effect.kind == found.kind and (effect.computes if found.verdict == "experts" else effect.causal)
    ]


def _held_against(found: Localization, interventions: Sequence[Intervention]) -> Localization:
    """Say so where routing mediates, but the experts that are called causal can be ablated without loss."""
    for one in interventions:
        if one.kind == found.kind and _CARRY in one.name and found.verdict == "routing" and one.refusal.low > 2 / 3:
            said = f"{one.name.capitalize()}, and {one.refusal.value:.0%} are still refused: others carry it as well."
            return replace(found, reasons=[*found.reasons, said])
    return found


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


_CARRY = "experts that carry it"


def _interventions(
    config: DiagnoseConfig,
    observed: Observed,
    ranked: Ranked,
    interchanges: Mapping[str, Interchanges],
    carriers: Mapping[str, Sequence[Expert]],
) -> list[Intervention]:
    """Return every change that was made, kind by kind."""
    removed = _directions_removed(config, observed, ranked)
    found = []
    for kind in observed.trials.kinds:
        trials, tested = observed.trials.of_kind(kind), observed.confirmation.of_kind(kind)
        flagged, twins = trials.own
        found += [
            trials.intervention("as it is", flagged, flagged),
            trials.intervention("twin as it is" if observed.matched else "benign as it is", twins, twins),
            *(interventions_of(interchanges[kind]) if kind in interchanges else []),
            *removed.get(kind, []),
            *_ablated_together(tested, _CARRY, carriers[kind]),
            *_ablated_together(tested, "associated experts", ranked.top),
        ]
    return found


def _directions_removed(config: DiagnoseConfig, observed: Observed, ranked: Ranked) -> dict[str, list[Intervention]]:
    """Return for each kind what removing the direction does that was strongest for it on the discovering half.

    Nothing without log-odds.
    """
    directions_LD = ranked.directions.tensors["direction"]
    layers = strongest_layers(observed.discovery, directions_LD)
    tested = {kind: observed.confirmation.of_kind(kind) for kind in layers}
    return {
        kind: ablations(tested[kind], directions_LD[layer], config.seed)
        for kind, layer in layers.items()
        if tested[kind].pairs
    }


def _ablated_together(trials: Trials, name: str, experts: Sequence[Expert]) -> list[Intervention]:
    """Return what ablating all of these experts at once does; nothing if there are none, or no prompts."""
    if not experts or not trials.pairs:
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
