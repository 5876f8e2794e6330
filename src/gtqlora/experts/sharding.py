"""Frozen dense weights split among ranks, and gathered a layer at a time when it runs: FSDP2, over what does not train.

Experts are split by `experts.exchange`, so they are none of these weights; routers are small and stay whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from gtqlora.families import Family
from gtqlora.families.layers import moe_layers_of
from gtqlora.planning.memory import is_split
from gtqlora.ranks import ranks


def is_worth_it(model: nn.Module, family: Family) -> bool:
    """Tell whether there are ranks, and so much of dense weights that none should hold all."""
    if ranks().here == 1 or not torch.cuda.is_available():
        return False
    size = sum(weight.nbytes for weight in _dense(model, family))
    return is_split(size, ranks().here, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a rank holds a part of the model's dense weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard(model: Any, family: Family) -> None:
    """Leave each rank of this machine its part of every dense weight.

    What trains is added afterwards, and is whole on every rank.
    """
    me = ranks()
    # by its name PEFT knows that a linear computes all of its outputs
    mesh = DeviceMesh.from_group(me.machine, next(model.parameters()).device.type, mesh_dim_names=("fsdp",))
    dense = set(_dense(model, family))
    others = {weight for weight in model.parameters() if weight not in dense}
    layers = model.get_submodule(family.layers).children()
    for module in (*layers, model.get_input_embeddings(), model.get_output_embeddings(), model.base_model):
        fully_shard(module, mesh=mesh, ignored_params=others, reshard_after_forward=True)


def part_of(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Return what a rank holds of values that a parameter could have: all of them, unless it is split."""
    if not isinstance(parameter, DTensor):
        return values
    parts = values.chunk(parameter.device_mesh.size())  # along the first dimension, as FSDP2 splits
    place = parameter.device_mesh.get_local_rank()
    return parts[place].clone() if place < len(parts) else values[:0]


@torch.no_grad()
def exchanged(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Give a parameter other values, of which a rank has its part, and return those that it had."""
    if not isinstance(parameter, DTensor):
        before, parameter.data = parameter.data, values
        return before
    held = parameter.to_local()  # FSDP2 gathers from this very memory
    before = held.clone()
    held.copy_(values)
    return before


def _dense(model: Any, family: Family) -> list[nn.Parameter]:
    """Return the weights that are split."""
    paths = map(family.router_of, moe_layers_of(model, family))
    routers = {id(weight) for path in paths for weight in model.get_submodule(path).parameters()}
    return [weight for weight in model.parameters() if id(weight) not in routers and weight.dim() > 1]
