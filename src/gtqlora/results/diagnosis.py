# pyright: strict
"""What `diagnose` leaves: where the refusal of flagged prompts sits, and why that is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True)
class Localization:
    """Where the behaviour sits, why, and how much each component carries.

    Attributes:
        verdict: "routing"; "residual" (stream) or "experts" (their own computation), both Level 1; "both" levels; or
            "cannot tell".
        n_usable: aligned pairs whose flagged prompt refuses and whose twin does not; these decide.
        shares: Owen values of the generated behaviour, which sum to 1, and the interaction of the two levels: above 0
            they only work together, below 0 each is enough alone.
        shares_log_odds: the same of the log-odds.
        necessary: the part of the refusals that goes when only this component is the twin's.
        sufficient: the part that comes when only this component is the flagged prompt's.
    """

    verdict: str
    sentence: str
    reasons: list[str]
    n_usable: int
    shares: dict[str, Interval] = field(default_factory=dict[str, Interval])
    shares_log_odds: dict[str, Interval] = field(default_factory=dict[str, Interval])
    necessary: dict[str, Interval] = field(default_factory=dict[str, Interval])
    sufficient: dict[str, Interval] = field(default_factory=dict[str, Interval])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Refusal and log-odds with each component taken from the flagged prompt or from its twin.

    Attributes:
        routing, experts, stream: "flagged" or "twin".
        log_odds: of refusing; None without tokens that tell refusals from answers.
    """

    routing: str
    experts: str
    stream: str
    refusal: Interval
    log_odds: Interval | None


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What the prompts do under one change, with the paired effect on it (as it is - changed)."""

    name: str
    control: bool
    refusal: Interval
    accuracy: Interval | None
    effect: Interval
    log_odds: Interval | None
    log_odds_effect: Interval | None


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
        verdict, sentence, reasons, n_usable, shares, shares_log_odds, necessary, sufficient: see `Localization`.
        warnings: what weakens these conclusions, and what would mend it.
        matched: flagged prompts have true twins.
        n_aligned: pairs of equal token count, whose computation can be interchanged.
        readout: the behaviour's first tokens, for log-odds.
        cells: each combination of components that was run; empty without aligned pairs.
        interventions, curves: on the confirming half where experts or directions were chosen.
        experts: effects of the candidates.
        causal_experts: those that carry the behaviour: the causal ones, or those that compute it if experts do.
        top_experts: those chosen clearly more on flagged prompts; association only.
        health: per MoE layer, balance of the load over all prompts' and answers' tokens.
        health_tokens: how many tokens these are.
    """

    verdict: str
    sentence: str
    reasons: list[str]
    warnings: list[str]
    matched: bool
    n_pairs: int
    n_aligned: int
    n_usable: int
    readout: list[str]
    shares: dict[str, Interval]
    shares_log_odds: dict[str, Interval]
    necessary: dict[str, Interval]
    sufficient: dict[str, Interval]
    cells: list[Cell]
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
