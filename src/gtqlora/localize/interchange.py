"""Interchange of what twin prompts compute: routing decisions, experts' inputs, and the rest of the residual stream.

A run is split into three components, each of which comes from the flagged prompt or from its twin (interchange
interventions, Geiger et al. 2021, arXiv 2106.02997): *routing* (which experts are chosen, with which weights), the
*experts'* own computation (the inputs they compute on), and the *stream* (all else: embeddings, attention, shared
experts, dense layers). Eight cells; two of them are the prompts as they are. All in memory; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from gtqlora.capture import Call, CallRecorder, ExpertHandler, Interchange
from gtqlora.decoding import Change, Changes, SourceRun
from gtqlora.errors import ModelError
from gtqlora.localize.controls import CONTROLS, Controlled
from gtqlora.localize.pairs import Pair
from gtqlora.localize.trials import FLAGGED, TWIN, Outcome, Side, Trials
from gtqlora.progress import track
from gtqlora.results.diagnosis import AS_TWIN, BROKEN, Intervention
from gtqlora.results.diagnosis import Cell as CellRecord

Cell = tuple[Side, Side, Side]
"""(routing, experts, stream): which prompt each component comes from."""

CELLS: tuple[Cell, ...] = tuple(product((FLAGGED, TWIN), (FLAGGED, TWIN), (FLAGGED, TWIN)))
"""All eight; the first is the flagged prompt as it is, the last the twin."""


def exchange(routing: Sequence[list[int]], experts: Sequence[list[int]] | None = None) -> Changes:
    """Run prompts with the routing of `routing`; their experts compute on their own inputs, or on those of `experts`.

    Experts' inputs come from a run under the same routing, so what they hold of the other prompt is not what its own
    routing has made of it. All prompts of a pair have the same token counts.
    """

    def change(chosen: list[int]) -> Change:
        routed = CallRecorder()
        source_runs = [SourceRun(expert_handlers=(routed,), prompts=[routing[i] for i in chosen])]
        if experts is None:
            return Change(source_runs=source_runs, expert_handlers=(Interchange(routing=routed, inputs=None),))
        # one run records both, as the experts' inputs come from the run whose routing is replayed
        if experts is routing:
            return Change(source_runs=source_runs, expert_handlers=(Interchange(routing=routed, inputs=routed),))
        inputs = CallRecorder()
        handlers = (Interchange(routing=routed, inputs=None), inputs)
        # recorded under the replayed routing, not under the prompt's own: only the inputs are the other prompt's
        source_runs.append(SourceRun(expert_handlers=handlers, prompts=[experts[i] for i in chosen]))
        return Change(source_runs=source_runs, expert_handlers=(Interchange(routing=routed, inputs=inputs),))

    return change


class InSteps:
    """Handles calls on the prompt only, or only on what is generated after it; for the run of one batch."""

    def __init__(self, handler: ExpertHandler, *, prompt: bool) -> None:
        self.handler, self.prompt = handler, prompt
        self._seen: set[int] = set()

    def __call__(self, position: int, call: Call) -> Call | None:
        """Return what the handler makes of the call, if it is of these steps: a layer's first call is the prompt."""
        first = position not in self._seen
        self._seen.add(position)
        return self.handler(position, call) if first == self.prompt else None


class InLayers:
    """Handles the calls of some MoE layers, by position, and leaves those of all others."""

    def __init__(self, handler: ExpertHandler, layers: range) -> None:
        self.handler, self.layers = handler, layers

    def __call__(self, position: int, call: Call) -> Call | None:
        """Return what the handler makes of the call, if it is of one of these layers."""
        return self.handler(position, call) if position in self.layers else None


def partly(change: Changes, part: Callable[[ExpertHandler], ExpertHandler]) -> Changes:
    """Return a change whose handlers of experts act in a part of the calls only."""

    def made(chosen: list[int]) -> Change:
        whole = change(chosen)
        return replace(whole, expert_handlers=[part(handler) for handler in whole.expert_handlers])

    return made


STEPS: dict[str, Callable[[ExpertHandler], ExpertHandler]] = {
    "on the prompt only": lambda handler: InSteps(handler, prompt=True),
    "on what is generated only": lambda handler: InSteps(handler, prompt=False),
}


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """Outcomes under one control: another pair's prompts of the same flag in the place of the twin's.

    Attributes:
        routing: flagged prompts with another flagged prompt's routing.
        experts: flagged prompts whose experts compute on another flagged prompt's inputs, routing held.
        twins: twins with another twin's routing.
    """

    routing: list[Outcome]
    experts: list[Outcome]
    twins: list[Outcome]


