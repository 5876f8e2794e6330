"""A changed copy of a checkpoint: only changed tensors are rewritten, and the kernel moves or shares every other byte.

Two layouts: tensors change in their places, so that names, order and headers stay bit for bit; or they stand in one
more file, an overlay, beside the files of the source.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from gtqlora.errors import ModelError, RunError
from gtqlora.families import fp8
from gtqlora.families.files import INDEX, WEIGHTS, checked_file, has, read_json, weight_files, weight_map
from gtqlora.families.headers import LENGTH_BYTES, Extent, Header, extents, overlay_name, read_headers
from gtqlora.families.identity import read_files, state_of
from gtqlora.families.patching import Change, Tally, check_change, patch
from gtqlora.progress import track
from gtqlora.run import sha256_bytes, sha256_file, sha256_json
from gtqlora.storage.atomic import sync
from gtqlora.storage.contents import sha256_pieces
from gtqlora.storage.moving import Moved, copy_ranges, share_file

_HASHING = max(2, min(8, os.cpu_count() or 1))
"""Files that are hashed at a time; one thread does about 1.5 GB/s, which is less than disks copy."""
_COPIED = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".md", ""}
"""Suffixes of what else a model folder needs; nothing that can hold code, pickled or plain, is passed on."""
_ALIGNED = 8
"""Bytes to a multiple of which safetensors pads a header."""


@dataclass(kw_only=True)
class Copied:
    """A copy of a model folder.

    Attributes:
        changed: what became of each tensor that was changed, by name.
        digest: identity of the model that was read, as `ModelIdentity.digest`, of the bytes that were read.
        hashes: sha256 of every weight file of the copy, by name.
        moved: how each of the source's weight files came there, by name in the copy.
    """

    changed: dict[str, Tally] = field(default_factory=dict)
    digest: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is read and what is written, all of it checked.

    Attributes:
        small: names of what is read of the source beside the weights.
        names: of the source's weight files in the copy.
        headers: of every tensor of the source.
        todo: the tensors that change in each weight file, and where they lie; scales of theirs among them.
        overlay: name of the file that takes them, if not that one.
        starts: where they begin in the overlay.
    """

    folder: Path
    small: frozenset[str]
    names: Mapping[str, str]
    headers: Mapping[str, Header]
    todo: Mapping[str, Mapping[str, Extent]]
    changes: Mapping[str, Change]
    overlay: str | None
    starts: Mapping[str, int]


def copy_changed(
    source: str, target: Path, changes: Mapping[str, Change], *, share: bool = False, overlay: bool = False
) -> Copied:
    """Copy a model folder with some of its tensors changed.

    A tensor keeps its dtype and shape. Pickles and code stay behind, and so does an index that is not the one of these
    weights. Everything is checked before the first byte is written.

    Args:
        changes: what happens to each tensor, by its name on disk.
        share: let unchanged bytes be the source's, see `storage.moving.share_file`.
        overlay: put the changed tensors into one more file, and leave the others as they are.

    Raises:
        ModelError: the source is not a safetensors checkpoint in hub layout, a link leads out of it, a tensor to change
            is quantized, or it was changed meanwhile.
        RunError: a tensor is not there, or of another shape, or would not be finite.
    """
    folder, shards = weight_files(source)
    _, read = read_files(source)
    headers = read_headers(folder, shards, weight_map(folder))
    todo = _todo(source, folder, shards, headers, changes)
    names, last = _names(shards) if overlay else ({shard: shard for shard in shards}, None)
    target.mkdir(parents=True, exist_ok=True)
    starts = {} if last is None else _begin_overlay(target / last, todo)
    plan = _Plan(
        folder=folder,
        small=frozenset(read) - set(shards),
        names=names,
        headers=headers,
        todo=todo,
        changes=changes,
        overlay=last,
        starts=starts,
    )
    copied = Copied()
    digests = _copy_weights(plan, target, copied, share=share)
    digests |= _copy_small(plan, target)
    copied.digest = sha256_json(digests)
    return copied


def _todo(
    source: str, folder: Path, shards: tuple[str, ...], headers: Mapping[str, Header], changes: Mapping[str, Change]
) -> dict[str, dict[str, Extent]]:
    """Return what changes in each file; every change has its tensor there, of its shape."""
    if absent := sorted(changes.keys() - headers.keys()):
        raise RunError(f"{source}: {len(absent)} edited tensors are not in the checkpoint, e.g. {absent[0]}")
    todo: dict[str, dict[str, Extent]] = {shard: {} for shard in shards}
    # Headers of files in which nothing changes are not read a second time: there may be thousands of tensors in each.
    places = {shard: extents(folder / shard) for shard in {headers[name].file for name in changes}}
    for name, change in changes.items():
        shard = headers[name].file
        todo[shard][name] = found = places[shard][name]
        if found.dtype == fp8.ON_DISK:
            todo[shard][name + fp8.SCALES] = _scales(name, places[shard], headers)
        check_change(name, found, change)
    return todo


