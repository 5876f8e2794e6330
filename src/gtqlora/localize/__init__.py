"""Find where a behaviour sits: interchange what twins compute, ablate experts, always against a control; in memory."""

from gtqlora.localize.conclusion import MIN_PAIRS, conclude
from gtqlora.localize.interchange import CELLS, Interchanges, run_interchanges
from gtqlora.localize.masks import (
    MIN_GROUPS,
    Expert,
    ablated_of,
    curve,
    expert_effects,
    random_curve,
    random_like,
)
from gtqlora.localize.pairs import Pair, halves, pairs_of, partners
from gtqlora.localize.trials import Outcome, Trials, readout_tokens

__all__ = [
    "CELLS",
    "MIN_GROUPS",
    "MIN_PAIRS",
    "Expert",
    "Interchanges",
    "Outcome",
    "Pair",
    "Trials",
    "ablated_of",
    "conclude",
    "curve",
    "expert_effects",
    "halves",
    "pairs_of",
    "partners",
    "random_curve",
    "random_like",
    "readout_tokens",
    "run_interchanges",
]
