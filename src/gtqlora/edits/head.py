"""The head of the model in training: it says how likely completions are, and nobody asks it about prompts.

Shape letters: N positions with a label, V words, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import utils

from gtqlora.experts.vocabulary import Tiled, words_of
from gtqlora.ranks import most


@contextmanager
def completions_only() -> Iterator[None]:
    """Let TRL's fused head compute on a CPU, too, only the positions that labels are given for; and of split words.

    It computes all of them where there is no Triton, as some devices compile a kernel for every number of positions. A
    CPU does not, and prompts are most of a batch.
    """
    module: Any = utils
    by_triton, log_probs = module._use_triton, module._ChunkedLogProbFunction

    def compact(device: torch.device) -> bool:
        return device.type == "cpu" or by_triton(device)

    module._use_triton, module._ChunkedLogProbFunction = compact, _LogProbs(log_probs)
    try:
        yield
    finally:
        module._use_triton, module._ChunkedLogProbFunction = by_triton, log_probs


class _LogProbs:
    """TRL's function over a head that is whole, or whose words are split among ranks and come a tile at a time."""

    def __init__(self, plain: type[torch.autograd.Function]) -> None:
        self._plain: Any = plain

    def apply(
        self, hidden_ND: Tensor, weight: Tensor, bias: Tensor | None, targets_N: Tensor, *settings: object
    ) -> tuple[Tensor | None, ...]:
        """Return log-probabilities_N, and what else the settings ask for."""
        words = words_of(weight)
        if words is None:
            return self._plain.apply(hidden_ND, weight, bias, targets_N, *settings)
        count = len(hidden_ND)
        more = most(count) - count  # ranks ask for tiles together, and once for so many positions
        hidden_ND, targets_N = nn.functional.pad(hidden_ND, (0, 0, 0, more)), nn.functional.pad(targets_N, (0, more))
        found = self._plain.apply(hidden_ND, Tiled.of(words), bias, targets_N, *settings)
        return tuple(None if one is None else one[:count] for one in found)
