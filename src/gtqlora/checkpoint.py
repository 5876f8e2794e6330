"""Safetensors checkpoints on disk: read one tensor at a time, write a changed copy shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gtqlora.families.files import weight_files
from gtqlora.progress import track

Change = Callable[[str, Tensor], Tensor]
"""(name on disk, tensor) -> the tensor to write; the same object if it is not changed."""

_COPIED = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", ""}
"""Suffixes of what else a model folder needs; nothing that can hold code, pickled or plain, is passed on."""


def copy_changed(source: str, target: Path, change: Change) -> set[str]:
    """Copy a model folder, passing every tensor through `change`; the names that were changed.

    Shards keep their names, order, dtype and metadata; one shard is in memory at a time. Pickles and code stay behind.

    Raises:
        ModelError: the source is not a safetensors checkpoint in hub layout.
    """
    folder, names = weight_files(source)
    target.mkdir(parents=True)
    changed: set[str] = set()
    for name in track(names, "write shards", len(names)):
        changed |= _copy_shard(folder / name, target / name, change)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _COPIED and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
    return changed


def _copy_shard(source: Path, target: Path, change: Change) -> set[str]:
    tensors: dict[str, Tensor] = {}
    changed: set[str] = set()
    with safe_open(source, framework="pt") as shard:
        for key in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
            before = shard.get_tensor(key)
            tensors[key] = change(key, before).to(before.dtype).contiguous()
            if tensors[key] is not before:
                changed.add(key)
        metadata = shard.metadata()
    target.parent.mkdir(parents=True, exist_ok=True)  # an index may name shards in folders
    save_file(tensors, target, metadata=metadata or {"format": "pt"})
    shutil.copymode(source, target)
    return changed
