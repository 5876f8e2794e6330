"""Frozen dense weights split among ranks, and gathered a layer at a time when it runs: FSDP2, over what does not train.

Experts are split by `experts.exchange`, so they are none of these weights; routers are small and stay whole.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from gtqlora.families import Anatomy
from gtqlora.planning.memory import is_split
from gtqlora.ranks import ranks


def is_worth_it(model: nn.Module, anatomy: Anatomy) -> bool:
    """Tell whether there are ranks, and so much dense weights that each should not hold all."""
    if ranks().here == 1 or not torch.cuda.is_available():
        return False
    size = sum(weight.nbytes for weight in _dense(model, anatomy))
    return is_split(size, ranks().here, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a rank holds a part of the model's dense weights."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def shard(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Leave each rank of this machine its part of every dense weight.

    What trains is added afterwards, and is whole on every rank.
    """
    me = ranks()
    # by its name PEFT knows that a linear computes all of its outputs
    mesh = DeviceMesh.from_group(me.machine, next(model.parameters()).device.type, mesh_dim_names=("fsdp",))
    dense = set(_dense(model, anatomy))
    others = {weight for weight in model.parameters() if weight not in dense}
    layers = [model.get_submodule(anatomy.family.layer(index)) for index in range(anatomy.n_layers)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings(), model.base_model]
    for module in (*layers, *ends):
        assert isinstance(module, nn.Module)
        fully_shard(module, mesh=mesh, ignored_params=others)


def _dense(model: nn.Module, anatomy: Anatomy) -> list[nn.Parameter]:
    """Return the weights that are split."""
    routers = {id(weight) for path in anatomy.routers for weight in model.get_submodule(path).parameters()}
    return [weight for weight in model.parameters() if id(weight) not in routers and weight.dim() > 1]
