"""Files and folders that appear whole or not at all, with one writer at a time.

`atomic_write` writes into a hidden staging folder beside the target, brings it onto the disk, and renames it.
`together` does so for several names at once. A staging folder holds a lock, which dies with its process, so that
whoever comes next can tell the leftovers of a killed process (`drop_leftovers`) from the work of a live one.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from gtqlora.errors import RunError
from gtqlora.storage.contents import first_line
from gtqlora.storage.locks import LOCK, hold

_STAGING, _OLD = ".gtqlora-staging", ".old"
# Eight characters are what `tempfile.mkdtemp` puts between prefix and suffix.
_NAME = re.compile(rf"\.(?P<target>.+)\.[a-z0-9_]{{8}}{re.escape(_STAGING)}", re.DOTALL)
_OURS = b"gtqlora staging\n"
"""The text of our lock in a staging folder: a folder that merely has such a name is not removed."""
_NEXT, _LAST = ".gtqlora-next", ".gtqlora-last"
# PyTorch reports a failed write as a RuntimeError, and these are its words for it.
_TORCH_WRITES = re.compile(r"PytorchStreamWriter|inline_container|iostream error|cannot be opened|Parent directory")
# Error numbers of a kernel or file system without `renameat2`.
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


# --- errors


def checked_path(path: str | Path) -> Path:
    """Return a path that the user gave, with `~` resolved.

    Raises:
        RunError: no file system takes it, or it cannot be written into an artefact.
    """
    try:
        str(path).encode()
        if "\0" in str(path):
            raise ValueError("it holds a NUL byte")
        return Path(path).expanduser()
    except (ValueError, RuntimeError) as error:  # UnicodeEncodeError is a ValueError
        raise RunError(f"{str(path)!a}: cannot be used as a path ({error}); choose another name") from error


class NotWritten(RunError):
    """A file or folder could not be written, whichever library reported it."""

    def __init__(self, target: Path, reason: str) -> None:
        super().__init__(f"{target}: not written ({reason})")
        self.target, self.reason = target, reason


@contextmanager
def named_errors(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Make errors of writing in a `with` block name `target`, where they name no file or one in the staging folder."""

    def inside(name: object) -> bool:
        return name is None or (staging is not None and staging in Path(str(name)).parents)

    try:
        yield
    except NotWritten as error:
        if not inside(error.target):
            raise
        raise NotWritten(target, error.reason) from error
    except OSError as error:
        if error.errno is None:
            raise NotWritten(target, first_line(error)) from error
        if not inside(error.filename):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    except (SafetensorError, pa.ArrowException) as error:
        raise NotWritten(target, first_line(error)) from error
    except RuntimeError as error:
        if not _TORCH_WRITES.search(str(error)):
            raise
        raise NotWritten(target, f"{first_line(error)}; is the disk full?") from error


@contextmanager
def scratch_errors() -> Iterator[None]:
    """Make errors of libraries that write scratch files in a `with` block name the folder of scratch files.

    Some libraries close a file twice, so the error that arrives is not the one that says what went wrong: the causes
    of an error are searched for one with an error number.
    """
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
            cause = cause.__cause__ or cause.__context__
        if cause is None or getattr(cause, "filename", None) is not None:
            raise
        assert isinstance(cause, OSError) and cause.errno is not None
        raise OSError(cause.errno, os.strerror(cause.errno), tempfile.gettempdir()) from error


# --- staging


def _staging_for(target: Path) -> tuple[Path, IO[bytes]]:
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGING, dir=target.parent))
        # Another process may take the folder for a leftover, and remove it, before it is locked.
        with suppress(FileNotFoundError):
            lock = hold(staging / LOCK, _OURS)
            if lock is not None:
                return staging, lock


def clear(path: Path) -> None:
    """Remove a file, a folder, or a link but not what it leads to."""
    # `is_dir` follows links, and what a link leads to is not ours to remove.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(staging: Path, target: Path) -> None:
    """Put back a folder that was moved aside and not replaced, then remove the staging folder.

    The lock goes last: it marks the folder as ours, so that a process killed here leaves a leftover that is cleaned up.
    """
    if (staging / _OLD).exists() and not os.path.lexists(target):
        os.replace(staging / _OLD, target)
    # What cannot be removed now is removed by the next process that writes here.
    with suppress(OSError):
        for entry in staging.iterdir():
            if entry.name != LOCK:
                clear(entry)
        (staging / LOCK).unlink()
        staging.rmdir()


def _lock_of_leftover(staging: Path) -> IO[bytes] | None:
    """Lock a staging folder of ours whose process is dead; None if it is not ours, or in use."""
    try:
        facts = os.lstat(staging)
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
            return None
        if not (names := os.listdir(staging)):
            staging.rmdir()  # killed before it was locked
            return None
        lock = hold(staging / LOCK) if LOCK in names else None
    except (OSError, RunError):  # not ours, or just removed by its owner
        return None
    if lock is None:
        return None
    says = lock.read()
    if says == _OURS or (says == b"" and names == [LOCK]):
        return lock
    lock.close()
    return None


