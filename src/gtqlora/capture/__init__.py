"""A model that runs under observation: opened, tapped, its passes recorded."""

from gtqlora.capture.batches import by_length, forward, left_padded
from gtqlora.capture.gradients import gradient_scores, log_odds
from gtqlora.capture.observe import Observation, Region, observe
from gtqlora.capture.subject import Subject, open_subject
from gtqlora.capture.taps import (
    Call,
    CallRecorder,
    Decision,
    Exchange,
    ExpertsHandler,
    Handler,
    Mask,
    Recorder,
    Replay,
    StatesHandler,
    direction_removed,
    experts_tapped,
    routers_tapped,
    states_tapped,
)
from gtqlora.capture.tokens import TokenRate, top_tokens

__all__ = [
    "Call",
    "CallRecorder",
    "Decision",
    "Exchange",
    "ExpertsHandler",
    "Handler",
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
    "experts_tapped",
    "forward",
    "gradient_scores",
    "left_padded",
    "log_odds",
    "observe",
    "open_subject",
    "routers_tapped",
    "states_tapped",
    "top_tokens",
]
