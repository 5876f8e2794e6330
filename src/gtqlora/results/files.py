# pyright: strict
"""Read records from the files of a run directory, and say who wrote one that does not fit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gtqlora.errors import RunError
from gtqlora.results.typed import Mismatch, from_json, to_json
from gtqlora.run import read_manifest, require
from gtqlora.storage.atomic import write_parquet
from gtqlora.storage.contents import parquet_rows, read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def read_record(kind: type[T], run: Path, name: str, verb: str) -> T:
    """Return the record in a JSON file of a run directory.

    Args:
        run: the run directory.
        name: of the file, below it.
        verb: the command that writes it.

    Raises:
        RunError: it is not there, damaged, edited or of another version; the message names the file, the key, the
            version that wrote it and the command to run again.
    """
    file = require(run, name, verb)
    value = read_json(file, _again(verb))
    try:
        return from_json(kind, value)
    except Mismatch as error:
        raise misfit(file, error, run, verb) from error


def read_rows(kind: type[T], run: Path, name: str, verb: str) -> list[T]:
    """Return the records in a parquet file of a run directory, one a row; arguments and errors as of `read_record`."""
    file = require(run, name, verb)
    found: list[T] = []
    for number, row in enumerate(parquet_rows(file, _again(verb)), 1):
        try:
            found.append(from_json(kind, row))
        except Mismatch as error:
            raise misfit(file, error, run, verb, f"row {number} ") from error
    return found


def write_rows(file: Path, rows: Iterable[DataclassInstance]) -> None:
    """Write records as the rows of a parquet file; it appears whole or not at all."""
    write_parquet(file, [to_json(row) for row in rows])


def misfit(file: Path, error: Mismatch, run: Path, verb: str, where: str = "") -> RunError:
    """Return the error of a file that does not hold what this version writes: which key, who wrote it, what to do."""
    return RunError(f"{file}: {where}{error} (written by {_writer(run, verb)}); {_again(verb)}")


def _writer(run: Path, verb: str) -> str:
    """Return the version that the manifest records for a verb's results."""
    try:
        version: object = read_manifest(run)["stages"][verb]["versions"]["gtqlora"]
    # a damaged manifest, or one that records no versions: who wrote the file is not worth a second error
    except (KeyError, RunError):
        version = None
    return f"gtqlora {version}" if version else "another version of gtqlora"


def _again(verb: str) -> str:
    return f"run `gtqlora {verb}` again"
