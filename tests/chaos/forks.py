"""Commands in forked children of a process that has imported everything, ended in the middle or left alone."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets.fingerprint

from gtqlora.cli import app
from tests.chaos import changes

LIMIT = 10.0
"""Seconds after which an input that is read counts as one that hangs the tool."""
TIMEOUT = 90.0
"""Seconds after which a child that does real work is given up."""
HUNG = -1000


@dataclass(frozen=True)
class Bomb:
    """How a child ends: by a signal just before its k-th change, after some seconds, or as a file grows too large.

    Attributes:
        size: bytes of a file at which the system kills the child in the middle of a write, whichever library writes.
        full: the same limit, but the write fails as on a full disk instead.
    """

    change: int | None = None
    seconds: float | None = None
    size: int | None = None
    full: int | None = None
    signal: int = signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit code, or minus the signal's number, or HUNG.
        changes: how many changes it saw, if it ended by itself.
    """

    code: int
    output: str
    seconds: float
    changes: int = 0

    @property
    def killed(self) -> bool:
        return self.code < 0 and self.code != HUNG

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def command(arguments: Sequence[str], root: Path, bomb: Bomb | None = None, timeout: float = TIMEOUT) -> Ended:
    """The command line in a forked child whose changes below `root` count."""
    return forked(lambda: app.main(list(arguments)), root, bomb, timeout)


def forked(work: Callable[[], int], root: Path, bomb: Bomb | None = None, timeout: float = TIMEOUT) -> Ended:
    """Call `work` in a child, its output caught."""
    scratch = f"{root}-scratch"
    said, output = os.pipe()  # which no limit on files ends
    os.set_blocking(said, False)
    with os.fdopen(said, "rb", buffering=0) as stream, tempfile.TemporaryFile() as counted:
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(work, root, bomb or Bomb(), output, counted.fileno(), scratch)
        os.close(output)
        heard: list[bytes] = []
        code = _wait(pid, bomb, timeout, lambda: heard.append(stream.read() or b""))
        shutil.rmtree(scratch, ignore_errors=True)
        counted.seek(0)
        count = int(counted.read() or 0)
        return Ended(code, b"".join(heard).decode(errors="replace"), time.monotonic() - started, count)


def _child(work: Callable[[], int], root: Path, bomb: Bomb, output: int, counted: int, scratch: str) -> None:
    """Never returns: what the parent had open or registered is none of the child's."""
    code = 99
    try:
        gc.disable()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if bomb.size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if (size := bomb.size if bomb.full is None else bomb.full) is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        os.makedirs(scratch, exist_ok=True)
        tempfile.tempdir = scratch  # what a killed child leaves half-written there is nobody else's
        datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None
        seen = changes.watch(root, bomb.change, bomb.signal)
        code = work()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.pwrite(counted, str(seen.count).encode(), 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _wait(pid: int, bomb: Bomb | None, timeout: float, listen: Callable[[], None]) -> int:
    """The child's exit code; it gets its signal when its time comes, and is ended when it hangs."""
    started, sent = time.monotonic(), False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        listen()
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if bomb is not None and bomb.seconds is not None and passed >= bomb.seconds and not sent:
            os.kill(pid, bomb.signal)
            sent = True
        if passed > timeout:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return HUNG
        time.sleep(0.002 if passed < 0.2 else 0.01)
