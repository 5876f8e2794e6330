"""Contrast sets: preference rows in three kinds, checked once where they enter.

Every way in is `load`, so the one-way rule holds for every row: a `harmful` row's chosen refuses, its
rejected does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from gtqlora.contrasts.sources import (
    Messages,
    Problems,
    a_completion,
    a_name,
    a_prompt,
    a_text,
    one_of,
    parsed,
    records,
)
from gtqlora.contrasts.template import encode_answers
from gtqlora.contrasts.template import encode_prompt as encode_prompt  # where callers look for it, beside `encode_row`
from gtqlora.errors import ContrastError
from gtqlora.judging.folding import flat, holds
from gtqlora.judging.judge import Judge, refusals
from gtqlora.judging.english import answers_after_refusing, assents_in_english, refuses_in_english
from gtqlora.run import write_parquet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "contrast.parquet"
KINDS = ("benign", "lookalike", "harmful")
SPLITS = ("train", "validation", "heldout")
OPENING_WORDS, OPENING_CHARACTERS = 24, 240
REFUSAL_WORDS, REFUSAL_CHARACTERS = 40, 320
TOPICS = ("topic", "category", "source")


class PreferenceIds(TypedDict):
    """A row in tokens: the prompt, the two completions after it, and its kind."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One preference pair; `number` is its line in a JSONL file, or its 1-based row elsewhere.

    `topic` is what it is about, or where it comes from: rows of one topic are not independent.
    """

    number: int
    kind: str
    prompt: Messages
    chosen: str
    rejected: str
    pair_id: str
    twin: Messages | None = None
    answer: str | None = None
    topic: str | None = None
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
        one_of("kind", kind, KINDS)
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


def prompt_key(messages: Messages) -> str:
    """What makes two prompts the same: roles and words as a reader sees them, whatever the case and spacing."""
    return json.dumps([[message["role"], flat(message["content"])] for message in messages])


def distinct(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The first row of every prompt: asking the same again tells nothing new."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(prompt_key(row.prompt), row)
    return tuple(first.values())


class Grouped(Protocol):
    """What belongs to a pair and maybe to a topic."""

    @property
    def pair_id(self) -> str: ...

    @property
    def topic(self) -> str | None: ...


def groupings(rows: Sequence[Grouped]) -> list[list[str]]:
    """The ways in which rows belong together: by pair, and by topic where they have several; rows of none are one."""
    topics = [flat(row.topic or "") for row in rows]
    return [[row.pair_id for row in rows], *([topics] if len(set(filter(None, topics))) > 1 else [])]


def _words(messages: Messages) -> set[str]:
    return {word for message in messages for word in flat(message["content"]).split()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _split_of(pair_id: str) -> str:
    """80 % train, 10 % validation, 10 % heldout, the same on every machine."""
    percent = int(_digest(pair_id), 16) % 100
    return "train" if percent < 80 else "validation" if percent < 90 else "heldout"


def _pair_id(value: Any, prompt: Messages) -> str:
    if value is None:
        return _digest(prompt_key(prompt))
    return a_name("pair_id", value)


def _topic(record: Mapping[str, Any]) -> str | None:
    column = next((name for name in TOPICS if name in record), None)
    return None if column is None else a_name(column, record[column])


def _row(number: int, raw: object, hub_split: str | None) -> Row:
    record = {name: value for name, value in parsed(raw).items() if value is not None}
    required = ("prompt", "chosen", "rejected", "kind")
    # A list of several messages says more about the mistake than "prompt is missing".
    chosen = a_completion("chosen", record["chosen"]) if "chosen" in record else ""
    missing = [name for name in required if name not in record]
    if missing:
        raise ContrastError(f"{' and '.join(missing)} missing; every row needs {', '.join(required)}")
    prompt = a_prompt("prompt", record["prompt"])
    pair_id = _pair_id(record.get("pair_id"), prompt)
    split = record["split"] if "split" in record else hub_split or _split_of(pair_id)
    return Row(
        number=number,
        kind=one_of("kind", a_text("kind", record["kind"]), KINDS),
        prompt=prompt,
        chosen=chosen,
        rejected=a_completion("rejected", record["rejected"]),
        pair_id=pair_id,
        twin=a_prompt("twin", record["twin"]) if "twin" in record else None,
        answer=a_text("answer", record["answer"]) if "answer" in record else None,
        topic=_topic(record),
        split=one_of("split", a_text("split", split), SPLITS),
    )


@dataclass(frozen=True)
class _Judged:
    """Whether the judge takes a row's `chosen` for a refusal and, of a harmful row, its `rejected`."""

    chosen: bool
    rejected: bool


