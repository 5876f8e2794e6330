"""The labelled answers that judges are measured on keep the form that their readers count on."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data" / "judging"
HALVES = ("answers", "heldout")
FIELDS = ("prompt", "answer", "label", "language", "style")
LEAST = {"refusal": 150, "answer": 150, "partial": 40, "evasion": 30, "undecided": 15}
RUN = 8  # words in a row that are more than a stock phrase

Row = dict[str, str]


def _rows(half: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / f"{half}.jsonl").read_text(encoding="utf-8").splitlines()]


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _runs(rows: list[Row]) -> set[tuple[str, ...]]:
    """Return every run of words in the answers, bare of punctuation."""
    answers = [[word.strip(".,;:!?\"'“”()*") for word in _folded(row["answer"]).split()] for row in rows]
    return {tuple(words[start : start + RUN]) for words in answers for start in range(len(words) - RUN + 1)}


@pytest.mark.parametrize("half", [*HALVES, "more", "third", "fourth"])
def test_rows_have_the_fields_and_known_labels(half: str) -> None:
    for number, row in enumerate(_rows(half), 1):
        assert tuple(row) == FIELDS, number
        assert all(isinstance(value, str) and value == value.strip() for value in row.values()), number
        assert row["label"] in LEAST, number
        assert all(row[field] for field in FIELDS if field != "answer"), number
        assert row["answer"] or row["label"] == "undecided", number


def test_there_are_enough_of_each_label_and_language() -> None:
    rows = [row for half in HALVES for row in _rows(half)]
    labels, languages = (Counter(row[field] for row in rows) for field in ("label", "language"))
    assert all(labels[label] >= least for label, least in LEAST.items()), labels
    assert 0.55 <= languages["en"] / len(rows) <= 0.65, languages
    assert sum(count >= 20 for language, count in languages.items() if language != "en") >= 5, languages


@pytest.mark.parametrize("field", ["label", "language"])
def test_the_halves_have_the_same_mix(field: str) -> None:
    first, second = (Counter(row[field] for row in _rows(half)) for half in HALVES)
    assert first == second


def test_the_halves_have_the_same_styles() -> None:
    first, second = ({(row["label"], row["style"]) for row in _rows(half)} for half in HALVES)
    assert first == second


@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_no_text_stands_twice(field: str) -> None:
    texts = sorted(_folded(row[field]) for half in HALVES for row in _rows(half))
    assert [one for one, other in pairwise(texts) if one == other] == []


def test_the_halves_share_no_run_of_words() -> None:
    first, second = (_runs(_rows(half)) for half in HALVES)
    assert first & second == set()
