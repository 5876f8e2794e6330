"""The run directory: one lock, one manifest with provenance, artefacts that appear whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.config import to_dict
from gtqlora.errors import RunError

MANIFEST = "manifest.json"
_LOCK = ".lock"
_STAGING = ".staging"
_PACKAGES = ("gtqlora", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "numpy")
_HASH_CONTENT_BELOW = 256 * 2**20


def sha256_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: str | Path) -> str:
    """Identity of an input: contents of a file or small folder; names, sizes and times of a large one; a hub id as is."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return f"hub:{path}"
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    small = sum(p.stat().st_size for p in files) < _HASH_CONTENT_BELOW
    facts = [
        (str(p.relative_to(path)), sha256_file(p) if small else (p.stat().st_size, p.stat().st_mtime_ns)) for p in files
    ]
    return sha256_json(facts)


def versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _fsync_tree(path: Path) -> None:
    for p in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fd = os.open(p, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder at; on success it replaces `target` in one rename.

    A folder that is already there is moved aside first and removed last, so a crash leaves the old or the new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    _remove(staged)
    try:
        yield staged
        _fsync_tree(staged)
        if target.is_dir():
            os.replace(target, old)
        os.replace(staged, target)
        _fsync_tree(target.parent) if target.parent == target.parent.parent else _fsync_dir(target.parent)
    finally:
        _remove(staged)
        _remove(old)


def _fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with whole(path) as staged:
        staged.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole(path) as staged:
        pq.write_table(pa.Table.from_pylist(rows), staged)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@dataclass
class Stage:
    """One stage in progress: `fresh` says that the artefacts on disk already answer this config and these inputs."""

    name: str
    record: dict[str, Any]
    fresh: bool
    outputs: list[str] = field(default_factory=list)


class Run:
    """A run directory held by this process alone.

    Raises:
        RunError: not writable, or another process is working in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / _LOCK).open("a")
        except OSError as error:
            raise RunError(
                f"{path}: the run directory cannot be written ({error.strerror}); choose another --run"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunError(f"{path}: another process is working in this run directory; wait or choose another") from error
        self._drop_leftovers()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()

    def _drop_leftovers(self) -> None:
        """A killed stage leaves only hidden staging paths; they are never read, so remove them."""
        for leftover in [*self.path.glob(".*.new"), *self.path.glob("*/.*.new")]:
            _remove(leftover)
        for old in self.path.glob(".*.old"):
            target = old.with_name(old.name[1:].rsplit(".", 2)[0])
            _remove(old) if target.exists() else os.replace(old, target)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        if not file.exists():
            return {"format": 1, "stages": {}}
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise RunError(f"{file}: not valid JSON ({error}); remove it to start the run anew") from error

    def read_json(self, name: str, made_by: str) -> Any:
        """An artefact of an earlier stage.

        Raises:
            RunError: it is not there; the message names the command that makes it.
        """
        file = self.require(name, made_by)
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise RunError(f"{file}: not valid JSON ({error}); run `gtqlora {made_by}` again") from error

    def require(self, name: str, made_by: str) -> Path:
        file = self.path / name
        if not file.exists():
            raise RunError(f"{self.path}: no {name} here; run `gtqlora {made_by}` first")
        return file

    @contextmanager
    def stage(
        self, name: str, config: Any, inputs: Mapping[str, str], *, device: str = "cpu", again: bool = False
    ) -> Iterator[Stage]:
        """Do a stage once: `fresh` when its config and inputs are unchanged; recorded only if the body succeeds."""
        settings = to_dict(config)
        digest = sha256_json({"config": settings, "inputs": dict(inputs)})
        known = self.manifest()["stages"].get(name)
        fresh = (
            not again
            and known is not None
            and known["hash"] == digest
            and all((self.path / output).exists() for output in known["outputs"])
        )
        record: dict[str, Any] = {
            "hash": digest,
            "config": settings,
            "inputs": dict(inputs),
            "versions": versions(),
            "device": device,
            "seed": settings.get("seed"),
        }
        stage = Stage(name=name, record=record, fresh=fresh)
        started = time.monotonic()
        yield stage
        if fresh:
            return
        record["seconds"] = round(time.monotonic() - started, 2)
        record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        record["outputs"] = stage.outputs
        manifest = self.manifest()
        manifest["stages"][name] = record
        write_json(self.path / MANIFEST, manifest)
