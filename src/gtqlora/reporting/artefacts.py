"""What a run directory holds for its report; files only, never a model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from gtqlora.errors import RunError
from gtqlora.results.adapter import adapter_hash
from gtqlora.run import Run, read_json, read_parquet

Json = dict[str, Any]

_DIAGNOSIS_KEYS = (
    "verdict", "sentence", "reasons", "warnings", "matched", "n_pairs", "n_aligned", "n_usable", "shares",
    "shares_log_odds", "necessary", "sufficient", "cells", "interventions", "curves", "experts", "causal_experts",
    "top_experts", "directions", "health", "health_tokens",
)  # fmt: skip
_EXPERT_KEYS = ("layer", "expert", "mask", "restore", "control", "q", "causal", "computes", "tokens")
ASSOCIATION_COLUMNS = (
    "layer", "expert", "rate_flagged", "rate_twin", "difference", "low", "high", "q", "stability", "gradient",
    "gradient_low", "gradient_high", "weight_flagged", "weight_twin", "last_flagged", "last_twin", "answer_flagged",
    "answer_twin",
)  # fmt: skip
_VERDICT_KEYS = ("adapter", "table", "floor", "kl_benign", "drift", "mediation")
_SCORES_COLUMNS = ("kind", "pair_id", "refused_before", "refused_after", "text_before", "text_after")
_INFO_KEYS = ("kind", "base", "family", "details")


@dataclass(frozen=True)
class Peer:
    """One edit in the side by side table."""

    label: str
    info: Json | None
    verdict: Json
    stale: bool


@dataclass(frozen=True)
class Artefacts:
    """All that a report can show; what is missing is None or empty.

    Attributes:
        stale: the verdict was given on another adapter than the one that lies there now.
        peers: the runs to compare with, this one first if it has a verdict.
    """

    path: Path
    stages: dict[str, Json]
    diagnosis: Json | None
    association: list[Json]
    info: Json | None
    metrics: list[Json]
    verdict: Json | None
    stale: bool
    scores: list[Json]
    peers: list[Peer]

    @property
    def model(self) -> str:
        """The model's name as the stages were given it."""
        named = [stage.get("config", {}).get("model") for stage in self.stages.values()]
        if self.info:
            named.append(self.info["base"])
        return next((str(name) for name in named if name), "")


def collect(run: Run, compare: Sequence[Path]) -> Artefacts:
    """Read all that is there.

    Raises:
        RunError: there is nothing to report, a run to compare with has no verdict, or an artefact cannot be read.
    """
    path = run.path
    diagnosis = _read_diagnosis(path / "diagnosis" / "diagnosis.json")
    info = _read_json(path / "adapter" / "gtqlora.json", _INFO_KEYS, "train")
    verdict = _read_json(path / "verdict.json", _VERDICT_KEYS, "verify")
    metrics = _read_metrics(path / "metrics.jsonl")
    if diagnosis is None and info is None and verdict is None and not metrics:
        raise RunError(
            f"{path}: nothing to report yet; run `gtqlora diagnose`, or `gtqlora train` and `gtqlora verify`, first"
        )
    return Artefacts(
        path=path,
        stages=run.manifest().get("stages", {}),
        diagnosis=diagnosis,
        association=_read_rows(path / "diagnosis" / "association.parquet", ASSOCIATION_COLUMNS, "diagnose")
        if diagnosis
        else [],
        info=info,
        metrics=metrics,
        verdict=verdict,
        stale=_stale(path, verdict),
        scores=_read_rows(path / "scores.parquet", _SCORES_COLUMNS, "verify") if verdict else [],
        peers=_peers(path, info, verdict, compare),
    )


def _peers(path: Path, info: Json | None, verdict: Json | None, compare: Sequence[Path]) -> list[Peer]:
    others = [other for other in dict.fromkeys(map(Path, compare)) if other.resolve() != path.resolve()]
    if not others:
        return []
    paths = [path, *others] if verdict else others
    labels = _labels(paths)
    peers = [] if verdict is None else [Peer(labels[0], info, verdict, _stale(path, verdict))]
    return peers + [_peer(other, label) for other, label in zip(others, labels[-len(others) :], strict=True)]


def _peer(path: Path, label: str) -> Peer:
    verdict = _read_json(path / "verdict.json", _VERDICT_KEYS, "verify")
    if verdict is None:
        raise RunError(f"{path}: no verdict.json here, so it cannot be compared; run `gtqlora verify {path}` first")
    info = _read_json(path / "adapter" / "gtqlora.json", _INFO_KEYS, "train")
    return Peer(label, info, verdict, _stale(path, verdict))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Folder names; whole paths from the common root where two names are equal."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    root = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    return [str(path.resolve().relative_to(root)) for path in paths]


def _stale(path: Path, verdict: Json | None) -> bool:
    return verdict is not None and identity(path / "adapter") != verdict["adapter"]


def identity(adapter: Path) -> str | None:
    """The hash of the adapter there, None if there is none in order."""
    try:
        return adapter_hash(adapter)
    except RunError:
        return None


def _read_json(file: Path, keys: Sequence[str], made_by: str) -> Json | None:
    if not file.exists():
        return None
    found = read_json(file, f"run `gtqlora {made_by}` again")
    _check(file, found, keys, made_by)
    return found


def _read_diagnosis(file: Path) -> Json | None:
    found = _read_json(file, _DIAGNOSIS_KEYS, "diagnose")
    for expert in found["experts"] if found else ():
        _check(file, expert, _EXPERT_KEYS, "diagnose")
    return found


def _check(file: Path, found: Json, keys: Sequence[str], made_by: str) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise RunError(f"{file}: has no {missing[0]!r}; run `gtqlora {made_by}` of this version again")


def _read_rows(file: Path, columns: Sequence[str], made_by: str) -> list[Json]:
    if not file.exists():
        return []
    try:
        rows = read_parquet(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{file}: cannot be read ({error}); run `gtqlora {made_by}` again") from error
    if rows:
        _check(file, rows[0], columns, made_by)
    return rows


def _read_metrics(file: Path) -> list[Json]:
    """Lines of numbers; a last line that a kill cut is left out."""
    lines: list[Json] = []
    if not file.exists():
        return lines
    for text in file.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


__all__ = ["Artefacts", "Json", "Peer", "collect", "identity"]
