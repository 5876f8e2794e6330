"""Where contrast rows come from: JSONL and Parquet files, dataset folders, the hub. Reads; judges nothing."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from gtqlora.errors import ContrastError
from gtqlora.run import read_parquet

_HUB_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation"}
_HUB_SPLITS |= {"test": "heldout", "heldout": "heldout"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_SOURCES = "give a .jsonl or .parquet file, a dataset folder, or a hub id such as org/name or org/name:split"

_SHOWN = 10

Records = Iterator[tuple[int, Any, str | None]]


@dataclass
class Problems:
    """Problems of one source, gathered so that the user mends them in one go."""

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, numbers: Sequence[int], problem: str) -> None:
        self.found.append(f"{_rows(numbers)}: {problem}")

    def stop(self) -> None:
        if len(self.found) == 1:
            raise ContrastError(f"{self.source}: {self.found[0]}")
        if self.found:
            rest = len(self.found) - _SHOWN
            shown = self.found[:_SHOWN] + ([f"and {rest} more"] if rest > 0 else [])
            raise ContrastError("\n  ".join([f"{self.source}: {len(self.found)} problems", *shown]))


def _rows(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"


def records(source: str) -> Records:
    """Row number, what stands there (bytes of a JSON line, or an object), and the split the source puts it in."""
    path = Path(source).expanduser()
    folder, _, split = source.rpartition(":")
    if path.is_file():
        return _file_records(source, path)
    if path.is_dir():
        return _dataset_records(source, str(path), None)
    if folder and Path(folder).expanduser().is_dir():
        return _dataset_records(source, str(Path(folder).expanduser()), split)
    is_file_name = path.suffix in (*_JSON_LINES, ".parquet")
    hub = None if is_file_name else re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(\w[\w.-]*))?", source)
    if hub is None:
        raise ContrastError(f"{source}: no such file; {_SOURCES}")
    return _dataset_records(source, hub[1], hub[2])


def _file_records(source: str, path: Path) -> Records:
    try:
        if path.suffix in _JSON_LINES:
            # Split bytes, not text: str.splitlines also breaks at U+2028, which JSON strings may hold.
            lines = enumerate(path.read_bytes().split(b"\n"), start=1)
            return ((number, line, None) for number, line in lines if line.strip() not in (b"", b"\xef\xbb\xbf"))
        if path.suffix == ".parquet":
            return ((number, record, None) for number, record in enumerate(read_parquet(path), start=1))
    except (OSError, pa.ArrowException) as error:
        raise ContrastError(f"{source}: cannot be read ({first_line(error)})") from error
    raise ContrastError(f"{source}: a {path.suffix or 'nameless'} file is not known; {_SOURCES}")


def _dataset_records(source: str, name: str, split: str | None) -> Records:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data: Any = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ContrastError(f"{source}: the dataset cannot be loaded ({first_line(error)}); {_SOURCES}") from error
    parts = {split: data} if split else dict(data)
    names = _split_names(source, list(parts))
    named = ((record, names[part]) for part, table in parts.items() for record in table)
    return ((number, record, name) for number, (record, name) in enumerate(named, start=1))


def _split_names(source: str, parts: Sequence[Any]) -> dict[Any, str | None]:
    """Several hub splits are kept apart under our names; a lone one is divided by pair like a file."""
    if len(parts) == 1:
        return {parts[0]: None}
    unknown = [part for part in parts if part not in _HUB_SPLITS]
    if unknown:
        raise ContrastError(f"{source}: unknown dataset splits {', '.join(unknown)}; choose one as {source}:SPLIT")
    return {part: _HUB_SPLITS[part] for part in parts}


def parsed(raw: Any) -> Mapping[str, Any]:
    """The object that stands at one row.

    Raises:
        ContrastError: it is no JSON object.
    """
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ContrastError(f"not valid JSON ({error}); write one JSON object per line") from error
    if not isinstance(raw, Mapping):
        raise ContrastError(f"a {type(raw).__name__}, not a JSON object; write one JSON object per line")
    return raw


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """`value`, if it is known.

    Raises:
        ContrastError: it is not; the message suggests the closest.
    """
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ContrastError(f"{name} {value!r} is unknown{hint} (known: {', '.join(known)})")
    return value


def first_line(error: Exception) -> str:
    """The first line of an upstream error, for a one-line message."""
    return (str(error) or type(error).__name__).splitlines()[0]
