"""Where a behaviour sits: twins' computation swapped, experts masked, always against a control; all in memory."""

from gtqlora.localize.conclusion import MIN_PAIRS, Verdict, judge
from gtqlora.localize.direction_ablation import ablations, strongest_layer
from gtqlora.localize.interchange import CELLS, Interchanges, cells_of, interventions_of, run_interchanges
from gtqlora.localize.masks import (
    MIN_GROUPS,
    Curve,
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
from gtqlora.localize.trials import Change, Intervention, Outcome, Trials, readout_tokens

__all__ = [
    "CELLS",
    "MIN_GROUPS",
    "MIN_PAIRS",
    "Change",
    "Curve",
    "Effect",
    "Expert",
    "Interchanges",
    "Intervention",
    "Outcome",
    "Pair",
    "Trials",
    "Verdict",
    "ablatable",
    "ablated_of",
    "ablating",
    "ablations",
    "cells_of",
    "curve",
    "expert_effects",
    "halves",
    "interventions_of",
    "judge",
    "pairs_of",
    "partners",
    "random_curve",
    "random_like",
    "readout_tokens",
    "run_interchanges",
    "strongest_layer",
]
