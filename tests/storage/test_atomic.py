"""What `atomic_write` promises: nothing of the user's is replaced or swept, and errors name the file."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from gtqlora.errors import GtqloraError, RunError
from gtqlora.storage import atomic
from gtqlora.storage.atomic import NotWritten, atomic_write, drop_leftovers, rename_new, write_json, write_parquet


def _contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def _write(staged: Path, kind: str, text: str = "ours") -> None:
    if kind == "folder":
        staged.mkdir()
        (staged / "a").write_text(text)
    else:
        staged.write_text(text)


def _write_new(target: Path, body: Callable[[Path], object]) -> None:
    with atomic_write(target, replace=False) as staged:
        body(staged)


def _text(path: Path) -> str:
    return (path / "a").read_text() if path.is_dir() else path.read_text()


# --- an existing destination

THEIRS: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("theirs"),
    "empty file": lambda path: path.touch(),
    "folder": lambda path: (path.mkdir(), (path / "precious").write_text("theirs")),
    "empty folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("elsewhere"),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.fixture(params=["renameat2", "without"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system call, and as on a file system that has it not."""
    if request.param == "without":
        monkeypatch.setattr(atomic, "_renameat2", lambda *_: errno.EINVAL)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.usefixtures("way")
def test_what_is_there_is_never_replaced(tmp_path: Path, kind: str, theirs: str) -> None:
    target = tmp_path / "out.parquet"
    THEIRS[theirs](target)
    before = (os.lstat(target), _contents(target) if target.is_dir() else None)
    with pytest.raises(RunError, match=f"{target}: exists already"), atomic_write(target, replace=False):
        pytest.fail("it began to write")
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]
    target.rename(tmp_path / "aside")

    with pytest.raises(RunError, match=rf"{target}: came while .* the work is in {target}\.kept"):
        _write_new(target, lambda staged: (_write(staged, kind), (tmp_path / "aside").rename(target)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.parquet", "out.parquet.kept"]
    assert _text(tmp_path / "out.parquet.kept") == "ours"
    now = os.lstat(target)
    assert (now.st_ino, now.st_size, now.st_mode) == (before[0].st_ino, before[0].st_size, before[0].st_mode)
    assert before[1] is None or _contents(target) == before[1]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.usefixtures("way")
def test_a_new_name_is_taken_and_kept_work_never_replaces_other_kept_work(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a"
    for number, name in enumerate(("a", "a.kept", "a.kept-2")):
        if number:
            target.rename(tmp_path / "aside")
        try:
            with atomic_write(target, replace=False) as staged:
                _write(staged, kind, str(number))
                if number:
                    (tmp_path / "aside").rename(target)
        except RunError:
            assert number
        assert _text(tmp_path / name) == str(number)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.kept", "a.kept-2"]


@pytest.mark.usefixtures("way")
def test_rename_new_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rename_new(tmp_path / "nothing", tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    def body(staged: Path) -> None:
        _write(staged, "folder")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _write_new(tmp_path / "a", body)
    assert list(tmp_path.iterdir()) == []


def test_parquet_can_be_new_only(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("theirs")
    with pytest.raises(RunError, match="exists already"):
        write_parquet(tmp_path / "a.parquet", [{"x": 1}], replace=False)
    assert _contents(tmp_path) == {"a.parquet": "theirs"}


# --- leftovers

_KILLED = """
import os, signal, sys
from pathlib import Path
from gtqlora.storage.atomic import atomic_write
with atomic_write(Path(sys.argv[1]), replace=False) as staged:
    staged.mkdir()
    (staged / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_goes_with_the_next_write_of_another_name(tmp_path: Path) -> None:
    for name in ("one", "two.b", "th[r]ee", ".four", "li\nne"):
        died = subprocess.run([sys.executable, "-c", _KILLED, tmp_path / name], check=False)
        assert died.returncode == -signal.SIGKILL
        left = [p.name for p in tmp_path.iterdir()]
        assert len(left) == 1 and left[0].startswith(f".{name}.")  # and not what was left before
    write_json(tmp_path / "other.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def test_a_killed_process_that_had_just_made_its_staging_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".a.abcdefgh.gtqlora-staging").mkdir()
    (tmp_path / ".b.abcdefgh.gtqlora-staging").mkdir()
    (tmp_path / ".b.abcdefgh.gtqlora-staging" / ".lock").touch()
    drop_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _folder_with(name: str, **files: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / name).mkdir(parents=True)
        for file, text in files.items():
            (place / name / file.replace("DOT", ".")).write_text(text)

    return make


def _linked(place: Path) -> None:
    _folder_with("real", DOTlock="gtqlora staging\n", mine="x")(place)
    (place / ".a.abcdefgh.gtqlora-staging").symlink_to("real")


def _with_odd_lock(place: Path) -> None:
    _folder_with(".a.abcdefgh.gtqlora-staging", mine="x")(place)
    os.mkfifo(place / ".a.abcdefgh.gtqlora-staging" / ".lock")


def _with_linked_lock(place: Path) -> None:
    (place / "theirs").write_text("gtqlora staging\n")
    _folder_with(".a.abcdefgh.gtqlora-staging", mine="x")(place)
    (place / ".a.abcdefgh.gtqlora-staging" / ".lock").symlink_to("../theirs")


@pytest.mark.parametrize(
    "make",
    [
        _folder_with(".a.abcdefgh.gtqlora-staging", mine="x"),
        _folder_with(".a.abcdefgh.gtqlora-staging", DOTlock="", mine="x"),
        _folder_with(".a.abcdefgh.gtqlora-staging", DOTlock="somebody else's", mine="x"),
        _folder_with(".a.gtqlora-staging", DOTlock="gtqlora staging\n"),
        _folder_with(".a.abcdefgh.gtqlora-staging.mine", DOTlock="gtqlora staging\n"),
        _folder_with("a.abcdefgh.gtqlora-staging", DOTlock="gtqlora staging\n"),
        lambda place: (place / ".a.abcdefgh.gtqlora-staging").write_text("a file"),
        *(_linked, _with_odd_lock, _with_linked_lock),
    ],
)
def test_what_merely_looks_like_a_leftover_stays(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    drop_leftovers(tmp_path)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_staging_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, swept = atomic.hold, []

    def late(file: Path, says: bytes = b"") -> object:
        if not swept:
            swept.append(file)
            monkeypatch.setattr(atomic, "hold", hold)
            drop_leftovers(tmp_path)
        return hold(file, says)

    monkeypatch.setattr(atomic, "hold", late)
    write_json(tmp_path / "a.json", {})
    assert swept and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# --- errors


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk with so little left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)


def _nested(staged: Path) -> None:
    staged.mkdir()
    write_json(staged / "a.json", {"x": "y" * 100_000})


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda staged: staged.write_text("x" * 100_000),
    "safetensors": lambda staged: save_file({"a": torch.zeros(100_000)}, staged),
    "safetensors in a folder": lambda staged: (staged.mkdir(), save_file({"a": torch.zeros(100_000)}, staged / "m")),
    "torch": lambda staged: torch.save(torch.zeros(100_000), staged),
    "parquet": lambda staged: pa.parquet.write_table(  # pyright: ignore[reportAttributeAccessIssue]
        pa.table({"a": [os.urandom(100_000)]}), staged, compression="none"
    ),
    "JSON in a folder": _nested,
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_names_the_target_whatever_library_finds_out(tmp_path: Path, library: str) -> None:
    target = tmp_path / "out"
    with _files_of_at_most(10_000), pytest.raises((OSError, RunError)) as caught, atomic_write(target) as staged:
        WRITERS[library](staged)
    if isinstance(caught.value, OSError):
        assert caught.value.filename == str(target) and caught.value.strerror == os.strerror(errno.EFBIG)
    else:
        assert str(caught.value).startswith(f"{target}: not written (")
    assert "staging" not in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (OSError("could not write"), NotWritten),
        (pa.ArrowInvalid("x"), NotWritten),
        (pa.ArrowNotImplementedError("x"), NotWritten),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), NotWritten),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ValueError("x"), ValueError),
        (GtqloraError("of our own"), GtqloraError),
    ],
)
def test_what_errors_become(tmp_path: Path, error: Exception, seen: type[Exception]) -> None:
    with pytest.raises(seen) as caught, atomic_write(tmp_path / "out"):
        raise error
    assert type(caught.value) is seen
    named = getattr(caught.value, "filename", None) or str(caught.value)
    assert str(tmp_path / "out") in str(named) or caught.value is error


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "out"):
        (tmp_path / "source").read_text()
    assert caught.value.filename == str(tmp_path / "source")


@pytest.mark.parametrize("name", ["a\0b", "a\udcff", "~nobody-of-that-name/x", "n" * 300])
def test_names_no_file_system_takes(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises((RunError, OSError), match=r"cannot be used as a path|File name too long"),
        atomic_write(Path(name)),
    ):
        pytest.fail("it began to write")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_the_wanted_place_is_named() -> None:
    with pytest.raises(OSError, match="'/proc/weights'") as caught, atomic_write(Path("/proc/weights"), replace=False):
        pass
    assert caught.value.filename == "/proc/weights"
