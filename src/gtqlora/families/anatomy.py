"""The parts of one model: bound from facts, with every count asserted against the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import nn

from gtqlora.errors import ModelError
from gtqlora.families.facts import DOWN, GATE_UP, Family
from gtqlora.routing import RouterSpec

_FP32_BYTES = 4


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

    @property
    def routers(self) -> tuple[str, ...]:
        return tuple(layer.router for layer in self.moe)

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(path for layer in self.moe for path in layer.shared)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """The linears that carry LoRA, and no other: attention projections and shared experts."""
        return self.attention + self.shared


@dataclass(frozen=True, kw_only=True)
class Group:
    """A line of `gtqlora inspect`: parameters of one kind and what GT-QLoRA does with them.

    Parameters count weights, however few bits each has; bytes are those in memory. TrainResult gates are fp32 masters,
    LoRA has its base module's dtype, or the model's where that module is quantized.
    """

    name: str
    modules: int
    parameters: int
    bytes: int
    trained: str
    trained_parameters: int
    trained_bytes: int


class FrozenRange(Protocol):
    """Routed experts `first` to `first + count` of a layer, held in buffers of a few bits instead of parameters."""

    n_experts: int
    first: int
    count: int
    hidden_size: int
    intermediate_size: int


def is_frozen(experts: nn.Module) -> TypeGuard[FrozenRange]:
    """Whether a layer's experts are frozen in buffers."""
    attributes = ("n_experts", "first", "count", "hidden_size", "intermediate_size")
    return not any(True for _ in experts.parameters()) and all(hasattr(experts, name) for name in attributes)


def check_projectable(anatomy: Anatomy) -> None:
    """Check that what blocks write is what is added to the residual stream, so that a direction can be taken out of it.

    Raises:
        ModelError: a norm stands between them; it would scale what is left until the direction is back in the stream.
    """
    for path in anatomy.post_norms:
        raise ModelError(
            f"{anatomy.family.model_type}: {path} normalizes what a block writes before it reaches the residual stream, "
            "so that a direction removed from the block stays in the stream; projection is not for this architecture"
        )


def language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside any PEFT wrapper, with the paths an `Anatomy` uses."""
    base = getattr(model, "base_model", None)
    return base.model if base is not None and hasattr(model, "peft_config") else model


def bind(model: nn.Module, family: Family) -> Anatomy:
    """Resolve the family's facts on a (possibly meta) language model.

    Raises:
        ModelError: the model's modules disagree with its config; nothing is skipped in silence.
    """
    config: Any = model.config
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
    """Absolute paths of those modules of a layer that it has."""
    modules = dict(layer.named_modules())
    return tuple(f"{prefix}.{name}" for name in names if isinstance(modules.get(name), kind))


def _everywhere(layers: dict[str, nn.Module], names: tuple[str, ...], kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(path for prefix, layer in layers.items() for path in _named(layer, prefix, names, kind))


def _blocks(layers: dict[str, nn.Module], family: Family) -> tuple[str, ...]:
    """Raises:
    ModelError: a layer has other blocks than one of attention and one MLP.
    """
    for path, layer in layers.items():
        if len(found := _named(layer, path, family.blocks, nn.Module)) != 2:
            raise ModelError(f"{path}: its blocks are {list(found)}, expected one of attention and one MLP")
    return _everywhere(layers, family.blocks, nn.Module)


def _moe_layer(index: int, layer: nn.Module, family: Family, spec: RouterSpec, config: Any) -> MoeLayer:
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
    index: int, router: nn.Module, experts: nn.Module | None, family: Family, spec: RouterSpec, config: Any
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


def _expert_shapes(
    experts: nn.Module, n_experts: int, hidden: int, inner: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sizes of a layer's experts, found and wanted."""
    if is_frozen(experts):
        found = {"experts": experts.n_experts, "hidden": experts.hidden_size, "inner": experts.intermediate_size}
        return found, {"experts": n_experts, "hidden": hidden, "inner": inner}
    found = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    return found, {GATE_UP: (n_experts, 2 * inner, hidden), DOWN: (n_experts, hidden, inner)}


_ROUTED, GATES, _ATTENTION, _SHARED = "routed experts", "routers (gates)", "attention", "shared experts"
_SHARED_GATES, _DENSE, _EMBEDDINGS, _NORMS = "shared-expert gates", "dense MLPs", "embeddings, head", "norms"


