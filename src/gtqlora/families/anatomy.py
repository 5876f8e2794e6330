"""The parts of one model: bound from its family's facts, with every count asserted against the config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast

from torch import nn

from gtqlora.errors import ModelError
from gtqlora.families.facts import DOWN, GATE_UP, Family
from gtqlora.routing import RouterSpec

if TYPE_CHECKING:
    from gtqlora.families.facts import TextConfig

Sizes = dict[str, int | tuple[int, ...]]
"""Sizes of a layer's routed experts: shapes by parameter or, of frozen ones, numbers by name."""


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """One decoder layer with a router; paths are absolute in the language model."""

    index: int
    router: str
    experts: str
    shared: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What GT-QLoRA needs to know of a model, resolved to module paths in the language model.

    Attributes:
        attention: linears of attention that carry LoRA.
        residual_writers: linears, dense or of shared experts, whose output is added to the residual stream.
        layers: decoder layers.
        blocks: modules whose outputs are added to the residual stream, in order.
        post_norms: norms between a block and the residual stream; none in the families known so far.
    """

    family: Family
    spec: RouterSpec
    n_layers: int
    hidden_size: int
    moe: tuple[MoeLayer, ...]
    attention: tuple[str, ...]
    residual_writers: tuple[str, ...]
    layers: tuple[str, ...]
    blocks: tuple[str, ...]
    post_norms: tuple[str, ...]

    def part(self, index: int) -> Anatomy:
        """Return what of this lies in one decoder layer."""
        here = f"{self.family.layer(index)}."
        paths = ("attention", "residual_writers", "blocks", "post_norms")
        kept = {name: tuple(path for path in getattr(self, name) if path.startswith(here)) for name in paths}
        moe = tuple(layer for layer in self.moe if layer.index == index)
        return replace(self, moe=moe, layers=(self.layers[index],), **kept)

    @property
    def routers(self) -> tuple[str, ...]:
        """Return the routers' paths, in the order of `moe`."""
        return tuple(layer.router for layer in self.moe)

    @property
    def shared(self) -> tuple[str, ...]:
        """Return the projections of all shared experts."""
        return tuple(path for layer in self.moe for path in layer.shared)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Return the linears that carry LoRA, and no other: attention projections and shared experts."""
        return self.attention + self.shared


class FrozenRange(Protocol):
    """Routed experts `first` to `first + count` of a layer, held in buffers of a few bits instead of parameters."""

    n_experts: int
    first: int
    count: int
    hidden_size: int
    intermediate_size: int


def is_frozen(experts: nn.Module) -> TypeGuard[FrozenRange]:
    """Return whether a layer's experts are frozen in buffers."""
    # By what they have and not by their class, which stands in a room above this one (`experts`).
    attributes = ("n_experts", "first", "count", "hidden_size", "intermediate_size")
    return not any(True for _ in experts.parameters()) and all(hasattr(experts, name) for name in attributes)


def check_projectable(anatomy: Anatomy) -> None:
    """Check that what blocks write is what is added to the residual stream, so that a direction can be taken out of it.

    Raises:
        ModelError: a norm stands between them; it would scale what is left until the direction is back in the stream.
    """
    for path in anatomy.post_norms:
        raise ModelError(
            f"{anatomy.family.model_type}: {path} normalizes what a block writes before the residual stream, so that a "
            "direction removed from the block stays in the stream; projection is not for this architecture"
        )


