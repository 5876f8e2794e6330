"""Work in pieces that outlives a killed process: a folder beside what is made, with a line for each finished piece."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from gtqlora.errors import RunError
from gtqlora.storage.atomic import named_errors
from gtqlora.storage.locks import LOCK, hold

_LINES = "done.jsonl"
_BASIS = "basis"
_UNSET = "(none)"


class Journal:
    """The pieces of one work by their names, kept by one process at a time, and readable by their owner only."""

    def __init__(self, folder: Path, basis: Mapping[str, str], *, restart: bool = False) -> None:
        """Open or begin the journal of a work.

        Args:
            basis: what the pieces depend on, by name; those of another work are not taken over.
            restart: begin anew, whatever is there.

        Raises:
            RunError: another process holds it, it is of another work, or it is none.
        """
        self.folder = folder
        with named_errors(folder):
            if folder.is_symlink() or (folder.exists() and not (folder / LOCK).exists()):
                raise RunError(f"{folder}: something else has this name; remove it or choose another output")
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = hold(folder / LOCK)
            if lock is None:
                raise RunError(f"{folder}: another process is at work here; wait for it, or choose another output")
            self._lock: IO[bytes] = lock
            self._done, size = _read(folder / _LINES)
            begun = self._done.pop(_BASIS, None)
            # Nothing is lost with a journal that holds nothing yet.
            if restart or not self._done:
                self._done, size = {}, 0
            self._stream = os.fdopen(os.open(folder / _LINES, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb")
            # What a killed process had not finished writing goes, so that the next line stands for itself.
            self._stream.truncate(size)
            self._stream.seek(size)
        if not size:
            self._write({_BASIS: dict(basis)})
        elif begun != basis:
            self.close()
            raise RunError(
                f"{folder}: begun with {_difference(begun, basis)}, on which its {len(self._done):,} answers hang; "
                "name the same again to go on with them, or add --restart to begin anew without them"
            )

    def __len__(self) -> int:
        """Return how many pieces are done."""
        return len(self._done)

    def __contains__(self, name: str) -> bool:
        """Tell whether a piece is done."""
        return name in self._done

    def __getitem__(self, name: str) -> object:
        """Return what a piece came to."""
        return self._done[name]

    def add(self, pieces: Mapping[str, object]) -> None:
        """Note finished pieces, on the disk before this returns: all of them or none."""
        self._write(pieces)
        self._done.update(pieces)

    def _write(self, pieces: Mapping[str, object]) -> None:
        with named_errors(self.folder):
            self._stream.write(json.dumps(pieces).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Let another process go on."""
        self._stream.close()
        self._lock.close()

    def remove(self) -> None:
        """Remove the journal, whose work is done; the lock goes last."""
        self._stream.close()
        (self.folder / _LINES).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _difference(begun: object, basis: Mapping[str, str]) -> str:
    """Return what the pieces of a journal depend on that is another now: from what it was to what it is."""
    # A stranger may have written the file, or an older version of this program.
    was = begun if isinstance(begun, dict) else {}
    names = [name for name in (*basis, *(was.keys() - basis.keys())) if was.get(name) != basis.get(name)]
    return " and ".join(f"{name} = {was.get(name, _UNSET)} and not {basis.get(name, _UNSET)}" for name in names)


def _read(file: Path) -> tuple[dict[str, object], int]:
    """Return the pieces in a journal's file, and the bytes that whole lines take."""
    found: dict[str, object] = {}
    if not os.path.lexists(file):
        return found, 0
    if file.is_symlink() or not file.is_file():
        raise RunError(f"{file}: not a plain file; remove {file.parent}")
    size = 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            pieces = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            pieces = None
        if not isinstance(pieces, dict):
            break
        found.update(pieces)
        size += len(line)
    return found, size
