"""A base and a fine-tune of it on disk: the same architecture, tensor for tensor, and one in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora.errors import ModelError
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.families import (
    Anatomy,
    Family,
    ModelIdentity,
    TensorNames,
    bind,
    identify,
    load_config,
    meta_model,
    quantization,
)
from gtqlora.families.files import weight_files
from gtqlora.families.names import Place

_ASIDE = frozenset(
    {
        *("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef"),
        *("initializer_range", "attention_dropout"),
    }
)
"""Keys of config.json that do not change what a forward pass computes; the token ids come with the tokenizer."""
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Pair:
    """A tensor in both checkpoints, as it is on disk."""

    before: Tensor
    tuned: Tensor

    @property
    def after(self) -> Tensor:
        """Return the fine-tune's tensor in the base's type, which is what a variant of this base has."""
        return self.tuned.to(self.before.dtype)

    @property
    def delta(self) -> Tensor:
        """Return the difference in fp32, of the fine-tune as it is."""
        return self.tuned.float() - self.before.float()

    @property
    def differs(self) -> bool:
        """Return whether a variant changes this tensor; a change that the base's type cannot hold is none."""
        return not torch.equal(self.before, self.after)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One tensor of the language model in both checkpoints: its name in the base's, and the fine-tune's own."""

    name: str
    other: str
    one_bit: bool
    base: TensorFiles
    tuned: TensorFiles

    def read(self) -> Pair:
        """Return both values, from disk."""
        return Pair(self.base.read(self.name), self.tuned.read(self.other))


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Both of them, checked against each other.

    Attributes:
        names: of the base's tensors.
        changes: every tensor of the language model, in the order of the base's files.
    """

    base: ModelIdentity
    tuned: ModelIdentity
    anatomy: Anatomy
    names: TensorNames
    changes: tuple[Change, ...]


def checkpoints(base: str, tuned: str) -> Checkpoints:
    """Open a base and a fine-tune, and check that they differ in nothing but the language model's values.

    Raises:
        ModelError: another architecture or shape, a quantized checkpoint, a tensor that only one has or that lies
            outside the language model and differs.
    """
    # configs and headers before the hashes, which read every byte
    family, skeleton = _architecture(base, tuned)
    old, new = identify(base), identify(tuned)
    files, others = _files(old), _files(new)
    names = TensorNames(skeleton, family, files.where)
    partners = _partners(new.model, names, TensorNames(skeleton, family, others.where), _tied(skeleton, family))
    anatomy = bind(skeleton, family)
    matrices = _Matrices(skeleton, anatomy)
    changes = tuple(
        Change(name=name, other=other, one_bit=matrices.holds(names.places[name]), base=files, tuned=others)
        for name, other in partners.items()
    )
    for change in changes:
        _check_shape(new.model, change)
    _check_rest(new.model, files, others, names.places)
    return Checkpoints(base=old, tuned=new, anatomy=anatomy, names=names, changes=changes)


def _architecture(base: str, tuned: str) -> tuple[Family, PreTrainedModel]:
    (family, config), (other, tuned_config) = load_config(base), load_config(tuned)
    if family != other:
        raise ModelError(f"{tuned}: is {other.model_type}, and {base} is {family.model_type}; give its own base")
    for model in (base, tuned):
        if (method := quantization(model)) is not None:
            raise ModelError(f"{model}: is quantized ({method}); give the checkpoint in 16 or 32 bits")
    mine, theirs = config.to_dict(), tuned_config.to_dict()
    # after the class's defaults are filled in, so that a key left out is no difference
    for key in sorted((mine.keys() | theirs.keys()) - _ASIDE):
        if mine.get(key) != theirs.get(key):
            raise ModelError(
                f"{tuned}: config.json says {key} = {theirs.get(key)!r}, the base's {mine.get(key)!r}; a variant runs "
                "with the base's settings, so give a fine-tune of just this base"
            )
    return family, meta_model(family, config)


def _files(found: ModelIdentity) -> TensorFiles:
    folder, shards = weight_files(found.model)
    return TensorFiles(Path(folder) / shard for shard in shards)


def _tied(skeleton: PreTrainedModel, family: Family) -> set[str]:
    """Return the parameters that are not their own: a head that is the embedding may or may not be on disk."""
    return {f"{family.head}{_WEIGHT}"} if skeleton.config.tie_word_embeddings else set()


def _partners(model: str, names: TensorNames, others: TensorNames, tied: set[str]) -> dict[str, str]:
    """Return the fine-tune's name of each of the base's tensors: both may spell the same place in their own way."""
    # by place in memory: transformers writes other names, or a wrapper's prefix, than a publisher did
    found = {place: name for name, place in others.places.items() if place.name not in tied}
    mine = {name: place for name, place in names.places.items() if place.name not in tied}
    if missing := [name for name, place in mine.items() if place not in found]:
        raise ModelError(f"{model}: {len(missing)} of the base's tensors are not there, e.g. {missing[0]}")
    if more := sorted(found[place] for place in found.keys() - set(mine.values())):
        raise ModelError(f"{model}: {len(more)} tensors that the base does not have, e.g. {more[0]}")
    return {name: found[place] for name, place in mine.items()}


def _check_shape(model: str, change: Change) -> None:
    wanted, found = change.base.header(change.name)[0], change.tuned.header(change.other)[0]
    if wanted != found:
        raise ModelError(f"{model}: tensor {change.other} is {found}, the base's {wanted}; give a fine-tune of it")


def _check_rest(model: str, files: TensorFiles, others: TensorFiles, ours: Mapping[str, Place]) -> None:
    """Check that what is no part of the language model is the same: nothing here runs it, so nothing judges it."""
    for name in files.where.keys() - ours.keys():
        # transformers leaves other towers out when it saves a fine-tune, which changes nothing in them
        if name in others.where and not torch.equal(files.read(name), others.read(name)):
            raise ModelError(
                f"{model}: {name} differs from the base's, and is no part of the language model that is judged here"
            )


def refuse_equals(both: Checkpoints) -> None:
    """Check that there is a difference, as far as the base's type can hold it.

    Raises:
        ModelError: there is none, so that a variant would be the base under another name.
    """
    # of the same files nothing need be read, and of a fine-tune mostly just the first tensor
    if both.base.digest == both.tuned.digest or not any(change.read().differs for change in both.changes):
        raise ModelError(
            f"{both.tuned.model}: is the same as {both.base.model}, tensor for tensor; give the base first, and then a "
            "fine-tune of it"
        )


class _Matrices:
    """Which tensors take one bit a weight: linears, embeddings and routed experts, but no router and no gate."""

    def __init__(self, skeleton: nn.Module, anatomy: Anatomy) -> None:
        # one number a token weighs all that a shared expert writes; a wrong sign there is no small error
        gates = {f"{layer}.{gate}" for layer in anatomy.layers for gate in anatomy.family.gates}
        self._linears = {
            path
            for path, module in skeleton.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding) and path not in gates
        } - set(anatomy.routers)
        self._experts = tuple(f"{layer.experts}." for layer in anatomy.moe)

    def holds(self, place: Place) -> bool:
        path, dot, parameter = place.name.rpartition(".")
        return (f"{dot}{parameter}" == _WEIGHT and path in self._linears) or place.name.startswith(self._experts)