def _kinds(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """The kind of each module that owns parameters, by path; the nearest of a parameter's owners counts."""
    family, moe = anatomy.family, {layer.index for layer in anatomy.moe}
    every = range(anatomy.n_layers)
    return {
        **{path: _NORMS for path, module in model.named_modules() if is_norm(module)},
        **{f"{family.layer(i)}.{family.mlp_block}": _DENSE for i in every if i not in moe},
        **dict.fromkeys((family.embedding, family.head), _EMBEDDINGS),
        **{f"{family.layer(i)}.{path}": kind for i in every for path, kind in family.frozen_kinds.items()},
        **{f"{family.layer(i)}.{gate}": _SHARED_GATES for i in moe for gate in family.gates},
        **dict.fromkeys(anatomy.shared, _SHARED),
        **dict.fromkeys(anatomy.attention, _ATTENTION),
        **dict.fromkeys(anatomy.routers, GATES),
        **{layer.experts: _ROUTED for layer in anatomy.moe},
    }


def _order_of_kinds(family: Family) -> tuple[str, ...]:
    """Trained kinds and experts first."""
    others = (*family.frozen_kinds.values(), *((_SHARED_GATES,) if family.gates else ()))
    return (_ROUTED, GATES, _ATTENTION, _SHARED, *others, _DENSE, _EMBEDDINGS, _NORMS)


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _owned(model: nn.Module, anatomy: Anatomy) -> dict[str, dict[str, list[nn.Parameter]]]:
    """Parameters by kind and owning module. Each parameter is visited once, so none can count twice."""
    kinds = _kinds(model, anatomy)
    owned: dict[str, dict[str, list[nn.Parameter]]] = {kind: {} for kind in _order_of_kinds(anatomy.family)}
    for name, parameter in model.named_parameters():
        owner = next((path for path in _ancestors(name) if path in kinds), None)
        if owner is None:
            raise ModelError(f"census does not cover the model: parameter {name} is of no known kind")
        owned[kinds[owner]].setdefault(owner, []).append(parameter)
    return owned


def _stored(parameter: nn.Parameter) -> tuple[int, int]:
    """Weights in a parameter and the bytes that hold them; bitsandbytes packs a matrix and keeps its statistics."""
    state: Any = getattr(parameter, "quant_state", None)
    held = parameter.numel() * parameter.element_size()
    if state is None:
        return parameter.numel(), held
    statistics = [value for value in state.as_dict(packed=True).values() if isinstance(value, torch.Tensor)]
    return state.shape.numel(), held + sum(value.nbytes for value in statistics)


def _frozen_sizes(experts: FrozenRange) -> tuple[int, int]:
    """Weights and bytes of frozen experts."""
    weights = 3 * experts.count * experts.hidden_size * experts.intermediate_size
    return weights, sum(buffer.nbytes for buffer in cast(nn.Module, experts).buffers())


def _lora_sizes(model: nn.Module, paths: Iterable[str], rank: int) -> tuple[int, int]:
    """Weights and bytes of LoRA on these linears."""
    count = size = 0
    for path in paths:
        linear = cast(nn.Linear, model.get_submodule(path))
        weights = rank * (linear.in_features + linear.out_features)
        dtype = linear.weight.dtype if linear.weight.is_floating_point() else cast(torch.dtype, model.dtype)
        count, size = count + weights, size + weights * dtype.itemsize
    return count, size


def _group(
    model: nn.Module,
    kind: str,
    owned: dict[str, list[nn.Parameter]],
    frozen: list[FrozenRange],
    lora_rank: int,
    router_parameters: tuple[str, ...],
) -> Group:
    sizes = [_stored(parameter) for group in owned.values() for parameter in group]
    sizes += [_frozen_sizes(experts) for experts in frozen]
    count = sum(weights for weights, _ in sizes)
    trained, n_trained, trained_bytes = "frozen", 0, 0
    if kind == GATES:
        parameters = [model.get_submodule(path).get_parameter(name) for path in owned for name in router_parameters]
        n_trained = sum(parameter.numel() for parameter in parameters)
        trained, trained_bytes = "full, fp32", n_trained * _FP32_BYTES
    elif kind in (_ATTENTION, _SHARED):
        trained = f"LoRA rank {lora_rank}"
        n_trained, trained_bytes = _lora_sizes(model, owned, lora_rank)
    return Group(
        name=kind,
        modules=len(owned) + len(frozen),
        parameters=count,
        bytes=sum(held for _, held in sizes),
        trained=trained,
        trained_parameters=n_trained,
        trained_bytes=trained_bytes,
    )


def parameter_counts(model: nn.Module, anatomy: Anatomy, lora_rank: int) -> tuple[Group, ...]:
    """Counts and bytes by kind, covering every parameter of the language model, and frozen experts, exactly once.

    Raises:
        ModelError: a parameter is of no known kind, or the counts do not add up to the model's.
    """
    owned = _owned(model, anatomy)
    routed = [model.get_submodule(layer.experts) for layer in anatomy.moe]
    frozen: dict[str, list[FrozenRange]] = {_ROUTED: [experts for experts in routed if is_frozen(experts)]}
    groups = tuple(
        _group(model, kind, owned[kind], frozen.get(kind, []), lora_rank, anatomy.family.router_parameters)
        for kind in owned
        if owned[kind] or frozen.get(kind)
    )
    counted = sum(g.parameters for g in groups)
    total = sum(_stored(p)[0] for p in model.parameters()) + sum(_frozen_sizes(e)[0] for e in frozen[_ROUTED])
    if counted != total:
        raise ModelError(f"census does not cover the model: {counted} of {total} parameters")
    return groups


def correction_bias_values(model: nn.Module, anatomy: Anatomy) -> int:
    """How many router correction-bias values (buffers, not parameters) the model has."""
    name = anatomy.family.correction_bias
    if name is None:
        return 0
    return sum(getattr(model.get_submodule(path), name).numel() for path in anatomy.routers)
