"""A variant as a LoRA adapter for llama.cpp: one-bit differences as signs times a diagonal, all else of full rank.

Nothing but what the file holds is added there, so what it loses of the differences is measured on its own bytes.

Shape letters: E experts, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gtqlora.bitdelta.container import Tensors
from gtqlora.bitdelta.factors import Factors, Form
from gtqlora.bitdelta.onebit import SCALE_DTYPE, OneBit, decode, matrix, packed, signs
from gtqlora.errors import RunError
from gtqlora.exports import gguf_adapter
from gtqlora.exports.gguf.types import quantized
from gtqlora.exports.gguf.values import Checkpoint
from gtqlora.exports.gguf_adapter import F32, Kind
from gtqlora.families.llama_cpp.layout import Made, Take, as_is
from gtqlora.progress import track

_EMBEDDING = "token_embd.weight"
"""Its rows are looked up, so llama.cpp takes the factors of this one in the other order."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An adapter that can be written: everything about it that could be refused has been looked at.

    Attributes:
        made: the tensors of the base's GGUF that change.
        whole: of those that are not in one bit, their change as a product.
    """

    architecture: str
    tensors: Tensors
    made: Mapping[str, Made]
    whole: Mapping[str, gguf_adapter.Factors]

    @staticmethod
    def of(checkpoint: Checkpoint, tensors: Tensors, architecture: str, made: Mapping[str, Made]) -> Plan:
        """Return the plan for a variant's tensors on a GGUF that has its base's as `made` says.

        Raises:
            RunError: a tensor is several of the checkpoint's in this GGUF.
        """
        in_bits = {name: one for name, one in made.items() if one.sources & tensors.bits.keys()}
        for name, one in in_bits.items():
            if len(one.parts) != (1 if len(one.shape) == 2 else one.shape[0]) or one.sources & tensors.dense.keys():
                raise RunError(
                    f"{name}: is made of several tensors in this GGUF, so no adapter of signs fits it; give one in "
                    "which they are apart, or none"
                )
        whole = {name: gguf_adapter.factors_of(checkpoint, made[name]) for name in made.keys() - in_bits.keys()}
        return Plan(architecture=architecture, tensors=tensors, made=made, whole=whole)

    def write(self, path: Path) -> Lost:
        """Write the adapter; return what it loses of the one-bit differences."""
        lost = Lost()
        each = track(self.made.values(), "write the adapter", len(self.made))
        contents = (content for one in each for content in self._contents(one, lost))
        gguf_adapter.write_tensors(path, self.architecture, dict(self._shapes()), contents)
        return lost

    @property
    def bits(self) -> float:
        """Return the bits of a weight, of the tensors that are in one bit in the variant."""
        ours = [one for name, one in self.made.items() if name not in self.whole]
        n_bytes = sum(kind.n_bytes(shape) for one in ours for kind, shape in _kinds(one))
        return 8 * n_bytes / max(sum(prod(one.shape) for one in ours), 1)

    @property
    def odd(self) -> list[str]:
        """Return the tensors of widths that Q1_0 or Q2_K has no blocks for, which take more bytes."""
        forms = {name: _form(one) for name, one in self.made.items() if name not in self.whole}
        return [name for name, form in forms.items() if (form.signs.name, form.diagonal.name) != ("Q1_0", "Q2_K")]

    def _shapes(self) -> Iterator[tuple[str, Kind]]:
        for name, one in self.made.items():
            kinds = _whole_kinds(self.whole[name]) if name in self.whole else _kinds(one)
            yield from zip((f"{name}.lora_a", f"{name}.lora_b"), kinds, strict=True)

    def _contents(self, one: Made, lost: Lost) -> tuple[bytes, bytes]:
        if (whole := self.whole.get(one.name)) is not None:
            return quantized(whole.a_RI, F32), quantized(whole.b_DR, F32)
        form, each = _form(one), list[Factors]()
        for delta in _deltas(self.tensors.bits, one):
            each.append(form.factors(delta))
            lost.add(one.name, decode(delta), form.written(each[-1]))
        signed, diagonal = b"".join(found.signs for found in each), b"".join(found.diagonal for found in each)
        return (signed, diagonal) if _signs_first(one) else (diagonal, signed)


@dataclass(frozen=True)
class Lost:
    """What an adapter loses of the differences, by name of a tensor in the GGUF: squared lengths, all and missed."""

    energy: dict[str, float] = field(default_factory=dict[str, float])
    missed: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, name: str, wanted: Tensor, found: Tensor) -> None:
        """Count one matrix.

        Raises:
            RunError: it holds a scale that is too large for fp16.
        """
        missed = float((wanted - found).norm()) ** 2
        if not missed < float("inf"):
            raise RunError(f"tensor {name}: a scale of it is too large for llama.cpp's types; was it made by compress?")
        self.energy[name] = self.energy.get(name, 0.0) + float(wanted.norm()) ** 2
        self.missed[name] = self.missed.get(name, 0.0) + missed

    @property
    def share(self) -> float:
        """Return the share over all tensors."""
        return sum(self.missed.values()) / max(sum(self.energy.values()), 1e-300)

    @property
    def kept(self) -> dict[str, float]:
        """Return the share that each tensor keeps."""
        return {name: 1 - self.missed[name] / energy if energy else 1.0 for name, energy in self.energy.items()}


# --- tensors ---------------------------------------------------------------------------------------------------------


def _form(one: Made) -> Form:
    # what is looked up has no inputs that a diagonal could be on the side of
    return Form(one.shape, rows=False) if one.name == _EMBEDDING else Form.smallest(one.shape)


def _signs_first(one: Made) -> bool:
    # a diagonal of rows multiplies last, and one of columns first
    return one.name == _EMBEDDING or _form(one).rows


def _kinds(one: Made) -> tuple[Kind, Kind]:
    form = _form(one)
    signed, diagonal = (form.signs, one.shape), (form.diagonal, (*one.shape[:-2], form.side, form.side))
    return (signed, diagonal) if _signs_first(one) else (diagonal, signed)


def _whole_kinds(found: gguf_adapter.Factors) -> tuple[Kind, Kind]:
    return (F32, tuple(found.a_RI.shape)), (F32, tuple(found.b_DR.shape))


def _deltas(bits: Mapping[str, OneBit], one: Made) -> Iterator[OneBit]:
    """Yield the matrices of a tensor of the GGUF, one for each expert where it is a stack of them."""
    # a stack holds all experts of a layer, so it is read once and not for each of them
    held = {disk: bits[disk] for disk in one.sources & bits.keys()}
    for part in one.parts:
        delta = held.get(part.disk)
        if delta is None:
            yield _nothing(one.shape[-2:])
            continue
        if part.expert is not None:
            delta = matrix(delta, part.expert)
        yield _taken(delta, part.take)


def _nothing(shape: tuple[int, ...]) -> OneBit:
    """Return the difference of an expert that does not change."""
    rows, columns = shape
    signs_NB = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    return OneBit(
        signs_NB=signs_NB,
        row_N=torch.zeros(rows, dtype=SCALE_DTYPE),
        column_K=torch.zeros(columns, dtype=SCALE_DTYPE),
    )


def _taken(delta: OneBit, take: Take) -> OneBit:
    """Return the difference of the matrix that `take`, which reorders rows or columns or leaves some, makes of this."""
    if take is as_is:
        return delta
    rows, columns = gguf_adapter.order(take, *delta.shape)
    return OneBit(
        signs_NB=packed(signs(delta)[rows][:, columns] > 0), row_N=delta.row_N[rows], column_K=delta.column_K[columns]
    )
