"""The only place that knows model families: frozen facts, bound to a model with counts asserted."""

from gtqlora.families.anatomy import Anatomy, MoeLayer, bind, check_projectable, language_model
from gtqlora.families.facts import FAMILIES, Family, family_of
from gtqlora.families.identity import ModelIdentity, identify, pinned, read_files
from gtqlora.families.loading import (
    load_config,
    load_model,
    load_tokenizer,
    meta_model,
    names_on_disk,
    quantization,
    quantization_settings,
    tensor_names,
)
from gtqlora.families.names import TensorNames
from gtqlora.families.parameters import GATES, Group, correction_bias_values, parameter_counts

__all__ = [
    "FAMILIES",
    "GATES",
    "Anatomy",
    "Family",
    "Group",
    "ModelIdentity",
    "MoeLayer",
    "TensorNames",
    "bind",
    "check_projectable",
    "correction_bias_values",
    "family_of",
    "identify",
    "language_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "names_on_disk",
    "parameter_counts",
    "pinned",
    "quantization",
    "quantization_settings",
    "read_files",
    "tensor_names",
]
