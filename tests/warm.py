"""Fresh processes without the seconds that imports take: children of one that has imported libraries and done nothing.

It runs beside the tests, reads a request a line and answers with how its children ended. Nothing of gtqlora is imported
in it, so a child knows of gtqlora what its code imports.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NoReturn, TypedDict

_SECONDS = 120
"""After which a child is given up."""


class Child(TypedDict):
    """Python code, its `sys.argv[1:]`, its environment, and the folder for what it says."""

    code: str
    arguments: list[str]
    environment: dict[str, str]
    said: str


Ended = subprocess.CompletedProcess[str]


def process(code: str, *arguments: object) -> Ended:
    """Run Python code, in which `torch` is imported, in such a child with one thread."""
    return _together(code, arguments, [{}])[0]


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
    return _together(code, arguments, given, own or {})


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _together(
    code: str,
    arguments: Sequence[object],
    given: Sequence[Mapping[str, str | None]],
    own: Mapping[int, Sequence[object]] | None = None,
) -> list[Ended]:
    """Run as many children as environments are given, and wait for all."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with TemporaryDirectory() as folder:
        children = list[Child]()
        for place, more in enumerate(given):
            said = Path(folder) / str(place)
            said.mkdir()
            whole = {**os.environ, **more}
            environment = {name: value for name, value in whole.items() if value is not None}
            words = [*map(str, (own or {}).get(place, arguments))]
            children.append(Child(code=code, arguments=words, environment=environment, said=str(said)))
        server.stdin.write(json.dumps(children) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        return [_ended(child, ended) for child, ended in zip(children, codes, strict=True)]


def _ended(child: Child, code: int) -> Ended:
    out, err = ((Path(child["said"]) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(child["arguments"], code, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    """Start it; it ends when its input does, that is with this process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.warm"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT)


_ROOT = Path(__file__).parents[1]


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Fork the children of each request and say how they ended."""
    for line in requests:
        started = list[int]()
        for child in json.loads(line):
            started.append(os.fork())
            if started[-1] == 0:
                _child(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


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


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch
    import trl.trainer.dpo_trainer  # noqa: F401

    torch.set_num_threads(1)
    serve(sys.stdin, sys.stdout)
