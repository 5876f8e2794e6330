"""What an edit does to each tensor of the checkpoint: said in one place, for what is judged and what is written.

Shape letters: D hidden (what a matrix writes), I inputs, R ranks; N rows and K columns of a part of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gtqlora.edits.adapters import Adapter
from gtqlora.edits.wrapping import Parts
from gtqlora.errors import RunError
from gtqlora.families import Anatomy, TensorNames, check_projectable
from gtqlora.families.facts import DOWN
from gtqlora.families.patching import Change, changed
from gtqlora.results.adapter import PROJECTION


class Edit(Change, Protocol):
    """What happens to one tensor of a checkpoint; it may be done block by block, see `families.patching`."""


@dataclass(frozen=True)
class LowRank:
    """Adds b_DR a_RI to a matrix; LoRA's scale is in `b_DR` already."""

    a_RI: Tensor
    b_DR: Tensor
    by_columns = False

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that the matrix has the product's shape."""
        _check_shape(shape, (self.b_DR.shape[0], self.a_RI.shape[1]))

    def __call__(self, weight_NK: Tensor, part: slice = slice(None)) -> Tensor:
        """Return these rows with the product added."""
        return weight_NK + self.b_DR[part].float() @ self.a_RI.float()


@dataclass(frozen=True)
class Whole:
    """Puts another tensor in the place of the one that is there."""

    value: Tensor
    by_columns = False

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that both have the same shape."""
        _check_shape(shape, tuple(self.value.shape))

    def __call__(self, weight_NK: Tensor, part: slice = slice(None)) -> Tensor:
        """Return these rows of the other tensor."""
        return self.value.reshape(-1, self.value.shape[-1])[part].float()


@dataclass(frozen=True)
class Projected:
    """Takes a direction out of what a matrix [D, I], or each of a stack [E, D, I], writes.

    Attributes:
        direction_D: of unit length.
        rows: the rows of the matrix are what it writes, as an embedding's are.
    """

    direction_D: Tensor
    norm_preserving: bool
    rows: bool = False

    @property
    def by_columns(self) -> bool:
        """Return that a column, what one input writes, stays whole."""
        return not self.rows

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that what the matrix writes is as long as the direction."""
        written = shape[-1 if self.rows else -2]
        if written != len(self.direction_D):
            raise RunError(
                f"the adapter does not fit the model (a direction of {len(self.direction_D)} values, {written} written)"
            )

    def __call__(self, weight_NK: Tensor, part: slice = slice(None)) -> Tensor:
        """Return this part of the matrix, or of each of a stack, without the direction."""
        if weight_NK.ndim == 3:  # all experts of a layer in one tensor
            return torch.stack([self(matrix, part) for matrix in weight_NK])
        if self.rows:
            return projected(weight_NK.mT, self.direction_D, norm_preserving=self.norm_preserving).mT
        return projected(weight_NK, self.direction_D, norm_preserving=self.norm_preserving)


def _check_shape(wanted: tuple[int, ...], found: tuple[int, ...]) -> None:
    if wanted != found:
        raise RunError(f"the adapter does not fit the model (a tensor of {wanted} there, {found} in the adapter)")


def merged(tensor: Tensor, edit: Edit) -> Tensor:
    """Return a checkpoint's tensor with its edit, rounded to the dtype it has there: what ships.

    Raises:
        RunError: the edit is for another shape.
    """
    return changed(tensor, edit)


def projected(weight_DI: Tensor, direction_D: Tensor, *, norm_preserving: bool = False) -> Tensor:
    """Return (I - r r^T) W for outputs D and inputs I, r of unit length; in fp32.

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


def plan(adapter: Adapter, anatomy: Anatomy, names: TensorNames) -> dict[str, Edit]:
    """Return what the merge does to each tensor, by its name on disk; every adapter tensor is used exactly once.

    Raises:
        RunError: the adapter lacks tensors, or holds some that belong nowhere in this architecture.
    """
    if adapter.info.kind == PROJECTION:
        return _plan_projection(adapter, anatomy, names)
    tensors = adapter.tensors
    odd = sorted(tensors.keys() ^ _wanted(adapter, anatomy))
    if odd:
        raise RunError(f"{adapter.path}: the adapter does not fit the model ({len(odd)} tensors differ, e.g. {odd[0]})")
    edits: dict[str, Edit] = {}
    for path in anatomy.lora_targets:
        if f"{path}.lora_A" in tensors:
            scaled_DR = adapter.scale * tensors[f"{path}.lora_B"].float()
            a_RI = tensors[f"{path}.lora_A"].float().clone()  # not where it lies in a file: that, too, steers rounding
            edits[names.whole(f"{path}.weight")] = LowRank(a_RI, scaled_DR)
    for path in anatomy.routers:
        if f"{path}.weight" in tensors:
            edits[names.whole(f"{path}.weight")] = Whole(tensors[f"{path}.weight"])
    return edits


def _wanted(adapter: Adapter, anatomy: Anatomy) -> set[str]:
    """Return names of an adapter's tensors: all LoRA pairs, all routers, or both, of what it was trained for."""
    parts = Parts.of(anatomy, adapter.info.mode, adapter.info.target)
    lora = {f"{path}.{part}" for path in parts.lora for part in ("lora_A", "lora_B")}
    return lora | {f"{path}.weight" for path in parts.gates}


def _plan_projection(adapter: Adapter, anatomy: Anatomy, names: TensorNames) -> dict[str, Edit]:
    """W <- (I - r r^T) W for every writer of the residual stream, its columns' lengths kept if told to."""
    check_projectable(anatomy)
    r_D, keep = adapter.direction_D / adapter.direction_D.norm(), adapter.info.norm_preserving
    experts = range(anatomy.spec.n_experts)
    writers = [names.whole(f"{path}.weight") for path in anatomy.residual_writers]
    writers += [name for layer in anatomy.moe for name in names.makers(f"{layer.experts}.{DOWN}", experts)]

    edits: dict[str, Edit] = dict.fromkeys(writers, Projected(r_D, keep))
    edits[names.whole(f"{anatomy.family.embedding}.weight")] = Projected(r_D, keep, rows=True)
    return edits
