"""The run directory: one lock, one manifest with provenance, artefacts that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gtqlora.config import to_dict
from gtqlora.errors import RunError
from gtqlora.ranks import agree, all_of, by_leader, ranks
from gtqlora.storage.atomic import (
    atomic_write,
    checked_path,
    drop_leftovers,
    leftovers,
    take_over,
    together,
    write_json,
    write_parquet,
)
from gtqlora.storage.contents import fingerprint, read_json, read_parquet, sha256_bytes, sha256_file, sha256_json
from gtqlora.storage.locks import LOCK, hold, still_held
from gtqlora.storage.manifest import FORMAT, MANIFEST, Manifest, Record, read_manifest, recorded, versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PATHS = frozenset({"model", "contrast", "wrappers", "expert_memory", "expert_disk"})
"""Settings that say where something lies, which changes no result: an input, whose contents identify it, or experts."""
_CHECKPOINTS = "checkpoints"
SERVED = "served"
"""The folder for verdicts on a server's answers, and for those answers while it is asked."""
_ARTEFACTS = {
    *("adapter", "diagnosis", _CHECKPOINTS, "contrast.parquet", "metrics.jsonl", "scores.parquet", "verdict.json"),
    *("report.html", "exports.jsonl", SERVED, MANIFEST),
}


def stage_hash(settings: Mapping[str, object], inputs: Mapping[str, str], aside: Collection[str] = ()) -> str:
    """Hash what a stage's results follow from: its settings, but those set aside, and the contents of its inputs."""
    return sha256_json({"config": {k: v for k, v in settings.items() if k not in aside}, "inputs": dict(inputs)})


_OTHER = {
    "model": "another model",
    "contrast": "other pairs",
    "adapter": "another adapter",
    "trained": "other pairs that were trained on",
    "judge": "another judge",
    "wrappers": "other frames (wrappers)",
}


