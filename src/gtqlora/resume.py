"""Training checkpoints on disk: which ones were written whole, which are of these settings, which is the last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gtqlora.run import write_json

MARK = "complete.json"


def mark_complete(folder: Path, step: int, stage_hash: str) -> None:
    """Say that a checkpoint is whole and good; it is not read without this mark."""
    sizes = {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file() and p.name != MARK}
    write_json(folder / MARK, {"hash": stage_hash, "step": step, "sizes": sizes})


def _read_mark(folder: Path) -> dict[str, Any] | None:
    """The mark of a checkpoint whose files are all there at their full size."""
    try:
        mark = json.loads((folder / MARK).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in mark["sizes"].items())
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return None
    return mark if whole else None


def last_checkpoint(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint."""
    marks = ((_read_mark(folder), folder) for folder in checkpoints.glob("checkpoint-*"))
    return max(((mark["step"], folder) for mark, folder in marks if mark is not None), default=None)


def drop_checkpoints(checkpoints: Path, *, keep_hash: str | None) -> None:
    """Remove half-written checkpoints and those of other settings or inputs: they are of no use."""
    for folder in checkpoints.glob("checkpoint-*"):
        mark = _read_mark(folder)
        if mark is None or mark["hash"] != keep_hash:
            shutil.rmtree(folder)
