"""Safetensors checkpoints on disk: read a tensor at a time, write a changed copy shard by shard, hashed on the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.families.files import checked_file, weight_files
from gtqlora.families.identity import read_files, state_of
from gtqlora.progress import track
from gtqlora.run import sha256_bytes, sha256_file, sha256_json

Change = Callable[[str, Tensor], Tensor]
"""(name on disk, tensor) -> the tensor to write; the same object if it is not changed."""

_COPIED = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", ""}
"""Suffixes of what else a model folder needs; nothing that can hold code, pickled or plain, is passed on."""


@dataclass(frozen=True)
class Copied:
    """A copy of a model folder.

    Attributes:
        changed: names of the tensors that were changed.
        digest: identity of the model that was read, as `ModelIdentity.digest`, of the bytes that were read.
    """

    changed: set[str]
    digest: str


def copy_changed(source: str, target: Path, change: Change) -> Copied:
    """Copy a model folder, passing every tensor through `change`.

    Shards keep their names, order, dtype and metadata; one shard is in memory at a time. Pickles and code stay behind,
    and so does an index that is not the one of these shards.

    Raises:
        ModelError: the source is not a safetensors checkpoint in hub layout, a link leads out of it, or it was changed
            meanwhile.
    """
    folder, shards = weight_files(source)
    _, read = read_files(source)
    target.mkdir(parents=True, exist_ok=True)
    changed: set[str] = set()
    digests: dict[str, str] = {}
    # In a thread beside the copy: both read the same bytes, which then come from the system's cache.
    with ThreadPoolExecutor(1) as hashing:
        for name in track(shards, "write shards", len(shards)):
            shard = checked_file(folder, name)
            before = state_of(shard)
            digest = hashing.submit(sha256_file, shard)
            changed |= _copy_shard(shard, target / name, change)
            digests[name] = digest.result()
            if state_of(shard) != before:
                raise ModelError(f"{shard}: was changed while it was copied; nothing was written")
    small = {name for name in read if name not in digests}
    others = {entry.name for entry in os.scandir(folder) if _is_passed_on(entry)}
    for name in sorted(small | others):
        data = checked_file(folder, name).read_bytes()
        if name in small:
            digests[name] = sha256_bytes(data)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    return Copied(changed, sha256_json(digests))


def _is_passed_on(entry: os.DirEntry[str]) -> bool:
    # The index of these shards is copied because it is among what is read; any other one belongs to other weights.
    is_index = entry.name.endswith(".safetensors.index.json")
    return entry.is_file() and Path(entry.name).suffix in _COPIED and not entry.name.startswith(".") and not is_index


def _copy_shard(source: Path, target: Path, change: Change) -> set[str]:
    tensors: dict[str, Tensor] = {}
    changed: set[str] = set()
    with safe_open(source, framework="pt") as shard:
        for key in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
            before = shard.get_tensor(key)
            tensors[key] = change(key, before).to(before.dtype).contiguous()
            # `to` and `contiguous` return the very same tensor if there is nothing to do.
            if tensors[key] is not before:
                changed.add(key)
        metadata = shard.metadata()
    target.parent.mkdir(parents=True, exist_ok=True)  # an index may name shards in folders
    save_file(tensors, target, metadata=metadata or {"format": "pt"})
    shutil.copymode(source, target)
    return changed
