"""The kernel that `auto` takes on a GPU, by what `bench/experts.py` measured on an H200; logged once per case."""

from __future__ import annotations

import logging
from functools import cache

from torch import Tensor

from gtqlora.experts.kernels import hopper
from gtqlora.experts.kernels.chunk import chunk
from gtqlora.experts.kernels.fused import fused
from gtqlora.experts.kernels.rows import Experts, compute_dtype

_FEW_ROWS = 128
"""Rows per expert up to which dequantizing int4 inside the Triton kernel is faster than dequantizing first.

For NF4 dequantizing first is faster at nearly any number of rows.
"""

_log = logging.getLogger(__name__)


def auto(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sums_TD of the experts' outputs, by the kernel that `chosen` names."""
    name = chosen(module, hidden_states, top_k_index.shape[-1])
    _say(name, module.format.name, module.hidden_size, module.intermediate_size, str(hidden_states.device))
    return {"fused": fused, "chunk": chunk}[name](module, hidden_states, top_k_index, top_k_weights)


def chosen(module: Experts, hidden_states: Tensor, top_k: int) -> str:
    """Return "fused" wherever the Hopper kernel works, and for few rows elsewhere; "chunk" for many."""
    if hopper.takes(module, hidden_states, compute_dtype(hidden_states)):
        return "fused"
    few = len(hidden_states) * top_k <= _FEW_ROWS * module.n_experts
    return "fused" if few and module.format.name != "nf4" else "chunk"


@cache
def _say(name: str, format: str, hidden_size: int, intermediate_size: int, device: str) -> None:
    _log.info("%s experts %d x %d on %s: kernel %s", format, hidden_size, intermediate_size, device, name)
