"""Where a behaviour sits: twins' computation swapped, experts masked, always against a control; all in memory."""

from gtqlora.localise.ablation import ablations, strongest_layer
from gtqlora.localise.masks import (
    MIN_GROUPS,
    Curve,
    Effect,
    Expert,
    curve,
    expert_effects,
    masked_of,
    masking,
    random_curve,
    random_like,
    spared,
)
from gtqlora.localise.pairs import Pair, halves, pairs_of, partners
from gtqlora.localise.swaps import CELLS, Swaps, cells_of, interventions_of, run_swaps
from gtqlora.localise.trials import Change, Intervention, Outcome, Trials, readout_tokens
from gtqlora.localise.verdict import MIN_PAIRS, Verdict, judge

__all__ = [
    "CELLS",
    "MIN_GROUPS",
    "MIN_PAIRS",
    "Change",
    "Curve",
    "Effect",
    "Expert",
    "Intervention",
    "Outcome",
    "Pair",
    "Swaps",
    "Trials",
    "Verdict",
    "ablations",
    "cells_of",
    "curve",
    "expert_effects",
    "halves",
    "interventions_of",
    "judge",
    "masked_of",
    "masking",
    "pairs_of",
    "partners",
    "random_curve",
    "random_like",
    "readout_tokens",
    "run_swaps",
    "spared",
    "strongest_layer",
]
