"""The head of the model in training: it says how likely completions are, and nobody asks it about prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.trainer import utils


@contextmanager
def completions_only() -> Iterator[None]:
    """Let TRL's fused head compute on a CPU, too, only the positions that labels are given for.

    It computes all of them where there is no Triton, as some devices compile a kernel for every number of positions. A
    CPU does not, and prompts are most of a batch.
    """
    module: Any = utils
    by_triton = module._use_triton

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or by_triton(device)

    module._use_triton = compact
    try:
        yield
    finally:
        module._use_triton = by_triton
