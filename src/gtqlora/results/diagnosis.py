# pyright: strict
"""What `diagnose` leaves: what mediates the refusals of each kind of flagged prompts, and why that is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gtqlora.results.directions import DirectionStudy
from gtqlora.results.experts import Curve, ExpertEffect, ExpertId
from gtqlora.results.files import read_record
from gtqlora.results.typed import to_json
from gtqlora.stats import Interval
from gtqlora.storage.atomic import write_json

FOLDER, FILE = "diagnosis", "diagnosis.json"
CANNOT_TELL = "cannot tell"
MIN_PAIRS = 30
"""Behaving pairs below which no verdict is given: an interval of a share then spans a third."""

FLAGGED_KINDS = ("lookalike", "harmful")
"""Kinds of prompts that are refused, falsely and truly."""

Behaviour = Literal["refuses", "as twin", "broken"]
"""What a completion does: it refuses, it does what the twin's own completion does, or neither."""
REFUSES: Behaviour = "refuses"
AS_TWIN: Behaviour = "as twin"
BROKEN: Behaviour = "broken"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What prompts do with each component taken from the flagged prompt or from its twin.

    Attributes:
        routing, experts, stream: "flagged" or "twin".
        refusal, as_twin, broken: shares, which sum to 1.
        log_odds: of refusing; None without tokens that tell refusals from answers.
    """

    routing: str
    experts: str
    stream: str
    refusal: Interval
    as_twin: Interval
    broken: Interval
    log_odds: Interval | None


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What the prompts of one kind do under one change, with the paired effect on refusal (as it is - changed).

    Attributes:
        refusal, as_twin, broken: shares, which sum to 1.
    """

    kind: str
    name: str
    control: bool
    refusal: Interval
    as_twin: Interval
    broken: Interval
    accuracy: Interval | None
    effect: Interval
    log_odds: Interval | None
    log_odds_effect: Interval | None


@dataclass(frozen=True, kw_only=True)
class DepthEffect:
    """What goes when only some layers' routing is the twin's.

    Attributes:
        log_odds: part of the gap in log-odds; None without a readout.
        as_twin: share of generated completions that do as the twin.
    """

    log_odds: Interval | None
    as_twin: Interval


@dataclass(frozen=True, kw_only=True)
class DepthPoint:
    """The MoE layers in two parts: those up to one, and those after it.

    Attributes:
        layers: how many the first part has; at 0 the second has all of them.
        last: the last one of the first part among the decoder's layers; None at 0.
        up_to, after: what goes with the twin's routing in the one part, and in the other.
    """

    layers: int
    last: int | None
    up_to: DepthEffect
    after: DepthEffect


@dataclass(frozen=True, kw_only=True)
class Depth:
    """In which layers the routing mediates the refusals of one kind of prompts.

    Attributes:
        generated: pairs of which completions were generated.
        points: from no layers to all of them.
    """

    sentence: str
    generated: int
    points: list[DepthPoint]