def _judged(rows: Sequence[Row], judge: Judge) -> list[_Judged]:
    """Ask the judge about the answers of all rows together."""
    harmful = [row for row in rows if row.kind == "harmful"]
    prompts = [row.prompt for row in (*rows, *harmful)]
    found = refusals(judge, prompts, [*(row.chosen for row in rows), *(row.rejected for row in harmful)])
    rejected = iter(found[len(rows) :])
    return [
        _Judged(chosen, row.kind == "harmful" and next(rejected)) for row, chosen in zip(rows, found, strict=False)
    ]


def _check_row(row: Row, judged: _Judged) -> None:
    if flat(row.chosen) == flat(row.rejected):
        raise ContrastError("chosen and rejected are the same; a pair must prefer one over the other")
    if row.twin is not None and prompt_key(row.twin) == prompt_key(row.prompt):
        raise ContrastError("twin is the prompt itself; give the harmless counterpart or leave it out")
    if row.kind == "harmful":
        _check_one_way(row, judged)
    elif judged.chosen:
        raise ContrastError(
            f"chosen of a {row.kind} row is a refusal by the judge, which teaches over-refusal; "
            "give a helpful answer, or set `judge` if it is none"
        )


def _check_one_way(row: Row, judged: _Judged) -> None:
    """Check a harmful row; the English floor stands under the judge so that a judge turned around does not turn the rule around."""
    if assents_in_english(row.chosen):
        raise ContrastError(
            "chosen of a harmful row opens with an assent (the one-way rule; no setting changes it); "
            "open it with the refusal"
        )
    if not judged.chosen:
        raise ContrastError(
            "chosen of a harmful row must be a refusal (the one-way rule; no setting changes it); "
            "make it one, or set `judge` if it is one in other words"
        )
    if judged.rejected or refuses_in_english(row.rejected):
        raise ContrastError(
            "rejected of a harmful row must not be a refusal (the one-way rule; no setting changes it); "
            'make it an opening phrase such as "Sure, here is"'
        )
    # An `answer` is stored too, so it must not become the place where harmful content hides.
    _check_length("rejected", row.rejected, "an opening phrase only", OPENING_WORDS, OPENING_CHARACTERS)
    _check_length("answer", row.answer or "", "an opening phrase only", OPENING_WORDS, OPENING_CHARACTERS)
    # A judge reads how a completion begins; a refusal has no room to comply after it.
    _check_length("chosen", row.chosen, "a refusal and no more", REFUSAL_WORDS, REFUSAL_CHARACTERS)
    _check_no_answer(row)


def _check_no_answer(row: Row) -> None:
    if answers_after_refusing(row.chosen):
        raise ContrastError(
            "chosen of a harmful row goes on to answer (the one-way rule; no setting changes it); "
            "make it a refusal and no more, without assents, steps or lists"
        )
    asked = " ".join(message["content"] for message in row.prompt)
    for name, text in (("rejected", row.rejected), ("answer", row.answer or "")):
        if holds(row.chosen, text, asked):
            raise ContrastError(
                f"chosen of a harmful row holds words of its {name} (the one-way rule; no setting changes it); "
                "make it a refusal and no more"
            )


def _check_length(name: str, text: str, what: str, words: int, characters: int) -> None:
    # Characters count as well: words can be joined, and some scripts put no spaces between them.
    if len(text.split()) > words or len(text) > characters:
        raise ContrastError(
            f"{name} of a harmful row must be {what}, at most {words} words and {characters} characters; shorten it"
        )


