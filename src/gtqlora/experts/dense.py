"""Dense linears in four bits through bitsandbytes, with the same bits and values on every processor.

Only imported where they are used: bitsandbytes is an extra.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn


class AnyRows(Linear4bit):
    """A 4-bit linear whose rows are not whole blocks.

    On CPUs with AVX-512 bitsandbytes 0.50 gives the weights of such rows the scales of other blocks.

    As one long row the weights come out right.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Multiply as `Linear4bit` does, on a CPU by weights that were dequantized as one long row."""
        if x.device.type != "cpu":
            return super().forward(x)
        weight: Any = self.weight
        state = copy.copy(weight.quant_state)
        state.shape = torch.Size((1, self.out_features * self.in_features))
        weight = dequantize_4bit(weight.data, state).view(self.out_features, self.in_features)
        compute = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(compute)
        return nn.functional.linear(x.to(compute), weight.to(compute), bias).to(x.dtype)


def same_everywhere(model: nn.Module) -> None:
    """Keep 4-bit linears as they were loaded.

    On CPUs with AVX-512 BF16 bitsandbytes 0.50 repacks them at the first pass without gradients: only where their
    outputs divide by 32, with scales rounded to bf16, and what is saved afterwards is not what was loaded.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            weight: Any = module.weight
            if module.in_features % weight.blocksize:
                # The parameters stay what they are; only `forward` changes.
                module.__class__ = AnyRows
