"""The run directory: one lock, one manifest with provenance, artefacts that appear whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.config import to_dict
from gtqlora.errors import RunError

MANIFEST = "manifest.json"
_LOCK, _STAGING, _OLD = ".lock", ".gtqlora-staging", ".old"
_PACKAGES = ("gtqlora", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "numpy")
_HASH_CONTENT_BELOW = 256 * 2**20


def sha256_json(value: Any) -> str:
    """Hash of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(path: str | Path, content_below: float = _HASH_CONTENT_BELOW) -> str:
    """Identity of an input: contents of a file or small folder; names, sizes, times of a large one; a hub id as is."""
    name, path = str(path), Path(path).expanduser()
    folder = Path(name.rpartition(":")[0]).expanduser()
    if not path.exists() and ":" in name and folder.is_dir():  # one split of a dataset folder
        return sha256_json([name.rpartition(":")[2], fingerprint(folder, content_below)])
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return f"hub:{name}"
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    small = sum(p.stat().st_size for p in files) < content_below
    facts = [
        (str(p.relative_to(path)), sha256_file(p) if small else (p.stat().st_size, p.stat().st_mtime_ns)) for p in files
    ]
    return sha256_json(facts)


def _hidden(path: Path) -> bool:
    """Such as the hub's `.cache` in a downloaded folder, which changes when nothing else does."""
    return any(part.startswith(".") for part in path.parts)


def versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(folder: Path) -> IO[str] | None:
    """Hold a folder until the stream is closed or this process dies; None if somebody else holds it."""
    stream = (folder / _LOCK).open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        return None
    except OSError:
        stream.close()
        raise
    return stream


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path in a hidden folder beside `target`; the file or folder written there takes its place on success.

    A file is replaced in one rename. A folder that is there already is moved aside first: a process killed between the
    two renames leaves it in the hidden folder, from where the next `whole` or `Run` puts it back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    drop_leftovers(target.parent, target.name)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_STAGING, dir=target.parent))
    lock, new = _lock(staging), staging / target.name
    try:
        yield new
        for path in [new, *new.rglob("*")]:
            _fsync(path)
        if target.is_dir():
            os.replace(target, staging / _OLD)
        os.replace(new, target)
        _fsync(target.parent)
    finally:
        _settle(staging, target)
        if lock is not None:
            lock.close()


def _settle(staging: Path, target: Path) -> None:
    """Put back a folder that was moved aside and not replaced, then remove the rest."""
    if (staging / _OLD).exists() and not target.exists():
        os.replace(staging / _OLD, target)
    shutil.rmtree(staging, ignore_errors=True)


def drop_leftovers(folder: Path, name: str | None = None) -> None:
    """Clean up after killed processes: what `whole` left in `folder` (of one target); live processes hold a lock."""
    for staging in folder.glob(f".{'*' if name is None else glob.escape(name)}.*{_STAGING}"):
        try:
            lock = _lock(staging)
        except OSError:  # not ours to remove, or just removed by its owner
            continue
        if lock is not None:
            _settle(staging, folder / staging.name[1:].rsplit(".", 2)[0])
            lock.close()


def write_json(path: Path, value: Any) -> None:
    with whole(path) as staged:
        staged.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole(path) as staged:
        pq.write_table(pa.Table.from_pylist(rows), staged)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= {"hash", "config", "inputs", "outputs"}


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
            lock = _lock(self.path)
        except OSError as error:
            raise RunError(
                f"{path}: the run directory cannot be written ({error.strerror}); choose another --run"
            ) from error
        if lock is None:
            raise RunError(f"{path}: another process is working in this run directory; wait or choose another")
        self._held = lock
        drop_leftovers(self.path)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        if not file.exists():
            return {"format": 1, "stages": {}}
        remedy = "remove it to start the run anew"
        try:
            manifest = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise RunError(f"{file}: not valid JSON ({error}); {remedy}") from error
        stages = manifest.get("stages") if isinstance(manifest, dict) else None
        if not isinstance(stages, dict) or not all(_is_record(stage) for stage in stages.values()):
            raise RunError(f"{file}: not a manifest of gtqlora's; {remedy}")
        return manifest

    def read_json(self, name: str, made_by: str) -> Any:
        """An artefact of an earlier stage.

        Raises:
            RunError: it is not there; the message names the command that makes it.
        """
        file = self.require(name, made_by)
        try:
            return json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
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
        """Do a stage once: `fresh` if config, inputs and outputs are unchanged; recorded only if the body succeeds.

        A stage that writes what another one wrote takes its place in the manifest.
        """
        settings = to_dict(config)
        digest = sha256_json({"config": settings, "inputs": dict(inputs)})
        known = self.manifest()["stages"].get(name)
        fresh = (
            not again
            and known is not None
            and known["hash"] == digest
            and known["outputs"] == self._hashes(known["outputs"])
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
        record["outputs"] = self._hashes(stage.outputs)
        manifest = self.manifest()
        replaced = record["outputs"].keys()
        others = {k: other for k, other in manifest["stages"].items() if not replaced & other["outputs"]}
        write_json(self.path / MANIFEST, {**manifest, "stages": {**others, name: record}})

    def _hashes(self, outputs: Iterable[str]) -> dict[str, str | None]:
        """Artefacts by their contents, whatever their size: a copied run is still fresh, an overwritten one is not."""
        files = {name: self.path / name for name in outputs}
        return {name: fingerprint(file, math.inf) if file.exists() else None for name, file in files.items()}
