"""Commands in forked children of a process that has imported everything, ended in the middle or left alone."""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

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


def _child(work: Callable[[], int], root: Path, bomb: Bomb, output: int, counted: int, scratch: str) -> NoReturn:
    """What the parent had open or registered is none of the child's."""
    code = 99
    try:
        gc.disable()
        _speak_into(output)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if bomb.size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if (size := bomb.size if bomb.full is None else bomb.full) is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        _leave_things_in(scratch)
        seen = changes.watch(root, bomb.change, bomb.signal)
        code = work()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.pwrite(counted, str(seen.count).encode(), 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _speak_into(output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


def _leave_things_in(scratch: str) -> None:
    """What a killed child leaves half-written in temporary folders is nobody else's."""
    os.makedirs(scratch, exist_ok=True)
    tempfile.tempdir = scratch
    datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None


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


class Child:
    """A forked child that is given one line of words after another; where it hangs or dies, another takes its place.

    A fork copies the tables of all that was imported, and each page that it touches: a tenth of a second, which is more
    than most commands take. What is to be killed needs a process of its own, see `forked`. What is only looked at does
    not, and has to end as it would alone, whatever the same process was asked before.
    """

    def __init__(self, work: Callable[[list[str]], int], root: Path) -> None:
        self._work, self._root, self._scratch = work, root, f"{root}-scratch"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._pid, self._asked, self._answers = 0, -1, -1

    def __call__(self, words: Sequence[str], timeout: float = TIMEOUT) -> Ended:
        """Let it work on these words in `root`, its output caught."""
        if not self._pid:
            self._start()
        os.ftruncate(self._said.fileno(), 0)
        started = time.monotonic()
        os.write(self._asked, json.dumps(list(words)).encode() + b"\n")
        there = select.select([self._answers], [], [], timeout)[0]
        answer = os.read(self._answers, 16) if there else b""
        code = int(answer) if answer else self._ended(hung=not there)
        shutil.rmtree(self._scratch, ignore_errors=True)
        said = os.pread(self._said.fileno(), os.fstat(self._said.fileno()).st_size, 0)
        return Ended(code, said.decode(errors="replace"), time.monotonic() - started)

    def close(self) -> None:
        """End it, if there is one."""
        if self._pid:
            self._ended(hung=True)
        self._said.close()

    def _start(self) -> None:
        (given, self._asked), (self._answers, answered) = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._asked)  # else it would never hear that there is nobody left to ask
            self._serve(given, answered)
        os.close(given)
        os.close(answered)

    def _ended(self, *, hung: bool) -> int:
        if hung:
            os.kill(self._pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        os.close(self._asked)
        os.close(self._answers)
        self._pid = 0
        return HUNG if hung else code

    def _serve(self, given: int, answered: int) -> NoReturn:
        try:
            gc.freeze()
            _speak_into(self._said.fileno())
            for line in os.fdopen(given):
                os.write(answered, b"%d\n" % self._worked(json.loads(line)))
        finally:
            os._exit(1)

    def _worked(self, words: list[str]) -> int:
        os.lseek(1, 0, os.SEEK_SET)
        _leave_things_in(self._scratch)
        try:
            os.chdir(self._root)  # another folder of that name than last time
            return self._work(words)
        except BaseException:
            traceback.print_exc()
            return 99
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
