"""The only place that knows model families: frozen facts, bound to a model with counts asserted."""

from gtqlora.families.anatomy import (
    Anatomy,
    Group,
    MoeLayer,
    bind,
    correction_bias_values,
    language_model,
    parameter_counts,
)
from gtqlora.families.facts import FAMILIES, Family, family_of
from gtqlora.families.identity import ModelIdentity, identify, pinned, read_files
from gtqlora.families.loading import (
    load_config,
    load_model,
    load_tokenizer,
    meta_model,
    quantization,
    quantization_settings,
)

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Family",
    "Group",
    "ModelIdentity",
    "MoeLayer",
    "bind",
    "correction_bias_values",
    "family_of",
    "identify",
    "language_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "parameter_counts",
    "pinned",
    "quantization",
    "quantization_settings",
    "read_files",
]
