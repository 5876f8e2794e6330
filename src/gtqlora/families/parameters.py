"""Parameters of a model by kind: how many there are, in how many bytes, and what GT-QLoRA does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from gtqlora.errors import ModelError
from gtqlora.families.anatomy import Anatomy, FrozenRange, is_frozen, is_norm
from gtqlora.families.facts import Family
from gtqlora.families.kinds import ATTENTION, DENSE, EMBEDDINGS, GATES, NORMS, ROUTED, SHARED, SHARED_GATES

# Gates train as fp32 masters whatever the model's dtype.
_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Group:
    """A line of `gtqlora inspect`: parameters of one kind and what GT-QLoRA does with them.

    Parameters count weights, however few bits each has; bytes are those in memory. Trained gates are fp32 masters,
    LoRA has its base module's dtype, or the model's where that module is quantized.
    """

    name: str
    modules: int
    parameters: int
    bytes: int
    trained: str
    trained_parameters: int
    trained_bytes: int


@dataclass(frozen=True)
class _Size:
    """Weights, and the bytes that hold them."""

    parameters: int = 0
    bytes: int = 0

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.parameters + other.parameters, self.bytes + other.bytes)


def parameter_counts(model: nn.Module, anatomy: Anatomy, lora_rank: int) -> tuple[Group, ...]:
    """Return counts and bytes by kind, covering every parameter, and frozen experts, exactly once.

    Raises:
        ModelError: a parameter is of no known kind, or the counts do not add up to the model's.
    """
    owned = _owned(model, anatomy)
    routed = [model.get_submodule(layer.experts) for layer in anatomy.moe]
    frozen = [experts for experts in routed if is_frozen(experts)]
    groups = tuple(
        _group(model, anatomy, kind, modules, frozen if kind == ROUTED else [], lora_rank)
        for kind, modules in owned.items()
        if modules or (kind == ROUTED and frozen)
    )
    counted = sum(group.parameters for group in groups)
    total = sum(_stored(p).parameters for p in model.parameters()) + sum(_frozen_size(e).parameters for e in frozen)
    # A count of a kind may be wrong in silence; their sum may not.
    if counted != total:
        raise ModelError(f"the counts do not cover the model: {counted} of {total} parameters")
    return groups


def correction_bias_values(model: nn.Module, anatomy: Anatomy) -> int:
    """Return how many router correction-bias values (buffers, not parameters) the model has."""
    name = anatomy.family.correction_bias
    if name is None:
        return 0
    return sum(getattr(model.get_submodule(path), name).numel() for path in anatomy.routers)


def _kinds(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Return the kind of each module that owns parameters, by path; the nearest of a parameter's owners counts."""
    family, moe = anatomy.family, {layer.index for layer in anatomy.moe}
    every = range(anatomy.n_layers)
    # A later entry takes the place of an earlier one with the same path, so the most special kinds come last.
    return {
        **{path: NORMS for path, module in model.named_modules() if is_norm(module)},
        **{f"{family.layer(i)}.{family.mlp_block}": DENSE for i in every if i not in moe},
        **dict.fromkeys((family.embedding, family.head), EMBEDDINGS),
        **{f"{family.layer(i)}.{path}": kind for i in every for path, kind in family.frozen_kinds.items()},
        **{f"{family.layer(i)}.{gate}": SHARED_GATES for i in moe for gate in family.gates},
        **dict.fromkeys(anatomy.shared, SHARED),
        **dict.fromkeys(anatomy.attention, ATTENTION),
        **dict.fromkeys(anatomy.routers, GATES),
        **{layer.experts: ROUTED for layer in anatomy.moe},
    }


def _in_order(family: Family) -> tuple[str, ...]:
    """Return every kind, experts and what trains first."""
    others = (*family.frozen_kinds.values(), *((SHARED_GATES,) if family.gates else ()))
    return (ROUTED, GATES, ATTENTION, SHARED, *others, DENSE, EMBEDDINGS, NORMS)


def _owned(model: nn.Module, anatomy: Anatomy) -> dict[str, dict[str, list[nn.Parameter]]]:
    """Return parameters by kind and owning module. Each parameter is visited once, so none can count twice."""
    kinds = _kinds(model, anatomy)
    owned: dict[str, dict[str, list[nn.Parameter]]] = {kind: {} for kind in _in_order(anatomy.family)}
    for name, parameter in model.named_parameters():
        owner = next((path for path in _ancestors(name) if path in kinds), None)
        if owner is None:
            raise ModelError(f"the counts do not cover the model: parameter {name} is of no known kind")
        owned[kinds[owner]].setdefault(owner, []).append(parameter)
    return owned


def _ancestors(name: str) -> Iterator[str]:
    # From the nearest module outwards, so that a norm inside of attention counts as a norm.
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _group(
    model: nn.Module,
    anatomy: Anatomy,
    kind: str,
    owned: dict[str, list[nn.Parameter]],
    frozen: list[FrozenRange],
    lora_rank: int,
) -> Group:
    size = sum((_stored(parameter) for group in owned.values() for parameter in group), _Size())
    size += sum((_frozen_size(experts) for experts in frozen), _Size())
    how, trained = _trained(model, anatomy.family, kind, owned, lora_rank)
    return Group(
        name=kind,
        modules=len(owned) + len(frozen),
        parameters=size.parameters,
        bytes=size.bytes,
        trained=how,
        trained_parameters=trained.parameters,
        trained_bytes=trained.bytes,
    )


def _trained(model: nn.Module, family: Family, kind: str, paths: Iterable[str], lora_rank: int) -> tuple[str, _Size]:
    """Return what is done with a kind, and the size of what trains."""
    if kind == GATES:
        routers = [model.get_submodule(path) for path in paths]
        count = sum(router.get_parameter(name).numel() for router in routers for name in family.router_parameters)
        return "full, fp32", _Size(count, count * _FP32_BYTES)
    if kind in (ATTENTION, SHARED):
        return f"LoRA rank {lora_rank}", sum((_lora_size(model, path, lora_rank) for path in paths), _Size())
    return "frozen", _Size()


def _lora_size(model: nn.Module, path: str, rank: int) -> _Size:
    linear = cast(nn.Linear, model.get_submodule(path))
    # Two matrices: inputs to rank, and rank to outputs.
    weights = rank * (linear.in_features + linear.out_features)
    dtype = linear.weight.dtype if linear.weight.is_floating_point() else cast(torch.dtype, model.dtype)
    return _Size(weights, weights * dtype.itemsize)


def _stored(parameter: nn.Parameter) -> _Size:
    """Return the size of a parameter; bitsandbytes packs a matrix and keeps its statistics beside it."""
    state: Any = getattr(parameter, "quant_state", None)
    held = parameter.numel() * parameter.element_size()
    if state is None:
        return _Size(parameter.numel(), held)
    statistics = [value for value in state.as_dict(packed=True).values() if isinstance(value, torch.Tensor)]
    return _Size(state.shape.numel(), held + sum(value.nbytes for value in statistics))


def _frozen_size(experts: FrozenRange) -> _Size:
    # Gate, up and down, each of hidden times intermediate size.
    weights = 3 * experts.count * experts.hidden_size * experts.intermediate_size
    return _Size(weights, sum(buffer.nbytes for buffer in cast(nn.Module, experts).buffers()))