def _scales(name: str, places: Mapping[str, Extent], headers: Mapping[str, Header]) -> Extent:
    fp8.check_scales(name, headers)
    if name + fp8.SCALES not in places:
        raise ModelError(f"tensor {name} and its scales are in two files, so they cannot be changed together")
    return places[name + fp8.SCALES]


# --- weights ---------------------------------------------------------------------------------------------------------


def _copy_weights(plan: _Plan, target: Path, copied: Copied, *, share: bool) -> dict[str, str]:
    """Write the weight files; return the sha256 of those that were read."""
    # Whoever waits at the end waits for the last file: let that be a small one.
    shards = sorted(plan.names, key=lambda shard: -checked_file(plan.folder, shard).stat().st_size)
    with (
        ThreadPoolExecutor(_HASHING, initializer=_step_back) as pool,
        ThreadPoolExecutor(1) as filling,
        ThreadPoolExecutor(1) as flushing,
    ):
        hashing = _Hashing(plan, target, copied, pool)
        filled: deque[Future[Path]] = deque()
        flushed: list[Future[None]] = []
        for shard in track(shards, "write shards", len(shards)):
            file, new = checked_file(plan.folder, shard), target / plan.names[shard]
            state, moved = _begin(file, new, changes=_is_rewritten(plan, shard), share=share)
            copied.moved[plan.names[shard]] = moved
            _patch_all(plan, file, target / (plan.overlay or plan.names[shard]), plan.todo[shard], copied)
            # What changes is there before what does not, so that both files can be hashed while the kernel copies.
            hashing.begin(shard, file, state)
            if moved != "hard link":
                filled.append(filling.submit(_fill, plan, shard, new, moved))
            while len(filled) > 1:
                flushed.append(flushing.submit(sync, filled.popleft().result()))
        flushed += [flushing.submit(sync, each.result()) for each in filled]
        hashing.finish()
        for each in flushed:
            each.result()
    return hashing.digests


def _is_rewritten(plan: _Plan, shard: str) -> bool:
    return bool(plan.todo[shard]) and plan.overlay is None


def _begin(file: Path, new: Path, *, changes: bool, share: bool) -> tuple[tuple[int, ...], Moved]:
    """Make a weight file, shared or still empty; return the state in which the source was, and how it comes there."""
    new.parent.mkdir(parents=True, exist_ok=True)  # an index may name shards in folders
    state, moved = state_of(file), "copy"
    if share:
        moved = share_file(file, new, changes=changes)
    else:
        with new.open("xb") as empty:
            empty.truncate(file.stat().st_size)
    # A hard link changes a time of the source; the bytes are the same file's.
    return (state_of(file) if moved == "hard link" else state), moved


def _fill(plan: _Plan, shard: str, new: Path, moved: Moved) -> Path:
    """Copy what does not change in a weight file; return it."""
    file = plan.folder / shard
    if moved == "copy":
        changed = plan.todo[shard].values() if _is_rewritten(plan, shard) else ()
        copy_ranges(file, new, _between(changed, file.stat().st_size))
    shutil.copymode(file, new)
    return new


def _between(extents: Iterable[Extent], size: int) -> Iterator[tuple[int, int]]:
    """Yield the bytes of a file that are in none of these, from a start up to a stop."""
    end = 0
    for extent in sorted(extents, key=lambda extent: extent.start):
        yield end, extent.start
        end = extent.stop
    yield end, size


def _pieces(file: Path, written: Path, extents: Iterable[Extent]) -> Iterator[tuple[Path, int, int]]:
    """Yield the bytes of a changed file as they lie in two: what is kept in the source, what changes as written."""
    changed = sorted(extents, key=lambda extent: extent.start)
    for (start, stop), extent in zip_longest(_between(changed, file.stat().st_size), changed):
        yield file, start, stop
        if extent is not None:
            yield written, extent.start, extent.stop


