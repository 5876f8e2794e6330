"""The parts of one model: bound from facts, with every count asserted against the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard, cast

import torch
from torch import nn

from gtqlora.errors import ModelError
from gtqlora.families.facts import Family
from gtqlora.routing import RouterSpec

_LAYERS = "model.layers"
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
    """What GT-QLoRA needs to know of a model, resolved to module paths."""

    family: Family
    spec: RouterSpec
    n_layers: int
    hidden_size: int
    moe: tuple[MoeLayer, ...]
    attention: tuple[str, ...]
    residual_writers: tuple[str, ...]

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


def language_model(model: nn.Module) -> nn.Module:
    """The transformers model inside any PEFT wrapper, with the paths an `Anatomy` uses."""
    base = getattr(model, "base_model", None)
    return base.model if base is not None and hasattr(model, "peft_config") else model


def _spec(family: Family, config: Any) -> RouterSpec:
    grouped = family.correction_bias is not None
    spec = RouterSpec(
        score=family.score,
        top_k=getattr(config, family.topk_key),
        n_experts=getattr(config, family.experts_key),
        normalize=bool(config.norm_topk_prob),
        scale=float(getattr(config, "routed_scaling_factor", 1.0)),
        n_group=int(config.n_group or 1) if grouped else 1,
        topk_group=int(config.topk_group or 1) if grouped else 1,
    )
    _check_spec(family, spec)
    return spec


def _check_spec(family: Family, spec: RouterSpec) -> None:
    eligible = spec.n_experts // spec.n_group * spec.topk_group
    if spec.n_experts % spec.n_group or not 1 <= spec.topk_group <= spec.n_group:
        raise ModelError(f"{family.model_type}: {spec.n_experts} experts do not split into {spec.n_group} groups")
    if not 1 <= spec.top_k <= eligible:
        raise ModelError(f"{family.model_type}: {family.topk_key} is {spec.top_k}, but {eligible} experts are eligible")


def _linears(layer: nn.Module, prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    modules = dict(layer.named_modules())
    return tuple(f"{prefix}.{name}" for name in names if isinstance(modules.get(name), nn.Linear))


def bind(model: nn.Module, family: Family) -> Anatomy:
    """Resolve the family's facts on a (possibly meta) language model.

    Raises:
        ModelError: the model's modules disagree with its config; nothing is skipped in ablate.
    """
    config: Any = model.config
    spec, expected = _spec(family, config), family.moe_layers(config)
    if not expected:
        raise ModelError(f"{family.model_type}: this config has no MoE layer, so there are no routers to train")
    layers = {f"{_LAYERS}.{i}": layer for i, layer in enumerate(model.get_submodule(_LAYERS).children())}
    moe = tuple(
        _moe_layer(index, layer, family, spec, config)
        for index, layer in enumerate(layers.values())
        if family.router in dict(layer.named_modules())
    )
    found = tuple(layer.index for layer in moe)
    if found != expected:
        raise ModelError(f"routers found in layers {list(found)}, but the config says {list(expected)}")

    def everywhere(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path for prefix, layer in layers.items() for path in _linears(layer, prefix, names))

    return Anatomy(
        family=family,
        spec=spec,
        n_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        moe=moe,
        attention=everywhere(family.attention),
        residual_writers=everywhere(family.residual_writers),
    )


def _moe_layer(index: int, layer: nn.Module, family: Family, spec: RouterSpec, config: Any) -> MoeLayer:
    prefix = f"{_LAYERS}.{index}"
    modules = dict(layer.named_modules())
    _check_layer(index, modules[family.router], modules.get(family.experts), family, spec, config)
    shared = _linears(layer, prefix, family.shared)
    if len(shared) != len(family.shared):
        raise ModelError(f"layer {index}: {len(shared)} shared-expert projections, expected {len(family.shared)}")
    return MoeLayer(
        index=index, router=f"{prefix}.{family.router}", experts=f"{prefix}.{family.experts}", shared=shared
    )


def _check_layer(
    index: int, router: nn.Module, experts: nn.Module | None, family: Family, spec: RouterSpec, config: Any
) -> None:
    shape = tuple(router.get_parameter("weight").shape)
    if shape != (spec.n_experts, config.hidden_size):
        raise ModelError(f"layer {index}: router weight {shape}, expected {(spec.n_experts, config.hidden_size)}")
    if experts is None:
        raise ModelError(f"layer {index}: no {family.experts} beside the router")
    found, wanted = _expert_shapes(experts, spec.n_experts, config.hidden_size, config.moe_intermediate_size)
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
    return found, {"gate_up_proj": (n_experts, 2 * inner, hidden), "down_proj": (n_experts, hidden, inner)}


_ROUTED, _GATES, _ATTENTION, _SHARED = "routed experts", "routers (gates)", "attention", "shared experts"
_DENSE, _EMBEDDINGS, _NORMS = "dense MLPs", "embeddings, head", "norms"
_KINDS = (_ROUTED, _GATES, _ATTENTION, _SHARED, _DENSE, _EMBEDDINGS, _NORMS)


def _kinds(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """The kind of each module that owns parameters, by path."""
    moe = {layer.index for layer in anatomy.moe}
    return {
        **{path: _NORMS for path, module in model.named_modules() if type(module).__name__.endswith("Norm")},
        **{f"{_LAYERS}.{i}.mlp": _DENSE for i in range(anatomy.n_layers) if i not in moe},
        **dict.fromkeys(("model.embed_tokens", "lm_head"), _EMBEDDINGS),
        **dict.fromkeys(anatomy.shared, _SHARED),
        **dict.fromkeys(anatomy.attention, _ATTENTION),
        **dict.fromkeys(anatomy.routers, _GATES),
        **{layer.experts: _ROUTED for layer in anatomy.moe},
    }


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _owned(model: nn.Module, anatomy: Anatomy) -> dict[str, dict[str, list[nn.Parameter]]]:
    """Parameters by kind and owning module. Each parameter is visited once, so none can count twice."""
    kinds = _kinds(model, anatomy)
    owned: dict[str, dict[str, list[nn.Parameter]]] = {kind: {} for kind in _KINDS}
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
    model: nn.Module, kind: str, owned: dict[str, list[nn.Parameter]], frozen: list[FrozenRange], lora_rank: int
) -> Group:
    sizes = [_stored(parameter) for group in owned.values() for parameter in group]
    sizes += [_frozen_sizes(experts) for experts in frozen]
    count = sum(weights for weights, _ in sizes)
    trained, n_trained, trained_bytes = "frozen", 0, 0
    if kind == _GATES:
        trained, n_trained, trained_bytes = "full, fp32", count, count * _FP32_BYTES
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
        _group(model, kind, owned[kind], frozen.get(kind, []), lora_rank)
        for kind in _KINDS
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