@dataclass(frozen=True, kw_only=True)
class Interchanges:
    """Outcomes of usable pairs in all cells, under each of the `CONTROLS`, and with the twin's routing in `STEPS`."""

    pairs: list[Controlled]
    trials: Trials
    cells: dict[Cell, list[Outcome]]
    controls: dict[str, Disturbed]
    steps: dict[str, list[Outcome]] = field(default_factory=dict[str, list[Outcome]])

    @property
    def flagged(self) -> list[Outcome]:
        """Return what the flagged prompts do as they are."""
        return self.cells[CELLS[0]]

    @property
    def twins(self) -> list[Outcome]:
        """Return what the twins do as they are."""
        return self.cells[CELLS[-1]]

    def of(self, kind: str) -> Interchanges:
        """Return those of the pairs of one kind."""
        rows = [i for i, one in enumerate(self.pairs) if one.pair.row.kind == kind]

        def some(outcomes: list[Outcome]) -> list[Outcome]:
            return [outcomes[i] for i in rows]

        return Interchanges(
            pairs=[self.pairs[i] for i in rows],
            trials=self.trials.of([self.trials.pairs[i] for i in rows]),
            cells={cell: some(outcomes) for cell, outcomes in self.cells.items()},
            controls={
                name: Disturbed(routing=some(c.routing), experts=some(c.experts), twins=some(c.twins))
                for name, c in self.controls.items()
            },
            steps={name: some(outcomes) for name, outcomes in self.steps.items()},
        )


def run_interchanges(trials: Trials, pairs: Sequence[Controlled]) -> Interchanges:
    """Run every cell and control of pairs that are among the trials."""
    part = trials.of([one.pair for one in pairs])
    _check_replay(part)
    prompts = {FLAGGED: part.flagged, TWIN: part.twins}
    cells = {CELLS[0]: part.own[0], CELLS[-1]: part.own[1]}
    for routing, experts, stream in track(CELLS[1:-1], "interchanges", len(CELLS) - 2):
        # experts that compute on their own stream need no other run
        source = None if experts == stream else prompts[experts]
        change = exchange(prompts[routing], source)
        cells[routing, experts, stream] = part.run(None, stream, change)
    controls = {
        name: _disturbed(part, [one.controls[i].pair for one in pairs])
        for i, name in track(list(enumerate(CONTROLS)), "controls of interchanges", len(CONTROLS))
    }
    twins = exchange(part.twins)
    steps = {
        name: part.run(None, FLAGGED, partly(twins, only))
        for name, only in track(list(STEPS.items()), "prompt and completion apart", len(STEPS))
    }
    return Interchanges(pairs=list(pairs), trials=part, cells=cells, controls=controls, steps=steps)


def _disturbed(trials: Trials, others: Sequence[Pair]) -> Disturbed:
    prompts, twins = [pair.prompt for pair in others], [pair.twin for pair in others]
    return Disturbed(
        routing=trials.run(None, FLAGGED, exchange(prompts)),
        experts=trials.run(None, FLAGGED, exchange(trials.flagged, prompts)),
        twins=trials.run(None, TWIN, exchange(twins)),
    )


_REPLAYED, _MAY_DIFFER = 16, 1
"""Prompts on which a replay of their own routing is checked, and how many may come out otherwise all the same."""


def _check_replay(trials: Trials) -> None:
    """Assert that a prompt with its own routing and its own experts' inputs does what it does.

    Raises:
        ModelError: it does not, so that no interchange shows anything.
    """
    few = trials.of(trials.pairs[:_REPLAYED])
    plain, again = few.run(None, FLAGGED), few.run(None, FLAGGED, exchange(few.flagged, few.flagged))
    # one may: kernels that add in no fixed order can turn a tie
    if (differ := sum(a.tokens != b.tokens for a, b in zip(plain, again, strict=True))) > _MAY_DIFFER:
        raise ModelError(
            f"replaying a prompt's own routing changes what {differ} of {len(plain)} prompts say, so nothing can be "
            "interchanged in this model; run it in fp32, or report its architecture"
        )


def cells_of(interchanges: Interchanges) -> list[CellRecord]:
    """Return what prompts do, and the log-odds, in each cell."""
    trials = interchanges.trials
    return [
        CellRecord(
            routing=routing,
            experts=experts,
            stream=stream,
            refusal=trials.refusal(outcomes),
            as_twin=trials.share(outcomes, AS_TWIN),
            broken=trials.share(outcomes, BROKEN),
            log_odds=trials.mean_odds(outcomes),
        )
        for (routing, experts, stream), outcomes in interchanges.cells.items()
    ]


def interventions_of(interchanges: Interchanges) -> list[Intervention]:
    """Return the interchanges with their controls, each against the same prompts as they are."""
    cells, flagged, twins = interchanges.cells, interchanges.flagged, interchanges.twins
    groups = [
        ("flagged, routing of", "its twin", cells[TWIN, FLAGGED, FLAGGED], "routing", flagged),
        ("flagged, experts on inputs of", "its twin", cells[FLAGGED, TWIN, FLAGGED], "experts", flagged),
        ("twin, routing of", "the flagged prompt", cells[FLAGGED, TWIN, TWIN], "twins", twins),
    ]
    found = []
    for change, source, outcomes, part, base in groups:
        found.append(interchanges.trials.intervention(f"{change} {source}", outcomes, base))
        if part == "routing":
            found += [
                interchanges.trials.intervention(f"{change} {source} {name}", changed, base)
                for name, changed in interchanges.steps.items()
            ]
        for name, control in interchanges.controls.items():
            of = name.replace("prompt", "twin") if part == "twins" else name
            disturbed = getattr(control, part)
            found.append(interchanges.trials.intervention(f"{change} {of}", disturbed, base, control=True))
    return found