def _step_back() -> None:
    """Leave the cores to whoever else wants them: torch's threads wait for the slowest of them, many times a second."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class _Hashing:
    """Hashes files in threads beside the copy: all read the same bytes, which then come from the system's cache."""

    def __init__(self, plan: _Plan, target: Path, copied: Copied, pool: ThreadPoolExecutor) -> None:
        self.digests: dict[str, str] = {}
        self._plan, self._target, self._copied, self._pool = plan, target, copied, pool
        self._read: deque[tuple[str, Path, tuple[int, ...], Future[str]]] = deque()
        self._written: dict[str, Future[str]] = {}

    def begin(self, shard: str, file: Path, state: tuple[int, ...]) -> None:
        """Hash a file of the source that was in this state, and what becomes of it."""
        # No further ahead than there are threads, or what was copied has left the cache when its hash comes.
        while len(self._read) >= _HASHING:
            self._end()
        self._read.append((shard, file, state, self._pool.submit(sha256_file, file)))
        if _is_rewritten(self._plan, shard):
            new, changed = self._plan.names[shard], self._plan.todo[shard].values()
            self._written[new] = self._pool.submit(sha256_pieces, _pieces(file, self._target / new, changed))

    def _end(self) -> None:
        shard, file, state, digest = self._read.popleft()
        self.digests[shard] = digest.result()
        if state_of(file) != state:
            raise ModelError(f"{file}: was changed while it was copied; nothing was written")

    def finish(self) -> None:
        """Wait for all of them.

        Raises:
            ModelError: a file of the source was changed meanwhile.
        """
        if (overlay := self._plan.overlay) is not None:
            self._written[overlay] = self._pool.submit(sha256_file, self._target / overlay)
        while self._read:
            self._end()
        same = {new: self.digests[shard] for shard, new in self._plan.names.items()}
        self._copied.hashes |= same | {name: digest.result() for name, digest in self._written.items()}


def _patch_all(plan: _Plan, source: Path, target: Path, todo: Mapping[str, Extent], copied: Copied) -> None:
    if not todo:
        return

    def start(name: str) -> int:
        return plan.starts.get(name, todo[name].start)

    with source.open("rb") as read, target.open("r+b") as write:
        for name in todo.keys() & plan.changes.keys():
            change, files = plan.changes[name], (read.fileno(), write.fileno())
            if todo[name].dtype == fp8.ON_DISK:
                both = name, name + fp8.SCALES
                extents, starts = (todo[both[0]], todo[both[1]]), (start(both[0]), start(both[1]))
                copied.changed[name] = fp8.patch(name, extents, change, *files, starts)
            else:
                copied.changed[name] = patch(name, todo[name], change, *files, start(name))


# --- the overlay -----------------------------------------------------------------------------------------------------


def _names(shards: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """Return names for the weight files beside an overlay, and the overlay's."""
    # Loaders look for a `model.safetensors` first, and take no other file where there is one.
    names = {shard: "model-00001-of-00001.safetensors" if shard == WEIGHTS else shard for shard in shards}
    return names, overlay_name(names.values())


def _begin_overlay(file: Path, todo: Mapping[str, Mapping[str, Extent]]) -> dict[str, int]:
    """Write the overlay's header; return where each tensor begins."""
    tensors = {name: extent for shard in todo.values() for name, extent in shard.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = dict[str, int](), 0
    # The widest types first, so that each tensor begins at a multiple of its values' size.
    for name in sorted(tensors, key=lambda name: (-_width(tensors[name]), name)):
        extent, offsets[name] = tensors[name], end
        end += extent.stop - extent.start
        header[name] = {"dtype": extent.dtype, "shape": extent.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    file.write_bytes(len(text).to_bytes(LENGTH_BYTES, "little") + text)
    return {name: LENGTH_BYTES + len(text) + offset for name, offset in offsets.items()}


def _width(extent: Extent) -> int:
    values = 1
    for size in extent.shape:
        values *= size
    return (extent.stop - extent.start) // max(values, 1)


def _overlay_index(plan: _Plan) -> bytes:
    """Return the index of the copy: what changed is in the overlay, everything else where it was."""
    mapped = {name: plan.names[header.file] for name, header in plan.headers.items()}
    mapped |= dict.fromkeys(plan.starts, str(plan.overlay))
    metadata: object = {"total_size": sum(_bytes(header) for header in plan.headers.values())}
    if has(plan.folder, INDEX):
        metadata = read_json(plan.folder / INDEX)["metadata"]
    return json.dumps({"metadata": metadata, "weight_map": mapped}, indent=2, sort_keys=True).encode()


def _bytes(header: Header) -> int:
    bits = re.search(r"\d+", header.dtype)  # BOOL says none
    return header.numel * int(bits[0] if bits else 8) // 8


# --- everything else -------------------------------------------------------------------------------------------------


def _copy_small(plan: _Plan, target: Path) -> dict[str, str]:
    """Copy what else a model needs; return the sha256 of what is read of it."""
    digests: dict[str, str] = {}
    others = {entry.name for entry in os.scandir(plan.folder) if _is_passed_on(entry)}
    for name in sorted(plan.small | others):
        data = checked_file(plan.folder, name).read_bytes()
        if name in plan.small:
            digests[name] = sha256_bytes(data)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    if plan.overlay is not None:
        (target / INDEX).write_bytes(_overlay_index(plan))
    return digests


def _is_passed_on(entry: os.DirEntry[str]) -> bool:
    # The index of these shards is copied because it is among what is read; any other one belongs to other weights.
    is_index = entry.name.endswith(".safetensors.index.json")
    return entry.is_file() and Path(entry.name).suffix in _COPIED and not entry.name.startswith(".") and not is_index