def load(source: str | Path, judge: Judge) -> Contrast:
    """The rows of a JSONL or Parquet file, a dataset folder or a hub dataset, in TRL preference form plus `kind`.

    Optional columns: `pair_id` (else a hash of the prompt), `twin`, `answer`, `split` (else by a hash of the pair id),
    and `topic`, else `category`, else `source`: what rows have in common, so that they are not independent.

    Raises:
        ContrastError: the source cannot be read, or rows break the schema, leak between splits or break the one-way
            rule; up to ten problems are shown together, with row numbers and the fix.
    """
    name = str(source)
    problems = Problems(name)
    found = [_parsed(*record) for record in records(name)]
    if not found:
        raise ContrastError(f"{name}: no rows; write one JSON object per line")
    judged = iter(_judged([row for _, row in found if isinstance(row, Row)], judge))
    rows = []
    for number, row in found:
        try:
            if isinstance(row, ContrastError):
                raise row
            _check_row(row, next(judged))
            rows.append(row)
        except ContrastError as error:
            problems.add([number], str(error))
    _check_set(rows, problems)
    problems.stop()
    check_kinds(rows, name)
    return Contrast(source=name, rows=tuple(rows))


def _parsed(number: int, raw: object, hub_split: str | None) -> tuple[int, Row | ContrastError]:
    """Return a row by its number, or what is wrong with it: every row is read before the judge is asked."""
    try:
        return number, _row(number, raw, hub_split)
    except ContrastError as error:
        return number, error


def check_kinds(rows: Iterable[Row], source: str) -> None:
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


def _check_set(rows: Sequence[Row], problems: Problems) -> None:
    for group in _grouped(rows, lambda row: (row.kind, json.dumps(row.prompt), row.chosen, row.rejected)):
        problems.add(_numbers(group), "the same row more than once; keep one of them")
    for group in _grouped(rows, lambda row: prompt_key(row.prompt)):
        if len({row.kind for row in group}) > 1:
            problems.add(_numbers(group), "the same prompt under two kinds; keep the kind that fits")
    _check_leakage(rows, problems)


def _check_leakage(rows: Sequence[Row], problems: Problems) -> None:
    for group in _grouped(rows, lambda row: row.pair_id):
        if len({row.split for row in group}) > 1:
            problems.add(_numbers(group), f"pair_id {group[0].pair_id!r} is in two splits; give its rows one `split`")
    for group in _sharing_a_prompt(rows):
        if len({row.split for row in group}) > 1 and len({row.pair_id for row in group}) > 1:
            problems.add(
                _numbers(group), "one prompt (or twin) is in two splits; give these rows one `pair_id` or one `split`"
            )


def _prompts(row: Row) -> list[str]:
    return [prompt_key(messages) for messages in (row.prompt, row.twin) if messages is not None]


def _sharing_a_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for prompt in _prompts(row):
            groups[prompt].append(row)
    return list(groups.values())


def _numbers(rows: Iterable[Row]) -> list[int]:
    return [row.number for row in rows]


def save(contrast: Contrast, path: Path) -> None:
    """Write a set as a new Parquet file that `load` reads back, whole or not at all.

    Raises:
        ContrastError: the name does not end in .parquet, so `load` would not know it.
        RunError: something has that name.
    """
    if path.suffix != ".parquet":
        raise ContrastError(f"{path}: a contrast set is saved as Parquet; let the name end in .parquet")
    rows = [dataclasses.asdict(row) | {"prompt": list(row.prompt)} for row in contrast.rows]
    for row in rows:
        row["twin"] = None if row["twin"] is None else list(row["twin"])
    write_parquet(path, rows, replace=False)


def check_disjoint(heldout: Contrast, train: Contrast) -> None:
    """Assure that no held-out prompt is a prompt, or a twin, of the training rows given.

    Raises:
        ContrastError: shared prompts, with the row numbers on both sides.
    """
    trained: dict[str, int] = {}
    for row in train.rows:
        for prompt in _prompts(row):
            trained.setdefault(prompt, row.number)
    problems = Problems(heldout.source)
    for row in heldout.rows:
        if (number := trained.get(prompt_key(row.prompt))) is not None:
            problems.add([row.number], f"its prompt was trained on (row {number} of {train.source}); remove it here")
    problems.stop()


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Token ids of a row's prompt and of its chosen completion (with whatever the template puts after it)."""
    prompt, (chosen,) = encode_answers(tokenizer, row.prompt, row.chosen)
    return prompt, chosen


def encode_preference(tokenizer: PreTrainedTokenizerBase, row: Row) -> PreferenceIds:
    """A row in tokens, in the form of TRL's preference batches."""
    prompt, (chosen, rejected) = encode_answers(tokenizer, row.prompt, row.chosen, row.rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "kind": row.kind}
