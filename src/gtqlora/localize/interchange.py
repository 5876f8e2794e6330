"""Interchange of what twin prompts compute: routing decisions, experts' inputs, and the rest of the residual stream.

A run is split into three components, each of which comes from the flagged prompt or from its twin (interchange
interventions, Geiger et al. 2021, arXiv 2106.02997): *routing* (which experts are chosen, with which weights), the
*experts'* own computation (the inputs they compute on), and the *stream* (all else: embeddings, attention, shared
experts, dense layers). Eight cells; two of them are the prompts as they are. All in memory; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from gtqlora.capture import CallRecorder, Interchange
from gtqlora.localize.pairs import Pair
from gtqlora.localize.trials import FLAGGED, TWIN, Outcome, Side, Trials
from gtqlora.progress import track
from gtqlora.results.diagnosis import Cell as CellRecord
from gtqlora.results.diagnosis import Intervention
from gtqlora.scoring import Change, Changes, SourceRun

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


@dataclass(frozen=True)
class Interchanges:
    """Outcomes of aligned pairs in all cells, and of the controls: another pair's prompts of the same flag.

    Attributes:
        routing_control: flagged prompts with another flagged prompt's routing.
        experts_control: flagged prompts whose experts compute on another flagged prompt's inputs, routing held.
        twin_control: twins with another twin's routing.
    """

    trials: Trials
    cells: dict[Cell, list[Outcome]]
    routing_control: list[Outcome]
    experts_control: list[Outcome]
    twin_control: list[Outcome]

    @property
    def flagged(self) -> list[Outcome]:
        """Return what the flagged prompts do as they are."""
        return self.cells[CELLS[0]]

    @property
    def twins(self) -> list[Outcome]:
        """Return what the twins do as they are."""
        return self.cells[CELLS[-1]]


def run_interchanges(trials: Trials, partners: Sequence[Pair]) -> Interchanges:
    """Run every cell and control of aligned pairs; `partners` give the controls."""
    prompts = {FLAGGED: trials.flagged, TWIN: trials.twins}
    cells = {CELLS[0]: trials.own[0], CELLS[-1]: trials.own[1]}
    for routing, experts, stream in track(CELLS[1:-1], "interchanges", len(CELLS) - 2):
        # experts that compute on their own stream need no other run
        source = None if experts == stream else prompts[experts]
        change = exchange(prompts[routing], source)
        cells[routing, experts, stream] = trials.run(None, stream, change)
    others, other_twins = [p.prompt for p in partners], [p.twin for p in partners]
    return Interchanges(
        trials=trials,
        cells=cells,
        routing_control=trials.run("routing's control", FLAGGED, exchange(others)),
        experts_control=trials.run("experts' control", FLAGGED, exchange(trials.flagged, others)),
        twin_control=trials.run("twins' control", TWIN, exchange(other_twins)),
    )


def cells_of(interchanges: Interchanges) -> list[CellRecord]:
    """Return refusal and log-odds in each cell."""
    trials = interchanges.trials
    return [
        CellRecord(
            routing=routing,
            experts=experts,
            stream=stream,
            refusal=trials.refusal(outcomes),
            log_odds=trials.mean_odds(outcomes),
        )
        for (routing, experts, stream), outcomes in interchanges.cells.items()
    ]


def interventions_of(interchanges: Interchanges) -> list[Intervention]:
    """Return the interchanges with their controls, each against the same prompts as they are."""
    cells, flagged, twins = interchanges.cells, interchanges.flagged, interchanges.twins
    listed = (
        ("flagged with its twin's routing", cells[TWIN, FLAGGED, FLAGGED], flagged, False),
        ("flagged with another flagged prompt's routing", interchanges.routing_control, flagged, True),
        ("flagged, experts on its twin's inputs, routing held", cells[FLAGGED, TWIN, FLAGGED], flagged, False),
        ("flagged, experts on another's inputs, routing held", interchanges.experts_control, flagged, True),
        ("twin with the flagged prompt's routing", cells[FLAGGED, TWIN, TWIN], twins, False),
        ("twin with another twin's routing", interchanges.twin_control, twins, True),
    )
    return [
        interchanges.trials.intervention(name, outcomes, base, control=control)
        for name, outcomes, base, control in listed
    ]
