"""Read contrast rows from JSONL and Parquet files, dataset folders and the hub, and check the type of each value.

What rows mean (kinds, splits, the one-way rule) is checked in `rows`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Message, Messages
from gtqlora.storage.contents import first_line

_HUB_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation"}
_HUB_SPLITS |= {"test": "heldout", "heldout": "heldout"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_SOURCES = "give a .jsonl or .parquet file, a dataset folder, or a hub id such as org/name or org/name:split"

# Problems, and row numbers of one problem, that a message shows.
_SHOWN = 10
# Python refuses to read integers of more than some thousand digits, with an error that names no row.
_DIGITS = 100
LONGEST = 1_000_000
"""Characters of a text: more than a context holds, and still read in about a second."""

_ROLES = ("system", "user", "assistant", "tool")

Records = Iterator[tuple[int, Any, str | None]]


@dataclass
class Problems:
    """Problems of one source, gathered so that the user mends them in one go."""

    source: str
    found: list[str] = field(default_factory=list)

    def add(self, numbers: Sequence[int], problem: str) -> None:
        """Add a problem of the rows with these numbers."""
        self.found.append(f"{_rows(numbers)}: {problem}")

    def stop(self) -> None:
        """Stop if there are problems.

        Raises:
            ContrastError: there are; the message shows the first ten.
        """
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
    """Yield each row's number, what stands there (bytes of a JSON line, or an object), and the source's split.

    Raises:
        ContrastError: there is no such source, or it cannot be read.
    """
    path = Path(source).expanduser()
    # Whatever exists on disk comes before the hub: a local folder `org/name` is what its owner means.
    folder, _, split = source.rpartition(":")
    if path.is_file():
        return _file_records(source, path)
    if path.is_dir():
        return _dataset_records(source, str(path), None)
    if folder and Path(folder).expanduser().is_dir():
        return _dataset_records(source, str(Path(folder).expanduser()), split)
    # `org/data.jsonl` is a file that is missing, and must not be asked of the hub.
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
            return ((number, record, None) for number, record in enumerate(_parquet_rows(source, path), start=1))
    except (OSError, pa.ArrowException) as error:
        raise ContrastError(f"{source}: cannot be read ({first_line(error)})") from error
    raise ContrastError(f"{source}: a {path.suffix or 'nameless'} file is not known; {_SOURCES}")


def _parquet_rows(source: str, path: Path) -> list[dict[str, object]]:
    with pq.ParquetFile(path) as file:
        table = file.read()
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ContrastError(f"{source}: the column {twice[0]!r} stands twice, so one would hide the other; keep one")
    columns = [_values(source, name, table.column(name)) for name in table.column_names]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(source: str, name: str, column: pa.ChunkedArray) -> list[object]:
    """Return a column's values as Python's."""
    # Arrow holds values that Python does not, such as dates beyond the year 9999 and text that is not UTF-8.
    found = []
    for number, value in enumerate(column, start=1):
        try:
            found.append(value.as_py())
        except (ValueError, OverflowError, TypeError) as error:
            problem = f"column {name!r} holds a {column.type} that cannot be read ({first_line(error)})"
            raise ContrastError(f"{source}: row {number}: {problem}; correct it or leave the column out") from error
    return found


def _dataset_records(source: str, name: str, split: str | None) -> Records:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data: Any = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ContrastError(f"{source}: the dataset cannot be loaded ({first_line(error)}); {_SOURCES}") from error
    # Without a split the library gives all of them by name.
    parts = {split: data} if split else dict(data)
    names = _split_names(source, list(parts))
    named = ((record, names[part]) for part, table in parts.items() for record in table)
    return _readable(source, ((number, record, name) for number, (record, name) in enumerate(named, start=1)))


def _readable(source: str, rows: Records) -> Records:
    """Yield the same rows, and name the row whose values cannot be read."""
    number = 0
    try:
        for row in rows:
            number = row[0]
            yield row
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:
        problem = f"a column cannot be read ({first_line(error)}); correct it or leave the column out"
        raise ContrastError(f"{source}: row {number + 1}: {problem}") from error


def _split_names(source: str, parts: Sequence[str]) -> dict[str, str | None]:
    """Map a dataset's splits to ours. A single one maps to None: it is divided by pair, as a file is."""
    if len(parts) == 1:
        return {parts[0]: None}
    unknown = [part for part in parts if part not in _HUB_SPLITS]
    if unknown:
        raise ContrastError(f"{source}: unknown dataset splits {', '.join(unknown)}; choose one as {source}:SPLIT")
    return {part: _HUB_SPLITS[part] for part in parts}


def parsed(raw: object) -> Mapping[str, object]:
    """Return the object that stands at one row.

    Raises:
        ContrastError: it is no JSON object, or names a key twice.
    """
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise ContrastError(f"not valid JSON ({error}); write one JSON object per line") from error
    if not isinstance(raw, Mapping):
        raise ContrastError(f"a {type(raw).__name__}, not a JSON object; write one JSON object per line")
    return raw


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object whose keys all differ."""
    # Of two equal keys the checks would see one, and another reader of the file might take the other.
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ContrastError(f"the key {twice[0]!r} stands twice in one object; keep one")
    return dict(pairs)


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ContrastError(f"a number has {len(digits)} digits, more than {_DIGITS}; write it as text, in quotes")
    return int(digits)


def a_text(name: str, value: object) -> str:
    """Return the value, if it is a text that can be used.

    Raises:
        ContrastError: it is no text, empty, longer than `LONGEST`, or cannot be written in UTF-8.
    """
    if not isinstance(value, str):
        raise ContrastError(f"{name} is {type(value).__name__}; it must be a string")
    if not value.strip():
        raise ContrastError(f"{name} is empty; give it a text")
    if len(value) > LONGEST:
        raise ContrastError(f"{name} has {len(value):,} characters, more than {LONGEST:,}; shorten it or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ContrastError(
            f"{name} holds half a character (a lone surrogate); write the file anew in UTF-8"
        ) from error
    return value


def _message(name: str, value: object) -> Message:
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise ContrastError(f'{name}: a message must be {{"role": ..., "content": ...}}')
    role = one_of(f"{name} role", a_text(f"{name} role", value["role"]), _ROLES)
    return {"role": role, "content": a_text(f"{name} content", value["content"])}


def a_prompt(name: str, value: object) -> Messages:
    """Return a prompt as messages: a text becomes one user message.

    Raises:
        ContrastError: it is neither a text nor messages that end with the user's or a tool's.
    """
    if not isinstance(value, list):
        return ({"role": "user", "content": a_text(name, value)},)
    messages = tuple(_message(name, message) for message in value)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ContrastError(f"{name} must end with a user message; the answer belongs in chosen and rejected")
    return messages


def a_completion(name: str, value: object) -> str:
    """Return a completion's text, which may come as a single assistant message.

    Raises:
        ContrastError: it is something else.
    """
    if not isinstance(value, list):
        return a_text(name, value)
    messages = [_message(name, message) for message in value]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ContrastError(
            f"{name} holds {len(messages)} messages, not the single assistant message; "
            "TRL's implicit-prompt form is not taken: move the shared messages into `prompt`"
        )
    return messages[0]["content"]


def a_name(column: str, value: object) -> str:
    """Return a text or a whole number as a text.

    Raises:
        ContrastError: it is something else.
    """
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else a_text(column, value)


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """Return `value` if it is known.

    Raises:
        ContrastError: it is not; the message suggests the closest.
    """
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ContrastError(f"{name} {value!r} is unknown{hint} (known: {', '.join(known)})")
    return value
