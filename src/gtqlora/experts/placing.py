"""Which layers of frozen experts wait on the host: none where all of them fit the GPU, else as few as have to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from gtqlora.errors import ConfigError
from gtqlora.experts.module import FrozenExperts
from gtqlora.experts.settings import FrozenExpertsConfig
from gtqlora.experts.streaming import bytes_of
from gtqlora.planning.cards import GIB, in_binary
from gtqlora.planning.memory import is_split, no_room, on_host, room_for_experts, spaced
from gtqlora.progress import note
from gtqlora.ranks import ranks


def device_of(device_map: object, config: FrozenExpertsConfig) -> torch.device:
    """Return where a model is loaded to, by what `from_pretrained` makes of its argument `device_map`.

    Raises:
        ConfigError: to several devices, and experts are to wait on the host.
    """
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        return torch.device(next(iter(device_map.values())))
    if config.memory is not None:
        raise ConfigError(f"memory = {config.memory}: experts stream to one device; give device_map = 'cuda:0'")
    return torch.device("cpu")


def chosen(
    model: nn.Module, experts: Sequence[FrozenExperts], config: FrozenExpertsConfig, device: torch.device
) -> list[FrozenExperts]:
    """Return those that wait, evenly spaced, of experts that have no memory yet, and say how many they are.

    Raises:
        ConfigError: there is no room for two layers on their way.
    """
    layer = max(map(bytes_of, experts), default=0)
    if config.memory is not None:
        waiting = on_host(len(experts), layer, config.memory * GIB)
        if waiting is None:
            raise no_room(config.memory, layer, len(experts))
    else:
        waiting = on_host(len(experts), layer, _free_for(model, experts, device)) or 0
    if waiting:
        graphs = "; passes run without CUDA graphs" if device.type == "cuda" else ""
        size = in_binary(waiting * layer)
        note(f"experts of {waiting} of {len(experts)} MoE layers wait on the host ({size}) for {device}{graphs}")
    places = spaced(len(experts), waiting) if waiting else set()
    return [module for index, module in enumerate(experts) if index in places]


def _free_for(model: nn.Module, experts: Sequence[FrozenExperts], device: torch.device) -> float:
    """Return the bytes that experts may take where no setting says it."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    others = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - sum(map(bytes_of, experts))
    others //= ranks().here if is_split(others, ranks().here, free) else 1
    return room_for_experts(free, others)
