"""Fresh processes without the seconds that imports take: children of one that has imported libraries and done nothing.

It runs beside the tests, reads a request a line and answers with how the child ended. Nothing of gtqlora is imported
in it, so a child knows of gtqlora what its code imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NoReturn, TypedDict

_SECONDS = 300
"""After which a child is given up."""


class Request(TypedDict):
    """Python code, its `sys.argv[1:]`, its environment, and the folder for what it says."""

    code: str
    arguments: list[str]
    environment: dict[str, str]
    said: str


def process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code, in which `torch` is imported, in such a child with one thread."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with TemporaryDirectory() as said:
        request = Request(code=code, arguments=[*map(str, arguments)], environment=dict(os.environ), said=said)
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        ended = int(server.stdout.readline())
        out, err = ((Path(said) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(request["arguments"], ended, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    """Start it; it ends when its input does, that is with this process."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.warm"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT)


_ROOT = Path(__file__).parents[1]


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Fork a child for each request and say how it ended."""
    for line in requests:
        request: Request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(request)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


def _child(request: Request) -> NoReturn:
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
