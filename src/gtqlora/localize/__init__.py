"""Find what mediates a behaviour: interchange what twins compute, ablate experts, each against a control; in memory."""

from gtqlora.localize.conclusion import conclude
from gtqlora.localize.controls import Control, Controlled, controlled
from gtqlora.localize.difference import difference
from gtqlora.localize.interchange import CELLS, Disturbed, Interchanges, run_interchanges
from gtqlora.localize.masks import (
    MIN_GROUPS,
    Expert,
    ablated_of,
    curve,
    expert_effects,
    random_curve,
    random_like,
)
from gtqlora.localize.pairs import Pair, halves, pairs_of
from gtqlora.localize.trials import Outcome, Trials, readable
from gtqlora.results.diagnosis import MIN_PAIRS

__all__ = [
    "CELLS",
    "MIN_GROUPS",
    "MIN_PAIRS",
    "Control",
    "Controlled",
    "Disturbed",
    "Expert",
    "Interchanges",
    "Outcome",
    "Pair",
    "Trials",
    "ablated_of",
    "conclude",
    "controlled",
    "curve",
    "difference",
    "expert_effects",
    "halves",
    "pairs_of",
    "random_curve",
    "random_like",
    "readable",
    "run_interchanges",
]
