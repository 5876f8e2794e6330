"""Count the file-system changes of this process below a folder, and end it at one of them.

Seen are all changes that Python makes: opened for writing, renamed, linked, removed, made, synced, written through
`os.write`. What libraries write by themselves (safetensors, torch, pyarrow) lies between two of these; a kill in the
middle of such a write comes from a limit on the size of files, see `forks.Bomb`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EVENTS = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Changes:
    """Counts until it is told to end the process.

    Attributes:
        seen: one line for each change so far, if they are kept.
    """

    root: str
    kill_at: int | None = None
    signal: int = signal.SIGKILL
    keep: bool = False
    count: int = 0
    seen: list[str] = field(default_factory=list)

    def change(self, what: str, path: str) -> None:
        """Called just before each change."""
        self.count += 1
        if self.keep:
            self.seen.append(f"{what} {os.path.relpath(path, self.root)}")
        if self.count == self.kill_at:
            os.kill(os.getpid(), self.signal)

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and (inside := self._inside(path)):
                self.change("open", inside)
        elif event in _EVENTS and (inside := self._inside(arguments[0])):
            self.change(event, inside)

    def _inside(self, path: object) -> str | None:
        if isinstance(path, int):
            return self._of_fd(path)
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        text = os.path.abspath(os.fsdecode(path))
        return text if text.startswith(self.root) else None

    def _of_fd(self, fd: int) -> str | None:
        try:
            return self._inside(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            return None

    def patched(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def changing(fd: int, *more: Any) -> Any:
            if (inside := self._of_fd(fd)) is not None:
                self.change(what, inside)
            return call(fd, *more)

        return changing


def watch(root: Path, kill_at: int | None, number: int, *, keep: bool = False) -> Changes:
    """Watch from now on; a hook cannot be taken away again, so this is for a forked child."""
    changes = Changes(f"{os.path.abspath(root)}{os.sep}", kill_at, number, keep)
    sys.addaudithook(changes.heard)
    for name in ("fsync", "write", "ftruncate"):
        setattr(os, name, changes.patched(name, getattr(os, name)))
    return changes
