"""What an edit does to each tensor of the checkpoint: said in one place, for what is judged and what is written.

Shape letters: D hidden (what a matrix writes), I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gtqlora.edits.adapters import Adapter
from gtqlora.errors import RunError
from gtqlora.families import Anatomy
from gtqlora.results.adapter import PROJECTION

Edit = Callable[[Tensor], Tensor]
"""A tensor of the checkpoint in fp32 -> the edited one."""


def on_disk(anatomy: Anatomy, paths: Iterable[str]) -> list[str]:
    """Names in the checkpoint of modules' weights."""
    return [f"{anatomy.family.disk_prefix}{path}.weight" for path in paths]


def merged(tensor: Tensor, edit: Edit) -> Tensor:
    """A checkpoint's tensor with its edit, rounded to the dtype it has there: what ships."""
    return edit(tensor.float()).to(tensor.dtype)


def projected(weight_DI: Tensor, direction_D: Tensor, *, norm_preserving: bool = False) -> Tensor:
    """(I - r r^T) W for outputs D and inputs I, r of unit length; in fp32.

    Args:
        norm_preserving: give every column, what one input writes, its length back. It stays orthogonal to r.
    """
    weight_DI, r_D = weight_DI.float(), direction_D.float()
    kept_DI = weight_DI - torch.outer(r_D, r_D @ weight_DI)
    if not norm_preserving:
        return kept_DI
    norm_I, left_I = weight_DI.norm(dim=0), kept_DI.norm(dim=0)
    # what is left of a column along r is rounding, which must not be blown up
    return kept_DI * torch.where(left_I > 1e-5 * norm_I, norm_I / left_I, 0.0)


def plan(adapter: Adapter, anatomy: Anatomy) -> dict[str, Edit]:
    """What the merge does to each tensor, by its name on disk; every adapter tensor is used exactly once.

    Raises:
        RunError: the adapter lacks tensors, or holds some that belong nowhere in this architecture.
    """
    if adapter.info.kind == PROJECTION:
        return _plan_projection(adapter, anatomy)
    tensors = adapter.tensors
    odd = sorted(tensors.keys() ^ _wanted(adapter, anatomy))
    if odd:
        raise RunError(f"{adapter.path}: the adapter does not fit the model ({len(odd)} tensors differ, e.g. {odd[0]})")
    edits: dict[str, Edit] = {}
    for path, name in zip(anatomy.lora_targets, on_disk(anatomy, anatomy.lora_targets), strict=True):
        if f"{path}.lora_A" in tensors:
            edits[name] = _add(tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"], adapter.scale)
    for path, name in zip(anatomy.routers, on_disk(anatomy, anatomy.routers), strict=True):
        if f"{path}.weight" in tensors:
            edits[name] = _put(tensors[f"{path}.weight"])
    return edits


def _wanted(adapter: Adapter, anatomy: Anatomy) -> set[str]:
    """Names of an adapter's tensors: all LoRA pairs, all routers, or both."""
    lora = [f"{path}.{part}" for path in anatomy.lora_targets for part in ("lora_A", "lora_B")]
    gates = [f"{path}.weight" for path in anatomy.routers]
    return set({"gt": lora + gates, "lora": lora, "gates": gates}[adapter.mode])


def _add(a: Tensor, b: Tensor, scale: float) -> Edit:
    def edit(weight: Tensor) -> Tensor:
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise _shape_error(tuple(weight.shape), (b.shape[0], a.shape[1]))
        return weight + scale * (b.float() @ a.float())

    return edit


def _put(value: Tensor) -> Edit:
    def edit(weight: Tensor) -> Tensor:
        if value.shape != weight.shape:
            raise _shape_error(tuple(weight.shape), tuple(value.shape))
        return value.float()

    return edit


def _shape_error(wanted: tuple[int, ...], found: tuple[int, ...]) -> RunError:
    return RunError(f"the adapter does not fit the model (a tensor of {wanted} there, {found} in the adapter)")


def _plan_projection(adapter: Adapter, anatomy: Anatomy) -> dict[str, Edit]:
    """W <- (I - r r^T) W for every writer of the residual stream, its columns' lengths kept if told to."""
    direction_D, keep, family = adapter.direction_D, adapter.info.norm_preserving, anatomy.family
    r_D = direction_D / direction_D.norm()
    experts = ((layer.index, expert) for layer in anatomy.moe for expert in range(anatomy.spec.n_experts))
    writers = on_disk(anatomy, anatomy.residual_writers) + [family.on_disk(*where)[-1] for where in experts]
    edits: dict[str, Edit] = dict.fromkeys(writers, lambda w: projected(w, r_D, norm_preserving=keep))
    for name in on_disk(anatomy, ["model.embed_tokens"]):
        edits[name] = lambda w: projected(w.mT, r_D, norm_preserving=keep).mT
    return edits
