"""The last step of a diagnosis, after `observed` and `ranking`: intervene.

How this connects: `observed.observe_pairs` runs the pairs as they are, `ranking.rank_experts` finds candidates on one
half of them, and `intervene` tests these on the other half, so that nothing is confirmed on what suggested it. The
`diagnose` stage draws the conclusions.

Shape letters: L layers, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gtqlora.capture import top_tokens
from gtqlora.config import DiagnoseConfig
from gtqlora.localize.conclusion import conclude
from gtqlora.localize.controls import controlled
from gtqlora.localize.depth import depth_of
from gtqlora.localize.difference import difference
from gtqlora.localize.direction_ablation import ablations, strongest_layers
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
from gtqlora.localize.observed import Observed
from gtqlora.localize.ranking import Ranked
from gtqlora.localize.sample_size import sample_sizes
from gtqlora.localize.trials import FLAGGED, Trials
from gtqlora.progress import note
from gtqlora.results.diagnosis import CANNOT_TELL, Difference, Intervention, Localization
from gtqlora.results.experts import Curve, ExpertEffect, TokenChoice


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
    tokens = dict(zip(ranked.candidates, _tokens(observed.trials, ranked.candidates), strict=True))
    effects = [
        effect
        for kind, localization in found.items()
        # after the verdict: what an expert's effect means depends on what the routing as a whole does
        for effect in _effects(observed, ranked, _measured(config, observed, ranked, kind), localization, tokens)
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
        curves=[one for kind in observed.confirmation.kinds for one in _curves(config, observed, ranked, kind)],
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
        if kind in interchanges:
            found[kind] = replace(found[kind], depth=depth_of(interchanges[kind], found[kind].verdict))
    return interchanges, found


def _measured(config: DiagnoseConfig, observed: Observed, ranked: Ranked, kind: str) -> list[Effect]:
    return expert_effects(
        observed.confirmation.of_kind(kind),
        ranked.of_kind(kind).candidates,
        observed.frequency_LE,
        min_effect=config.min_effect,
        level=config.level,
        seed=config.seed,
    )


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
    chosen_more = ranked.of_kind(found.kind).by_difference if found.verdict in ("routing", "both") else []
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
            *_ablated_together(tested, "associated experts", ranked.of_kind(kind).top),
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


def _curves(config: DiagnoseConfig, observed: Observed, ranked: Ranked, kind: str) -> list[Curve]:
    """Return refusal over the number of ablated experts, in each order there is, and for random ones like the first."""
    trials, ranking = observed.confirmation.of_kind(kind), ranked.of_kind(kind)
    orders = {"most associated": ranking.by_difference, "largest gradient": ranking.by_gradient}
    known = {name: order for name, order in orders.items() if order}
    curves = [curve(trials, name, order) for name, order in known.items()]
    if known and config.random_controls:
        # the first order there is sets how many experts, and of which layers, are drawn
        first, draws = next(iter(known.values())), config.random_controls
        curves.append(random_curve(trials, first, observed.frequency_LE, draws, config.seed))
    return [replace(one, kind=kind) for one in curves]
