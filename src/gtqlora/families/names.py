"""What the language model's tensors are called on disk and in memory, through transformers' own conversion mapping.

On disk a checkpoint may have a prefix, other words for some modules, and its routed experts one by one or fused. In
memory there is one naming, transformers'. Which tensor on disk makes which in memory is computed from the names that
the checkpoint has, by the same mapping with which transformers loads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

from gtqlora.families.facts import Family
from gtqlora.families.layers import absent

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Place:
    """What a tensor on disk is in memory.

    Attributes:
        name: the parameter or buffer in memory.
        expert: the expert's number, if the tensor is one expert's matrix and the parameter fuses those of a layer.
        part: which matrix of that expert, where the parameter holds several below each other (gate 0, up 1).
    """

    name: str
    expert: int | None = None
    part: int = 0


class TensorNames:
    """The names of one model's tensors on disk and in memory.

    Args:
        model: the language model, on any device; its class has the mapping.
        disk: names of the checkpoint's tensors. Without them, names on disk are those that transformers would write.
        wrapped: whether the language model is part of a larger one on disk, where no name there says it; by default as
            the family has it.

    Attributes:
        places: what each tensor on disk is in memory, but for those of other towers, of multi-token-prediction layers
            and of modules that the model was made without. A quantized matrix has several tensors, all at one place.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, disk: Iterable[str] = (), *, wrapped: bool | None = None
    ) -> None:
        ours = [name for name in disk if not name.startswith(family.other_towers)]
        to_memory, extra = _ToMemory(model, family), (*family.extra_layers(model.config), *absent(model))
        places = {name: to_memory.place(name) for name in ours}
        self.places = {name: place for name, place in places.items() if not place.name.startswith(extra)}
        self._found: dict[Place, list[str]] = {}
        for name, place in self.places.items():
            self._found.setdefault(place, []).append(name if place.expert is None else _matrix_name(name))
        self._to_memory = to_memory
        self._to_disk = _ToDisk(model, family, ours, family.text_key is not None if wrapped is None else wrapped)

    def whole(self, memory: str) -> str:
        """Return the name on disk of a parameter, or the one that it would have."""
        return self._name(Place(memory))

    def matrix(self, fused: str, expert: int, part: int) -> str:
        """Return the name on disk of one expert's matrix, which ends in `.weight`, or the one that it would have."""
        return self._name(Place(fused, expert, part))

    def makers(self, fused: str, experts: Iterable[int], parts: int = 1) -> tuple[str, ...]:
        """Return the names on disk of what makes a parameter that fuses these experts: one tensor, or their matrices.

        A matrix that is not there has the name that it would have.
        """
        if self.is_whole(fused):
            return (self.whole(fused),)
        return tuple(self.matrix(fused, expert, part) for expert in experts for part in range(parts))

    def is_whole(self, memory: str) -> bool:
        """Return whether one tensor on disk is the whole parameter."""
        return Place(memory) in self._found

    def module(self, disk: str) -> str:
        """Return what a module on disk is called in memory."""
        return self._to_memory.renamed(f"{disk}{_WEIGHT}").removesuffix(_WEIGHT)

    def twice(self) -> list[tuple[str, str]]:
        """Return pairs of names on disk that make the same parameter, or the same part of one."""
        # The parts of a quantized matrix share one name here, so that they do not count as two tensors of one place.
        every = (sorted(set(names), key=len) for names in self._found.values())
        return [(names[-1], names[0]) for names in every if len(names) > 1]

    def both_forms(self) -> list[tuple[str, str]]:
        """Return pairs of names on disk where one holds all experts of a layer, and the other one of them."""
        singles = {place.name: names[0] for place, names in self._found.items() if place.expert is not None}
        return [(self.whole(fused), single) for fused, single in singles.items() if self.is_whole(fused)]

    def _name(self, place: Place) -> str:
        return self._found[place][0] if place in self._found else self._to_disk.name(place)


