"""A variant on disk: safetensors files of one-bit and dense tensors, and `bitdelta.json`, which says what they are.

A tensor is called by its name in the base's checkpoint. One-bit tensors are three: `NAME:signs` (uint8), `NAME:row` and
`NAME:column` (bf16). A dense one is `NAME:whole`: the values that take the place of the base's, in the base's type.
What a folder holds is untrusted: nothing in it is code, and what does not fit is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from gtqlora.bitdelta.onebit import OneBit, decode_rows
from gtqlora.bitdelta.voices import check_recorded
from gtqlora.config.values import Scalar
from gtqlora.edits.merging import Edit, LowRank, Whole
from gtqlora.errors import ModelError, RunError
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.exports.provenance import floor_problems
from gtqlora.families.files import checked_file, has, read_json
from gtqlora.results.export import FormVerdict
from gtqlora.results.typed import Mismatch, from_json, to_json
from gtqlora.results.verdict import HeldOut
from gtqlora.run import sha256_file, sha256_json
from gtqlora.stats import Floor
from gtqlora.storage.atomic import write_json

RECORD = "bitdelta.json"
OWN = "own"
"""Folder of the fine-tune's tokenizer, chat template and generation settings, where they are not the base's."""
FORMAT = 1
_PARTS = ("signs", "row", "column")
_WHOLE = "whole"
_SUFFIX = ".safetensors"
ENOUGH = 0.5
"""Share of the harmful prompts that a base must refuse."""
_SHARD = 2**30
"""Bytes of tensors that are gathered before they are written: a variant of any size takes this much memory."""
_DTYPES = {"signs": ("U8",), "row": ("BF16",), "column": ("BF16",), _WHOLE: ("BF16", "F16", "F32")}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a variant is, in bytes: `one_bit` for tensors that take `covered` in 16 bits, and the `dense` ones."""

    one_bit: int
    covered: int
    dense: int

    @property
    def ratio(self) -> float:
        """Return how many times smaller the one-bit tensors are than in 16 bits."""
        return self.covered / self.one_bit if self.one_bit else 1.0


@dataclass(frozen=True, kw_only=True)
class Record:
    """What `bitdelta.json` holds.

    Attributes:
        name: what the variant is called.
        base, tuned: public names of the models; the fingerprints are the digests of their files.
        ancestors: models that were edited one upon another, the first one first, and `base` last.
        spent: share of the first original's refusals that may be lost by now, by the bounds.
        finished: when it was judged, in UTC.
        tries: variants and edits judged on these prompts.
        against_tuned: what was measured of the variant, against the fine-tune itself.
        against_base: the same against the base; its floor must pass where the base refuses enough.
        distilled: whether scales were fitted to what layers compute, and not to the weights alone.
        lost: by name of a one-bit tensor, the share of its difference's energy that is lost; `energy_lost` is over all.
        versions: package -> version.
        files: every file of tensors, and of the fine-tune's own tokenizer, -> sha256.
        template: variables of the chat template that it was judged with.
    """

    format: int
    name: str
    base: str
    base_fingerprint: str
    tuned: str
    tuned_fingerprint: str
    ancestors: list[str]
    spent: float
    finished: str
    judge: str
    prompts: HeldOut
    tries: int
    against_tuned: FormVerdict
    against_base: FormVerdict
    distilled: bool
    energy_lost: float
    lost: dict[str, float]
    size: Size
    versions: dict[str, str]
    files: dict[str, str]
    template: dict[str, Scalar] = field(default_factory=dict[str, Scalar])


