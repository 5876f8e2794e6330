"""Read the rows of one file: JSON lines, a JSON array, CSV, lines of text, or Parquet."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.errors import ContrastError
from gtqlora.storage.contents import first_line

LONGEST = 1_000_000
"""Characters of a text: more than a context holds, and still read in about a second."""

Records = Iterator[tuple[int, Any, str | None]]
"""Each row's number, what stands there (bytes of JSON, or an object), and its split where the source has some."""

# Python refuses to read integers of more than some thousand digits, with an error that names no row.
_DIGITS = 100
_SPACE = re.compile(r"[ \t\r\n]*")


def file_records(source: str, path: Path) -> Records | None:
    """Return the records of a file, or None where the name's ending is not known.

    Raises:
        ContrastError: the file cannot be read.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        return None
    try:
        return ((number, record, None) for number, record in read(source, path))
    except (OSError, pa.ArrowException) as error:
        raise ContrastError(f"{source}: cannot be read ({first_line(error)})") from error


def _text(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ContrastError(
            f"{source}: not UTF-8 (byte {error.start + 1:,} is 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


# --- JSON


def decoded(text: str) -> object:
    """Return what JSON says.

    Raises:
        ContrastError: an object names a key twice, or a number has too many digits.
        ValueError, RecursionError: it is not JSON, or nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once, parse_int=_integer)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object whose keys all differ."""
    # Of two equal keys the checks would see one, and another reader of the file might take the other.
    if twice := _twice(name for name, _ in pairs):
        raise ContrastError(f"the key {twice[0]!r} stands twice in one object; keep one")
    return dict(pairs)


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ContrastError(f"a number has {len(digits)} digits, more than {_DIGITS}; write it as text, in quotes")
    return int(digits)


def _lines(source: str, path: Path) -> Iterator[tuple[int, bytes]]:
    return _rows_of(source, path.read_bytes())


def _rows_of(source: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ContrastError(f"{source}: UTF-16, not UTF-8; save it as UTF-8")
    _check_lines(source, data)
    # Split bytes, not text: str.splitlines also breaks at U+2028, which JSON strings may hold.
    lines = enumerate(data.split(b"\n"), start=1)
    return ((number, line) for number, line in lines if line.strip() not in (b"", b"\xef\xbb\xbf"))


def _json(source: str, path: Path) -> Iterator[tuple[int, bytes | Mapping[str, object]]]:
    """Return what stands in a `.json` file, which has one array, or one object per line."""
    data = path.read_bytes()
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        return enumerate(_elements(source, _text(source, data)), start=1)
    return _rows_of(source, data)


def _check_lines(source: str, data: bytes) -> None:
    """Check that a file is not one array or object over many lines, each of which would be called wrong."""
    if b"\n" not in data.strip():
        return
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(found, list):
        raise ContrastError(f"{source}: a JSON array over many lines; let the name end in .json")
    lists = ", ".join(repr(key) for key, value in found.items() if isinstance(value, list)) or "none"
    raise ContrastError(
        f"{source}: one object over many lines; a .json file holds an array of rows, or a row per line (lists in the "
        f"object: {lists})"
    )


def _elements(source: str, text: str) -> Iterator[bytes | Mapping[str, object]]:
    """Yield the elements of an array, each as its bytes, so that a row is checked like a line; a string is a text."""
    decoder, at, number = json.JSONDecoder(parse_int=str), _skip(text, text.index("[") + 1), 1
    while text[at : at + 1] != "]":
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ContrastError(f"{source}: element {number} of the array is not valid JSON ({error})") from error
        yield {"text": found} if isinstance(found, str) else text[at:end].encode(errors="surrogatepass")
        at, number = _skip(text, end), number + 1
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ContrastError(f"{source}: the array does not go on after element {number - 1}; is the file cut off?")
    if _skip(text, at + 1) < len(text):
        raise ContrastError(f"{source}: more stands after the array; a .json file holds one array, or a row per line")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


# --- tables


def _csv(delimiter: str) -> Callable[[str, Path], Iterator[tuple[int, Mapping[str, object]]]]:
    def read(source: str, path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
        # Line ends inside of quotes belong to the text.
        lines = io.StringIO(_text(source, path.read_bytes()), newline="")
        # The library's own limit, 128 KiB, is for the whole process, and below what a text may have here.
        csv.field_size_limit(LONGEST)
        return _csv_rows(source, csv.reader(lines, delimiter=delimiter, strict=True))

    return read


def _csv_rows(source: str, rows: Iterator[list[str]]) -> Iterator[tuple[int, Mapping[str, object]]]:
    number = 0
    try:
        names = [name.strip() for name in next(rows, [])]
        # pandas writes its index as a first column without a name
        names[:1] = ["Index"] if names[:1] == [""] and len(names) > 1 else names[:1]
        _check_header(source, names)
        for number, cells in enumerate(rows, start=1):
            if not cells:  # an empty line
                continue
            if len(cells) != len(names):
                raise ContrastError(
                    f"{source}: row {number} has {len(cells)} cells, and the header {len(names)}; "
                    "put a text that holds a comma or a line end in quotes"
                )
            # CSV does not tell an empty text from none.
            yield number, {name: _cell(source, number, cell) for name, cell in zip(names, cells, strict=True) if cell}
    except csv.Error as error:
        raise ContrastError(f"{source}: row {number + 1} is not valid CSV ({error})") from error


def _cell(source: str, number: int, text: str) -> object:
    """Return a cell's text, or the messages that it holds as JSON."""
    if not re.match(r"""\[\s*\{\s*["'](role|content)["']\s*:""", text):
        return text
    try:
        return decoded(text)
    except ContrastError as error:
        raise ContrastError(f"{source}: row {number}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ContrastError(
            f"{source}: row {number} holds messages that are not valid JSON ({error}); "
            "write them as JSON, with double quotes, or save the rows as JSONL or Parquet"
        ) from error


def _check_header(source: str, names: list[str]) -> None:
    twice = _twice(names)
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
        raise ContrastError(f"{source}: its columns are separated by {other!r}; save it with commas, or tabs as .tsv")
    if not names:
        raise ContrastError(f"{source}: is empty; a CSV file begins with the names of its columns")
    if "" in names or twice:
        fault = f"has the column {twice[0]!r} twice" if twice else "does not name every column"
        raise ContrastError(f"{source}: the first line {fault}; a CSV file begins with the names of its columns")


def _texts(source: str, path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    lines = _text(source, path.read_bytes()).split("\n")
    return ((number, {"text": line.strip()}) for number, line in enumerate(lines, start=1) if line.strip())


def _parquet(source: str, path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with pq.ParquetFile(path) as file:
        table = file.read()
    if twice := _twice(table.column_names):
        raise ContrastError(f"{source}: the column {twice[0]!r} stands twice, so one would hide the other; keep one")
    columns = [_values(source, name, table.column(name)) for name in table.column_names]
    rows = (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))
    return enumerate(rows, start=1)


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


_READERS: dict[str, Callable[[str, Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv(","),
    ".tsv": _csv("\t"),
    ".txt": _texts,
    ".parquet": _parquet,
}
ENDINGS = tuple(_READERS)
