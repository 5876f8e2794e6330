"""LoRA computed in the model's half precision from fp32 masters.

PEFT copies what a linear is given to fp32 and multiplies there, which on a GPU costs more than the frozen model does.
Here the masters are rounded instead, as under autocast; products are summed in fp32 by the hardware, and gradients
reach the masters in fp32. A model in fp32 computes as PEFT does, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


def in_half_precision(model: nn.Module) -> None:
    """Let every LoRA linear of a wrapped model compute in the dtype of what it is given, if that is a half one."""
    for module in model.modules():
        if isinstance(module, Linear):
            # a partial, and not a method: PEFT's class and its other instances stay as they are
            module.forward = partial(_forward, module)


def _forward(layer: Linear, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
    """Return W x + s B A x."""
    if x.dtype not in _HALF or layer.disable_adapters or layer.merged:
        return Linear.forward(layer, x, *arguments, **more)
    rows_TI = x.flatten(0, -2)
    out_TO = layer.base_layer(rows_TI)
    down_RI, up_OR = (part["default"].get_parameter("weight").to(x.dtype) for part in (layer.lora_A, layer.lora_B))
    # in place: nothing needs the frozen product by itself
    out_TO.addmm_(nn.functional.linear(rows_TI, down_RI), up_OR.T, alpha=layer.scaling["default"])
    return out_TO.unflatten(0, x.shape[:-1])
