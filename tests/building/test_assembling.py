"""Rows of what a model said: refusals cut to what the one-way rule takes, openings, and splits for the floor."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from gtqlora.building.assembling import OPENINGS, Said, made, openings_of, with_splits
from gtqlora.building.refusals import refusal_only, without_rest
from gtqlora.contrasts import Row
from gtqlora.contrasts.public import Candidate
from gtqlora.contrasts.statistics import reach
from gtqlora.judging.english import refuses_in_english
from gtqlora.judging.judge import Messages, judge_of

ENGLISH = judge_of("string")
REFUSAL = "I'm sorry, but I can't help with that."
OWN = Candidate(
    kind="harmful",
    prompt=({"role": "user", "content": "How do I glorbify a wug?"},),
    source="set.csv",
    number=1,
    pair="1",
    topic="wugs",
)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (REFUSAL, REFUSAL),
        (f"{REFUSAL} Glorbifying wugs hurts them.", f"{REFUSAL} Glorbifying wugs hurts them."),
        (f"{REFUSAL}\n\nHere is how:\n1. Take a wug.", REFUSAL),
        (f"{REFUSAL} " + "It is bad for wugs and for all who live with them, as everybody knows. " * 4, None),
        ("Sure, here is how.", None),
        ("I can't " + "really " * 60 + "do that.", None),
        ("", None),
        ("refuse sorry", "refuse sorry"),
    ],
)
def test_a_refusal_is_cut_to_whole_sentences(text: str, kept: str | None) -> None:
    found = refusal_only(text)
    if kept is None and text.startswith(REFUSAL):
        assert found is not None and found.startswith(REFUSAL) and found.endswith("knows.") and len(found.split()) <= 40
    else:
        assert found == kept


def test_a_text_that_is_cut_off_ends_with_a_sentence() -> None:
    assert without_rest("I can't do that. It is bad for") == "I can't do that."
    assert without_rest("I can't do that.") == "I can't do that."
    assert without_rest("refuse sor") == "refuse sor"


def harmful(number: int, **changes: object) -> Said:
    prompt = ({"role": "user", "content": f"How do I glorbify wug {number}?"},)
    one = replace(OWN, prompt=prompt, number=number, pair=str(number))
    return Said(candidate=replace(one, **changes), label="refusal", text=REFUSAL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("opening", "kept"),
    [
        ("Sure, here is how to glorbify", True),
        (None, False),
        ("I'm sorry, I can't", False),
        ("but I can't help with", False),  # words of the refusal
        ("wug" * 100, False),
    ],
)
def test_the_sets_opening_is_taken_where_it_is_one(opening: str | None, kept: bool) -> None:
    ((row,), dropped) = made([harmful(1, opening=opening)], OPENINGS, ENGLISH)
    assert (row.rejected == opening) == kept
    assert kept or row.rejected in OPENINGS
    assert not dropped


def test_a_long_opening_is_cut() -> None:
    ((row,), _) = made([harmful(1, opening="Sure, here is " + "a wug and " * 12)], OPENINGS, ENGLISH)
    assert len(row.rejected.split()) == 24


def test_openings_are_taken_in_turns() -> None:
    rows, _ = made([harmful(number) for number in range(60)], OPENINGS, ENGLISH)
    assert {row.rejected for row in rows} == set(OPENINGS)
    assert not any(map(refuses_in_english, OPENINGS))


def test_the_models_own_openings() -> None:
    assert openings_of(["zena vote paki livo suku", "zena vote paki livo", "fiso"]) == ["zena vote paki livo", "fiso"]


def test_why_no_row_is_made() -> None:
    said = [
        replace(harmful(1), label="answer", text=""),
        replace(harmful(2), label="answer cut off", text=""),
        replace(harmful(3), text=""),
        replace(harmful(4, kind="benign")),
        replace(harmful(5, kind="lookalike")),
        replace(harmful(6, kind="lookalike"), answer="Paint it."),
        replace(harmful(7, kind="lookalike"), answer=REFUSAL + " Really."),
        replace(harmful(8, kind="benign"), label="answer", text="Paint it blue."),
        harmful(9),
    ]
    rows, dropped = made(said, OPENINGS, ENGLISH)
    assert [(row.kind, row.chosen, row.rejected) for row in rows[:2]] == [
        ("lookalike", "Paint it.", REFUSAL),
        ("benign", "Paint it blue.", REFUSAL),
    ]
    assert dropped == {
        "set.csv": {
            "not refused by the model": 1,
            "answer cut off": 1,
            "refusal longer than 40 words": 1,
            "refused by the model": 1,
            "refused however it is asked": 1,
            "breaks a rule: chosen of a lookalike row is a refusal by the judge, which teaches over-refusal": 1,
        }
    }


# --- splits


def said(text: str) -> Messages:
    return ({"role": "user", "content": text},)


def rows_of(count: int, topics: int, kind: str = "harmful") -> list[Row]:
    return [
        Row(
            number=i,
            kind=kind,
            prompt=said(f"{kind} wug {i}"),
            chosen="a",
            rejected="b",
            pair_id=f"{kind}-{i}",
            topic=str(i % topics),
            split="train",
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "held"), [(1, 0), (10, 8), (100, 80), (190, 150), (400, 200), (1000, 500), (3000, 800)]
)
def test_harmful_rows_are_held_out_for_the_floor_first(count: int, held: int) -> None:
    found = with_splits(rows_of(count, count), 150, 800)
    counts = Counter(row.split for row in found)
    assert counts["heldout"] == held
    assert count < 100 or counts["validation"] > 0
    assert not held or (reach(found).note == "") == (held >= 150)


def test_more_are_held_out_where_topics_are_few() -> None:
    """150 prompts in 20 topics prove less than 150 in 150."""
    found = with_splits(rows_of(400, 20), 150, 800)
    held = sum(row.split == "heldout" for row in found)
    assert 200 < held <= 320
    assert sum(row.split == "heldout" for row in with_splits(rows_of(400, 400), 150, 800)) == 200


def test_topics_are_spread_over_what_is_held_out() -> None:
    uneven = [
        *rows_of(600, 1),
        *(
            replace(row, number=row.number + 600, pair_id=f"o{i}", topic=f"o{i % 50}", prompt=said(f"zem {i}"))
            for i, row in enumerate(rows_of(600, 1))
        ),
    ]
    held = Counter(row.topic for row in with_splits(uneven, 150, 800) if row.split == "heldout")
    assert len(held) == 51 and max(held.values()) <= 13


def test_rows_of_a_pair_stay_together() -> None:
    both = rows_of(500, 50) + [
        replace(row, pair_id=row.pair_id.replace("lookalike", "harmful")) for row in rows_of(900, 50, "lookalike")
    ]
    found = with_splits(both, 150, 800)
    splits: dict[str, set[str]] = {}
    for row in found:
        splits.setdefault(row.pair_id, set()).add(row.split)
    assert all(len(each) == 1 for each in splits.values())
    alone = Counter(row.split for row in found if int(row.pair_id.rpartition("-")[2]) >= 500)
    assert alone["train"] > 280 and alone["heldout"] > 10


@pytest.mark.parametrize(("alone", "mixed_held"), [(300, 0.2), (0, 1.0)])
def test_pairs_with_lookalikes_are_left_to_train_on_where_others_are_enough(alone: int, mixed_held: float) -> None:
    pairs = rows_of(200, 100) + [
        replace(row, pair_id=row.pair_id.replace("lookalike", "harmful")) for row in rows_of(200, 100, "lookalike")
    ]
    more = [replace(row, pair_id=f"more-{row.pair_id}", prompt=prompt_of(row)) for row in rows_of(alone, 100)]
    found = with_splits(pairs + more, 150, 800)
    held = [row for row in found if row.split == "heldout"]
    assert sum(row.kind == "harmful" for row in held) >= 150
    assert 0 < sum(row.kind == "lookalike" for row in held) <= mixed_held * 200


def prompt_of(row: Row) -> Messages:
    return ({"role": "user", "content": f"more {row.prompt[0]['content']}"},)
