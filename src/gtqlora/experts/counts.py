"""Counts the frozen experts of a model against its config, and the bytes they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gtqlora.errors import ModelError
from gtqlora.experts.module import FrozenExperts
from gtqlora.families.facts import Family
from gtqlora.families.layers import moe_layers_of


@dataclass(frozen=True, kw_only=True)
class QuantizedExpertCounts:
    """What a model with frozen experts holds; bytes are those in memory.

    Attributes:
        layers: MoE layers.
        experts, held: routed experts a layer has, and those of them that are here.
        expert_parameters: weights of the experts here, none of them trainable.
        other_bytes: everything else, buffers included.
    """

    format: str
    layers: int
    experts: int
    held: int
    expert_parameters: int
    expert_bytes: int
    other_bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight of the experts, scales included."""
        return self.expert_bytes * 8 / self.expert_parameters

    def __str__(self) -> str:
        return (
            f"{self.layers} MoE layers with {self.held} of {self.experts} routed experts in {self.format}: "
            f"{self.expert_parameters:,} weights in {self.expert_bytes / 2**20:,.1f} MiB ({self.bits:.3f} bits each), "
            f"none trainable; everything else {self.other_bytes / 2**20:,.1f} MiB"
        )


def quantized_expert_counts(model: nn.Module, family: Family) -> QuantizedExpertCounts:
    """Count, and check that every routed expert is frozen in 4 bits.

    Raises:
        ModelError: a MoE layer's experts are not frozen, of another size than the config says, of another range or
            format than other layers', partly unquantized, or not in memory.
    """
    config: Any = model.config
    layers = {i: model.get_submodule(family.experts_of(i)) for i in moe_layers_of(model, family)}
    if not layers:
        raise ModelError(f"{family.model_type}: this config has no MoE layer, so there are no experts to freeze")
    wanted = (family.n_experts(config), config.hidden_size, family.inner_size(config))
    modules = [_checked(layer, module, wanted) for layer, module in layers.items()]
    one = modules[0]
    for layer, module in zip(layers, modules, strict=True):
        if (module.format, module.first, module.count) != (one.format, one.first, one.count):
            raise ModelError(f"layer {layer}: experts {module}, but the first MoE layer has {one}")
    expert_bytes = sum(buffer.nbytes for module in modules for buffer in module.buffers())
    every = [*model.parameters(), *model.buffers()]
    return QuantizedExpertCounts(
        format=one.format.name,
        layers=len(modules),
        experts=one.n_experts,
        held=one.count,
        expert_parameters=3 * len(modules) * one.count * one.hidden_size * one.intermediate_size,
        expert_bytes=expert_bytes,
        other_bytes=sum(tensor.nbytes for tensor in every) - expert_bytes,
    )


def _checked(layer: int, module: nn.Module, wanted: tuple[int, int, int]) -> FrozenExperts:
    if not isinstance(module, FrozenExperts):
        raise ModelError(f"layer {layer}: the routed experts are {type(module).__name__}, not frozen in 4 bits")
    found = (module.n_experts, module.hidden_size, module.intermediate_size)
    if found != wanted:
        raise ModelError(f"layer {layer}: experts, hidden and inner size are {found}, expected {wanted}")
    extra = [name for name, _ in module.named_parameters()]
    if extra:
        raise ModelError(f"layer {layer}: routed experts have parameters {extra}; frozen ones have none")
    held = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in module.named_buffers()}
    expected = module.layout()
    if held != expected:
        raise ModelError(f"layer {layer}: experts hold {held}, expected {expected}")
    if any(buffer.is_meta for buffer in module.buffers()):
        raise ModelError(f"layer {layer}: the experts are not in memory")
    return module
