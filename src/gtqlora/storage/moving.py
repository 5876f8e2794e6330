"""Bytes of large files moved by the kernel, or shared with the file they are of; they do not pass through here."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

Moved = Literal["copy", "reflink", "hard link"]
"""What a new file is of another one: bytes of its own, or shared until either is written to, or the very same file."""

_FICLONE = 0x40049409  # <linux/fs.h>: shares all blocks of one file with another, where the file system can
_AT_ONCE = 2**30
"""Bytes asked of the kernel in one call, so that a signal is not kept waiting."""
_CHUNK = 2**23
"""Bytes of a copy that does pass through here."""


def copy_file(source: Path, target: Path) -> None:
    """Write a copy as a new file; the kernel moves the bytes, or this process does where the kernel cannot.

    Raises:
        OSError: the target is there, there is no room, or the source became shorter meanwhile.
    """
    with source.open("rb") as read, target.open("xb") as write:
        size = os.fstat(read.fileno()).st_size
        done = _by_kernel(read, write, size)
        if done < size:
            read.seek(done)
            write.seek(done)
            shutil.copyfileobj(read, write, _CHUNK)
            if write.tell() < size:
                raise OSError(f"{source}: became shorter while it was copied")


def _by_kernel(read: IO[bytes], write: IO[bytes], size: int) -> int:
    """Return how many bytes the kernel copied: all, or fewer where it cannot (between file systems, on some systems).

    A full disk, which stops it as well, stops the copy that goes on from there, with the name of the file.
    """
    done = 0
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            while done < size:
                moved = os.copy_file_range(read.fileno(), write.fileno(), min(size - done, _AT_ONCE), done, done)
                # The end came early: the copy that goes on from here finds out, and says which file it was.
                if moved == 0:
                    break
                done += moved
    return done


def share_file(source: Path, target: Path, *, changes: bool = False) -> Moved:
    """Write a new file that shares its bytes with another, if the file system can, and return how.

    Args:
        changes: the new file will be written to, so it must not be the same file.

    Raises:
        OSError: as `copy_file`.
    """
    if _reflink(source, target):
        return "reflink"
    if not changes:
        # The file itself and not a link to it. It may be another user's, which the system may forbid to link to.
        with suppress(OSError):
            os.link(os.path.realpath(source), target)
            return "hard link"
    copy_file(source, target)
    return "copy"


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as read, target.open("xb") as write, suppress(OSError):
        fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        return True
    target.unlink()
    return False