def leftovers(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield everything named like a staging folder, with the name of what was to be written there."""
    for staging in folder.glob(f".*{_STAGING}"):
        if match := _NAME.fullmatch(staging.name):
            yield staging, match["target"]


def drop_leftovers(folder: Path) -> None:
    """Remove the staging folders that killed processes left in `folder`; those of live processes are locked."""
    for staging, name in leftovers(folder):
        lock = _lock_of_leftover(staging)
        if lock is not None:
            _settle(staging, folder / name)
            lock.close()


# --- writing


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, onto the disk."""
    for each in [path, *path.rglob("*")]:
        _fsync(each)


def refuse_existing(target: Path) -> None:
    """Check that nothing has that name, not even a link to nowhere.

    Raises:
        RunError: something has it.
    """
    if os.path.lexists(target):
        # The process that wrote it may have been killed right after the rename, with its staging folder left.
        drop_leftovers(target.parent)
        raise RunError(f"{target}: exists already; choose another name or remove it")


def refuse_inside(target: Path, *folders: Path) -> None:
    """Check that a new folder does not lie in any of these, by whatever links: what is read there would change.

    Raises:
        RunError: it does.
    """
    place = Path(os.path.realpath(checked_path(target)))
    for folder in folders:
        if place.is_relative_to(os.path.realpath(folder)):
            raise RunError(f"{target}: lies inside {folder}, which has to stay as it is; choose another folder")


@contextmanager
def atomic_write(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a path in a hidden folder beside `target`; the file or folder written there takes its place on success.

    A file is replaced in one rename. A folder that is there already is moved aside first: a process killed between the
    two renames leaves it in the hidden folder, from where the next `atomic_write` or `Run` puts it back.

    Args:
        replace: take the place of what is there. Otherwise whatever has that name, or gets it meanwhile, stays.

    Raises:
        RunError: `target` is there, or came while it was written; the message says where the finished work is then.
    """
    target = checked_path(target)
    if not replace:
        refuse_existing(target)
    with named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        drop_leftovers(target.parent)
        try:
            staging, lock = _staging_for(target)
        except OSError as error:  # it names the hidden folder, which the user has never heard of
            raise OSError(error.errno, error.strerror, str(target)) from error
    new = staging / target.name
    try:
        with named_errors(target, staging):
            yield new
            # Before the rename: after a power cut a name must not stand for a file that never reached the disk.
            sync(new)
            _put(new, target, replace)
            _fsync(target.parent)
    finally:
        _settle(staging, target)
        lock.close()


def _put(new: Path, target: Path, replace: bool) -> None:
    if replace:
        if target.is_dir():
            os.replace(target, new.parent / _OLD)
        os.replace(new, target)
        return
    try:
        rename_new(new, target)
    except FileExistsError as error:
        kept = _keep(new, target)
        raise RunError(f"{target}: came while it was being written and is left alone; the work is in {kept}") from error


def _keep(new: Path, target: Path) -> Path:
    """Give finished work another name beside the one that is taken, and return it."""
    number = 1
    while True:
        kept = target.with_name(f"{target.name}.kept" + (f"-{number}" if number > 1 else ""))
        try:
            rename_new(new, kept)
        except FileExistsError:
            number += 1
        else:
            return kept


def rename_new(source: Path, target: Path) -> None:
    """Rename without ever replacing anything.

    Raises:
        FileExistsError: something has that name.
    """
    code = _renameat2(source, target)
    if code in _NOT_HERE:
        _rename_new_slowly(source, target)
    elif code:
        raise OSError(code, os.strerror(code), str(target))


def _renameat2(source: Path, target: Path) -> int:
    """Call Linux's rename that does not replace; return the error's number, or 0."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return errno.ENOSYS
    here, no_replace = -100, 1  # AT_FDCWD and RENAME_NOREPLACE of <fcntl.h> and <linux/fs.h>
    return 0 if call(here, os.fsencode(source), here, os.fsencode(target), no_replace) == 0 else ctypes.get_errno()


def _rename_new_slowly(source: Path, target: Path) -> None:
    """Rename without replacing where the kernel does not offer it: claim the name first."""
    if source.is_dir():
        # Whoever makes the folder owns the name, and rename replaces a folder only if it is empty.
        target.mkdir()
        os.rename(source, target)
    else:
        os.link(source, target)
        source.unlink()


# --- several at once


@contextmanager
def together(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder; what is written there takes the places of the same names in `folder`, all or none.

    A single rename decides. What it decided is carried out by `take_over`, here or, after a kill, when the run is
    opened.
    """
    with named_errors(folder):
        staging, lock = _staging_for(folder / "stage")
    new = staging / "new"
    try:
        with named_errors(folder, staging):
            new.mkdir()
            yield new
            sync(new)
            os.rename(new, folder / _NEXT)
            _fsync(folder)
        take_over(folder)
    finally:
        _settle(staging, folder / "stage")
        lock.close()


def take_over(folder: Path) -> None:
    """Carry out what `together` decided. Doing it again after a kill at any point leads to the same result."""
    decided, last = folder / _NEXT, folder / _LAST
    clear(last)
    if not decided.is_dir() or decided.is_symlink():
        return
    last.mkdir()
    for item in sorted(decided.iterdir()):
        target = folder / item.name
        # A rename replaces a file but not a folder that holds something, so the old folder steps aside.
        if target.is_dir() or target.is_symlink():
            os.replace(target, last / item.name)
        os.replace(item, target)
    _fsync(folder)
    decided.rmdir()
    clear(last)


# --- JSON and Parquet


def write_json(path: Path, value: object) -> None:
    """Write a JSON-able value, with sorted keys and finite numbers only."""
    with atomic_write(path) as staged:
        staged.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_parquet(path: Path, rows: Sequence[Mapping[str, object]], *, replace: bool = True) -> None:
    """Write rows, one dictionary each, as a Parquet file."""
    with atomic_write(path, replace) as staged:
        pq.write_table(pa.Table.from_pylist(list(rows)), staged)
