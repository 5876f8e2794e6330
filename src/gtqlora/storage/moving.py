"""Bytes of large files moved by the kernel, or shared with the file they are of; they do not pass through here."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
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
    target.open("xb").close()
    copy_ranges(source, target, [(0, source.stat().st_size)])


def copy_ranges(source: Path, target: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Copy bytes from their places in a file, from a start up to a stop, to the same places in one that is there.

    Raises:
        OSError: as `copy_file`.
    """
    with source.open("rb") as read, target.open("r+b") as write:
        for start, stop in ranges:
            done = _by_kernel(read, write, start, stop)
            read.seek(done)
            write.seek(done)
            while done < stop:
                data = read.read(min(_CHUNK, stop - done))
                if not data:
                    raise OSError(f"{source}: became shorter while it was copied")
                done += write.write(data)


def _by_kernel(read: IO[bytes], write: IO[bytes], done: int, stop: int) -> int:
    """Return up to where the kernel copied: all, or less where it cannot (between file systems, on some systems).

    A full disk, which stops it as well, stops the copy that goes on from there, with the name of the file.
    """
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            while done < stop:
                moved = os.copy_file_range(read.fileno(), write.fileno(), min(stop - done, _AT_ONCE), done, done)
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
