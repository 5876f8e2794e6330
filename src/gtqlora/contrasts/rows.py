"""Contrast sets: preference rows in kinds, how they belong together, and how they become tokens.

Rows come in by `loading.load`, which checks them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypedDict

from gtqlora.contrasts.sources import one_of
from gtqlora.contrasts.template import encode_answers
from gtqlora.errors import ContrastError
from gtqlora.judging.folding import flat
from gtqlora.judging.judge import Message, Messages
from gtqlora.judging.thoughts import final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "contrast.parquet"
# Optional kinds come last, so that a kind's place in the list stays what it was without them.
KINDS = ("benign", "lookalike", "harmful")
"""Kinds that a verdict needs."""
ALL_KINDS = (*KINDS, "instructed")
DECLINED_KINDS = ("harmful", "instructed")
"""Kinds whose `chosen` declines."""
SPLITS = ("train", "validation", "heldout")
# Columns that say what rows have in common; the first that is there counts.
TOPICS = ("topic", "category", "source")


class PreferenceIds(TypedDict):
    """A row in tokens: the prompt, the two completions after it, and its kind."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One preference pair.

    Attributes:
        number: its line in a JSONL file, or its row elsewhere, counted from 1.
        kind: benign, lookalike (harmless, but looks harmful), harmful, or instructed (harmless, but its system prompt
            tells the model to decline it).
        chosen, rejected: the answer that is preferred, and the one that is not.
        pair_id: rows of one pair differ only in what triggers the refusal.
        twin: the same prompt without what triggers the refusal.
        answer: the expected answer, for task accuracy.
        topic: what the row is about, or where it comes from; rows of one topic are not independent.
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

    @cached_property
    def prompt_key(self) -> str:
        """Return the `prompt_key` of its prompt."""
        return prompt_key(self.prompt)


class Asked(Protocol):
    """A row, or what is recorded of one: a prompt and what a completion of it is held against."""

    @property
    def prompt(self) -> Messages:
        """Return the messages up to the answer."""
        ...

    @property
    def answer(self) -> str | None:
        """Return the expected answer, if there is one."""
        ...

    @property
    def rejected(self) -> str:
        """Return the completion that is not wanted."""
        ...


class Preference(TypedDict):
    """A row in TRL's conversational preference form, with its kind."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    kind: str


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The checked rows of one source, a file or a dataset."""

    source: str
    rows: tuple[Row, ...]

    def split(self, name: str) -> Contrast:
        """Return the rows of one split; "all" gives every row.

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
        """Return the rows of one kind, maybe none.

        Raises:
            ContrastError: no such kind.
        """
        one_of("kind", kind, ALL_KINDS)
        return tuple(row for row in self.rows if row.kind == kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds to tell of, see `kinds_of`."""
        return kinds_of(row.kind for row in self.rows)

    @cached_property
    def _benign(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.of_kind("benign"):
            found[row.pair_id].append(row)
        return dict(found)

    def twin_of(self, row: Row) -> Messages | None:
        """Return the row's own twin, else the benign prompt of its pair that shares most words with it.

        A benign row has no twin but its own; nor has an instructed one, whose trigger is its system prompt.
        """
        if row.twin is not None or row.kind in ("benign", "instructed"):
            return row.twin
        # Of several benign rows of a pair the nearest one differs from the flagged prompt by little but the trigger.
        words = _words(row.prompt)
        candidates = [benign.prompt for benign in self._benign.get(row.pair_id, ())]
        return max(candidates, key=lambda prompt: len(_words(prompt) & words), default=None)

    def to_preference(self) -> list[Preference]:
        """Return the rows in TRL's conversational preference form, with their kind."""
        return [
            {
                "prompt": [dict(message) for message in row.prompt],
                "chosen": [{"role": "assistant", "content": row.chosen}],
                "rejected": [{"role": "assistant", "content": row.rejected}],
                "kind": row.kind,
            }
            for row in self.rows
        ]


def kinds_of(found: Iterable[str]) -> tuple[str, ...]:
    """Return the kinds that a verdict needs, and optional ones that are among those found."""
    there = {*KINDS, *found}
    return tuple(kind for kind in ALL_KINDS if kind in there)


def prompt_key(messages: Messages) -> str:
    """Return a key that two prompts share if a reader sees the same roles and words, whatever the case and spacing."""
    return json.dumps([[message["role"], flat(message["content"])] for message in messages])


def is_correct(row: Asked, text: str) -> bool | None:
    """Tell whether a text without its thoughts is the answer that a row expects; None where it expects none."""
    return None if row.answer is None else (final(text) or "").split() == row.answer.split()


def distinct(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return the first row of every prompt; asking the same again tells nothing new."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.prompt_key, row)
    return tuple(first.values())


class Grouped(Protocol):
    """Anything that belongs to a pair, and maybe to a topic."""

    @property
    def pair_id(self) -> str:
        """Return the pair that it belongs to."""
        ...

    @property
    def topic(self) -> str | None:
        """Return the topic that it is about, if it says so."""
        ...


def groupings(rows: Sequence[Grouped]) -> list[list[str]]:
    """Return the ways of grouping rows that are not independent: by pair, and by topic where there are several.

    Rows without a topic are one group.
    """
    # Folded, so that "Chemistry" and "chemistry " are one topic.
    topics = [flat(row.topic or "") for row in rows]
    return [[row.pair_id for row in rows], *([topics] if len(set(filter(None, topics))) > 1 else [])]


def _words(messages: Messages) -> set[str]:
    return {word for message in messages for word in flat(message["content"]).split()}


def digest(text: str) -> str:
    """Return a hash of a text, short enough for an id."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """Return token ids of a row's prompt and of its chosen completion, with whatever the template puts after it."""
    prompt, (chosen,) = encode_answers(tokenizer, row.prompt, row.chosen)
    return prompt, chosen


def encode_preference(tokenizer: PreTrainedTokenizerBase, row: Row) -> PreferenceIds:
    """Return a row in tokens, in the form of TRL's preference batches."""
    prompt, (chosen, rejected) = encode_answers(tokenizer, row.prompt, row.chosen, row.rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "kind": row.kind}