def language_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside any PEFT wrapper, with the paths an `Anatomy` uses."""
    # A transformers model has a `base_model`, too (the part without its head), so only `peft_config` marks a wrapper.
    base = getattr(model, "base_model", None)
    return base.model if base is not None and hasattr(model, "peft_config") else model


def bind(model: nn.Module, family: Family) -> Anatomy:
    """Resolve the family's facts on a (possibly meta) language model.

    Raises:
        ModelError: the model's modules disagree with its config; nothing is skipped in silence.
    """
    config = cast("TextConfig", model.config)
    spec, expected = family.router_spec(config), family.moe_layers(config)
    if not expected:
        raise ModelError(f"{family.model_type}: this config has no MoE layer, so there are no routers to train")
    layers = {family.layer(i): layer for i, layer in enumerate(model.get_submodule(family.layers).children())}
    moe = tuple(
        _moe_layer(index, layer, family, spec, config)
        for index, layer in enumerate(layers.values())
        if family.router in dict(layer.named_modules())
    )
    found = tuple(layer.index for layer in moe)
    if found != expected:
        raise ModelError(f"routers found in layers {list(found)}, but the config says {list(expected)}")
    return Anatomy(
        family=family,
        spec=spec,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        moe=moe,
        attention=_everywhere(layers, family.attention, nn.Linear),
        residual_writers=_everywhere(layers, family.residual_writers, nn.Linear),
        layers=tuple(layers),
        blocks=_blocks(layers, family),
        post_norms=tuple(
            f"{path}.{name}"
            for path, layer in layers.items()
            for name, child in layer.named_children()
            if is_norm(child) and name not in family.block_norms
        ),
    )


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalization; every family has a class of its own for it."""
    return "Norm" in type(module).__name__


def _named(layer: nn.Module, prefix: str, names: tuple[str, ...], kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the absolute paths of those of the modules that a layer has."""
    modules = dict(layer.named_modules())
    return tuple(f"{prefix}.{name}" for name in names if isinstance(modules.get(name), kind))


def _everywhere(layers: dict[str, nn.Module], names: tuple[str, ...], kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(path for prefix, layer in layers.items() for path in _named(layer, prefix, names, kind))


def _blocks(layers: dict[str, nn.Module], family: Family) -> tuple[str, ...]:
    """Return the paths of all layers' blocks.

    Raises:
        ModelError: a layer has other blocks than one of attention and one MLP.
    """
    for path, layer in layers.items():
        if len(found := _named(layer, path, family.blocks, nn.Module)) != 2:
            raise ModelError(f"{path}: its blocks are {list(found)}, expected one of attention and one MLP")
    return _everywhere(layers, family.blocks, nn.Module)


def _moe_layer(index: int, layer: nn.Module, family: Family, spec: RouterSpec, config: TextConfig) -> MoeLayer:
    modules = dict(layer.named_modules())
    _check_layer(index, modules[family.router], modules.get(family.experts), family, spec, config)
    shared = _named(layer, family.layer(index), family.shared, nn.Linear)
    if len(shared) != len(family.shared):
        raise ModelError(f"layer {index}: {len(shared)} shared-expert projections, expected {len(family.shared)}")
    for gate in family.gates:
        if not isinstance(modules.get(gate), nn.Linear):
            raise ModelError(f"layer {index}: no {gate} beside the router")
    return MoeLayer(index=index, router=family.router_of(index), experts=family.experts_of(index), shared=shared)


def _check_layer(
    index: int, router: nn.Module, experts: nn.Module | None, family: Family, spec: RouterSpec, config: TextConfig
) -> None:
    shape = tuple(router.get_parameter("weight").shape)
    if shape != (spec.n_experts, config.hidden_size):
        raise ModelError(f"layer {index}: router weight {shape}, expected {(spec.n_experts, config.hidden_size)}")
    if experts is None:
        raise ModelError(f"layer {index}: no {family.experts} beside the router")
    found, wanted = _expert_shapes(experts, spec.n_experts, config.hidden_size, family.inner_size(config))
    if found != wanted:
        raise ModelError(f"layer {index}: experts {found}, expected {wanted}")
    if family.correction_bias and not hasattr(router, family.correction_bias):
        raise ModelError(f"layer {index}: router lacks {family.correction_bias}")


def _expert_shapes(experts: nn.Module, n_experts: int, hidden: int, inner: int) -> tuple[Sizes, Sizes]:
    """Return the sizes of a layer's experts, found and wanted."""
    if is_frozen(experts):
        held: Sizes = {"experts": experts.n_experts, "hidden": experts.hidden_size, "inner": experts.intermediate_size}
        return held, {"experts": n_experts, "hidden": hidden, "inner": inner}
    # All parameters that there are: an expert bias, which no family here has, must not pass unseen.
    found: Sizes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    return found, {GATE_UP: (n_experts, 2 * inner, hidden), DOWN: (n_experts, hidden, inner)}
