"""Level 1 alone: a direction removed from the residual stream, with the routing held to what it was, or free.

Shape letters: L states (embedding and decoder layers), D hidden.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gtqlora.capture import CallRecorder, Interchange, direction_removed
from gtqlora.decoding import Change, SourceRun
from gtqlora.localize.trials import FLAGGED, Trials
from gtqlora.progress import track
from gtqlora.results.diagnosis import Intervention


def removing(trials: Trials, direction_D: Tensor, *, routing_held: bool) -> Change:
    """Return the change that removes a direction from all that writes the residual stream."""
    removed, held = direction_removed(trials.subject.model, trials.subject.anatomy, direction_D), CallRecorder()
    return Change(
        switch=lambda: removed,
        source_runs=(SourceRun(expert_handlers=(held,)),) if routing_held else (),
        expert_handlers=(Interchange(routing=held, inputs=None),) if routing_held else (),
    )


def strongest_layers(trials: Trials, directions_LD: Tensor) -> dict[str, int]:
    """Return for each kind of prompts the state whose direction takes most off the log-odds when removed.

    Empty without a readout.
    """
    if not trials.readout:
        return {}
    # where the states do not differ there is no direction, and dividing by its length gives NaN
    present = [layer for layer, direction_D in enumerate(directions_LD) if direction_D.norm() > 0]
    odds: dict[int, NDArray[np.floating]] = {}
    for layer in track(present, "each layer's direction", len(present)):
        change = removing(trials, directions_LD[layer], routing_held=False)
        odds[layer] = trials.first_odds(change)
    rows_of = {kind: trials.rows_of(trials.of_kind(kind)) for kind in trials.kinds if odds}
    return {kind: min(odds, key=lambda layer: odds[layer][rows].mean()) for kind, rows in rows_of.items()}


def ablations(trials: Trials, direction_D: Tensor, seed: int) -> list[Intervention]:
    """Remove the direction with routing held and free, and a random direction as control."""
    # of no length in particular: what is removed is the direction's line
    random_D = torch.randn(len(direction_D), generator=torch.Generator().manual_seed(seed))
    found = []
    for name, vector_D, held, control in (
        ("refusal direction removed, routing held", direction_D, True, False),
        ("refusal direction removed", direction_D, False, False),
        ("random direction removed", random_D, False, True),
    ):
        outcomes = trials.run(name, FLAGGED, removing(trials, vector_D, routing_held=held))
        found.append(trials.intervention(name, outcomes, trials.own[0], control=control))
    return found