@dataclass(frozen=True)
class Added:
    """Adds a one-bit difference to a tensor."""

    delta: OneBit
    by_columns = False

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that the tensor has the difference's shape.

        Raises:
            RunError: it has not.
        """
        if shape != self.delta.shape:
            raise RunError(f"a variant's tensor of {self.delta.shape} does not fit the base's of {shape}")

    def __call__(self, weight_NK: Tensor, part: slice = slice(None)) -> Tensor:
        """Return these rows with the difference added; those of a stack's matrices follow each other."""
        return weight_NK + decode_rows(self.delta, part)


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What a variant changes of its base. Values are read when they are asked for.

    Attributes:
        bits: by name in the base's checkpoint, what is added to the tensor there.
        dense: by the same names, the values that take its place: gates, norms, biases and what else is no matrix.
        lora: products that are added; none in this format.
    """

    bits: Mapping[str, OneBit]
    dense: Mapping[str, Tensor]
    lora: Mapping[str, LowRank] = field(default_factory=dict[str, LowRank])

    @property
    def edits(self) -> Mapping[str, Edit]:
        """Return what happens to each tensor of the base that changes, by its name."""
        return Lazy((*self.bits, *self.dense, *self.lora), self._edit)

    def _edit(self, name: str) -> Edit:
        if name in self.bits:
            return Added(self.bits[name])
        return Whole(self.dense[name]) if name in self.dense else self.lora[name]


@dataclass(frozen=True, kw_only=True)
class Variant(Tensors):
    """A fine-tune as its differences from a base, with what was measured of it."""

    folder: Path
    record: Record

    @property
    def name(self) -> str:
        """Return what it is called."""
        return self.record.name

    @property
    def base_fingerprint(self) -> str:
        """Return the digest of the files of the only model that it fits, see `families.identity`."""
        return self.record.base_fingerprint

    @property
    def tokenizer(self) -> Path | None:
        """Return the folder with its own tokenizer, template and generation settings; None: the base's hold."""
        return self.folder / OWN if any(name.startswith(f"{OWN}/") for name in self.record.files) else None

    @property
    def digest(self) -> str:
        """Return the identity of its tensors."""
        return sha256_json(self.record.files)


# --- writing ---------------------------------------------------------------------------------------------------------


class Shards:
    """Tensors on their way to disk: gathered up to a size, then written to the next file of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held, self._bytes = folder, dict[str, Tensor](), 0
        self.files: dict[str, str] = {}
        """Every file that was written -> sha256."""
        self.one_bit, self.dense = 0, 0

    def add_bits(self, name: str, delta: OneBit) -> None:
        """Take a one-bit tensor."""
        self.one_bit += delta.nbytes
        for part, tensor in zip(_PARTS, (delta.signs_NB, delta.row_N, delta.column_K), strict=True):
            self._add(f"{name}:{part}", tensor)

    def add_dense(self, name: str, value: Tensor) -> None:
        """Take a tensor that is kept whole."""
        self.dense += value.nbytes
        self._add(f"{name}:{_WHOLE}", value)

    def _add(self, name: str, tensor: Tensor) -> None:
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= _SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is held; the last call makes the last file."""
        if not self._held:
            return
        file = self._folder / f"deltas-{len(self.files) + 1:05}{_SUFFIX}"
        save_file(self._held, file, metadata={"format": "pt"})
        self.files[file.name] = sha256_file(file)
        self._held, self._bytes = {}, 0


