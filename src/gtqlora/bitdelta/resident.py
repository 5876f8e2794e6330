"""One base in memory with the variants that are served on it: each of its layers is given what is the variants' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora.bitdelta.layers import Batch, Grouped, Tiles, VariantEmbedding, VariantLinear
from gtqlora.bitdelta.onebit import OneBit
from gtqlora.bitdelta.routed import Piece, VariantExperts, VariantRouter
from gtqlora.bitdelta.variants import Variant, read_variants, unchanged
from gtqlora.bitdelta.voices import Voice, own_voice, voice_of
from gtqlora.capture import Subject, open_subject
from gtqlora.config import ModelConfig
from gtqlora.edits.merging import LowRank
from gtqlora.errors import ModelError
from gtqlora.experts import FrozenExperts
from gtqlora.experts.loading import BF16, format_on_disk
from gtqlora.families import Anatomy, identify, tensor_names
from gtqlora.families.anatomy import is_norm
from gtqlora.families.facts import DOWN
from gtqlora.families.names import Place
from gtqlora.results.export import public_name


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A base with variants.

    Attributes:
        batch: says of which variants the sequences of a forward pass are.
        names: what each is asked for by, the base first; a variant's place here is its number.
        voices: how each is spoken with, in the same order.
    """

    subject: Subject
    batch: Batch
    names: tuple[str, ...]
    voices: tuple[Voice, ...]


def resident(base: str, folders: Sequence[Path], *, device: str = "cpu") -> Resident:
    """Load a base and the variants on it.

    Raises:
        ModelError: the base cannot be loaded, or a folder is no certified variant of it.
    """
    # before anything is loaded, so that what was hashed is what is compared with the variants' records
    identity = identify(base)
    expert_format = BF16 if format_on_disk(identity.model) is None else "native"
    subject = open_subject(ModelConfig(model=identity.model, device=device, expert_format=expert_format))
    model = cast(PreTrainedModel, subject.model)
    names = tensor_names(identity.model, subject.anatomy.family, model)
    voice = voice_of(subject)
    with unchanged(folders):
        variants = read_variants(folders, names, base=identity.digest, expert_format=expert_format)
        others = [
            own_voice(subject, identity.model, v.tokenizer, v.template) if v.tokenizer or v.template else voice
            for v in variants
        ]
    identity.check_unchanged()
    own = public_name(base)
    if any(variant.name == own for variant in variants):
        raise ModelError(f"{own!r} is the base's name and a variant's, too; rename the variant's folder")
    return Resident(
        subject=subject,
        batch=install(subject, variants),
        names=(own, *(variant.name for variant in variants)),
        voices=(voice, *others),
    )


def install(subject: Subject, variants: Sequence[Variant]) -> Batch:
    """Give a model's layers what is the variants' own; they are numbered from 1, as 0 is the base.

    Raises:
        ModelError: a variant has a tensor of its own that no layer here can have, or one of another shape.
    """
    model = cast(PreTrainedModel, subject.model)
    batch = Batch(subject.device, len(variants) + 1)
    places = _Places(model, subject.anatomy)
    for number, variant in enumerate(variants, 1):
        places.add(number, variant)
    tiles = Tiles(model.dtype, subject.device)
    for path, module in places.modules(batch, tiles):
        model.set_submodule(path, module)
    return batch


@dataclass
class _Own:
    """What variants have of their own of one module, by number."""

    bits: dict[int, OneBit] = field(default_factory=dict[int, OneBit])
    lora: dict[int, LowRank] = field(default_factory=dict[int, LowRank])
    whole: dict[int, dict[str, Tensor]] = field(default_factory=dict[int, dict[str, Tensor]])
    pieces: dict[int, dict[tuple[str, int], list[Piece]]] = field(
        default_factory=dict[int, dict[tuple[str, int], list[Piece]]]
    )


