"""Files that only grow, by one line at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path


def append_line(file: Path, line: str) -> None:
    """Write one line, whole or recognizably torn: a line that was cut off by a kill ends where the next begins.

    Raises:
        OSError: it cannot be written, or is a link or no plain file.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(file))
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        data = f"{chr(10) if torn else ''}{line}\n".encode()
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)
