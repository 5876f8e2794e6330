"""Tables of plain values as new files, in the format that the file's name ends with."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.errors import ConfigError
from gtqlora.storage.atomic import atomic_write, checked_path, refuse_existing

Rows = Sequence[Mapping[str, object]]


def check_table(path: Path) -> Path:
    """Return the path of a file that a table may be written as.

    Raises:
        ConfigError: its name ends with none of the formats.
        RunError: something has that name.
    """
    path = checked_path(path)
    if path.suffix.lower() not in _WRITERS:
        *others, last = _WRITERS
        raise ConfigError(f"{path}: let its name end in {', '.join(others)} or {last}, which says how it is written")
    refuse_existing(path)
    return path


def write_table(path: Path, rows: Rows) -> None:
    """Write rows that all have the same columns as a new file, whole or not at all.

    Raises:
        ConfigError, RunError: as `check_table`.
    """
    path = check_table(path)
    with atomic_write(path, replace=False) as staged:
        _WRITERS[path.suffix.lower()](staged, rows)


def _csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else (), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def _parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


_WRITERS: dict[str, Callable[[Path, Rows], None]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