@dataclass(frozen=True, kw_only=True)
class Localization:
    """What mediates the refusals of one kind of prompts, why that is said, and how much each component does.

    Attributes:
        kind: "lookalike" (false refusals) or "harmful" (true ones).
        verdict: "routing"; "residual" (stream) or "experts" (their own computation), both Level 1; "both" levels; or
            "cannot tell".
        verdict_log_odds: what the same rule says of the log-odds; empty without a readout.
        n_usable: aligned pairs whose flagged prompt refuses and whose twin does something sensible; these decide.
        unusable: how many pairs are not, by reason.
        stood_in: how many pairs had no control of the sort wanted, by what stood in.
        overlap: mean share of experts in common with the twin, and with each control.
        words: whether a component is "necessary", "sufficient", "both" or "neither", where that can be told.
        shares: Owen values of the generated behaviour with experts and stream in a union, which sum to 1, and the
            interaction of the two levels: above 0 they only work together, below 0 each is enough alone.
        shares_with_routing: the same with experts and routing in a union.
        shares_log_odds, shares_with_routing_log_odds: the same of the log-odds.
        necessary: the part of the refusals that goes when only this component is the twin's, beyond the control.
        sufficient: the part that comes when only this component is the flagged prompt's, beyond the control.
        necessary_log_odds, sufficient_log_odds: the same of the log-odds.
        cells: each combination of components; empty without usable pairs.
        depth: in which layers the routing mediates; None with too few usable pairs.
    """

    kind: str
    verdict: str
    verdict_log_odds: str = ""
    sentence: str
    reasons: list[str]
    n_usable: int
    unusable: dict[str, int] = field(default_factory=dict[str, int])
    stood_in: dict[str, int] = field(default_factory=dict[str, int])
    overlap: dict[str, float] = field(default_factory=dict[str, float])
    words: dict[str, str] = field(default_factory=dict[str, str])
    shares: dict[str, Interval] = field(default_factory=dict[str, Interval])
    shares_log_odds: dict[str, Interval] = field(default_factory=dict[str, Interval])
    shares_with_routing: dict[str, Interval] = field(default_factory=dict[str, Interval])
    shares_with_routing_log_odds: dict[str, Interval] = field(default_factory=dict[str, Interval])
    necessary: dict[str, Interval] = field(default_factory=dict[str, Interval])
    sufficient: dict[str, Interval] = field(default_factory=dict[str, Interval])
    necessary_log_odds: dict[str, Interval] = field(default_factory=dict[str, Interval])
    sufficient_log_odds: dict[str, Interval] = field(default_factory=dict[str, Interval])
    cells: list[Cell] = field(default_factory=list[Cell])
    depth: Depth | None = None


ELSEWHERE, SAME_PLACE = "elsewhere", "in the same place"


@dataclass(frozen=True)
class Difference:
    """Whether the false refusals are mediated elsewhere than the true ones.

    Attributes:
        verdict: "elsewhere", "in the same place" or "cannot tell".
        parts: what a component does for false refusals less what it does for true ones, under "necessary: routing"
            and the like.
    """

    verdict: str
    sentence: str
    parts: dict[str, Interval] = field(default_factory=dict[str, Interval])


@dataclass(frozen=True, kw_only=True)
class LayerHealth:
    """How evenly one MoE layer's load is spread over its experts; see `routing.Load`. `dead` ones are never chosen."""

    layer: int
    cv: float
    max_vio: float
    entropy: float
    dead: int


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnosis/diagnosis.json` holds; intervals are at 95 %.

    Attributes:
        verdict: what mediates the refusals that an edit is to remove: the false ones, or all if there are no others.
        sentence: first whether false refusals are elsewhere than true ones, then what mediates each.
        difference: of the two kinds.
        kinds: what mediates the refusals of each kind of flagged prompts.
        warnings: what weakens these conclusions, and what would mend it.
        matched: flagged prompts have true twins.
        n_aligned: pairs of equal token count, whose computation can be interchanged.
        readout: the behaviour's first tokens, for log-odds.
        interventions, curves: on the confirming half where experts or directions were chosen.
        experts: effects of the candidates, for each kind.
        causal_experts: those that carry the behaviour of a kind: the causal ones, or those that compute it if experts
            do.
        top_experts: those chosen clearly more on flagged prompts; association only.
        health: per MoE layer, balance of the load over all prompts' and answers' tokens.
        health_tokens: how many tokens these are.
    """

    verdict: str
    sentence: str
    difference: Difference
    kinds: list[Localization]
    warnings: list[str]
    matched: bool
    n_pairs: int
    n_aligned: int
    readout: list[str]
    interventions: list[Intervention]
    curves: list[Curve]
    experts: list[ExpertEffect]
    causal_experts: list[ExpertId]
    top_experts: list[ExpertId]
    directions: DirectionStudy
    health: list[LayerHealth]
    health_tokens: int


def read_diagnosis(run: Path) -> Diagnosis:
    """Return the diagnosis in a run directory.

    Raises:
        RunError: there is none, or it is not what this version writes.
    """
    return read_record(Diagnosis, run, f"{FOLDER}/{FILE}", "diagnose")


def write_diagnosis(folder: Path, diagnosis: Diagnosis) -> None:
    """Write it into the folder `diagnosis`, wherever that is being made."""
    write_json(folder / FILE, to_json(diagnosis))
