"""Read contrast rows from files, dataset folders and the hub, and check the type of each value.

What rows mean (kinds, splits, the one-way rule) is checked in `rows`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from gtqlora.contrasts.files import ENDINGS, LONGEST, Records, decoded, file_records
from gtqlora.contrasts.hub import load_dataset
from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Message, Messages
from gtqlora.storage.contents import first_line, in_json

_HUB_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation"}
_HUB_SPLITS |= {"test": "heldout", "heldout": "heldout"}
_SOURCES = (
    f"give a file ({', '.join(ENDINGS)}), a dataset folder, or a hub id such as org/name, org/name:split or "
    "org/name:config@split"
)
# A hub id or a folder, whose own name may hold colons, then a split, or the name of a configuration and a split.
_NAMED = re.compile(r"(?P<name>.+?)(?::(?P<config>\w[\w.-]*)@(?P<both>\w[\w.-]*)|:(?P<split>\w[\w.-]*))?")

# Problems, and row numbers of one problem, that a message shows.
_SHOWN = 10
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with some rows of a source.

    Attributes:
        rows: their numbers.
        problem: what is wrong, and the fix.
        excess: those of them without which nothing is wrong: all, unless one may stay.
    """

    rows: tuple[int, ...]
    problem: str
    excess: tuple[int, ...]

    def __str__(self) -> str:
        return f"{_named([', '.join(map(str, self.rows[:_SHOWN]))], len(self.rows))}: {self.problem}"


def _named(rows: Sequence[str], count: int) -> str:
    more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
    return f"row{'s' if count > 1 else ''} {', '.join(rows)}{more}"


# What differs between two problems that are one: names and numbers.
_OWN = re.compile(r"'[^']*'|\d+")


def grouped(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each problem, whichever rows have it, with how many and the first of them.

    Rows that are one another's problem are joined: `3+7`.
    """
    alike: dict[str, list[Problem]] = defaultdict(list)
    for one in problems:
        alike[_OWN.sub("", one.problem)].append(one)
    return [str(found[0]) if len(found) == 1 else _together(found) for found in alike.values()]


def _together(found: Sequence[Problem]) -> str:
    joined, shown = list[str](), 0
    for one in found:
        if shown < _SHOWN:
            joined.append("+".join(map(str, one.rows[: _SHOWN - shown])))
            shown += len(one.rows)
    others = f" (and {len(found) - 1:,} like it)" if len({one.problem for one in found}) > 1 else ""
    return f"{_named(joined, sum(len(one.rows) for one in found))}: {found[0].problem}{others}"


class ContrastProblems(ContrastError):
    """Rows have problems; the message shows each once, up to ten, and `problems` has all."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = grouped(problems)
        rest = len(lines) - _SHOWN
        more = [f"and {rest:,} more; `gtqlora contrast check {source} --json` lists all"] if rest > 0 else []
        head = f"{source}: {len(lines):,} problems"
        super().__init__("\n  ".join([head, *lines[:_SHOWN], *more]) if len(lines) > 1 else f"{source}: {lines[0]}")


@dataclass
class Problems:
    """Problems of one source, gathered so that the user mends them in one go."""

    source: str
    found: list[Problem] = field(default_factory=list[Problem])

    def add(self, numbers: Sequence[int], problem: str, *, excess: Sequence[int] | None = None) -> None:
        """Add a problem of the rows with these numbers, all of which are in excess unless some are named."""
        chosen = numbers if excess is None else excess
        self.found.append(Problem(rows=tuple(numbers), problem=problem, excess=tuple(chosen)))

    def stop(self) -> None:
        """Stop if there are problems.

        Raises:
            ContrastProblems: there are.
        """
        if self.found:
            raise ContrastProblems(self.source, self.found)

    @property
    def excess(self) -> set[int]:
        """Return the numbers of all rows that would have to go."""
        return {number for problem in self.found for number in problem.excess}


def records(source: str) -> Records:
    """Yield each row's number, what stands there (bytes of a JSON line, or an object), and the source's split.

    Raises:
        ContrastError: there is no such source, or it cannot be read.
    """
    place = _place(source)
    if isinstance(place, Path):
        found = file_records(source, place)
        if found is None:
            raise ContrastError(f"{source}: a {place.suffix or 'nameless'} file is not known; {_SOURCES}")
        return found
    return _dataset_records(source, *place)


def check_named(source: str) -> None:
    """Check, before anything is read, that a source is there, or may be on the hub.

    Raises:
        ContrastError: it is neither.
    """
    _place(source)


def _place(source: str) -> Path | tuple[str, str | None, str | None]:
    """Return a source's file, or its folder or hub id with the names of a configuration and a split."""
    path = Path(source).expanduser()
    # Whatever exists on disk comes before the hub: a local folder `org/name` is what its owner means.
    if path.is_file():
        return path
    if path.is_dir():
        return str(path), None, None
    named = _NAMED.fullmatch(source)
    # `org/data.jsonl` is a file that is missing, and must not be asked of the hub.
    if named is None or path.suffix in ENDINGS:
        raise ContrastError(f"{source}: no such file; {_SOURCES}")
    name, split = named["name"], named["both"] or named["split"]
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), named["config"], split
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise ContrastError(f"{source}: no such file; {_SOURCES}")
    return name, named["config"], split


