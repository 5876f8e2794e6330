"""The only place that knows model families: frozen facts, bound to a model with counts asserted.

Names are imported on first use: facts and sizes of a family are read without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtqlora.families.anatomy import Anatomy, MoeLayer, bind, check_projectable, language_model
    from gtqlora.families.facts import FAMILIES, Family, family_of
    from gtqlora.families.identity import ModelIdentity, identify, pinned, read_files
    from gtqlora.families.kinds import GATES
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
    from gtqlora.families.parameters import Group, correction_bias_values, parameter_counts

_HOME = {
    "Anatomy": "anatomy",
    "FAMILIES": "facts",
    "Family": "facts",
    "GATES": "kinds",
    "Group": "parameters",
    "ModelIdentity": "identity",
    "MoeLayer": "anatomy",
    "TensorNames": "names",
    "bind": "anatomy",
    "check_projectable": "anatomy",
    "correction_bias_values": "parameters",
    "family_of": "facts",
    "identify": "identity",
    "language_model": "anatomy",
    "load_config": "loading",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "meta_model": "loading",
    "names_on_disk": "loading",
    "parameter_counts": "parameters",
    "pinned": "identity",
    "quantization": "loading",
    "quantization_settings": "loading",
    "read_files": "identity",
    "tensor_names": "loading",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gtqlora.families' has no attribute {name!r}")
    return getattr(import_module(f"gtqlora.families.{_HOME[name]}"), name)
