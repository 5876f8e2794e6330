"""Routed experts kept frozen in 4 bits: formats, the module that holds them, and the kernels it can use."""

from gtqlora.experts.counts import QuantizedExpertCounts, quantized_expert_counts
from gtqlora.experts.formats import FORMATS, Format, Parts, format_of
from gtqlora.experts.loading import load_model
from gtqlora.experts.module import FrozenExperts
from gtqlora.experts.quantizer import FrozenExpertsQuantizer
from gtqlora.experts.settings import FrozenExpertsConfig

__all__ = [
    "FORMATS",
    "Format",
    "FrozenExperts",
    "FrozenExpertsConfig",
    "FrozenExpertsQuantizer",
    "Parts",
    "QuantizedExpertCounts",
    "format_of",
    "load_model",
    "quantized_expert_counts",
]
