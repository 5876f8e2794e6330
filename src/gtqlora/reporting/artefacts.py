"""What a run directory holds for its report; files only, never a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtqlora.errors import RunError
from gtqlora.results import adapter, association, diagnosis
from gtqlora.results.adapter import Info, adapter_hash, read_info
from gtqlora.results.association import Association, read_associations
from gtqlora.results.diagnosis import Diagnosis, read_diagnosis
from gtqlora.results.metrics import METRICS, Metrics, read_metrics
from gtqlora.results.verdict import SCORES, VERDICT, Outcome, Verdict, read_outcomes, read_verdict
from gtqlora.run import SERVED, Run

Stages = Mapping[str, Mapping[str, object]]
"""Name of a stage -> its record in the manifest."""


@dataclass(frozen=True)
class Peer:
    """One edit in the side by side table; `stale` as in `Artefacts`."""

    label: str
    info: Info | None
    verdict: Verdict
    stale: bool


@dataclass(frozen=True)
class Artefacts:
    """All that a report can show; what is missing is None or empty.

    Attributes:
        stale: the verdict was given on another adapter than the one that lies there now.
        served: the verdict on a server's answers, if it is of this adapter.
        peers: the runs to compare with, this one first if it has a verdict.
    """

    path: Path
    stages: Stages
    diagnosis: Diagnosis | None
    association: list[Association]
    info: Info | None
    metrics: list[Metrics]
    verdict: Verdict | None
    stale: bool
    served: Verdict | None
    scores: list[Outcome]
    peers: list[Peer]

    @property
    def model(self) -> str:
        """Return the model's name as the stages were given it."""
        configs = [stage.get("config") for stage in self.stages.values()]
        named = [config.get("model") for config in configs if isinstance(config, dict)]
        if self.info:
            named.append(self.info.base)
        return next((str(name) for name in named if name), "")


def collect(run: Run, compare: Sequence[Path]) -> Artefacts:
    """Read all that is there.

    Raises:
        RunError: there is nothing to report, a run to compare with has no verdict, or an artefact cannot be read.
    """
    path = run.path
    _check_readable(path)
    found = _diagnosis(path)
    info, verdict, metrics = _info(path), _verdict(path), _metrics(path)
    if found is None and info is None and verdict is None and not metrics:
        raise RunError(
            f"{path}: nothing to report yet; run `gtqlora diagnose`, or `gtqlora train` and `gtqlora verify`, first"
        )
    return Artefacts(
        path=path,
        # the manifest was checked as it was read; the sections show of it what is there
        stages=run.manifest()["stages"],
        diagnosis=found,
        association=_associations(path) if found else [],
        info=info,
        metrics=metrics,
        verdict=verdict,
        stale=_stale(path, verdict),
        served=_served(path),
        scores=read_outcomes(path) if verdict and (path / SCORES).exists() else [],
        peers=_peers(path, info, verdict, compare),
    )


def _check_readable(path: Path) -> None:
    """Check every record, so that one message names all stages that have to be run again.

    Raises:
        RunError: some cannot be read.
    """
    problems: list[str] = []
    for read in (_diagnosis, _info, _verdict, _served, _metrics):
        try:
            read(path)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise RunError("; ".join(problems))


def _metrics(path: Path) -> list[Metrics]:
    return read_metrics(path / METRICS)


def _diagnosis(path: Path) -> Diagnosis | None:
    return read_diagnosis(path) if (path / diagnosis.FOLDER / diagnosis.FILE).exists() else None


def _associations(path: Path) -> list[Association]:
    return read_associations(path) if (path / diagnosis.FOLDER / association.FILE).exists() else []


def _info(path: Path) -> Info | None:
    folder = path / adapter.FOLDER
    return read_info(folder) if (folder / adapter.INFO).exists() else None


def _verdict(path: Path) -> Verdict | None:
    return read_verdict(path) if (path / VERDICT).exists() else None


def _served(path: Path) -> Verdict | None:
    found = _verdict(path / SERVED)
    return None if _stale(path, found) else found


def _peers(path: Path, info: Info | None, verdict: Verdict | None, compare: Sequence[Path]) -> list[Peer]:
    # each folder once, in the order given, and this run's own not again
    others = [other for other in dict.fromkeys(map(Path, compare)) if other.resolve() != path.resolve()]
    if not others:
        return []
    paths = [path, *others] if verdict else others
    labels = _labels(paths)
    peers = [] if verdict is None else [Peer(labels[0], info, verdict, _stale(path, verdict))]
    return peers + [_peer(other, label) for other, label in zip(others, labels[-len(others) :], strict=True)]


def _peer(path: Path, label: str) -> Peer:
    verdict = _verdict(path)
    if verdict is None:
        raise RunError(f"{path}: no {VERDICT} here, so it cannot be compared; run `gtqlora verify {path}` first")
    return Peer(label, _info(path), verdict, _stale(path, verdict))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return folder names; whole paths from the common root where two names are equal."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    # the shortest names that still differ
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    return [str(path.resolve().relative_to(root)) for path in paths]


def _stale(path: Path, verdict: Verdict | None) -> bool:
    return verdict is not None and identity(path / adapter.FOLDER) != verdict.adapter


def identity(folder: Path) -> str | None:
    """Return the hash of the adapter there, None if there is none in order."""
    try:
        return adapter_hash(folder)
    except RunError:
        return None


__all__ = ["Artefacts", "Peer", "Stages", "collect", "identity"]
