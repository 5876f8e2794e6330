"""Consoles and readers of every kind: narrow encodings, closed pipes, full outputs, names that no library takes."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gtqlora.cli import app, console, main
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
    with pytest.raises(SystemExit):  # as the parser leaves after its own words
        main(["inspect", str(model), "--模型"])


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
        (["train", "organism:routed", "--contrast", "organism", "--run", os.fsdecode(b"r\xff")], "udcff"),
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

    monkeypatch.setattr(app, "_embedded", strikes)
    assert main(["inspect", "m"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and line in err and len(err) < 300


def test_nothing_is_said_of_kernels_that_are_not_used() -> None:
    import logging

    console.quieten()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