class _Places:
    """All variants' own tensors, by the module that they belong to."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self._model, self._anatomy, self._dtype = model, anatomy, model.dtype
        self._experts = {layer.experts for layer in anatomy.moe}
        self._own: dict[str, _Own] = {}

    def add(self, number: int, variant: Variant) -> None:
        """Sort in one variant's tensors.

        Raises:
            ModelError: one does not fit.
        """
        for place, delta in variant.bits.items():
            for name in self._names(place.name):
                self._add_bits(number, variant, Place(name, place.expert, place.part), delta)
        for path, product in variant.lora.items():
            self._add_lora(number, variant, path, product)
        for name, value in variant.whole.items():
            for each in self._names(name):
                self._add_whole(number, variant, each, value)

    def _names(self, name: str) -> list[str]:
        """Return the parameters that a tensor is: an embedding may be the head as well."""
        family = self._anatomy.family
        tied = self._model.config.tie_word_embeddings and name == f"{family.embedding}.weight"
        return [name, f"{family.head}.weight"] if tied else [name]

    def _add_bits(self, number: int, variant: Variant, place: Place, delta: OneBit) -> None:
        path, _, leaf = place.name.rpartition(".")
        own, moved = self._own.setdefault(path, _Own()), self._moved(delta)
        if path in self._experts:
            pieces = own.pieces.setdefault(number, {})
            outputs, inputs = _expert_sizes(self._model.get_submodule(path), leaf)
            for expert, first, each in _pieces(place, moved):
                inside = first + each.shape[0] <= outputs and expert < self._anatomy.spec.n_experts
                self._check(variant, place.name, each.shape[1:], (inputs,) if inside else (outputs, inputs))
                pieces.setdefault((leaf, expert), []).append((first, each))
        elif leaf == "weight" and isinstance(module := self._module(variant, path), nn.Linear | nn.Embedding):
            self._check(variant, place.name, delta.shape, tuple(module.weight.shape))
            own.bits[number] = moved
        else:
            raise ModelError(f"{variant.folder}: {place.name} in one bit is not served; merge the variant instead")

    def _add_lora(self, number: int, variant: Variant, path: str, product: LowRank) -> None:
        module = self._module(variant, path)
        if not isinstance(module, nn.Linear):
            raise ModelError(f"{variant.folder}: LoRA on {path}, which is no linear; it is not served")
        shape = product.b_DR.shape[0], product.a_RI.shape[1]
        self._check(variant, path, shape, (module.out_features, module.in_features))
        a_RI, b_DR = (part.to(self._model.device, self._dtype) for part in (product.a_RI, product.b_DR))
        self._own.setdefault(path, _Own()).lora[number] = LowRank(a_RI, b_DR)

    def _add_whole(self, number: int, variant: Variant, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._module(variant, path)
        base = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        alone = isinstance(module, nn.Linear | nn.Embedding) or is_norm(module) or path in self._anatomy.routers
        if leaf not in base or not alone:
            raise ModelError(f"{variant.folder}: {name} of its own is not served; merge the variant instead")
        self._check(variant, name, tuple(value.shape), tuple(base[leaf].shape))
        whole = self._own.setdefault(path, _Own()).whole.setdefault(number, {})
        whole[leaf] = value.to(base[leaf].device, base[leaf].dtype)

    def _module(self, variant: Variant, path: str) -> nn.Module:
        try:
            return self._model.get_submodule(path)
        except AttributeError as error:
            raise ModelError(f"{variant.folder}: the base has no {path}") from error

    def _check(self, variant: Variant, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise ModelError(f"{variant.folder}: {name} is {found}, and the base has {wanted}")

    def _moved(self, delta: OneBit) -> OneBit:
        # scales in the model's type, so that no product is computed in another one and rounded back
        device = self._model.device
        return OneBit(
            signs_NB=delta.signs_NB.to(device),
            row_N=delta.row_N.to(device, self._dtype),
            column_K=delta.column_K.to(device, self._dtype),
        )

    def modules(self, batch: Batch, tiles: Tiles) -> Iterator[tuple[str, nn.Module]]:
        """Give what takes the place of each module that a variant has something of its own of."""
        for path, own in self._own.items():
            yield path, self._made(path, own, batch, tiles)

    def _made(self, path: str, own: _Own, batch: Batch, tiles: Tiles) -> nn.Module:
        base = self._model.get_submodule(path)
        # a router with a correction bias of its own chooses differently from the same logits, so it gets a twin instead
        if path in self._anatomy.routers and all(whole.keys() == {"weight"} for whole in own.whole.values()):
            return VariantRouter(base, batch, {number: whole["weight"] for number, whole in own.whole.items()})
        module = Grouped(base, batch, own.whole) if own.whole else base
        if own.pieces:
            return VariantExperts(module, batch, tiles, own.pieces)
        if own.bits and isinstance(base, nn.Embedding):
            return VariantEmbedding(module, batch, tiles, own.bits)
        return VariantLinear(module, batch, tiles, own.bits, own.lora) if own.bits or own.lora else module


def _expert_sizes(experts: nn.Module, name: str) -> tuple[int, int]:
    """Return rows and columns of one expert's matrix in a fused parameter."""
    if isinstance(experts, FrozenExperts):
        outputs, inputs = experts.sizes("down" if name == DOWN else "gate")
        return (outputs if name == DOWN else 2 * outputs), inputs
    _, outputs, inputs = experts.get_parameter(name).shape
    return outputs, inputs


def _pieces(place: Place, delta: OneBit) -> Iterator[tuple[int, int, OneBit]]:
    """Give each expert's differences: its number, the first row in the fused parameter, and the difference."""
    if place.expert is not None:
        yield place.expert, place.part * delta.shape[0], delta
        return
    for expert, parts in enumerate(zip(delta.signs_NB, delta.row_N, delta.column_K, strict=True)):
        signs_NB, row_N, column_K = cast(tuple[Tensor, Tensor, Tensor], parts)
        yield expert, 0, OneBit(signs_NB=signs_NB, row_N=row_N, column_K=column_K)
