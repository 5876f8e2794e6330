"""The `report` stage: a run's artefacts as one self-contained HTML page. Reads files only, never a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gtqlora.errors import RunError
from gtqlora.report.artefacts import collect
from gtqlora.report.page import render
from gtqlora.run import Run, whole

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
    text = render(collect(run, compare))
    try:
        with whole(target) as staged:
            staged.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{target}: the report cannot be written ({error.strerror}); choose another --out") from error
    return target


__all__ = ["PAGE", "report"]
