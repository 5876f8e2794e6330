"""What the language model's tensors are called on disk and in memory, through transformers' own conversion mapping.

On disk a checkpoint may have a prefix, other words for some modules, and its routed experts one by one or fused. In
memory there is one naming, transformers'. Which tensor on disk makes which in memory is computed from the names that
the checkpoint has, by the same mapping with which transformers loads it.
"""

from __future__ import annotations

import re
from collections import defaultdict
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

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Place:
    """What a tensor on disk is in memory.

    Attributes:
        name: the parameter or buffer in memory.
        expert: if that fuses a layer's experts, and the tensor is one expert's matrix: which expert.
        part: which of the matrices of an expert that the parameter holds below each other (gate 0, up 1).
    """

    name: str
    expert: int | None = None
    part: int = 0


class TensorNames:
    """The names of one model's tensors on disk and in memory.

    Args:
        model: the language model, on any device; its class has the mapping.
        disk: names of the checkpoint's tensors. Without them, names on disk are those that transformers would write.
        wrapped: whether the language model is part of a larger one on disk, where the names there do not say it.

    Attributes:
        places: of the names on disk, those that may belong to the language model, and what they are in memory; names of
            other towers and of multi-token-prediction layers are left out. A quantized expert's matrix has several, at one place.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, disk: Iterable[str] = (), *, wrapped: bool | None = None
    ) -> None:
        # not its state dict: making that would move the weights of frozen experts
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._prefix, self._memory = model.base_model_prefix, {name: True for name, _ in tensors}
        self._renamings, self._converters = _split(_transforms(model, family, legacy=True))
        self._parts = {
            pattern: (re.compile(re.escape(pattern).replace(r"\*", r"(\d+)") + "$"), part)
            for converter in self._converters
            for part, pattern in enumerate(converter.source_patterns)
            if "*" in pattern
        }
        ours, extra = (
            [name for name in disk if not name.startswith(family.other_towers)],
            family.extra_layers(model.config),
        )
        places = {name: self.place(name) for name in ours}
        self.places = {name: place for name, place in places.items() if not place.name.startswith(extra)}
        self._found: defaultdict[Place, list[str]] = defaultdict(list)
        self._singles: defaultdict[str, set[Place]] = defaultdict(set)
        for name, place in self.places.items():
            self._found[place].append(_matrix_name(name) if place.expert is not None else name)
            if place.expert is not None:
                self._singles[place.name].add(place)
        wrapped = family.text_key is not None if wrapped is None else wrapped
        own = _transforms(model, family, legacy=False)
        used = [transform for transform in own if _is_used(transform, ours, wrapped)]
        self._back_renamings, self._back_converters = _split([t.reverse_transform() for t in reversed(used)])

    def place(self, disk: str) -> Place:
        """Return what a tensor on disk is in memory; a name that no mapping knows is itself.

        The tensors that make a quantized matrix end in other words than `.weight`, which no mapping knows.
        """
        matrix = _matrix_name(disk)
        name, pattern = rename_source_key(matrix, self._renamings, self._converters, self._prefix, self._memory)
        if pattern in self._parts:
            (expression, part), renamed = self._parts[pattern], self._renamed(matrix)
            if found := expression.search(renamed):
                return Place(name, int(found[1]), part)
        return Place(self._renamed(disk))

    def module(self, disk: str) -> str:
        """Return what a module on disk is called in memory."""
        return self._renamed(f"{disk}{_WEIGHT}").removesuffix(_WEIGHT)

    def _renamed(self, disk: str) -> str:
        return rename_source_key(disk, self._renamings, [], self._prefix, self._memory)[0]

    def makers(self, fused: str, experts: Iterable[int], parts: int = 1) -> tuple[str, ...]:
        """Return the names on disk of what makes a parameter that fuses these experts: one tensor, or their matrices.

        A matrix that is not there has the name that it would have.
        """
        if self.is_whole(fused):
            return (self.whole(fused),)
        return tuple(self.matrix(fused, expert, part) for expert in experts for part in range(parts))

    def is_whole(self, memory: str) -> bool:
        """Return whether a tensor on disk is the whole parameter."""
        return Place(memory) in self._found

    def whole(self, memory: str) -> str:
        """Return the name on disk of a parameter, or the one that it would have."""
        return self._one(Place(memory))

    def matrix(self, memory: str, expert: int, part: int) -> str:
        """Return the name on disk of one expert's matrix, which ends in `.weight`, or the one that it would have."""
        return self._one(Place(memory, expert, part))

    def _one(self, place: Place) -> str:
        return self._found[place][0] if place in self._found else self._written(place)

    def _written(self, place: Place) -> str:
        """The name that transformers would write."""
        name = place.name
        if place.expert is not None:
            name, pattern = rename_source_key(name, [], self._back_converters, reverse=True)
            assert pattern is not None, f"no conversion takes {name} apart"
            sources = next(c.target_patterns for c in self._back_converters if pattern in c.source_patterns)
            name = name.replace(sources[0], sources[place.part]).replace("*", str(place.expert))
        return rename_source_key(name, self._back_renamings, [], reverse=True)[0]

    def twice(self) -> list[tuple[str, str]]:
        """Return pairs of names on disk that make the same parameter, or the same part of one."""
        every = {place: list(dict.fromkeys(names)) for place, names in self._found.items()}
        return [(max(names, key=len), min(names, key=len)) for names in every.values() if len(names) > 1]

    def both_forms(self) -> list[tuple[str, str]]:
        """Return pairs of names on disk where one holds all experts of a layer, and the other one of them."""
        both = [name for name in self._singles if self.is_whole(name)]
        return [(self.whole(name), self._one(min(self._singles[name], key=_order))) for name in both]


def _order(place: Place) -> tuple[int, int]:
    return place.expert or 0, place.part


def _matrix_name(disk: str) -> str:
    """The name of a matrix of which a tensor is a part: `w1.weight` of `w1.weight_packed` and of `w1.packed`."""
    return disk.rpartition(".")[0] + _WEIGHT


def _transforms(model: PreTrainedModel, family: Family, *, legacy: bool) -> list[WeightTransform]:
    """The mapping of the language model's class, after what the family's wrapper adds."""
    outer = [PrefixChange(prefix_to_remove=family.wrapper_prefix)] if family.wrapper_prefix else []
    return [*outer, *get_model_conversion_mapping(model, add_legacy=legacy)]


def _split(transforms: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    every = list(transforms)
    renamings = [transform for transform in every if isinstance(transform, WeightRenaming)]
    return renamings, [transform for transform in every if isinstance(transform, WeightConverter)]


def _is_used(transform: WeightTransform, disk: list[str], wrapped: bool) -> bool:
    """Whether names on disk that are not there would be such as this transform takes.

    Converters are always: what lacks may be one expert of many. A renaming is where names that are there need it.
    """
    if isinstance(transform, WeightConverter):
        return True
    if disk:
        return any(transform.rename_source_key(name)[1] is not None for name in disk)
    return wrapped or not isinstance(transform, PrefixChange)
