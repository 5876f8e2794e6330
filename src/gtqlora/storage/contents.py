"""What files hold: inputs are known by the hash of their contents, and JSON from outside is checked as it is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.errors import RunError

_CHUNK = 2**20
"""Bytes that are hashed at once."""


def sha256_json(value: object) -> str:
    """Return the hash of a JSON-able value, which does not depend on the order of keys."""
    # A path among settings hashes as its text, so that it is the same before and after it was in a manifest.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_pieces(pieces: Iterable[tuple[Path, int, int]]) -> str:
    """Return the SHA-256 of bytes that lie in files, each piece from a start up to a stop."""
    digest = hashlib.sha256()
    for path, start, stop in pieces:
        with path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while start < stop and (data := stream.read(min(_CHUNK, stop - start))):
                digest.update(data)
                start += len(data)
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """Return the identity of a file, folder or dataset split: a hash of its contents, wherever it lies.

    A name that is none of these is a hub id, and stands for itself.
    """
    name, path = str(path), Path(path).expanduser()
    folder = Path(name.rpartition(":")[0]).expanduser()
    if not path.exists() and ":" in name and folder.is_dir():  # one split of a dataset folder
        return sha256_json([name.rpartition(":")[2], fingerprint(folder)])
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return f"hub:{name}"
    return sha256_json(sorted((str(file.relative_to(path)), sha256_file(file)) for file in _files(path)))


def _files(folder: Path) -> Iterator[Path]:
    """Yield all plain files, also behind links, but not hidden ones."""
    # The hub keeps a hidden `.cache` in a model folder, which changes by itself.
    seen: set[Path] = set()  # links may lead back up, so each real folder is read once
    for root, folders, names in os.walk(folder, followlinks=True):
        place = Path(root).resolve()
        folders[:] = [] if place in seen else [name for name in folders if not name.startswith(".")]
        if place not in seen:
            yield from (p for p in (Path(root, n) for n in names) if not p.name.startswith(".") and p.is_file())
        seen.add(place)


KINDS: dict[object, str] = {
    **{dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"},
    **{int: "a whole number", float: "a number"},
}
"""What values of JSON are called, by their types."""


def in_json(value: object) -> str:
    """Return what kind of value it is in the words of JSON; what is no finite number by itself."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return KINDS.get(type(value), type(value).__name__)


def first_line(error: BaseException) -> str:
    """Return the first line of an upstream error, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(file: Path, remedy: str) -> dict[str, object]:
    """Read the JSON object in a file that may have been edited or damaged.

    Raises:
        RunError: it is no plain file, or not one JSON object of unique keys and finite numbers; the message ends with
            the remedy.
    """
    try:
        if not file.is_file():
            raise RunError(f"{file}: {'not a plain file' if os.path.lexists(file) else 'not there'}; {remedy}")
        return json_object(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: not valid JSON ({first_line(error)}); {remedy}") from error


def json_object(text: str) -> dict[str, object]:
    """Parse a text that must be one JSON object of unique keys and finite numbers.

    Raises:
        ValueError: it is anything else.
        RecursionError: it is nested too deeply.
    """

    # Python's reader keeps the last of equal keys, and takes NaN and Infinity, which are not JSON.
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        return found

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is no finite number")
        return float(text)

    value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    if not isinstance(value, dict):
        raise ValueError("it must be an object")
    return value


def parquet_rows(file: Path, remedy: str) -> list[dict[str, object]]:
    """Return the rows of a parquet file that may have been edited or damaged.

    Raises:
        RunError: it cannot be read; the message ends with the remedy.
    """
    try:
        return read_parquet(file)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{file}: cannot be read ({error}); {remedy}") from error


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read a Parquet file as one dictionary for each row."""
    return pq.read_table(path).to_pylist()
