"""Where a behaviour sits: twins' computation swapped, experts masked, always against a control; all in memory."""

from gtqlora.localize.conclusion import MIN_PAIRS, conclude
from gtqlora.localize.direction_ablation import ablations, strongest_layer
from gtqlora.localize.interchange import CELLS, Interchanges, cells_of, interventions_of, run_interchanges
from gtqlora.localize.masks import (
    MIN_GROUPS,
    Effect,
    Expert,
    ablatable,
    ablated_of,
    ablating,
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
    "Effect",
    "Expert",
    "Interchanges",
    "Outcome",
    "Pair",
    "Trials",
    "ablatable",
    "ablated_of",
    "ablating",
    "ablations",
    "cells_of",
    "conclude",
    "curve",
    "expert_effects",
    "halves",
    "interventions_of",
    "pairs_of",
    "partners",
    "random_curve",
    "random_like",
    "readout_tokens",
    "run_interchanges",
    "strongest_layer",
]
