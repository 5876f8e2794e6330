"""The `report` stage: a run's artefacts as one self-contained HTML page. Reads files only, never a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gtqlora.errors import RunError
from gtqlora.reporting.artefacts import collect
from gtqlora.reporting.page import render
from gtqlora.run import Run, atomic_write, fingerprint

PAGE = "report.html"


def report(run: Run, *, compare: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write what the run found, did and proved as a page that opens anywhere, offline.

    Args:
        run: the run; whatever artefacts it has are shown.
        compare: other run directories with a verdict, for the side by side table.
        out: the page's file, or a folder for it; else `report.html` in the run.

    Raises:
        RunError: there is nothing to report, an artefact cannot be read, or the page cannot be written.
    """
    target = run / PAGE if out is None else out / PAGE if out.is_dir() else out
    text = _rendered(run, compare)
    try:
        with atomic_write(target) as staged:
            staged.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{target}: the report cannot be written ({error.strerror}); choose another --out") from error
    return target


def _rendered(run: Run, compare: Sequence[Path]) -> str:
    try:
        return render(collect(run, compare))
    except (ArithmeticError, LookupError, ValueError) as error:
        # records are checked as they are read, but numbers that were edited may not belong together
        raise RunError(
            f"{_changed(run)}: not what this version writes ({type(error).__name__}: {error!s:.200}); run the "
            "command that makes it again"
        ) from error


def _changed(run: Run) -> str:
    """The artefacts that are not those on record, else all of the run."""
    stages = run.manifest()["stages"].values()
    outputs = {name: identity for stage in stages for name, identity in stage["outputs"].items()}
    changed = [run.path / name for name, was in outputs.items() if was is not None and _identity(run, name) != was]
    return ", ".join(map(str, changed)) or str(run.path)


def _identity(run: Run, name: str) -> str | None:
    return fingerprint(run.path / name) if (run.path / name).exists() else None


__all__ = ["PAGE", "report"]
