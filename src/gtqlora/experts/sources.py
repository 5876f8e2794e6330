"""How routed experts lie in a checkpoint: which tensors make a matrix, and how one is put into `FrozenExperts`.

On disk a quantized expert is three matrices with a few tensors each, so that it can be read and written one at a time:

| saved as | names of a matrix, after `...mlp.experts.E.gate_proj` (`up_proj`, `down_proj`) |
|---|---|
| unquantized | `.weight`; or fused, `...mlp.experts.gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] |
| by gtqlora, nf4 | `.packed`, `.absmax`, `.absmax_scale`, `.absmax_offset` |
| by gtqlora, int4-g32 and int4-g128 | `.packed`, `.scale` |
| compressed-tensors INT4 | `.weight_packed`, `.weight_scale`, `.weight_shape` |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gtqlora.errors import ModelError
from gtqlora.experts.formats import Format, Parts
from gtqlora.experts.module import PLACE, FrozenExperts, Projection
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.families.facts import DOWN, GATE_UP, Family
from gtqlora.families.layers import moe_layers_of
from gtqlora.families.names import TensorNames
from gtqlora.progress import track

PACKED_PARTS = {"packed": "weight_packed", "scale": "weight_scale"}
"""compressed-tensors' names for the parts of int4."""
PACKED_SHAPE = "weight_shape"

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {**_FLOATS, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}
# Tensors that say that a matrix is quantized: none may be left over, or it would load as something else.
_QUANTIZED_ENDINGS = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_scale_inv")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One projection of one routed expert.

    Attributes:
        stem: what its tensors' names on disk start with, where each matrix has its own.
        fused: name on disk of the tensor that holds it, where a layer's experts are in one.
        rows, columns: outputs N and inputs K.
    """

    layer: int
    expert: int
    projection: Projection
    stem: str
    fused: str
    rows: int
    columns: int


Wanted = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]
"""Shape and possible dtypes of tensors, by name."""


def matrices(family: Family, model: PreTrainedModel, names: TensorNames) -> Iterator[Matrix]:
    """Yield every matrix of every routed expert that the config says there is, in the layers that the model has."""
    config: Any = model.config
    hidden, inner = config.hidden_size, family.inner_size(config)
    for layer in moe_layers_of(model, family):
        parameters = {"gate_up": f"{family.experts_of(layer)}.{GATE_UP}", "down": f"{family.experts_of(layer)}.{DOWN}"}
        wholes = {name: names.whole(parameter) for name, parameter in parameters.items()}
        for expert in range(family.n_experts(config)):
            for projection, (name, part) in PLACE.items():
                rows, columns = (hidden, inner) if projection == "down" else (inner, hidden)
                yield Matrix(
                    layer=layer,
                    expert=expert,
                    projection=projection,
                    stem=names.matrix(parameters[name], expert, part).removesuffix(".weight"),
                    fused=wholes[name],
                    rows=rows,
                    columns=columns,
                )


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A way in which experts lie in a checkpoint.

    Attributes:
        format: what they become, or are.
    """

    format: Format

    @abstractmethod
    def wanted(self, matrix: Matrix) -> Wanted:
        """Return the tensors that make a matrix."""

    @abstractmethod
    def fill(self, experts: FrozenExperts, matrix: Matrix, files: TensorFiles) -> None:
        """Put a matrix, whose tensors have the right shapes, where it belongs.

        Raises:
            ModelError: a value is not finite, or contradicts the config.
        """


# --- the ways, one class each: which tensors make a matrix, and how they are put into the module


