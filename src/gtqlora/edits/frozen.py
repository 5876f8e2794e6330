"""Proof that frozen experts stay what they were: what is written to them shows, without a second copy of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gtqlora.errors import TrainingError
from gtqlora.experts.layout import bits_of
from gtqlora.experts.module import FrozenExperts
from gtqlora.families import language_model

_SUMMED_AT_ONCE = 2**26
"""Elements that are added up at once: CUDA makes a 64-bit copy of them, here of 512 MiB."""

FrozenState = dict[str, tuple[int, int]]
"""Per buffer: how often it was written to in place, and the sum of its bits as whole numbers."""


def sum_of_bits(tensor: Tensor, device: torch.device | None = None) -> int:
    """Add up the bits of all elements, read as whole numbers: any change of one element changes the sum.

    Args:
        device: where they are added up, a piece at a time; by default where they are.
    """
    pieces = bits_of(tensor).flatten().split(_SUMMED_AT_ONCE)
    return int(torch.stack([piece.to(device or tensor.device).sum(dtype=torch.int64) for piece in pieces]).sum())


def frozen_state(model: nn.Module) -> FrozenState:
    """Return the state of all frozen experts in one pass over their memory, by name in the model inside any wrapper."""
    state: FrozenState = {}
    for path, module in language_model(model).named_modules():
        if isinstance(module, FrozenExperts):
            module.arrange(tiled=False)  # kernels may have put the weights into another order
            for name, buffer in module.named_buffers():
                state[f"{path}.{name}"] = (buffer._version, sum_of_bits(buffer, module.device))
    return state


def assert_experts_frozen(model: nn.Module, before: FrozenState) -> None:
    """Check that the experts' 4-bit weights are what `frozen_state` saw.

    Raises:
        TrainingError: names the first buffer that was written to.
    """
    now = frozen_state(model)
    if now != before:
        written = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        raise TrainingError(f"{len(written)} buffers of frozen experts were written to, first: {written[0]}")
