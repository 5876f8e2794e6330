"""Residual-stream directions: what they are per layer, how well they separate, and what erasing them leaves."""

from gtqlora.localize.directions.layers import Directions, study
from gtqlora.localize.directions.named import MIN_GROUPS, named_directions

__all__ = ["MIN_GROUPS", "Directions", "named_directions", "study"]
