"""Contrast sets: preference rows in three kinds, checked once where they enter; the chat template; statistics.

Every way in is `load`, so the one-way rule holds for every row: a `harmful` row's chosen refuses, its
rejected does not.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from gtqlora.errors import ConfigError, ContrastError
from gtqlora.judging import Judge, assents_in_english, refuses_in_english
from gtqlora.run import read_parquet, write_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Messages = tuple[Message, ...]

FILE = "contrast.parquet"
KINDS = ("benign", "lookalike", "harmful")
SPLITS = ("train", "validation", "heldout")
OPENING_WORDS, OPENING_CHARACTERS = 24, 240

_ROLES = ("system", "user", "assistant", "tool")
_HUB_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation"}
_HUB_SPLITS |= {"test": "heldout", "heldout": "heldout"}
_JSON_LINES = (".jsonl", ".json", ".ndjson")
_SHOWN = 10
_SOURCES = "give a .jsonl or .parquet file, a dataset folder, or a hub id such as org/name or org/name:split"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One preference pair; `number` is its line in a JSONL file, or its 1-based row elsewhere."""

    number: int
    kind: str
    prompt: Messages
    chosen: str
    rejected: str
    pair_id: str
    twin: Messages | None = None
    answer: str | None = None
    split: str


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Checked rows of one source."""

    source: str
    rows: tuple[Row, ...]

    def split(self, name: str) -> Contrast:
        """The rows of one split; "all" gives every row.

        Raises:
            ContrastError: no row is in that split.
        """
        if name == "all":
            return self
        rows = tuple(row for row in self.rows if row.split == name)
        if not rows:
            counts = Counter(row.split for row in self.rows)
            present = ", ".join(f"{split} ({n})" for split, n in counts.items())
            raise ContrastError(f"{self.source}: no rows in split {name!r}; splits present: {present}, or all")
        return dataclasses.replace(self, rows=rows)

    def of_kind(self, kind: str) -> tuple[Row, ...]:
        """The rows of one kind, maybe none.

        Raises:
            ContrastError: no such kind.
        """
        _one_of("kind", kind, KINDS)
        return tuple(row for row in self.rows if row.kind == kind)

    @cached_property
    def _benign(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.of_kind("benign"):
            found[row.pair_id].append(row)
        return dict(found)

    def twin_of(self, row: Row) -> Messages | None:
        """The row's own twin, else (unless it is benign) the benign prompt of its pair sharing most words with it."""
        if row.twin is not None or row.kind == "benign":
            return row.twin
        words = _words(row.prompt)
        candidates = [benign.prompt for benign in self._benign.get(row.pair_id, ())]
        return max(candidates, key=lambda prompt: len(_words(prompt) & words), default=None)

    def to_preference(self) -> list[dict[str, Any]]:
        """The rows in TRL's conversational preference form, with their kind."""
        return [
            {
                "prompt": [dict(message) for message in row.prompt],
                "chosen": [{"role": "assistant", "content": row.chosen}],
                "rejected": [{"role": "assistant", "content": row.rejected}],
                "kind": row.kind,
            }
            for row in self.rows
        ]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts over rows."""

    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a set holds.

    Attributes:
        counts: rows by split, then by kind.
        pairs: distinct pair ids.
        prompt_tokens: prompts after the chat template, up to where the answer begins.
        full_tokens: prompt and the longer of the two completions.
    """

    rows: int
    kinds: dict[str, int]
    splits: dict[str, int]
    counts: dict[str, dict[str, int]]
    pairs: int
    with_twin: int
    unique_prompts: int
    prompt_tokens: Lengths | None = None
    full_tokens: Lengths | None = None


@dataclass
class _Problems:
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


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _key(messages: Messages) -> str:
    """What makes two prompts the same: roles and words, whatever the case and spacing."""
    return json.dumps([[message["role"], _normal(message["content"])] for message in messages])


