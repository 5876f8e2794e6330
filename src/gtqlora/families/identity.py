"""Which model a stage read: the contents of exactly the files that are read, wherever they are."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gtqlora.errors import ModelError
from gtqlora.families import files
from gtqlora.families.facts import family_of
from gtqlora.progress import track
from gtqlora.run import sha256_file, sha256_json

# Enough readers to keep a fast disk busy.
_THREADS = 8
_WHAT = "hashing the model"


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """A model as it was found.

    Attributes:
        model: what to call it so that the same is found again: an absolute path, or `owner/name@commit`.
        folder: where its files are.
        revision: the hub's commit, None for a folder.
        files: sha256 of the contents by name in the folder, of every file that any verb reads.
        states: what `state_of` gave for each file just before it was hashed.
    """

    model: str
    folder: Path
    revision: str | None
    files: dict[str, str]
    states: dict[str, tuple[int, ...]] = field(repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """Return one hash of names and contents: the same for the same bytes anywhere."""
        return sha256_json(self.files)

    def check_unchanged(self) -> None:
        """Assure that what was loaded since is what was hashed.

        Raises:
            ModelError: a file was written to or exchanged.
        """
        for name, state in self.states.items():
            if state_of(self.folder / name) != state:
                raise ModelError(f"{self.folder / name}: was changed while it was read; run the command again")


def state_of(file: Path) -> tuple[int, ...]:
    """Return device, inode, size and times of a file, which show that it was written to or replaced.

    Raises:
        ModelError: it is gone.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    # A program can set the modification time back, but not the last one, of the inode.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def pinned(model: str) -> str:
    """Return a name for MODEL that goes on meaning the same: an absolute path, or a hub id with its commit.

    Raises:
        ModelError: there is no such folder or hub model.
    """
    found = files.config_file(model)
    if files.is_local(model):
        return os.path.abspath(files.local_path(model))
    # The hub's cache keeps a model's files in a folder that is named after their commit.
    commit = found.parent.name
    if not files.COMMIT.fullmatch(commit):
        raise ModelError(f"{model}: the hub's cache gives no commit for it ({found.parent}); give a local folder")
    return f"{model.partition('@')[0]}@{commit}"


def read_files(model: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder of MODEL and the names of exactly those files that any verb reads, from the hub if need be.

    Raises:
        ModelError: as `files.weight_files`.
    """
    # What cannot be studied at all is said first: before gigabytes are fetched.
    family_of(files.read_json(files.config_file(model)), model)
    folder, shards = files.weight_files(model)
    names = {files.config_file(model).name, *files.small_names(folder), *shards}
    if files.has(folder, files.INDEX):
        names.add(files.INDEX)
    for name in names:
        files.checked_file(folder, name)
    return folder, tuple(sorted(names))


def identify(model: str) -> ModelIdentity:
    """Find MODEL and hash what is read of it, several files at a time.

    Raises:
        ModelError: as `read_files`, or a file cannot be read.
    """
    name = pinned(model)
    folder, names = read_files(name)
    # Before hashing, so that a change while a file is hashed shows as well.
    states = {file: state_of(folder / file) for file in names}
    threads = min(_THREADS, os.cpu_count() or 1, len(names))
    with ThreadPoolExecutor(threads) as pool:
        try:
            digests = list(track(pool.map(lambda file: sha256_file(folder / file), names), _WHAT, len(names)))
        except OSError as error:
            raise ModelError(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
    revision = None if files.is_local(name) else name.partition("@")[2]
    hashes = dict(zip(names, digests, strict=True))
    return ModelIdentity(model=name, folder=folder, revision=revision, files=hashes, states=states)