def _quantize_into(experts: FrozenExperts, matrix: Matrix, name: str, weight_NK: Tensor) -> None:
    try:
        experts.quantize_into(matrix.expert, matrix.projection, weight_NK.to(experts.device))
    except ModelError as error:
        raise ModelError(f"tensor {name}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class PlainSource(Source):
    """A tensor for each matrix, not quantized."""

    def wanted(self, matrix: Matrix) -> Wanted:
        """Return the one tensor of the matrix."""
        return {f"{matrix.stem}.weight": ((matrix.rows, matrix.columns), tuple(_FLOATS.values()))}

    def fill(self, experts: FrozenExperts, matrix: Matrix, files: TensorFiles) -> None:
        """Quantize the tensor into its place."""
        name = f"{matrix.stem}.weight"
        _quantize_into(experts, matrix, name, files.read(name))


@dataclass(frozen=True, kw_only=True)
class FusedSource(Source):
    """One tensor for all gates and ups of a layer, gate's rows first, and one for all downs; not quantized."""

    n_experts: int

    def wanted(self, matrix: Matrix) -> Wanted:
        """Return the tensor that holds the matrix with all others of its layer."""
        rows = matrix.rows if matrix.projection == "down" else 2 * matrix.rows
        return {matrix.fused: ((self.n_experts, rows, matrix.columns), tuple(_FLOATS.values()))}

    def fill(self, experts: FrozenExperts, matrix: Matrix, files: TensorFiles) -> None:
        """Quantize the matrix's rows of the fused tensor into their place."""
        start = matrix.rows if matrix.projection == "up" else 0
        weight_NK = files.part(matrix.fused, matrix.expert, slice(start, start + matrix.rows))
        _quantize_into(experts, matrix, f"{matrix.fused}[{matrix.expert}]", weight_NK)


@dataclass(frozen=True, kw_only=True)
class PartsSource(Source):
    """The parts of a format under their own names, as gtqlora saves them."""

    def name(self, matrix: Matrix, part: str) -> str:
        """Return the name of one part of a matrix on disk."""
        return f"{matrix.stem}.{part}"

    def wanted(self, matrix: Matrix) -> Wanted:
        """Return the parts of the format, each of exactly its dtype."""
        layout = self.format.layout(matrix.rows, matrix.columns)
        return {self.name(matrix, part): (shape, (dtype,)) for part, (shape, dtype) in layout.items()}

    def fill(self, experts: FrozenExperts, matrix: Matrix, files: TensorFiles) -> None:
        """Copy the parts, bit for bit, into their place."""
        parts: Parts = {}
        for part in self.format.layout(matrix.rows, matrix.columns):
            parts[part] = files.read(self.name(matrix, part)).to(experts.device)
            if parts[part].is_floating_point() and not bool(parts[part].isfinite().all()):
                raise ModelError(f"tensor {self.name(matrix, part)} holds NaN or infinity; get the weights again")
        experts.put(matrix.expert, matrix.projection, parts)


@dataclass(frozen=True, kw_only=True)
class PackedSource(PartsSource):
    """compressed-tensors' `pack-quantized` INT4."""

    def name(self, matrix: Matrix, part: str) -> str:
        """Return compressed-tensors' name of one part of a matrix."""
        return f"{matrix.stem}.{PACKED_PARTS[part]}"

    def wanted(self, matrix: Matrix) -> Wanted:
        """Return the packed parts and the tensor that tells the matrix's shape."""
        return {**super().wanted(matrix), f"{matrix.stem}.{PACKED_SHAPE}": ((2,), (torch.int32, torch.int64))}

    def fill(self, experts: FrozenExperts, matrix: Matrix, files: TensorFiles) -> None:
        """Check the shape that the file tells, and copy the parts."""
        shape = files.read(f"{matrix.stem}.{PACKED_SHAPE}").tolist()
        if shape != [matrix.rows, matrix.columns]:
            raise ModelError(
                f"tensor {matrix.stem}.{PACKED_SHAPE} says {shape}, config.json {[matrix.rows, matrix.columns]}"
            )
        super().fill(experts, matrix, files)

    def shape_dtype(self, matrix: Matrix, files: TensorFiles) -> torch.dtype:
        """Return the integers that `weight_shape` is stored in."""
        return _DTYPES[files.header(f"{matrix.stem}.{PACKED_SHAPE}")[1]]


def check(source: Source, wanted: Iterable[Matrix], family: Family, names: TensorNames, files: TensorFiles) -> None:
    """Check that every tensor of the experts is there, with the right shape and dtype, and no other; headers only.

    Raises:
        ModelError: the message counts those that are not, and names the first.
    """
    every = tuple(wanted)
    tensors = {name: found for matrix in every for name, found in source.wanted(matrix).items()}
    missing = [name for name in tensors if name not in files.where]
    present = {name: wanted for name, wanted in tensors.items() if name in files.where}
    wrong = [text for name, (shape, dtypes) in present.items() for text in _wrong(name, shape, dtypes, files)]
    layers = tuple(f"{family.experts_of(layer)}." for layer in sorted({matrix.layer for matrix in every}))
    others = {name: place.name for name, place in names.places.items() if name not in tensors}
    foreign = [name for name, memory in others.items() if memory.startswith(layers)]
    for what, found in (
        ("missing", missing),
        ("that do not fit config.json", wrong),
        ("not of these experts", foreign),
        ("quantized, but not of a routed expert", [name for name in others if name.endswith(_QUANTIZED_ENDINGS)]),
    ):
        if found:
            raise ModelError(f"{len(found)} tensors {what}, e.g. {', '.join(found[:3])}")


def _wrong(name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], files: TensorFiles) -> Iterator[str]:
    found, dtype = files.header(name)
    if found != shape:
        yield f"{name} {found} on disk, {shape} by config"
    elif _DTYPES.get(dtype) not in dtypes:
        known = " or ".join(str(known).removeprefix("torch.") for known in dtypes)
        yield f"{name} is {dtype}, expected {known}"


def stream(source: Source, wanted: Iterable[Matrix], experts: dict[int, FrozenExperts], files: TensorFiles) -> None:
    """Fill the experts of each layer with the matrices they hold, one at a time, in the order of the files.

    Raises:
        ModelError: as `Source.fill`.
    """
    held = [matrix for matrix in wanted if _holds(experts[matrix.layer], matrix.expert)]
    # File after file, so that few are open and each is read once.
    held.sort(key=lambda matrix: files.where[next(iter(source.wanted(matrix)))].name)
    for matrix in track(held, "loading experts", len(held)):
        source.fill(experts[matrix.layer], matrix, files)


def _holds(experts: FrozenExperts, expert: int) -> bool:
    return experts.first <= expert < experts.first + experts.count


def saved(
    source: PartsSource, wanted: Iterable[Matrix], experts: dict[int, FrozenExperts], shape_dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, of memory the experts own, under which `source` finds them again."""
    for matrix in wanted:
        module = experts[matrix.layer]
        local = slice(matrix.expert - module.first, matrix.expert - module.first + 1)
        fused, row = PLACE[matrix.projection]
        for part, tensor in module.parts(fused, local).items():
            yield source.name(matrix, part), _own_storage(tensor[0, row])
        if isinstance(source, PackedSource):
            yield f"{matrix.stem}.{PACKED_SHAPE}", torch.tensor([matrix.rows, matrix.columns], dtype=shape_dtype)


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the same memory as a tensor of its own: transformers copies all views of a storage before it saves any."""
    return torch.from_dlpack(tensor.detach())