def _words(messages: Messages) -> set[str]:
    return {word for message in messages for word in _normal(message["content"]).split()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _split_of(pair_id: str) -> str:
    """80 % train, 10 % validation, 10 % heldout, the same on every machine."""
    percent = int(_digest(pair_id), 16) % 100
    return "train" if percent < 80 else "validation" if percent < 90 else "heldout"


def _one_of(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ContrastError(f"{name} {value!r} is unknown{hint} (known: {', '.join(known)})")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ContrastError(f"{name} is {type(value).__name__}; it must be a string")
    if not value.strip():
        raise ContrastError(f"{name} is empty; give it a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ContrastError(
            f"{name} holds half a character (a lone surrogate); write the file anew in UTF-8"
        ) from error
    return value


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise ContrastError(f'{name}: a message must be {{"role": ..., "content": ...}}')
    role = _one_of(f"{name} role", _text(f"{name} role", value["role"]), _ROLES)
    return {"role": role, "content": _text(f"{name} content", value["content"])}


def _prompt(name: str, value: Any) -> Messages:
    if not isinstance(value, list):
        return ({"role": "user", "content": _text(name, value)},)
    messages = tuple(_message(name, message) for message in value)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise ContrastError(f"{name} must end with a user message; the answer belongs in chosen and rejected")
    return messages


def _completion(name: str, value: Any) -> str:
    if not isinstance(value, list):
        return _text(name, value)
    messages = [_message(name, message) for message in value]
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ContrastError(
            f"{name} holds {len(messages)} messages, not the single assistant message; "
            "TRL's implicit-prompt form is not taken: move the shared messages into `prompt`"
        )
    return messages[0]["content"]


def _pair_id(value: Any, prompt: Messages) -> str:
    if value is None:
        return _digest(_key(prompt))
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else _text("pair_id", value)


def _record(raw: Any) -> Mapping[str, Any]:
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ContrastError(f"not valid JSON ({error}); write one JSON object per line") from error
    if not isinstance(raw, Mapping):
        raise ContrastError(f"a {type(raw).__name__}, not a JSON object; write one JSON object per line")
    return raw


def _row(number: int, raw: Any, hub_split: str | None) -> Row:
    record = {name: value for name, value in _record(raw).items() if value is not None}
    required = ("prompt", "chosen", "rejected", "kind")
    # A list of several messages says more about the mistake than "prompt is missing".
    chosen = _completion("chosen", record["chosen"]) if "chosen" in record else ""
    missing = [name for name in required if name not in record]
    if missing:
        raise ContrastError(f"{' and '.join(missing)} missing; every row needs {', '.join(required)}")
    prompt = _prompt("prompt", record["prompt"])
    pair_id = _pair_id(record.get("pair_id"), prompt)
    split = record["split"] if "split" in record else hub_split or _split_of(pair_id)
    return Row(
        number=number,
        kind=_one_of("kind", _text("kind", record["kind"]), KINDS),
        prompt=prompt,
        chosen=chosen,
        rejected=_completion("rejected", record["rejected"]),
        pair_id=pair_id,
        twin=_prompt("twin", record["twin"]) if "twin" in record else None,
        answer=_text("answer", record["answer"]) if "answer" in record else None,
        split=_one_of("split", _text("split", split), SPLITS),
    )


def _check_row(row: Row, judge: Judge) -> None:
    if _normal(row.chosen) == _normal(row.rejected):
        raise ContrastError("chosen and rejected are the same; a pair must prefer one over the other")
    if row.twin is not None and _key(row.twin) == _key(row.prompt):
        raise ContrastError("twin is the prompt itself; give the harmless counterpart or leave it out")
    if row.kind == "harmful":
        _check_one_way(row, judge)
    elif judge(row.chosen):
        raise ContrastError(
            f"chosen of a {row.kind} row is a refusal by the judge, which teaches over-refusal; "
            "give a helpful answer, or set `judge` if it is none"
        )


def _check_one_way(row: Row, judge: Judge) -> None:
    """The English floor stands under the judge so that a judge turned around does not turn the rule around."""
    if assents_in_english(row.chosen):
        raise ContrastError(
            "chosen of a harmful row opens with an assent (the one-way rule; no setting changes it); "
            "open it with the refusal"
        )
    if not judge(row.chosen):
        raise ContrastError(
            "chosen of a harmful row must be a refusal (the one-way rule; no setting changes it); "
            "make it one, or set `judge` if it is one in other words"
        )
    if judge(row.rejected) or refuses_in_english(row.rejected):
        raise ContrastError(
            "rejected of a harmful row must not be a refusal (the one-way rule; no setting changes it); "
            'make it an opening phrase such as "Sure, here is"'
        )
    # An `answer` is stored too, so it must not become the place where harmful content hides.
    _check_opening("rejected", row.rejected)
    _check_opening("answer", row.answer or "")


def _check_opening(name: str, text: str) -> None:
    # Characters count as well: words can be joined, and some scripts put no spaces between them.
    if len(text.split()) > OPENING_WORDS or len(text) > OPENING_CHARACTERS:
        raise ContrastError(
            f"{name} of a harmful row must be an opening phrase only, at most {OPENING_WORDS} words and "
            f"{OPENING_CHARACTERS} characters; cut it to its first words"
        )


def load(source: str | Path, judge: Judge) -> Contrast:
    """The rows of a JSONL or Parquet file, a dataset folder or a hub dataset, in TRL preference form plus `kind`.

    Optional columns: `pair_id` (else a hash of the prompt), `twin`, `answer`, `split` (else by a hash of the pair id).

    Raises:
        ContrastError: the source cannot be read, or rows break the schema, leak between splits or break the one-way
            rule; up to ten problems are shown together, with row numbers and the fix.
    """
    name = str(source)
    problems, rows = _Problems(name), []
    seen = 0
    for number, raw, hub_split in _records(name):
        seen += 1
        try:
            row = _row(number, raw, hub_split)
            _check_row(row, judge)
        except ContrastError as error:
            problems.add([number], str(error))
        else:
            rows.append(row)
    if not seen:
        raise ContrastError(f"{name}: no rows; write one JSON object per line")
    _check_set(rows, problems)
    problems.stop()
    _check_kinds(rows, name)
    return Contrast(source=name, rows=tuple(rows))


def _check_kinds(rows: Iterable[Row], source: str) -> None:
    kinds = {row.kind for row in rows}
    if "harmful" not in kinds:
        raise ContrastError(
            f"{source}: no harmful rows, only {' and '.join(sorted(kinds))}; add some with a refusal as chosen: "
            "the safety floor and the routing anchor are measured on them"
        )
    if len(kinds) < 2:
        raise ContrastError(f"{source}: only harmful rows; add benign or lookalike rows to contrast them with")


def _grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> Iterator[list[Row]]:
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return (group for group in groups.values() if len(group) > 1)


def _check_set(rows: Sequence[Row], problems: _Problems) -> None:
    for group in _grouped(rows, lambda row: (row.kind, json.dumps(row.prompt), row.chosen, row.rejected)):
        problems.add(_numbers(group), "the same row more than once; keep one of them")
    for group in _grouped(rows, lambda row: _key(row.prompt)):
        if len({row.kind for row in group}) > 1:
            problems.add(_numbers(group), "the same prompt under two kinds; keep the kind that fits")
    _check_leakage(rows, problems)


def _check_leakage(rows: Sequence[Row], problems: _Problems) -> None:
    for group in _grouped(rows, lambda row: row.pair_id):
        if len({row.split for row in group}) > 1:
            problems.add(_numbers(group), f"pair_id {group[0].pair_id!r} is in two splits; give its rows one `split`")
    for group in _sharing_a_prompt(rows):
        if len({row.split for row in group}) > 1 and len({row.pair_id for row in group}) > 1:
            problems.add(
                _numbers(group), "one prompt (or twin) is in two splits; give these rows one `pair_id` or one `split`"
            )


def _prompts(row: Row) -> list[str]:
    return [_key(messages) for messages in (row.prompt, row.twin) if messages is not None]


def _sharing_a_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for prompt in _prompts(row):
            groups[prompt].append(row)
    return list(groups.values())


def _numbers(rows: Iterable[Row]) -> list[int]:
    return [row.number for row in rows]


_Records = Iterator[tuple[int, Any, str | None]]


def _records(source: str) -> _Records:
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


def _file_records(source: str, path: Path) -> _Records:
    try:
        if path.suffix in _JSON_LINES:
            # Split bytes, not text: str.splitlines also breaks at U+2028, which JSON strings may hold.
            lines = enumerate(path.read_bytes().split(b"\n"), start=1)
            return ((number, line, None) for number, line in lines if line.strip() not in (b"", b"\xef\xbb\xbf"))
        if path.suffix == ".parquet":
            return ((number, record, None) for number, record in enumerate(read_parquet(path), start=1))
    except (OSError, pa.ArrowException) as error:
        raise ContrastError(f"{source}: cannot be read ({_first_line(error)})") from error
    raise ContrastError(f"{source}: a {path.suffix or 'nameless'} file is not known; {_SOURCES}")


def _dataset_records(source: str, name: str, split: str | None) -> _Records:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        data: Any = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ContrastError(f"{source}: the dataset cannot be loaded ({_first_line(error)}); {_SOURCES}") from error
    parts = {split: data} if split else dict(data)
    names = _split_names(source, list(parts))
    records = ((record, names[part]) for part, table in parts.items() for record in table)
    return ((number, record, name) for number, (record, name) in enumerate(records, start=1))


def _split_names(source: str, parts: Sequence[Any]) -> dict[Any, str | None]:
    """Several hub splits are kept apart under our names; a lone one is divided by pair like a file."""
    if len(parts) == 1:
        return {parts[0]: None}
    unknown = [part for part in parts if part not in _HUB_SPLITS]
    if unknown:
        raise ContrastError(f"{source}: unknown dataset splits {', '.join(unknown)}; choose one as {source}:SPLIT")
    return {part: _HUB_SPLITS[part] for part in parts}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def save(contrast: Contrast, path: Path) -> None:
    """Write a set as a Parquet file that `load` reads back, whole or not at all.

    Raises:
        ContrastError: the name does not end in .parquet, so `load` would not know it.
    """
    if path.suffix != ".parquet":
        raise ContrastError(f"{path}: a contrast set is saved as Parquet; let the name end in .parquet")
    rows = [dataclasses.asdict(row) | {"prompt": list(row.prompt)} for row in contrast.rows]
    for row in rows:
        row["twin"] = None if row["twin"] is None else list(row["twin"])
    write_parquet(path, rows)


def check_disjoint(heldout: Contrast, train: Contrast) -> None:
    """Assure that no held-out prompt is a prompt, or a twin, of the training rows given.

    Raises:
        ContrastError: shared prompts, with the row numbers on both sides.
    """
    trained: dict[str, int] = {}
    for row in train.rows:
        for prompt in _prompts(row):
            trained.setdefault(prompt, row.number)
    problems = _Problems(heldout.source)
    for row in heldout.rows:
        if (number := trained.get(_key(row.prompt))) is not None:
            problems.add([row.number], f"its prompt was trained on (row {number} of {train.source}); remove it here")
    problems.stop()


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool) -> list[int]:
    from jinja2 import TemplateError

    try:
        encoded: Any = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    except TemplateError as error:
        raise ContrastError(f"the chat template refuses these messages ({_first_line(error)})") from error
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    flat = ids[0] if len(ids) and isinstance(ids[0], list) else ids
    return [int(token) for token in flat]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, up to where the assistant's answer begins; the one place that applies the template to it.

    Raises:
        ContrastError: the template refuses the messages, e.g. a system role it does not know.
    """
    return _apply_template(tokenizer, messages, generation=True)


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt and of its chosen completion (with whatever the template puts after it)."""
    prompt = encode_prompt(tokenizer, row.prompt)
    full = _apply_template(tokenizer, [*row.prompt, {"role": "assistant", "content": row.chosen}], generation=False)
    shared = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return full[:shared], full[shared:]


def _row_lengths(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[int, int]:
    """Tokens of the prompt, and of the prompt with its longer completion."""
    prompt = len(encode_prompt(tokenizer, row.prompt))
    answers = ([*row.prompt, {"role": "assistant", "content": text}] for text in (row.chosen, row.rejected))
    return prompt, max(len(_apply_template(tokenizer, answer, generation=False)) for answer in answers)


def _summary(lengths: Sequence[int]) -> Lengths:
    return Lengths(
        minimum=min(lengths),
        median=float(np.median(lengths)),
        p95=int(np.percentile(lengths, 95, method="higher")),
        maximum=max(lengths),
    )


def _token_lengths(
    contrast: Contrast, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Lengths]:
    problems = _Problems(contrast.source)
    lengths: list[tuple[int, int, int]] = []
    for row in contrast.rows:
        try:
            lengths.append((row.number, *_row_lengths(tokenizer, row)))
        except ContrastError as error:
            problems.add([row.number], str(error))
    limit = max_length if max_length is not None else float("inf")
    prompts = [number for number, prompt, _ in lengths if prompt > limit]
    fulls = [number for number, prompt, full in lengths if prompt <= limit < full]
    for numbers, what in ((prompts, "the prompt alone"), (fulls, "prompt and completion")):
        if numbers:
            problems.add(numbers, f"{what} longer than {max_length} tokens; shorten, drop, or raise the length")
    problems.stop()
    return {
        "prompt_tokens": _summary([prompt for _, prompt, _ in lengths]),
        "full_tokens": _summary([full for _, _, full in lengths]),
    }


def statistics(
    contrast: Contrast, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> Statistics:
    """Counts of a set and, with a tokenizer, token lengths after the chat template.

    Raises:
        ContrastError: rows longer than `max_length`, or refused by the chat template.
        ConfigError: `max_length` without a tokenizer.
    """
    if max_length is not None and tokenizer is None:
        raise ConfigError("max_length is counted in tokens; give the tokenizer too")
    rows = contrast.rows
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        if kinds := Counter(row.kind for row in rows if row.split == split):
            counts[split] = dict(kinds)
    return Statistics(
        rows=len(rows),
        kinds=dict(Counter(row.kind for row in rows)),
        splits=dict(Counter(row.split for row in rows)),
        counts=counts,
        pairs=len({row.pair_id for row in rows}),
        with_twin=sum(contrast.twin_of(row) is not None for row in rows),
        unique_prompts=len({_key(row.prompt) for row in rows}),
        **(_token_lengths(contrast, tokenizer, max_length) if tokenizer is not None else {}),
    )
