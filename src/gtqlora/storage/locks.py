"""Lock files: held by one process at a time, and free again as soon as that process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path
from typing import IO

from gtqlora.errors import RunError

LOCK = ".lock"
"""The name of the lock file in a run directory or a staging folder."""


def hold(file: Path, says: bytes = b"") -> IO[bytes] | None:
    """Lock a file until the stream is closed or this process dies; return None if somebody else holds or removed it.

    Args:
        says: written into the file once it is locked.

    Raises:
        RunError: something that is no plain file has that name; it is neither followed nor opened.
    """
    if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
        raise RunError(f"{file}: not a plain file, so it cannot be the lock; remove it or choose another folder")
    # O_NOFOLLOW and O_NONBLOCK: somebody may have put a link or a pipe there since; O_CLOEXEC: a child process that
    # outlives this one must not go on holding the lock.
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    stream = os.fdopen(fd, "r+b", buffering=0)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its owner may have removed the file between our opening and locking it: then the name is free again.
        if still_held(stream, file):
            stream.write(says)
            return stream
    except BlockingIOError:
        pass
    except BaseException:
        stream.close()
        raise
    stream.close()
    return None


def still_held(stream: IO[bytes], file: Path) -> bool:
    """Return whether the locked file still has its name; it has not if the folder was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.lstat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False
