"""Routed experts kept frozen in 4 bits: formats, the module that holds them, and the products it can use."""

from gtqlora.experts.census import FrozenCensus, frozen_census
from gtqlora.experts.formats import FORMATS, Format, Parts, format_of
from gtqlora.experts.loading import load_model
from gtqlora.experts.module import FrozenExperts
from gtqlora.experts.quantizer import FrozenExpertsQuantizer
from gtqlora.experts.settings import FrozenExpertsConfig

__all__ = [
    "FORMATS",
    "Format",
    "FrozenCensus",
    "FrozenExperts",
    "FrozenExpertsConfig",
    "FrozenExpertsQuantizer",
    "Parts",
    "format_of",
    "frozen_census",
    "load_model",
]