def other_settings(was: Mapping[str, object], now: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Say which of these settings had other values than now, and both."""
    different = [name for name in names if was.get(name) != now.get(name)]
    return [f"{name} = {_shown(was.get(name))} and not {_shown(now.get(name))}" for name in different]


def _shown(value: object) -> str:
    return "none" if value is None else json.dumps(value)


def other_inputs(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say in words which inputs had other contents than now; those that are not called anything here by their name."""
    names = sorted(was.keys() | now.keys())
    return [_OTHER.get(name, f"another {name}") for name in names if was.get(name) != now.get(name)]


def require(folder: Path, name: str, made_by: str) -> Path:
    """Return the path of an artefact in a run directory.

    Raises:
        RunError: it is not there; the message names the command that makes it.
    """
    file = folder / name
    if not file.exists():
        raise RunError(f"{folder}: no {name} here; run `gtqlora {made_by}` first")
    return file


def _check_ours(path: Path) -> None:
    """Check that nothing is written into a folder of the user's.

    Raises:
        RunError: the folder has no manifest of ours, and holds something; or it is one that is the user's in any case.
    """
    if os.path.lexists(path / MANIFEST):
        read_manifest(path)
        return
    if path.resolve() in (Path("/"), Path(os.path.expanduser("~")).resolve()):
        raise RunError(f"{path}: not a folder for a run; choose another --run")
    lock, staged = path / LOCK, {staging.name for staging, _ in leftovers(path)}
    ours = staged | ({LOCK} if lock.exists() and lock.stat().st_size == 0 else set())
    if theirs := sorted(set(os.listdir(path)) - ours):
        names = ", ".join(f"{name!a}" for name in theirs[:3]) + (", ..." if len(theirs) > 3 else "")
        raise RunError(
            f"{path}: not empty and not a run directory (it holds {names}, and no {MANIFEST}); nothing was touched, "
            "choose another --run"
        )


def _told_apart(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that all ranks have to have; where things lie may differ between machines."""
    return {name: value for name, value in settings.items() if name not in PATHS}


@dataclass
class Stage:
    """One stage in progress: `fresh` says that the artefacts on disk already answer this config and these inputs.

    Attributes:
        renewed: makes a folder; what is written there under the names of outputs takes their places when the stage
            ends, together with its record: until then, and if it fails, the old ones stay.
    """

    name: str
    record: Record
    fresh: bool
    renewed: Callable[[], Path]
    outputs: list[str] = field(default_factory=list)


class Run:
    """A run directory held by this process alone, or by the leader of the ranks that run one command.

    The other ranks work in copies that go when they are closed.

    Attributes:
        home: the directory itself, also where `path` is a copy.

    Raises:
        RunError: not writable, not empty and not a run directory, or another process is working in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self.home = checked_path(path)
        self._copy: TemporaryDirectory[str] | None = None
        if ranks().leads:
            by_leader(self._hold)
        else:
            by_leader(lambda: None)
            self._follow()
        all_of(self.path.name)  # nothing is written before all have their copies

    def _follow(self) -> None:
        """Work in a copy of the leader's directory."""
        if not (self.path / MANIFEST).is_file():
            raise RunError(f"{self.path}: rank {ranks().rank} cannot see it; every machine needs the run directory")
        self._copy = TemporaryDirectory(prefix="gtqlora-")
        copy = Path(self._copy.name) / self.path.name
        shutil.copytree(self.path, copy, ignore=shutil.ignore_patterns(LOCK))
        self.path = copy
        self._hold()

    def _hold(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _check_ours(self.path)
            lock = hold(self.path / LOCK)
            if lock is None:
                raise RunError(f"{self.path}: another process is working in this run directory; wait or choose another")
            self._held = lock
            self._mend()
        except OSError as error:
            raise RunError(
                f"{self.path}: the run directory cannot be written ({error.strerror}); choose another --run"
            ) from error

    def _mend(self) -> None:
        """Finish or clean up what killed processes left; a new run is marked as ours before anything else."""
        below = (SERVED, _CHECKPOINTS, f"{_CHECKPOINTS}/*")
        for folder in (self.path, *(found for pattern in below for found in self.path.glob(pattern))):
            drop_leftovers(folder)
        take_over(self.path)
        if not (self.path / MANIFEST).exists():
            write_json(self.path / MANIFEST, {"format": FORMAT, "stages": {}})

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes work in the directory."""
        self._held.close()
        if self._copy is not None:
            self._copy.cleanup()

    def check_held(self) -> None:
        """Check that the run directory is the one that was opened.

        Raises:
            RunError: it was removed, moved or replaced since.
        """
        if not self._held.closed and not still_held(self._held, self.path / LOCK):
            raise RunError(
                f"{self.path}: the run directory was removed or replaced while this command worked in it; nothing "
                "more is written, run the command again"
            )

    def __truediv__(self, name: str) -> Path:
        self.check_held()
        return self.path / name

    def owns(self, path: str | Path) -> bool:
        """Tell whether a path lies in what this run, or any other, writes itself: nothing else may be put there."""
        place = Path(path).expanduser().resolve()
        mine = self.path.resolve()
        if place == mine:
            return True
        for folder in place.parents:
            if folder == mine or (folder / MANIFEST).is_file():
                first = place.relative_to(folder).parts[0]
                if first in _ARTEFACTS | recorded(folder) or first == LOCK or first.startswith(".gtqlora"):
                    return True
        return False

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            RunError: it was edited so that it is none of ours.
        """
        self.check_held()
        return read_manifest(self.path)

    def require(self, name: str, made_by: str) -> Path:
        """Return an artefact's path, see `require`."""
        return require(self.path, name, made_by)

    @contextmanager
    def stage(
        self,
        name: str,
        config: DataclassInstance,
        inputs: Mapping[str, str],
        *,
        again: bool = False,
        aside: Collection[str] = (),
    ) -> Iterator[Stage]:
        """Do a stage once: `fresh` if config, inputs and outputs are unchanged; recorded only if the body succeeds.

        A stage that writes what another one wrote takes its place in the manifest.

        Args:
            inputs: contents of what is read, as hashes.
            aside: settings that do not change the results.
        """
        self.check_held()
        settings = to_dict(config)
        record = Record(
            hash=stage_hash(settings, inputs, aside),
            config=settings,
            inputs=dict(inputs),
            outputs={},
            versions=versions(),
            device=str(settings.get("device", "cpu")),
            seed=seed if isinstance(seed := settings.get("seed"), int) else None,
        )
        agree({**_told_apart(settings), **record["inputs"], **record["versions"], "--again": again})
        fresh = not again and self._answers(name, record["hash"])
        started, new = time.monotonic(), list[Path]()
        with ExitStack() as until_done:

            def renewed() -> Path:
                if not new:
                    new.append(until_done.enter_context(together(self / "")))
                return new[0]

            stage = Stage(name=name, record=record, fresh=fresh, renewed=renewed)
            yield stage
            if not fresh:
                record["seconds"] = round(time.monotonic() - started, 2)
                record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
                self._record(stage, new[0] if new else None)

    def _answers(self, name: str, digest: str) -> bool:
        known = self.manifest()["stages"].get(name)
        return known is not None and known["hash"] == digest and known["outputs"] == self._hashes(known["outputs"])

    def _record(self, stage: Stage, new: Path | None) -> None:
        """Enter the stage into the manifest, which takes its place together with the outputs that were renewed."""
        self.check_held()
        outputs = self._hashes(stage.outputs, new)
        manifest = self.manifest()
        others = {k: other for k, other in manifest["stages"].items() if not outputs.keys() & other["outputs"].keys()}
        stages = {**others, stage.name: {**stage.record, "outputs": outputs}}
        write_json((new or self.path) / MANIFEST, {**manifest, "stages": stages})

    def _hashes(self, outputs: Iterable[str], new: Path | None = None) -> dict[str, str | None]:
        """Hash artefacts by their contents: a copied run is still fresh, an overwritten one is not."""
        found: dict[str, str | None] = {}
        for name in outputs:
            renewed = None if new is None else new / name
            file = renewed if renewed is not None and renewed.exists() else self.path / name
            found[name] = fingerprint(file) if file.exists() else None
        return found


__all__ = [
    "MANIFEST",
    "PATHS",
    "SERVED",
    "Run",
    "Stage",
    "atomic_write",
    "drop_leftovers",
    "fingerprint",
    "read_json",
    "read_manifest",
    "read_parquet",
    "sha256_bytes",
    "sha256_file",
    "sha256_json",
    "stage_hash",
    "versions",
    "write_json",
    "write_parquet",
]