class _ToMemory:
    """transformers' mapping as it loads a checkpoint."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        # Not its state dict: making that would move the weights of frozen experts
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._prefix, self._names = model.base_model_prefix, {name: True for name, _ in tensors}
        self._renamings, self._converters = _split(_transforms(model, family, legacy=True))
        # A converter's pattern has a * where the expert's number stands. Nine digits at most, so that a stranger's name
        # cannot make a number that takes long to read.
        self._parts = {
            pattern: (re.compile(re.escape(pattern).replace(r"\*", "([0-9]{1,9})") + "$"), part)
            for converter in self._converters
            for part, pattern in enumerate(converter.source_patterns)
            if "*" in pattern
        }
        self._matrices: dict[str, Place | None] = {}

    def place(self, disk: str) -> Place:
        """Return what a tensor on disk is in memory; a name that no mapping knows is itself.

        The tensors that make a quantized matrix end in other words than `.weight`, which no mapping knows.
        """
        # The parts of a quantized matrix share one look-up; a checkpoint has up to a million names.
        matrix = _matrix_name(disk)
        if matrix not in self._matrices:
            self._matrices[matrix] = self._expert(self.renamed(matrix))
        return self._matrices[matrix] or Place(self.renamed(disk))

    def renamed(self, disk: str) -> str:
        """Return a name in memory that no conversion makes."""
        return rename_source_key(disk, self._renamings, [], self._prefix, self._names)[0]

    def _expert(self, renamed: str) -> Place | None:
        """Return the place of an expert's matrix, if it is one."""
        name, pattern = rename_source_key(renamed, [], self._converters, self._prefix, self._names)
        if pattern not in self._parts:
            return None
        expression, part = self._parts[pattern]
        found = expression.search(renamed)
        return Place(name, int(found[1]), part) if found else None


class _ToDisk:
    """transformers' mapping as it would write a checkpoint like the one that is there."""

    def __init__(self, model: PreTrainedModel, family: Family, disk: list[str], wrapped: bool) -> None:
        own = _transforms(model, family, legacy=False)
        # Loading applies the transforms one after the other, so writing undoes them from the last to the first.
        used = [transform for transform in own if _is_used(transform, disk, wrapped)]
        self._renamings, self._converters = _split([transform.reverse_transform() for transform in reversed(used)])

    def name(self, place: Place) -> str:
        """Return what would be at a place in memory."""
        name = place.name
        if place.expert is not None:
            name, pattern = rename_source_key(name, [], self._converters, reverse=True)
            assert pattern is not None, f"no conversion takes {name} apart"
            # In reverse the matrices stand among the targets: the first is the one that the renaming put into the name.
            sources = next(c.target_patterns for c in self._converters if pattern in c.source_patterns)
            name = name.replace(sources[0], sources[place.part]).replace("*", str(place.expert))
        return rename_source_key(name, self._renamings, [], reverse=True)[0]


def _matrix_name(disk: str) -> str:
    """Return the name of a matrix of which a tensor is a part: `w1.weight` of `w1.weight_packed` and of `w1.packed`."""
    return disk.rpartition(".")[0] + _WEIGHT


def _transforms(model: PreTrainedModel, family: Family, *, legacy: bool) -> list[WeightTransform]:
    """Return the mapping of the language model's class, after what the family's wrapper adds."""
    outer = [PrefixChange(prefix_to_remove=family.wrapper_prefix)] if family.wrapper_prefix else []
    return [*outer, *get_model_conversion_mapping(model, add_legacy=legacy)]


def _split(transforms: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in transforms if isinstance(transform, WeightConverter)]


def _is_used(transform: WeightTransform, disk: list[str], wrapped: bool) -> bool:
    """Return whether a name that is not on disk would be one that this transform takes.

    A renaming: if names that are there need it, or if none are there, but for a prefix that only a wrapper gives.
    A conversion: always, as what is not there may be one expert of many.
    """
    if isinstance(transform, WeightConverter):
        return True
    if disk:
        return any(transform.rename_source_key(name)[1] is not None for name in disk)
    return wrapped or not isinstance(transform, PrefixChange)
