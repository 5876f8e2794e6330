"""Kernels: the ways to multiply by frozen experts, registered with transformers under `frozen_<name>`.

Each has the signature of transformers' own: (module, hidden_states_TD, top_k_index_TK, top_k_weights_TK) -> sums_TD.
"""

from __future__ import annotations

from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gtqlora.experts.kernels.reference import reference as _reference
from gtqlora.experts.kernels.rows import Experts

PREFIX = "frozen_"
NAMES = ("auto", "reference", "chunk", "fused")


# The GPU kernels need Triton, so they are imported when they are first used.


def _chunk(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    from gtqlora.experts.kernels.chunk import chunk

    return chunk(module, hidden_states, top_k_index, top_k_weights)


def _fused(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    from gtqlora.experts.kernels.fused import fused

    return fused(module, hidden_states, top_k_index, top_k_weights)


def _auto(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Use the reference kernel on a CPU; elsewhere the one that fits the GPU and the number of tokens."""
    if hidden_states.device.type == "cpu":
        return _reference(module, hidden_states, top_k_index, top_k_weights)
    from gtqlora.experts.kernels.choose import auto

    return auto(module, hidden_states, top_k_index, top_k_weights)


for _name, _kernel in zip(NAMES, (_auto, _reference, _chunk, _fused), strict=True):
    ALL_EXPERTS_FUNCTIONS.register(PREFIX + _name, _kernel)
