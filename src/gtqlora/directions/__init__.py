"""Residual-stream directions: what they are per layer, how well they separate, and what erasing them leaves."""

from gtqlora.directions.layers import DirectionStudy, LayerStudy, study
from gtqlora.directions.named import named_directions

__all__ = ["DirectionStudy", "LayerStudy", "named_directions", "study"]
