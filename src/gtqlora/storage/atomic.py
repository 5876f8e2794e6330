"""Files and folders that appear whole or not at all, one writer at a time, and what identifies them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from gtqlora.errors import RunError
from gtqlora.storage.contents import first_line

LOCK = ".lock"
_STAGING, _OLD = ".gtqlora-staging", ".old"
_NAME = re.compile(rf"\.(?P<target>.+)\.[a-z0-9_]{{8}}{re.escape(_STAGING)}", re.DOTALL)
_OURS = b"gtqlora staging\n"
"""What our lock in a staging folder says, so that nothing that merely has such a name is taken for one."""
_NEXT, _LAST = ".gtqlora-next", ".gtqlora-last"
_TORCH_WRITES = re.compile(r"PytorchStreamWriter|inline_container|iostream error|cannot be opened|Parent directory")
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


# --- errors


def checked_path(path: str | Path) -> Path:
    """A path of the user's, with `~` resolved.

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
    """A file or folder could not be written, whichever library found out."""

    def __init__(self, target: Path, reason: str) -> None:
        super().__init__(f"{target}: not written ({reason})")
        self.target, self.reason = target, reason


@contextmanager
def named_errors(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Errors of writing within name `target`, also those of libraries that name no file or one in the staging."""

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
    """Errors of libraries that write scratch files within name the folder of scratch files.

    Some close such a file twice, so that what is raised at last is not what went wrong.
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


# --- locks


def hold(file: Path, says: bytes = b"") -> IO[bytes] | None:
    """Lock a file until the stream is closed or this process dies; None if somebody else holds or removed it.

    Raises:
        RunError: something that is no plain file has that name: it is neither followed nor opened.
    """
    if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
        raise RunError(f"{file}: not a plain file, so it cannot be the lock; remove it or choose another folder")
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    stream = os.fdopen(fd, "r+b", buffering=0)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if still_held(stream, file):
            stream.write(says)
            return stream
    except BlockingIOError:
        pass
    except BaseException:
        stream.close()
        raise
    stream.close()
    return None


def still_held(stream: IO[bytes], file: Path) -> bool:
    """Whether the locked file is the one that has its name: not if the folder was removed or replaced."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.lstat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


# --- staging


def _staging_for(target: Path) -> tuple[Path, IO[bytes]]:
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGING, dir=target.parent))
        with suppress(FileNotFoundError):  # another process took it for a leftover before it was locked
            lock = hold(staging / LOCK, _OURS)
            if lock is not None:
                return staging, lock


def clear(path: Path) -> None:
    """Remove a file, a folder, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(staging: Path, target: Path) -> None:
    """Put back a folder that was moved aside and not replaced, then remove the rest, what marks it as ours last."""
    if (staging / _OLD).exists() and not os.path.lexists(target):
        os.replace(staging / _OLD, target)
    with suppress(OSError):  # what cannot be removed now is removed by the next one that writes here
        for entry in staging.iterdir():
            if entry.name != LOCK:
                clear(entry)
        (staging / LOCK).unlink()
        staging.rmdir()


def _lock_of_leftover(staging: Path) -> IO[bytes] | None:
    """The lock of a staging folder of ours whose process is dead."""
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
    """What has the name of a staging folder, and the name of what was to be written."""
    for staging in folder.glob(f".*{_STAGING}"):
        if match := _NAME.fullmatch(staging.name):
            yield staging, match["target"]


def drop_leftovers(folder: Path) -> None:
    """Clean up after killed processes: what `atomic_write` left in `folder`; those of live processes are locked."""
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
    """Raises RunError if anything has that name, even a link to nowhere."""
    if os.path.lexists(target):
        drop_leftovers(target.parent)  # perhaps of the one that wrote it, killed when it had its name already
        raise RunError(f"{target}: exists already; choose another name or remove it")


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
        except OSError as error:  # which names the hidden folder, that nobody asked for
            raise OSError(error.errno, error.strerror, str(target)) from error
    new = staging / target.name
    try:
        with named_errors(target, staging):
            yield new
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
    """Give finished work another name beside the one that is taken."""
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
    """Rename, and never replace anything.

    Raises:
        FileExistsError: something has that name.
    """
    code = _renameat2(source, target)
    if code in _NOT_HERE:
        _rename_new_slowly(source, target)
    elif code:
        raise OSError(code, os.strerror(code), str(target))


def _renameat2(source: Path, target: Path) -> int:
    """Linux's rename that does not replace; the error's number, or 0."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return errno.ENOSYS
    here, no_replace = -100, 1
    return 0 if call(here, os.fsencode(source), here, os.fsencode(target), no_replace) == 0 else ctypes.get_errno()


def _rename_new_slowly(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()  # the name is ours then, and only an empty folder is replaced
        os.rename(source, target)
    else:
        os.link(source, target)
        source.unlink()


# --- several at once


@contextmanager
def together(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder; what is written there takes the places of the same names in `folder`, all or none.

    One rename decides. What it decided is carried out by `take_over`, here or, after a kill, when it is next called.
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
    """Carry out what `together` decided; to do it again after a kill at any point comes to the same."""
    decided, last = folder / _NEXT, folder / _LAST
    clear(last)
    if not decided.is_dir() or decided.is_symlink():
        return
    last.mkdir()
    for item in sorted(decided.iterdir()):
        target = folder / item.name
        if target.is_dir() or target.is_symlink():
            os.replace(target, last / item.name)
        os.replace(item, target)
    _fsync(folder)
    decided.rmdir()
    clear(last)


# --- JSON and Parquet


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as staged:
        staged.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_parquet(path: Path, rows: list[dict[str, Any]], *, replace: bool = True) -> None:
    with atomic_write(path, replace) as staged:
        pq.write_table(pa.Table.from_pylist(rows), staged)
