"""Training checkpoints on disk: which ones are whole, of which settings they are, which one to go on from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gtqlora.errors import RunError
from gtqlora.machine import ran_out_of_memory
from gtqlora.progress import note
from gtqlora.run import other_inputs, other_settings
from gtqlora.storage.atomic import clear, sync, write_json
from gtqlora.storage.contents import first_line, read_json, sha256_file

MARK = "complete.json"
EDIT, STATE, RANDOM = "edit.safetensors", "trainer_state.json", "rng_state.pth"
NEEDED = frozenset({EDIT, STATE, RANDOM, "optimizer.pt", "scheduler.pt"})
_NAME = re.compile(r"checkpoint-\d+")
_ASIDE = "unusable-"
_FORMAT = 2


@dataclass(frozen=True)
class Origin:
    """What training follows from: the settings that its arithmetic depends on, and the contents of its inputs."""

    settings: dict[str, Any]
    inputs: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those that were vouched for.

    Attributes:
        threads: on which it was computed; on another number sums are rounded otherwise.
    """

    folder: Path
    step: int
    origin: Origin
    threads: int


class Unusable(RunError):
    """A checkpoint that cannot be gone on from."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"{folder}: the checkpoint cannot be used ({reason})")
        self.folder, self.reason = folder, reason


def mark_complete(folder: Path, step: int, origin: Origin, threads: int = 1) -> None:
    """Say that a checkpoint is whole and good, once it is on the disk; it is not read without this mark."""
    sync(folder)
    files = {p.name: sha256_file(p) for p in folder.iterdir() if p.is_file() and p.name != MARK}
    write_json(folder / MARK, {"format": _FORMAT, "step": step, "files": files, "threads": threads, **asdict(origin)})


def _check_mark(folder: Path, mark: Mapping[str, object]) -> Checkpoint:
    """Return the checkpoint that a mark vouches for.

    Raises:
        Unusable: it is not what `mark_complete` writes.
    """
    if mark.get("format") != _FORMAT:
        raise Unusable(folder, "it is of another version of gtqlora")
    step, threads = mark.get("step"), mark.get("threads")
    files, settings, inputs = (mark.get(key) for key in ("files", "settings", "inputs"))
    if type(step) is not int or folder.name != f"checkpoint-{step}" or type(threads) is not int:
        raise Unusable(folder, f"{MARK} is malformed")
    if not all(isinstance(part, dict) for part in (files, settings, inputs)):
        raise Unusable(folder, f"{MARK} is malformed")
    assert isinstance(files, dict) and isinstance(settings, dict) and isinstance(inputs, dict)
    if not files.keys() >= NEEDED or any("/" in name for name in files):
        raise Unusable(folder, f"{MARK} does not vouch for all that is needed")
    return Checkpoint(folder, step, Origin(settings, inputs), threads)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, every file compared with the hash that was taken when it was written.

    Raises:
        Unusable: it was not written whole, or was damaged or changed since.
    """
    if not (folder / MARK).exists():
        raise Unusable(folder, "it was not written whole")
    try:
        mark = read_json(folder / MARK, "")
    except RunError as error:
        raise Unusable(folder, f"{MARK} is malformed") from error
    found = _check_mark(folder, mark)
    files = mark["files"]
    assert isinstance(files, dict)  # `_check_mark` saw to it
    for name, identity in files.items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != identity:
            raise Unusable(folder, f"{name} is not what was written")
    return found


def _folders(checkpoints: Path) -> list[Path]:
    """List the folders of checkpoints, newest first."""
    found = [p for p in checkpoints.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: -int(p.name.rpartition("-")[2]))


def usable(checkpoints: Path) -> list[Checkpoint]:
    """Return the checkpoints that are whole, newest first."""
    found = []
    for folder in _folders(checkpoints):
        try:
            found.append(read_checkpoint(folder))
        except Unusable:
            continue
    return found


def check_origin(found: list[Checkpoint], now: Origin) -> None:
    """Check that training can go on from these checkpoints.

    Raises:
        RunError: they are of other settings or inputs; the message says which.
    """
    for checkpoint in found:
        was = checkpoint.origin
        names = sorted(now.settings.keys() | was.settings.keys())
        other = [*other_settings(was.settings, now.settings, names), *other_inputs(was.inputs, now.inputs)]
        if other:
            raise RunError(
                f"{checkpoint.folder.parent}: the checkpoints were made with {' and with '.join(other)}; "
                "--again drops them, or take another --run"
            )


def tidy(checkpoints: Path) -> None:
    """Move what cannot be used out of the way, and say so; remove what a kill left half-written."""
    for folder in _folders(checkpoints):
        try:
            read_checkpoint(folder)
        except Unusable as error:
            if not (folder / MARK).exists() and {p.name for p in folder.iterdir()} <= NEEDED:
                clear(folder)
            else:
                set_aside(error)


def set_aside(bad: Unusable) -> None:
    """Keep a checkpoint that cannot be used under another name, and say so."""
    number, kept = 1, bad.folder.with_name(f"{_ASIDE}{bad.folder.name}")
    while os.path.lexists(kept):
        number += 1
        kept = bad.folder.with_name(f"{_ASIDE}{bad.folder.name}.{number}")
    os.rename(bad.folder, kept)
    note(f"{bad.folder} cannot be used ({bad.reason}) and is kept as {kept.name}; training goes on without it")


def drop(checkpoints: Path, metrics: str) -> None:
    """Remove all checkpoints and the figures of the training that made them, and say so."""
    found = [*_folders(checkpoints), *checkpoints.glob(f"{_ASIDE}checkpoint-*")]
    for folder in found:
        (folder / MARK).unlink(missing_ok=True)  # first: half of it must not look whole
        clear(folder)
    clear(checkpoints / metrics)
    if found:
        note(f"{checkpoints}: {len(found)} checkpoint{'s' if len(found) > 1 else ''} of before dropped (--again)")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Take whatever fails while a checkpoint is loaded for the checkpoint's fault."""
    try:
        yield
    except Unusable:
        raise
    except Exception as error:  # damaged bytes make libraries raise anything
        if ran_out_of_memory(error):
            raise
        raise Unusable(folder, first_line(error)[:200]) from error