def _dataset_records(source: str, name: str, config: str | None, split: str | None) -> Records:
    from datasets.exceptions import DatasetsError

    try:
        if _is_saved(Path(name)):
            return _saved_records(source, Path(name), split)
        data = load_dataset(name, config, split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # its own words, and not a name that holds the word, such as org/aggregated
        if re.search(r"(?<![\w/-])gated(?![\w/-])", str(error)):
            page = f"https://huggingface.co/datasets/{name}"
            raise ContrastError(
                f"{source}: a gated dataset; accept its terms at {page}, and log in with `hf auth login`"
            ) from error
        # where a configuration must be named, the second line has their names
        what = " ".join(str(error).splitlines()[:2]) if "Config name is missing" in str(error) else first_line(error)
        raise ContrastError(f"{source}: the dataset cannot be loaded ({what}); {_SOURCES}") from error
    # Without a split the library gives all of them by name.
    return _by_split(source, {split: data} if split else dict(data))


def _by_split(source: str, parts: Mapping[str, Any]) -> Records:
    names = _split_names(source, list(parts))
    named = ((record, names[part]) for part, table in parts.items() for record in table)
    return _readable(source, ((number, record, name) for number, (record, name) in enumerate(named, start=1)))


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_records(source: str, folder: Path, split: str | None) -> Records:
    """Return the records of a dataset, or of several by split, that `save_to_disk` wrote.

    Raises:
        ContrastError: there is no such split, or a part of it names a file outside of the folder.
    """
    from datasets import load_from_disk

    try:
        _check_names(folder)
        data: Any = load_from_disk(str(folder))
    except ContrastError as error:
        raise ContrastError(f"{source}: {error}") from error
    except Exception as error:  # the library raises whatever a broken file leads to
        raise ContrastError(f"{source}: the saved dataset is broken ({first_line(error)}); save it anew") from error
    if not isinstance(data, dict):
        if split is not None:
            raise ContrastError(f"{source}: this folder is a single dataset without splits; leave {split!r} out")
        return _by_split(source, {"": data})
    if split is not None and split not in data:
        raise ContrastError(f"{source}: no split {split!r}; splits present: {', '.join(data)}")
    return _by_split(source, data if split is None else {split: data[split]})


def _check_names(folder: Path) -> None:
    """Check that a saved dataset is made of its own folder's files: names in files are not trusted."""
    index = folder / "dataset_dict.json"
    splits = json.loads(index.read_bytes())["splits"] if index.is_file() else []
    parts = [folder / _own(index, split) for split in splits] or [folder]
    for part in parts:
        for file in json.loads((part / "state.json").read_bytes())["_data_files"]:
            _own(part / "state.json", file["filename"])


def _own(listing: Path, name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ContrastError(f"{listing} names {name!r}, which is no file or folder beside it")
    return name


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
        raise ContrastError(f"{source}: unknown dataset splits {', '.join(unknown)}; choose one as {_example(source)}")
    return {part: _HUB_SPLITS[part] for part in parts}


def _example(source: str) -> str:
    """Return how one split of a source is asked for, whose configuration may be named already."""
    return f"{source}@SPLIT" if ":" in source else f"{source}:SPLIT"


def parsed(raw: object) -> Mapping[str, object]:
    """Return the object that stands at one row.

    Raises:
        ContrastError: it is no JSON object, or names a key twice.
    """
    if isinstance(raw, bytes):
        try:
            raw = decoded(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ContrastError(f"not valid JSON ({error}); write one JSON object per line") from error
    if not isinstance(raw, Mapping):
        raise ContrastError(f"{in_json(raw)}, not a JSON object; write one JSON object per line")
    return raw


def a_text(name: str, value: object) -> str:
    """Return the value, if it is a text that can be used.

    Raises:
        ContrastError: it is no text, empty, longer than `LONGEST`, or cannot be written in UTF-8.
    """
    if not isinstance(value, str):
        raise ContrastError(f"{name} is {in_json(value)}; it must be a text")
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
    if not isinstance(value, Mapping) or "role" not in value or not {"content", "tool_calls"} & value.keys():
        raise ContrastError(f'{name}: a message must be {{"role": ..., "content": ...}}')
    if value.get("tool_calls"):
        raise ContrastError(
            f"{name} has tool_calls, which are not rendered here; write the call as text, or drop the row"
        )
    if value["role"] == "developer":
        raise ContrastError(f"{name} role 'developer' is not known to most chat templates; write 'system'")
    role = one_of(f"{name} role", a_text(f"{name} role", value["role"]), _ROLES)
    return {"role": role, "content": _content(f"{name} content", value.get("content"))}


def _content(name: str, value: object) -> str:
    """Return the text of a message, which may come in parts, as of models that also see."""
    if not isinstance(value, list):
        return a_text(name, value)
    types = [part.get("type") if isinstance(part, Mapping) else f"{in_json(part)} by itself" for part in value]
    if other := [kind for kind in types if kind != "text"]:
        raise ContrastError(f"{name} has a part of type {other[0]!r}; only text is read, so drop the row")
    return a_text(name, "".join(a_text(name, part.get("text")) for part in value))


def a_prompt(name: str, value: object) -> Messages:
    """Return a prompt as messages: a text becomes one user message.

    Raises:
        ContrastError: it is neither a text nor messages that end with the user's or a tool's.
    """
    if not isinstance(value, list):
        return ({"role": "user", "content": a_text(name, value)},)
    _check_some(name, value)
    messages = tuple(_message(name, message) for message in value)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ContrastError(f"{name} must end with a user message; the answer belongs in chosen and rejected")
    return messages


def _check_some(name: str, messages: Sequence[object]) -> None:
    if not messages:
        raise ContrastError(f"{name} is an empty list; give it a text, or messages")


def a_completion(name: str, value: object) -> str:
    """Return a completion's text, which may come as a single assistant message.

    Raises:
        ContrastError: it is something else.
    """
    if not isinstance(value, list):
        return a_text(name, value)
    _check_some(name, value)
    messages = [_message(name, message) for message in value]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ContrastError(
            f"{name} holds {len(messages)} messages, not the single assistant message; "
            "move those that chosen and rejected share into `prompt`"
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