def write_record(folder: Path, record: Record) -> None:
    """Write `bitdelta.json` beside the tensors; it comes last, as it has their hashes."""
    write_json(folder / RECORD, to_json(record))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_record(folder: Path) -> Record:
    """Return what a variant's `bitdelta.json` says.

    Raises:
        ModelError: it is not there, not what this version writes, or without a passed floor.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; `gtqlora bitdelta compress` makes one")
    if not has(folder, RECORD):
        raise ModelError(
            f"{folder}: no {RECORD} there, so it is no one-bit variant; give a folder that `gtqlora bitdelta compress` "
            "wrote"
        )
    file = checked_file(folder, RECORD)
    try:
        record = from_json(Record, read_json(file))
    except Mismatch as error:
        raise ModelError(f"{file}: {error}; compress the fine-tune again") from error
    check_recorded(record.template, file)
    # after the keys, which tell more of another version's file
    if record.format != FORMAT:
        raise ModelError(f"{file}: format {record.format}, and this version reads {FORMAT}; compress again")
    for problem in (*floor_problems(record.against_tuned.floor, "against_tuned"), *_base_problems(record)):
        raise ModelError(f"{file}: this variant did not pass the safety floor ({problem}), so it is not used")
    return record


def binds(floor: Floor) -> bool:
    """Return whether a base refuses enough for its variants to be held to it.

    One that was never taught to refuse says nothing of a fine-tune that was. No setting moves this share.
    """
    return floor.refused >= max(ENOUGH * floor.prompts, 1)


def _base_problems(record: Record) -> Iterator[str]:
    if binds(record.against_base.floor):
        yield from floor_problems(record.against_base.floor, "against_base")


def read_variant(folder: Path) -> Variant:
    """Return the variant in a folder, its files checked against their hashes and its tensors against each other.

    Raises:
        ModelError: as `read_record`, or a file is missing, changed or cut short, or tensors do not fit together.
    """
    record = read_record(folder)
    # names are the record's, and a record may come from anywhere: `checked_file` keeps them in the folder
    for name, digest in record.files.items():
        if sha256_file(checked_file(folder, name)) != digest:
            raise ModelError(f"{folder / name}: was changed since it was written; compress the fine-tune again")
    tensors = read_tensors(folder, record.files)
    return Variant(folder=folder, record=record, bits=tensors.bits, dense=tensors.dense)


def read_tensors(folder: Path, names: Iterable[str]) -> Tensors:
    """Return the tensors in a variant's files, each read when it is asked for.

    Raises:
        ModelError: a file is corrupt, or tensors are not of this format or do not fit together; one with a value that
            is not finite is found when it is read.
    """
    files = TensorFiles(folder / name for name in names if name.endswith(_SUFFIX))
    wholes, bits = _names(folder, files)
    return Tensors(
        bits=Lazy(bits, lambda name: _bits(folder, files, name)),
        dense=Lazy(wholes, lambda name: _finite(folder, files, f"{name}:{_WHOLE}")),
    )


class Lazy(Mapping[str, T], Generic[T]):
    """Values by name, each read from disk every time that it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], T]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _names(folder: Path, files: TensorFiles) -> tuple[list[str], list[str]]:
    """Return the names of dense and of one-bit tensors, from headers that fit together."""
    found: dict[str, set[str]] = {}
    for stored in files.where:
        # the last colon: a tensor's own name may hold others
        name, _, part = stored.rpartition(":")
        if not name or files.header(stored)[1] not in _DTYPES.get(part, ()):
            raise ModelError(f"{folder}: tensor {stored!a} is none of this format's")
        found.setdefault(name, set()).add(part)
    for name, parts in found.items():
        if parts != {_WHOLE} and parts != set(_PARTS):
            raise ModelError(f"{folder}: {name!a} has the parts {', '.join(sorted(parts))}; get the variant again")
    bits = [name for name, parts in found.items() if parts != {_WHOLE}]
    for name in bits:
        _check_shapes(folder, name, *(files.header(f"{name}:{part}")[0] for part in _PARTS))
    return [name for name, parts in found.items() if parts == {_WHOLE}], bits


def _check_shapes(
    folder: Path, name: str, signs: tuple[int, ...], row: tuple[int, ...], column: tuple[int, ...]
) -> None:
    # before any value is read: shapes decide how much memory reading takes
    wanted = (*row, -(-column[-1] // 8)) if column else ()
    if signs != wanted or len(row) not in (1, 2) or row[:-1] != column[:-1]:
        raise ModelError(f"{folder}: {name!a} has signs {signs}, rows {row} and columns {column}, which do not fit")


def _bits(folder: Path, files: TensorFiles, name: str) -> OneBit:
    row_N, column_K = (_finite(folder, files, f"{name}:{part}") for part in ("row", "column"))
    # signs stand elsewhere, so that a product of two negative scales would hide a change of meaning
    if bool((row_N < 0).any()) or bool((column_K < 0).any()):
        raise ModelError(f"{folder}: {name!a} has a scale below 0; get the variant again")
    return OneBit(signs_NB=files.read(f"{name}:signs"), row_N=row_N, column_K=column_K)


def _finite(folder: Path, files: TensorFiles, name: str) -> Tensor:
    tensor = files.read(name)
    if not bool(torch.isfinite(tensor).all()):
        raise ModelError(f"{folder}: {name!a} holds NaN or infinity; get the variant again")
    return tensor
