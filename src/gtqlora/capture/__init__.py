"""A model under observation: opened (`subject`), hooked (`hooks`), run in batches (`batches`).

On top of these, `observe` counts which experts tokens choose, `gradients` measures how much each expert's weight pushes
the first answered token, and `tokens` lists the tokens that choose an expert most.
"""

from gtqlora.capture.batches import by_length, forward, left_padded, positions
from gtqlora.capture.gradients import gradient_scores, log_odds
from gtqlora.capture.hooks import (
    Call,
    CallRecorder,
    Decision,
    ExpertHandler,
    Handler,
    Interchange,
    Mask,
    Recorder,
    Replay,
    StatesHandler,
    direction_removed,
    expert_hooks,
    input_hooks,
    router_hooks,
    state_hooks,
)
from gtqlora.capture.observe import Observation, Region, observe
from gtqlora.capture.subject import Subject, open_layer, open_subject
from gtqlora.capture.tokens import TokenRate, top_tokens

__all__ = [
    "Call",
    "CallRecorder",
    "Decision",
    "ExpertHandler",
    "Handler",
    "Interchange",
    "Mask",
    "Observation",
    "Recorder",
    "Region",
    "Replay",
    "StatesHandler",
    "Subject",
    "TokenRate",
    "by_length",
    "direction_removed",
    "expert_hooks",
    "forward",
    "gradient_scores",
    "input_hooks",
    "left_padded",
    "log_odds",
    "observe",
    "open_layer",
    "open_subject",
    "positions",
    "router_hooks",
    "state_hooks",
    "top_tokens",
]
