"""Consoles and readers of every kind: narrow encodings, closed pipes, full outputs, names that no library takes."""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gtqlora.cli import app, console, main, verbs
from gtqlora.progress import track
from tests import models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny(tmp_path_factory.mktemp("console") / "modèle-模型-[b]", "qwen3_moe")


def on(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)


def text_of(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "cp437", "shift_jis"])
def test_what_a_console_cannot_show_is_replaced(
    model: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, tmp_path: Path
) -> None:
    out, err = on(encoding), on(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["inspect", str(model)]) == 0
    assert "qwen3_moe" in text_of(out) and "?" in text_of(out)
    assert main(["inspect", str(model), "--json"]) == 0
    assert main(["inspect", str(tmp_path / "日本 ü €")]) == 2
    assert "error: " in text_of(err)
    with console.stage_progress():
        assert list(track([1, 2], "réglage 模型 ✓", 2)) == [1, 2]
    assert "glage" in text_of(err)
    assert main(["inspect", str(model), "--模型"]) == 2  # the parser's own words


def test_json_is_the_same_on_any_console(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = on("ascii"), on("utf-8")
    for stream in (narrow, wide):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(text_of(narrow)) == json.loads(text_of(wide))


@contextmanager
def read_by_nobody() -> Iterator[io.TextIOWrapper]:
    """A pipe whose other end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_reader_who_leaves_ends_nothing(model: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    with read_by_nobody() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["inspect", str(model), *more]) in (0, app._READER_LEFT)
        stream.flush()  # as Python does when it ends


def test_work_goes_on_when_nobody_sees_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    with read_by_nobody() as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with console.stage_progress():
            assert list(track(range(3), "train", 3)) == [0, 1, 2]
        assert main(["inspect", "nowhere"]) == 2


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_an_output_without_room(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["inspect", str(model), *more]) == 2
    err = capsys.readouterr().err
    assert err == "error: standard output: No space left on device; make room and run the same command again\n"


def test_no_output_at_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", str(model)]) == 0
    assert main(["inspect", str(model), "--json"]) == 0
    assert main(["inspect", "nowhere"]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "a\0b"], "NUL"),
        (["train", "m", "--contrast", "c", "--run", "r\0"], "NUL"),
        (["train", "m", "--contrast", "c", "--run", "r", "--set", "judge=a\0"], "NUL"),
        (["verify", os.fsdecode(b"r\xff")], "udcff"),
        (
            [
                "train",
                "organism:routed",
                "--contrast",
                "organism",
                "--config",
                "organism",
                "--run",
                os.fsdecode(b"r\xff"),
            ],
            "udcff",
        ),
        (["contrast", "check", os.fsdecode(b"c\xff.jsonl")], "no such"),
    ],
)
def test_names_that_no_library_takes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "/a/b: No space left on device; make room"),
        (OSError(errno.EFBIG, "File too large", "/a/b"), "/a/b: File too large; raise the limit"),
        (OSError(errno.EACCES, "Permission denied", "/a"), "/a: Permission denied"),
        (OSError("odd"), "input or output: odd"),
        (UnicodeEncodeError("utf-8", "x" * 500 + "\udcff", 500, 501, "surrogates not allowed"), r"x\udcff': this name"),
    ],
)
def test_errors_of_the_system_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def strikes(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(verbs, "embedded_model", strikes)
    assert main(["inspect", "m"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and len(err) < 300


PROGRESS = """
from gtqlora.cli.console import demo_progress, stage_progress
from gtqlora.progress import report
with stage_progress():
    for done in range(0, 12346, 2469):
        report("after layer 17: 16 of 384 experts ablated at random, ranked anew", done, 12345)
with demo_progress() as show:
    show(("residual", "projection: without layer 3's direction", 98, 105))
"""


@pytest.mark.parametrize("width", [60, 80, 160])
def test_progress_fits_a_terminal_and_cuts_no_number(width: int) -> None:
    text = on_a_terminal(PROGRESS, width)
    lines = {line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()}
    assert all(len(line) <= width for line in lines)
    assert any(line.endswith("left") and " 12345/12345 " in line for line in lines)
    assert any(line.startswith("residual: projection:") and " 98/105 " in line for line in lines)
    assert not re.search(r"\d…|…\d", text) and all(re.search(r" \d+/\d+ .*left$", line) for line in lines)


def on_a_terminal(code: str, width: int) -> str:
    """Return what a program shows on a terminal of this width, without the codes that move the cursor."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    shown = b""
    with suppress(OSError):  # what Linux says at the end
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait() == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def test_progress_that_nobody_reports_leaves_no_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.stage_progress():
        pass
    with console.demo_progress():
        pass
    assert capsys.readouterr() == ("", "")
    with console.stage_progress():
        assert list(track([1], "train", 1)) == [1]
        sys.stdout.write("a library's own words\n")
    out, err = capsys.readouterr()
    assert not out and "train" in err and "a library's own words" in err


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_rests_only_while_libraries_are_imported(fails: bool) -> None:
    with suppress(ValueError), console.starting():
        assert not gc.isenabled()
        if fails:
            raise ValueError
    assert gc.isenabled()


def test_nothing_is_said_of_kernels_that_are_not_used() -> None:
    import logging

    console.quieten()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
