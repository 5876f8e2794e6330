"""Fresh processes without the seconds that imports take: children of one that has imported libraries and done nothing.

It runs beside the tests, one for all workers. For each of them it forks a server that reads a request a line and
answers with how its children ended. Nothing of gtqlora is imported in it, so a child knows of gtqlora what its code
imports. Ranks, and others that are not about imports, are children of a second one that is forked from it and has
imported the stages, too.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import IO, NoReturn, TypedDict

_SECONDS = 120
"""After which a child is given up."""


class Child(TypedDict):
    """Python code, its `sys.argv[1:]`, its environment, the folder for what it says."""

    code: str
    arguments: list[str]
    environment: dict[str, str]
    said: str


Ended = subprocess.CompletedProcess[str]


def process(code: str, *arguments: object, knowing: bool = False) -> Ended:
    """Run Python code, in which `torch` is imported, in such a child with one thread.

    Args:
        knowing: the stages are imported, too: for what is about a new process, and not about what that imports.
    """
    return _together(code, arguments, [{}], knowing=knowing)[0]


def ranks(
    code: str,
    *arguments: object,
    count: int,
    machines: int = 1,
    own: Mapping[int, Sequence[object]] | None = None,
    **more: object,
) -> list[Ended]:
    """Run Python code in so many children at once, with the environment in which `torchrun` starts its ranks.

    Args:
        machines: on which they seem to run.
        own: arguments of single ranks in place of those of all.
        more: further variables of their environment; None removes one.
    """
    port, here = _free_port(), count // machines
    given = [
        {
            **{"RANK": str(rank), "WORLD_SIZE": str(count)},
            **{"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{name: None if value is None else str(value) for name, value in more.items()},
        }
        for rank in range(count)
    ]
    return _together(code, arguments, given, own or {}, knowing=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _together(
    code: str,
    arguments: Sequence[object],
    given: Sequence[Mapping[str, str | None]],
    own: Mapping[int, Sequence[object]] | None = None,
    *,
    knowing: bool = False,
) -> list[Ended]:
    """Run as many children as environments are given, and wait for all."""
    server = _server(KNOWING if knowing else "")
    with TemporaryDirectory() as folder:
        children = list[Child]()
        for place, more in enumerate(given):
            said = Path(folder) / str(place)
            said.mkdir()
            whole = {**os.environ, **more}
            environment = {name: value for name, value in whole.items() if value is not None}
            words = [*map(str, (own or {}).get(place, arguments))]
            children.append(Child(code=code, arguments=words, environment=environment, said=str(said)))
        server.write(json.dumps(children) + "\n")
        server.flush()
        codes = json.loads(server.readline())
        return [_ended(child, ended) for child, ended in zip(children, codes, strict=True)]


def _ended(child: Child, code: int) -> Ended:
    out, err = ((Path(child["said"]) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(child["arguments"], code, out, err)


KNOWING = "-knowing"
"""Behind the name of the process: the one that has imported the stages."""


@cache
def _server(which: str) -> IO[str]:
    """Connect to a process of this run of the tests; whoever comes first starts it."""
    place = Path(gettempdir()) / f"gtqlora-warm-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ours = socket.socket(socket.AF_UNIX)
        try:
            ours.connect(f"{place}{which}")
        except OSError:  # there is none, or none any more
            _start(place)
            ours.connect(f"{place}{which}")
    return ours.makefile("rw")


def _start(place: Path) -> None:
    """Start it; it takes no more workers when its input ends, that is with this process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.warm", str(place)]
    # sets have another order there than here
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    with socket.socket(socket.AF_UNIX) as plain, socket.socket(socket.AF_UNIX) as knowing:
        for listening, which in ((plain, ""), (knowing, KNOWING)):
            Path(f"{place}{which}").unlink(missing_ok=True)
            listening.bind(f"{place}{which}")
            listening.listen()
        there = [plain.fileno(), knowing.fileno()]
        command += map(str, there)
        _STARTED.append(subprocess.Popen(command, stdin=subprocess.PIPE, cwd=_ROOT, env=environment, pass_fds=there))


_STARTED: list[subprocess.Popen[bytes]] = []
"""Kept, as its input ends with it."""
_ROOT = Path(__file__).parents[1]


def _take(plain: socket.socket, knowing: socket.socket, place: Path) -> None:
    """Fork a server for each worker that comes, and the second process for the first that asks for it."""
    for listening in _asked(plain, knowing):
        if listening is plain:
            _serve(plain)
        elif os.fork() == 0:
            plain.close()
            _know()
            for _ in _asked(knowing):
                _serve(knowing)
            os._exit(0)
        else:
            knowing.close()
    for name in (place, Path(f"{place}{KNOWING}"), place.with_suffix(".lock")):
        name.unlink(missing_ok=True)


def _asked(*listening: socket.socket) -> Iterator[socket.socket]:
    """Give the socket to which a worker comes, until the input ends."""
    while True:
        open_ones = [one for one in listening if one.fileno() >= 0]
        if select.select([sys.stdin, *open_ones], [], [])[0] == [sys.stdin]:
            return
        yield from select.select(open_ones, [], [], 0)[0]


def _serve(listening: socket.socket) -> None:
    """Fork a server for the worker that came."""
    with listening.accept()[0] as worker:
        if os.fork() == 0:
            listening.close()
            with worker.makefile("rw") as both:
                for line in both:
                    both.write(json.dumps(_forked(json.loads(line))) + "\n")
                    both.flush()
            os._exit(0)


def _know() -> None:
    """Import the stages."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import gtqlora.cli.app  # noqa: F401
    import tests.ranks.checks  # noqa: F401

    quiet()
    get_checkpoint_conversion_mapping("qwen3_moe")  # hundreds of patterns, which are compiled once
    gc.freeze()  # collections in children must not touch, and so copy, all that was imported


def _forked(children: Sequence[Child]) -> list[int]:
    started = list[int]()
    for child in children:
        started.append(os.fork())
        if started[-1] == 0:
            _child(child)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]


def _child(request: Child) -> NoReturn:
    code = 1
    try:
        signal.alarm(_SECONDS)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(request["said"]) / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["-c", *request["arguments"]]
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__", "torch": sys.modules["torch"]})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def quiet() -> None:
    """One thread, so that two workers do not take each other's cores, and nothing said that is not ours."""
    import torch
    import transformers
    from accelerate.utils import imports

    # asked thirty times as a training begins, each time from the package's metadata: a sixth of a toy's training
    imports._is_package_available = cache(imports._is_package_available)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch
    import trl.trainer.dpo_trainer  # noqa: F401

    torch.set_num_threads(1)
    plain, knowing = (socket.socket(fileno=int(there)) for there in sys.argv[2:])
    _take(plain, knowing, Path(sys.argv[1]))
