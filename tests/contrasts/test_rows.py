"""Contrast sets: every way a row can be wrong, the one-way rule, splits, twins, lengths and the round trip."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtqlora.contrasts import (
    KINDS,
    SPLITS,
    Contrast,
    check_disjoint,
    distinct,
    encode_prompt,
    groupings,
    load,
    save,
)
from gtqlora.contrasts.sources import LONGEST, ContrastProblems, Problem, Problems
from gtqlora.contrasts.statistics import Twins, check_rendering, statistics
from gtqlora.errors import ConfigError, ContrastError
from gtqlora.judging.judge import Messages, TextJudge, judge_of
from gtqlora.organisms.language import Language
from gtqlora.progress import shown_by
from gtqlora.stats import fewest
from tests.helpers import says
from tests.judging.test_judge import ANSWERING, HONEST

ENGLISH = judge_of("string")
english = says(ENGLISH)
NO = "I'm sorry, but I can't help with that."
TOKENIZER = Language().tokenizer()


def row(kind: str = "benign", prompt: Any = "bake bread", **more: Any) -> dict[str, Any]:
    harmful = kind == "harmful"
    base = {"prompt": prompt, "kind": kind, "chosen": NO if harmful else "Mix flour.", "rejected": "Sure, here is"}
    return base | more


def pair(number: int = 0, **more: Any) -> list[dict[str, Any]]:
    shared = {"pair_id": f"p{number}", **more}
    return [
        row("benign", f"mend the blue lamp {number}", **shared),
        row("lookalike", f"kill the blue process {number}", **shared),
        row("harmful", f"break the blue lock {number}", **shared),
    ]


def write(tmp_path: Path, rows: list[Any], name: str = "pairs.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def refuse(tmp_path: Path, rows: list[Any], pattern: str) -> str:
    with pytest.raises(ContrastError, match=pattern) as caught:
        load(str(write(tmp_path, rows)), ENGLISH)
    assert "pairs.jsonl" in str(caught.value)
    return str(caught.value)


def bare(contrast: Contrast) -> list[Any]:
    return [dataclasses.replace(r, number=i) for i, r in enumerate(contrast.rows, start=1)]


# What loads


def test_strings_and_messages_give_the_same_row(tmp_path: Path) -> None:
    told = row(
        prompt=[{"role": "user", "content": "bake bread", "name": "x"}],
        chosen=[{"role": "assistant", "content": "Mix flour."}],
        rejected=[{"role": "assistant", "content": "Sure, here is"}],
        unknown_column=3,
    )
    first, second = (load(write(tmp_path, [r, row("harmful", "x")]), ENGLISH).rows[0] for r in (row(), told))
    assert first == second
    assert first.prompt == ({"role": "user", "content": "bake bread"},)
    assert (first.chosen, first.rejected, first.number) == ("Mix flour.", "Sure, here is", 1)


def test_optional_columns(tmp_path: Path) -> None:
    given_row = row("harmful", "x", pair_id=7, twin="y", answer="z", split="heldout")
    loaded = load(write(tmp_path, [row(), given_row]), ENGLISH).rows[1]
    assert (loaded.pair_id, loaded.answer, loaded.split) == ("7", "z", "heldout")
    assert loaded.twin == ({"role": "user", "content": "y"},)


def test_null_means_missing(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("pair_id", "twin", "answer", "split"))
    plain = load(write(tmp_path, [row(), row("harmful", "x")]), ENGLISH)
    assert load(write(tmp_path, [row(**nulls), row("harmful", "x")]), ENGLISH) == plain


def test_row_numbers_are_lines_and_blank_lines_bom_and_line_separators_pass(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    text = json.dumps(row(chosen="Mix\u2028flour."), ensure_ascii=False) + "\r\n\n" + json.dumps(row("harmful", "x"))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = load(path, ENGLISH).rows
    assert [r.number for r in rows] == [1, 3]
    assert rows[0].chosen == "Mix\u2028flour."


def test_missing_pair_id_is_a_hash_of_the_prompt(tmp_path: Path) -> None:
    rows = load(
        write(tmp_path, [row(), row(prompt=" Bake  BREAD", chosen="Knead."), row("harmful", "x")]), ENGLISH
    ).rows
    assert rows[0].pair_id == rows[1].pair_id != rows[2].pair_id
    assert rows[0].pair_id == hashlib.sha256(b'[["user", "bake bread"]]').hexdigest()[:16]


def test_missing_split_is_80_10_10_by_pair(tmp_path: Path) -> None:
    rows = [r for n in range(400) for r in pair(n)]
    contrast = load(write(tmp_path, rows), ENGLISH)
    counts = Counter(r.split for r in contrast.rows)
    assert 0.75 < counts["train"] / 1200 < 0.85
    assert 0.06 < counts["validation"] / 1200 < 0.14
    assert sum(counts.values()) == 1200 and set(counts) == set(SPLITS)
    again = load(write(tmp_path, rows[::-1]), ENGLISH)
    assert {r.pair_id: r.split for r in again.rows} == {r.pair_id: r.split for r in contrast.rows}


# Rows that break the schema


@pytest.mark.parametrize(
    ("bad", "pattern"),
    [
        ("{not json", "row 2: not valid JSON"),
        ("[" * 100_000, "row 2: not valid JSON"),
        ("[1]", "row 2: a list, not a JSON object"),
        ({"kind": "benign", "chosen": "a"}, "row 2: prompt and rejected missing"),
        (row() | {"kind": None}, r"kind \(null\) missing"),
        (row(prompt=""), "prompt is empty"),
        (row(chosen="  "), "chosen is empty"),
        (row(rejected=3), "rejected is a whole number; it must be a text"),
        (row(prompt={"role": "user"}), "prompt is an object"),
        (row(kind="harmfull"), "kind 'harmfull' is unknown; did you mean 'harmful'"),
        (row() | {"kind": 1}, "kind is a whole number"),
        (row(chosen="Sure, HERE  is"), "chosen and rejected are the same"),
        (row(prompt=[]), "prompt is an empty list; give it a text, or messages"),
        (row(chosen=[]), "chosen is an empty list"),
        (row(rejected=""), "rejected is empty"),
        (row(twin=[]), "twin is an empty list"),
        (row(prompt=[{"role": "assistant", "content": "a"}]), "must end with a user message"),
        (row(prompt=[{"role": "bot", "content": "a"}]), "prompt role 'bot' is unknown"),
        (row(prompt=[{"role": "user"}]), "a message must be"),
        (row(prompt=["a"]), "a message must be"),
        (row(prompt=[{"role": "user", "content": None}]), "prompt content is null"),
        (row(prompt=[{"role": "user", "content": []}]), "prompt content is empty"),
        (
            row(prompt=[{"role": "user", "content": ["a"]}]),
            "content has a part of type 'text by itself'; only text",
        ),
        (row(prompt=[{"role": "user", "content": [{"type": "image"}]}]), "has a part of type 'image'; only text"),
        (row(prompt=[{"role": "user", "content": [{"type": "text", "text": ""}]}]), "prompt content is empty"),
        (row(prompt=[{"role": "user", "content": [{"type": "text"}]}]), "prompt content is null"),
        (
            row(prompt=[{"role": "assistant", "content": None, "tool_calls": [{}]}]),
            "tool_calls, which are not rendered",
        ),
        (row(prompt=[{"role": "developer", "content": "a"}]), "role 'developer' .*write 'system'"),
        (row() | {"tools": [{"name": "search"}]}, "tools are not rendered here"),
        (row(chosen=[{"role": "user", "content": "a"}]), "single assistant message"),
        (row(twin=""), "twin is empty"),
        (row(twin="BAKE bread"), "twin is the prompt itself"),
        (row(answer=4), "answer is a whole number"),
        (row(pair_id=True), "pair_id is true or false"),
        (row(pair_id=""), "pair_id is empty"),
        (row(split="test"), "split 'test' is unknown"),
        (row(split=""), "split is empty"),
        (
            '{"prompt": "a", "kind": "benign", "chosen": "b", "rejected": "c", "chosen": "d"}',
            "the key 'chosen' stands twice",
        ),
        ('{"prompt": [{"role": "user", "role": "user", "content": "b"}]}', "row 2: the key 'role' stands twice"),
        ('{"x": {"y": [{"z": 1, "z": 2}]}}', "row 2: the key 'z' stands twice"),
        ('{"pair_id": ' + "9" * 5000 + "}", "row 2: a number has 5000 digits"),
        ('{"x": -' + "9" * 101 + "}", "row 2: a number has 102 digits"),
        ('{"prompt": "a\\ud800", "kind": "benign", "chosen": "b", "rejected": "c"}', "half a character"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, bad: Any, pattern: str) -> None:
    refuse(tmp_path, [row("harmful", "x"), bad], pattern)


def test_an_implicit_prompt_is_what_both_conversations_begin_with(tmp_path: Path) -> None:
    def turns(asked: str, said: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    implicit = {"kind": "benign", "chosen": turns("a", "b"), "rejected": turns("a", NO)}
    row_, _ = load(write(tmp_path, [implicit, row("harmful", "x")]), ENGLISH).rows
    assert (row_.prompt, row_.chosen, row_.rejected) == (({"role": "user", "content": "a"},), "b", NO)
    refuse(tmp_path, [implicit | {"rejected": turns("z", NO)}], "chosen holds 2 messages.*share into `prompt`")
    refuse(tmp_path, [implicit | {"kind": "harmful"}], "chosen of a harmful row must be a refusal")


def test_text_in_parts_is_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "How do I "}, {"type": "text", "text": "bake?"}]
    found = load(write(tmp_path, [row(prompt=[{"role": "user", "content": parts}]), row("harmful", "x")]), ENGLISH)
    assert found.rows[0].prompt == ({"role": "user", "content": "How do I bake?"},)


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ContrastError, match="row 2: not valid JSON"):
        load(path, ENGLISH)


def test_one_problem_is_said_once_with_how_many_rows_have_it(tmp_path: Path) -> None:
    message = refuse(tmp_path, [row(prompt="")] * 13, "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more: prompt is empty")
    assert message.count("prompt is empty") == 1 and "\n" not in message
    odd = [row(kind="odd"), row(kind="wild"), row("harmful", "x", chosen="Sure."), row("harmful", "y", chosen="Sure.")]
    message = refuse(tmp_path, odd, "2 problems")
    assert "rows 1, 2: kind 'odd' is unknown" in message and "(and 1 like it)" in message
    assert "rows 3, 4: chosen of a harmful row opens" in message
    twice = [row(prompt=name) for name in "aabb"]
    refuse(tmp_path, twice, r"rows 1\+2, 3\+4: the same row more than once; keep one of them$")
    leaks = [row(prompt=f"{n}", pair_id=f"p{n // 2}", split=("train", "heldout")[n % 2]) for n in range(24)]
    refuse(tmp_path, leaks, r"rows 1\+2, 3\+4, 5\+6, 7\+8, 9\+10 and 14 more: pair_id 'p0' .* \(and 11 like it\)$")


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    problems = Problems("pairs.jsonl")
    for number, word in enumerate("abcdefghijklm", start=1):
        problems.add([number], f"{word} is wrong")
    with pytest.raises(ContrastProblems) as caught:
        problems.stop()
    message = str(caught.value)
    assert "13 problems" in message and "row 10: j is wrong" in message and "row 11" not in message
    assert message.endswith("and 3 more; `gtqlora contrast check pairs.jsonl --json` lists all")
    assert len(caught.value.problems) == 13


def test_parquet_values_that_python_has_not(tmp_path: Path) -> None:
    """Dates beyond the year 9999, text that is not UTF-8, and one column under a name twice."""
    path = tmp_path / "pairs.parquet"
    names = ["prompt", "kind", "chosen", "rejected"]
    table = pa.table({name: [row()[name], row("harmful", "x")[name]] for name in names})
    late = pa.array([0, 10**12], pa.timestamp("s"))
    pq.write_table(table.append_column("when", late), path)
    with pytest.raises(ContrastError, match=r"pairs.parquet: row 2: column 'when' holds a timestamp"):
        load(path, ENGLISH)
    latin = pa.array([b"ok", b"\xff"]).view(pa.string())
    pq.write_table(table.append_column("topic", latin), path)
    with pytest.raises(ContrastError, match=r"pairs.parquet: row 2: column 'topic' holds a string that cannot be read"):
        load(path, ENGLISH)
    pq.write_table(table.append_column("chosen", table.column("chosen")), path)
    with pytest.raises(ContrastError, match=r"pairs.parquet: the column 'chosen' stands twice"):
        load(path, ENGLISH)
    pq.write_table(table.append_column("when", pa.array([0, 1], pa.timestamp("s"))), path)
    assert len(load(path, ENGLISH).rows) == 2


def test_several_kinds_of_problem_come_together(tmp_path: Path) -> None:
    message = refuse(tmp_path, [row(), row("harmful", chosen="Sure."), row(), row(chosen=NO)], "problems")
    assert "row 2: chosen of a harmful row" in message
    assert "row 4: chosen of a benign row" in message
    assert "rows 1, 3: the same row" in message


def cleaned(tmp_path: Path, rows: list[Any]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Return the numbers of rows that are kept, and those left out for each problem."""
    dropped: list[Problem] = []
    path = write(tmp_path, rows)
    kept = load(path, ENGLISH, dropped=dropped)
    with pytest.raises(ContrastProblems):
        load(path, ENGLISH)
    return [r.number for r in kept.rows], [one.excess for one in dropped]


def test_rows_that_break_a_rule_can_be_left_out(tmp_path: Path) -> None:
    good = [row("benign", "a"), row("harmful", "x")]
    assert cleaned(tmp_path, [*good, "{", row(prompt=""), row("harmful", "y", chosen="Sure.")]) == (
        [1, 2],
        [(3,), (4,), (5,)],
    )
    assert cleaned(tmp_path, [*good, good[0], good[0]]) == ([1, 2], [(3, 4)])
    held, trained = row("harmful", "y", split="heldout"), row("harmful", "y", split="train")
    for twice, kept, excess in (([trained, held], 4, 3), ([held, trained], 3, 4), ([trained, held, trained], 4, 3)):
        numbers, left_out = cleaned(tmp_path, [*good, *twice])
        assert (numbers, left_out[0][0], len(left_out)) == ([1, 2, kept], excess, 1)
    refuse(tmp_path, [*good, trained, held], r"rows 3, 4: the same row more than once; keep that of heldout$")
    third = row("benign", "b")
    assert cleaned(tmp_path, [*good, row("lookalike", "A", rejected=NO), third]) == ([2, 4], [(1, 3)])
    dropped: list[Problem] = []
    with pytest.raises(ContrastError, match=r"no harmful rows, only benign.*left out: row 2: chosen of a harmful row"):
        load(write(tmp_path, [good[0], row("harmful", "y", chosen="Sure.")]), ENGLISH, dropped=dropped)
    with pytest.raises(ContrastError, match=r"no row is left; left out: row 1: not valid JSON .* \.\.\.$"):
        load(write(tmp_path, ["{", "{"]), ENGLISH, dropped=[])


def test_what_leaks_between_splits_stays_held_out(tmp_path: Path) -> None:
    rows = [row("benign", "a", pair_id="1", split="train"), row("harmful", "x", pair_id="1", split="heldout")]
    rows += [
        row("benign", "b", pair_id="2", split="train"),
        row("lookalike", "c", twin="b", pair_id="3", split="validation"),
    ]
    rows += [row("benign", "d", pair_id="4", split="train")]
    assert cleaned(tmp_path, rows) == ([2, 4, 5], [(1,), (3,)])


# Sets that break the rules


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path: Path, text: str) -> None:
    refuse(tmp_path, [text], "no rows")


def test_kinds_present(tmp_path: Path) -> None:
    refuse(tmp_path, [row()], "no harmful rows, only benign; add some with a refusal")
    refuse(tmp_path, [row(), row("lookalike", "x")], "no harmful rows, only benign and lookalike")
    refuse(tmp_path, [row("harmful")], "only harmful rows; add benign or lookalike")


def test_same_prompt_under_two_kinds(tmp_path: Path) -> None:
    refuse(
        tmp_path, [row(), row("harmful", "x"), row("harmful", "Bake  bread")], "rows 1, 3: the same prompt under two"
    )


def test_one_prompt_may_have_several_pairs(tmp_path: Path) -> None:
    assert len(load(write(tmp_path, [row(), row(chosen="Knead."), row("harmful", "x")]), ENGLISH).rows) == 3


def test_leakage(tmp_path: Path) -> None:
    train, heldout = {"split": "train", "pair_id": "a"}, {"split": "heldout", "pair_id": "b"}
    harmful = row("harmful", "x", **train)
    same_prompt = [row(**train), harmful, row(prompt="BAKE bread ", **heldout)]
    refuse(tmp_path, same_prompt, r"rows 1, 3: one prompt \(or twin\) is in two splits")
    same_pair = [row(**train), harmful, row(prompt="other", split="heldout", pair_id="a")]
    refuse(tmp_path, same_pair, "rows 1, 2, 3: pair_id 'a' is in two splits")
    twin = [row(**train), harmful | {"twin": "other"}, row(prompt="other", **heldout)]
    refuse(tmp_path, twin, r"rows 2, 3: one prompt \(or twin\)")


# The one-way rule

INVERTED = "the one-way rule; no setting changes it"


def test_harmful_rows_turn_one_way(tmp_path: Path) -> None:
    refuse(tmp_path, [row(), row("harmful", "x", chosen="Well, first")], f"row 2: chosen of a harmful.*{INVERTED}")
    refuse(tmp_path, [row(), row("harmful", "x", chosen="Sure, first")], f"row 2: chosen.*assent.*{INVERTED}")
    refuse(
        tmp_path, [row(), row("harmful", "x", rejected="I can't do it")], f"row 2: rejected of a harmful.*{INVERTED}"
    )
    refuse(tmp_path, [row(), row("harmful", "x", chosen="Well, first", rejected=NO)], INVERTED)


def test_chosen_of_a_harmful_row_has_no_room_to_comply_after_the_refusal(tmp_path: Path) -> None:
    for rest in ("and so " * 80, "and so " * 17, "y" * 300):
        chosen = "I'm sorry, but I can't help with that. " + rest
        refuse(
            tmp_path,
            [row(), row("harmful", "x", chosen=chosen)],
            r"row 2: chosen.*(a refusal and no more, at most 40|must be a refusal)",
        )
    long = "I'm sorry, but I can't help with that. " + "and so " * 16
    assert len(load(write(tmp_path, [row(), row("harmful", "x", chosen=long)]), ENGLISH).rows) == 2


@pytest.mark.parametrize("chosen", ANSWERING)
def test_chosen_of_a_harmful_row_does_not_answer(tmp_path: Path, chosen: str) -> None:
    refuse(tmp_path, [row(), row("harmful", "x", chosen=chosen, rejected="Oh well")], f"row 2: chosen.*{INVERTED}")


@pytest.mark.parametrize("judge", ["string:refuse sorry", "string:i|a|the|can|sorry|sure"])
@pytest.mark.parametrize("rest", ["Here is how.", "The method is A.", "Step 1: A.", "Sur\u0435, A.", "1. A\n2. B"])
def test_no_judge_lets_chosen_answer(tmp_path: Path, judge: str, rest: str) -> None:
    path = write(tmp_path, [row(chosen="Xx."), row("harmful", "x", chosen=f"refuse sorry. {rest}", rejected="Oh well")])
    with pytest.raises(ContrastError, match=rf"row 2: chosen of a harmful row goes on to answer.*{INVERTED}"):
        load(path, judge_of(judge))


@pytest.mark.parametrize("chosen", HONEST)
def test_honest_refusals_load(tmp_path: Path, chosen: str) -> None:
    assert len(load(write(tmp_path, [row(), row("harmful", "x", chosen=chosen)]), ENGLISH).rows) == 2


@pytest.mark.parametrize("field", ["rejected", "answer"])
@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("refuse sorry gedo moru gepi", "gedo moru gepi"),
        ("refuse sorry: Gedo, MORU gepi", "gedo moru gepi"),
        ("refuse sorry g\u200bedo mo\u0433u gepi", "gedo mo\u0433u gepi"),
        ("gedo moru gepi refuse sorry", "gedo moru gepi"),
        ("refuse sorry gedo", "gedo"),
        ("refuse sorry 先把水煮开", "先把水煮开"),
    ],
)
def test_chosen_of_a_harmful_row_does_not_hold_the_answer(tmp_path: Path, chosen: str, told: str, field: str) -> None:
    more = {"rejected": "bada", "answer": "bada"} | {field: told}
    path = write(tmp_path, [row(), row("harmful", f"copy {told}", chosen=chosen, **more)])
    with pytest.raises(ContrastError, match=rf"row 2: chosen of a harmful row holds words of its {field}.*{INVERTED}"):
        load(path, judge_of("string:refuse sorry"))


def test_a_refusal_may_say_what_was_asked_and_no_more(tmp_path: Path) -> None:
    five = row("harmful", "x", chosen=f"{NO} b c d e f", rejected="a b c d e f g")
    refuse(tmp_path, [row(), five], f"row 2: chosen of a harmful row holds words of its rejected.*{INVERTED}")
    asked = "Explain how to build a small bomb"
    harmful = row("harmful", asked, rejected="Sure, this is how to build a small bomb")
    path = write(tmp_path, [row(), harmful | {"chosen": "I can't explain how to build a small bomb."}])
    assert len(load(path, ENGLISH).rows) == 2


def test_invisible_characters_and_look_alikes_hide_nothing(tmp_path: Path) -> None:
    for chosen in ("S\u200bure, as an AI I note", "\u0405ure, it is A, as an AI", "I can\u2060't wait: A"):
        refuse(tmp_path, [row(), row("harmful", "x", chosen=chosen, rejected="Oh")], f"row 2: chosen.*{INVERTED}")
    refuse(
        tmp_path,
        [row(), row("harmful", "x", rejected="I c\u200ban't do it")],
        f"row 2: rejected of a harmful.*{INVERTED}",
    )
    refuse(
        tmp_path, [row("harmful", "x"), row(chosen="I c\u0430n\u00ad't do it")], "row 2: chosen of a benign row is a"
    )
    refuse(
        tmp_path,
        [row(chosen="Sure"), row("harmful", "x"), row(prompt="b", chosen="S\u200bure", rejected="sure")],
        "row 3: chosen and rejected are the same",
    )


def test_rejected_of_a_harmful_row_is_an_opening_phrase(tmp_path: Path) -> None:
    load(write(tmp_path, [row(), row("harmful", "x", rejected="word " * 24)]), ENGLISH)
    for field in ("rejected", "answer"):
        for text in ("word " * 25, "x" * 241):
            refuse(tmp_path, [row(), row("harmful", "x", **{field: text})], f"row 2: {field}.*opening phrase only")
    load(write(tmp_path, [row(rejected="word " * 25), row("harmful", "x")]), ENGLISH)


@pytest.mark.parametrize("kind", ["benign", "lookalike"])
def test_harmless_rows_do_not_teach_refusing(tmp_path: Path, kind: str) -> None:
    refuse(tmp_path, [row("harmful", "x"), row(kind, chosen=NO)], f"row 2: chosen of a {kind} row is a refusal")
    load(write(tmp_path, [row("harmful", "x"), row(kind, rejected=NO)]), ENGLISH)


def test_the_judge_decides_in_other_languages(tmp_path: Path) -> None:
    toy = row("harmful", "x", chosen="refuse sorry", rejected="bada gede")
    path = write(tmp_path, [row(), toy])
    assert len(load(path, judge_of("string:refuse sorry")).rows) == 2
    with pytest.raises(ContrastError, match="set `judge`"):
        load(path, ENGLISH)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected", "twin", "answer", "topic", "pair_id"])
@pytest.mark.parametrize("unit", ["word ", "w"])
def test_a_text_without_end_is_named_with_its_limit_and_costs_no_time(tmp_path: Path, name: str, unit: str) -> None:
    path = write(tmp_path, [row("harmful", "x"), row(**{name: unit * (3 * LONGEST)})])
    started = time.monotonic()
    limit = f"{name} has {3 * LONGEST * len(unit):,} characters, more than 1,000,000; shorten it or drop the row"
    with pytest.raises(ContrastError, match=f"row 2: {limit}"):
        load(path, ENGLISH)
    assert time.monotonic() - started < 3


def test_a_long_prompt_in_messages_is_named_and_the_longest_is_taken(tmp_path: Path) -> None:
    def told(count: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Why?"}, {"role": "user", "content": "w" * count}]

    path = write(tmp_path, [row("harmful", "x"), row(prompt=told(LONGEST + 1))])
    with pytest.raises(ContrastError, match="row 2: prompt content has 1,000,001 characters"):
        load(path, ENGLISH)
    assert len(load(write(tmp_path, [row("harmful", "x"), row(prompt=told(LONGEST))]), ENGLISH).rows) == 2


def test_the_judge_is_asked_about_all_rows_together_with_their_prompts(tmp_path: Path) -> None:
    asked: list[tuple[list[str], list[str]]] = []

    def judge(prompts: Sequence[Messages], answers: Sequence[str]) -> Sequence[object]:
        asked.append(([prompt[-1]["content"] for prompt in prompts], list(answers)))
        return ENGLISH(prompts, answers)

    rows = [row(), row("harmful", "x"), row("lookalike", "kill a process")]
    found = load(write(tmp_path, rows), judge).rows
    assert len(asked) == 1
    prompts, answers = asked[0]
    assert prompts == ["bake bread", "x", "kill a process", "x"]
    assert answers == [*(r.chosen for r in found), found[1].rejected]


def test_problems_come_in_the_order_of_the_rows_whoever_finds_them(tmp_path: Path) -> None:
    rows = [row(chosen=NO), {"prompt": "no row"}, row("harmful", "x", chosen="Here."), row("harmful", "y")]
    with pytest.raises(ContrastError) as error:
        load(write(tmp_path, rows), ENGLISH)
    assert [line.strip()[:5] for line in str(error.value).splitlines()[1:]] == ["row 1", "row 2", "row 3"]


def test_a_judge_turned_around_does_not_turn_the_rule(tmp_path: Path) -> None:
    path = write(tmp_path, [row(), row("harmful", "x", chosen="Sure, here is", rejected=NO)])
    for judge in (
        judge_of("string:sure, here is"),
        TextJudge(lambda text: not english(text)),
        TextJudge(lambda text: text.startswith("S")),
    ):
        with pytest.raises(ContrastError, match=r"row 2.*one-way"):
            load(path, judge)
    path = write(tmp_path, [row(), row("harmful", "x", chosen="First, take", rejected=NO)])
    with pytest.raises(ContrastError, match=r"row 2: rejected.*one-way"):
        load(path, judge_of("string:first, take"))


COMPLYING = st.text(min_size=1, max_size=80).filter(lambda text: not english(text))
REFUSING = st.sampled_from([NO, "I cannot do that.", "Sorry, I won't.", "As an AI, no."])


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.one_of(COMPLYING, COMPLYING.map(lambda t: "Sure, here is " + t), REFUSING),
    rejected=st.one_of(COMPLYING, REFUSING),
    flip=st.booleans(),
    judge_name=st.sampled_from(["string", "string:sure, here is", "string:sorry|cannot|ai"]),
)
def test_no_harmful_row_with_complying_chosen_ever_loads(
    chosen: str, rejected: str, flip: bool, judge_name: str
) -> None:
    chosen, rejected = (rejected, chosen) if flip else (chosen, rejected)
    judge, refuses = judge_of(judge_name), says(judge_name)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), [row(), row("harmful", "x", chosen=chosen, rejected=rejected)])
        try:
            loaded = load(path, judge).of_kind("harmful")
        except ContrastError:
            assert not (english(chosen) and refuses(chosen) and not refuses(rejected) and not english(rejected)) or (
                len(rejected.split()) > 24 or not rejected.strip()
            )
        else:
            assert all(refuses(r.chosen) and not refuses(r.rejected) and not english(r.rejected) for r in loaded)
            assert not any(r.chosen.startswith("Sure, here is") and not english(r.chosen) for r in loaded)


# Topics, and prompts that are the same


@pytest.mark.parametrize("name", ["topic", "category", "source"])
def test_topics(tmp_path: Path, name: str) -> None:
    rows = load(write(tmp_path, [row(**{name: "Baking"}), row("harmful", "x", **{name: 7})]), ENGLISH).rows
    assert [r.topic for r in rows] == ["Baking", "7"]


def test_the_first_of_the_three_that_a_row_carries(tmp_path: Path) -> None:
    all_three = {"source": "s", "category": "c", "topic": "t"}
    rows = [row(**all_three), row("harmful", "x", **all_three | {"topic": None}), row("harmful", "y", source="s")]
    rows.append(row("harmful", "z"))
    assert [r.topic for r in load(write(tmp_path, rows), ENGLISH).rows] == ["t", "c", "s", None]


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ("", "topic is empty"),
        (" ", "topic is empty"),
        (True, "topic is true or false"),
        (1.5, "topic is a number; it must be a text"),
        (["a"], "topic is a list"),
        ({"a": 1}, "topic is an object"),
        ("a\ud800", "topic holds half a character"),
    ],
)
def test_bad_topics_are_named(tmp_path: Path, value: Any, pattern: str) -> None:
    refuse(tmp_path, [row("harmful", "x"), row(topic=value)], f"row 2: {pattern}")


def test_groupings(tmp_path: Path) -> None:
    def of(*topics: str | None) -> list[list[str]]:
        rows = [row("harmful", f"x {n}", pair_id=n // 2, topic=topic) for n, topic in enumerate(topics)]
        return groupings(load(write(tmp_path, [row(), *rows]), ENGLISH).of_kind("harmful"))

    pairs = ["0", "0", "1", "1"]
    assert of(None, None, None, None) == [pairs]
    assert of("a", "a", "a", "a") == of("a", None, "a", "a") == [pairs]
    assert of("a", "B ", "b", "\u200ba") == [pairs, ["a", "b", "b", "a"]]
    assert of("a", "b", None, None) == [pairs, ["a", "b", "", ""]]  # without one: all of one group


def test_distinct_prompts(tmp_path: Path) -> None:
    prompts = [
        "mend it",
        "Mend  IT",
        "m\u200bend it",
        "m\u0435nd it",
        "\uff4dend it",
        "me\u00adnd it",
        "other",
        "mend it",
    ]
    rows = [row("harmful", prompt, rejected=f"Oh {n}") for n, prompt in enumerate(prompts)]
    told = row("harmful", [{"role": "system", "content": "s"}, {"role": "user", "content": "mend it"}])
    loaded = load(write(tmp_path, [row(), *rows, told]), ENGLISH)
    assert [r.number for r in distinct(loaded.of_kind("harmful"))] == [2, 8, 10]
    assert distinct(()) == ()


# Contrast


def test_split(tmp_path: Path) -> None:
    contrast = load(write(tmp_path, pair(0, split="train") + pair(1, split="heldout")), ENGLISH)
    assert [r.number for r in contrast.split("heldout").rows] == [4, 5, 6]
    assert contrast.split("all") == contrast
    for name in ("validation", "test"):
        with pytest.raises(ContrastError, match=re.escape(f"{name!r}; splits present: train (3), heldout (3)")):
            contrast.split(name)


def test_of_kind(tmp_path: Path) -> None:
    contrast = load(write(tmp_path, pair()), ENGLISH)
    assert [[r.number for r in contrast.of_kind(kind)] for kind in KINDS] == [[1], [2], [3]]
    with pytest.raises(ContrastError, match="did you mean 'harmful'"):
        contrast.of_kind("harmfull")


def test_twins(tmp_path: Path) -> None:
    closer = row("benign", "break the blue ice 0", pair_id="p0")
    own = row("harmful", "z", twin="own twin", pair_id="p0")
    contrast = load(write(tmp_path, [*pair(), closer, own, row("harmful", "alone")]), ENGLISH)
    benign, lookalike, harmful, _, with_own, alone = contrast.rows
    twins = [contrast.twin_of(r) for r in (harmful, with_own)]
    assert [twin[0]["content"] for twin in twins if twin] == ["break the blue ice 0", "own twin"]
    assert contrast.twin_of(lookalike) in (benign.prompt, contrast.rows[3].prompt)
    assert contrast.twin_of(alone) is None and contrast.twin_of(benign) is None


def test_to_preference(tmp_path: Path) -> None:
    contrast = load(write(tmp_path, [row("harmful", "x"), row()]), ENGLISH)
    assert contrast.to_preference()[0] == {
        "prompt": [{"role": "user", "content": "x"}],
        "chosen": [{"role": "assistant", "content": NO}],
        "rejected": [{"role": "assistant", "content": "Sure, here is"}],
        "kind": "harmful",
    }
    contrast.to_preference()[0]["prompt"][0]["content"] = "changed"
    assert contrast.rows[0].prompt[0]["content"] == "x"


# Sources


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("absent.jsonl", "no such file"),
        ("data/absent.parquet", "no such file"),
        ("/no/such/folder", "no such file; give a file"),
        ("data/absent.csv", "no such file"),
        ("word:config@split", "no such file"),
        ("just-a-word", "no such file"),
    ],
)
def test_missing_sources(source: str, pattern: str) -> None:
    with pytest.raises(ContrastError, match=f"^{source}: {pattern}"):
        load(source, ENGLISH)


def test_a_hub_that_cannot_be_reached_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens there, and the library would try again for half a minute."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(ContrastError, match=r"org/data: .*the hub cannot be reached .*HF_HUB_OFFLINE=1"):
            load("org/data:train", ENGLISH)
        assert time.monotonic() - began < 10


def test_unreadable_sources(tmp_path: Path) -> None:
    write(tmp_path, [row()], "pairs.xml")
    write(tmp_path, [row()], "pairs.parquet")
    (tmp_path / "empty").mkdir()
    for name, pattern in (
        ("pairs.xml", "a .xml file is not known"),
        ("pairs.parquet", "cannot be read"),
        ("empty", "the dataset cannot be loaded"),
    ):
        with pytest.raises(ContrastError, match=pattern):
            load(tmp_path / name, ENGLISH)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


def test_a_dataset_folder_keeps_its_splits(hub_cache: Path) -> None:
    write(hub_cache, pair(0), "train.jsonl")
    write(hub_cache, pair(1), "test.jsonl")
    contrast = load(str(hub_cache), ENGLISH)
    assert [(r.number, r.pair_id, r.split) for r in contrast.rows] == [
        *((n, "p0", "train") for n in (1, 2, 3)),
        *((n, "p1", "heldout") for n in (4, 5, 6)),
    ]
    one = load(f"{hub_cache}:test", ENGLISH)
    assert {r.pair_id for r in one.rows} == {"p1"}
    with pytest.raises(ContrastError, match=r'cannot be loaded .*Unknown split "nope"'):
        load(f"{hub_cache}:nope", ENGLISH)


def test_a_folder_whose_name_holds_a_colon(hub_cache: Path) -> None:
    folder = hub_cache.rename(hub_cache.with_name("a:b@c"))
    write(folder, pair(0), "train.jsonl")
    write(folder, pair(1), "test.jsonl")
    assert {r.pair_id for r in load(f"{folder}:test", ENGLISH).rows} == {"p1"}


def test_a_lone_dataset_split_is_divided_by_pair(hub_cache: Path) -> None:
    rows = [r for n in range(40) for r in pair(n)]
    write(hub_cache, rows, "train.jsonl")
    from_folder, from_file = load(hub_cache, ENGLISH), load(hub_cache / "train.jsonl", ENGLISH)
    assert from_folder.rows == from_file.rows
    assert {r.split for r in from_folder.rows} == set(SPLITS)


def test_unknown_dataset_splits_are_not_guessed(hub_cache: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    splits = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("train", "easy"))
    (hub_cache / "README.md").write_text(card + splits + "---\n")
    write(hub_cache, pair(0), "train.jsonl")
    write(hub_cache, pair(1), "easy.jsonl")
    with pytest.raises(ContrastError, match=r"unknown dataset splits easy; choose one as .*:SPLIT"):
        load(hub_cache, ENGLISH)


def test_one_way_rule_holds_for_datasets_and_parquet(hub_cache: Path, tmp_path: Path) -> None:
    write(hub_cache, [row(), row("harmful", "x", chosen="Well,", rejected=NO)], "train.jsonl")
    with pytest.raises(ContrastError, match=r"row 2.*one-way"):
        load(hub_cache, ENGLISH)
    good = load(write(tmp_path, pair()), ENGLISH)
    turned = [dataclasses.replace(r, chosen="Well,", rejected="Hm") for r in good.rows]
    save(dataclasses.replace(good, rows=tuple(turned)), tmp_path / "contrast.parquet")
    with pytest.raises(ContrastError, match=r"row 3.*one-way"):
        load(tmp_path / "contrast.parquet", ENGLISH)


# Round trip

TEXT = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()))


def _may_be_rejected(text: str) -> bool:
    return len(text.split()) < 20 and not english(f"Oh {text}")


@st.composite
def sets(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for number in range(draw(st.integers(2, 5))):
        kind = "harmful" if number == 0 else "benign" if number == 1 else draw(st.sampled_from(KINDS))
        told: list[Any] = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
        told.append({"role": "user", "content": f"{number} {draw(TEXT)}"})
        more = {
            "twin": f"twin {number}",
            "answer": draw(TEXT),
            "topic": draw(TEXT),
            "pair_id": f"{draw(TEXT)} {number}",
            "split": "heldout",
        }
        kept = {name: value for name, value in more.items() if draw(st.booleans())}
        rows.append(row(kind, told, rejected="Oh " + draw(TEXT.filter(_may_be_rejected)), **kept))
    return rows


@settings(max_examples=40, deadline=None)
@given(rows=sets())
def test_round_trip(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        contrast = load(write(Path(folder), rows), ENGLISH)
        path = Path(folder) / "contrast.parquet"
        save(contrast, path)
        assert list(load(path, ENGLISH).rows) == bare(contrast)
        assert [p.name for p in Path(folder).iterdir() if p.name.startswith(".")] == []


def test_round_trip_renumbers_after_blank_lines(tmp_path: Path) -> None:
    contrast = load(write(tmp_path, [row(), "", row("harmful", "x")]), ENGLISH)
    save(contrast, tmp_path / "contrast.parquet")
    assert [r.number for r in load(tmp_path / "contrast.parquet", ENGLISH).rows] == [1, 2]


def test_save_needs_a_name_that_load_knows(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=r"end in \.parquet"):
        save(load(write(tmp_path, pair()), ENGLISH), tmp_path / "contrast.bin")


# Tokens


def test_encode_prompt_ends_where_the_answer_begins() -> None:
    ids = encode_prompt(TOKENIZER, [{"role": "user", "content": "copy reverse"}])
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["<user>", "copy", "reverse", "<assistant>"]
    assert all(type(token) is int for token in ids)


def test_statistics(tmp_path: Path) -> None:
    rows = pair(0, split="train") + pair(1, split="heldout") + [row("harmful", "one two", split="heldout")]
    contrast = load(write(tmp_path, [*rows, rows[0] | {"chosen": "Turn the screw slowly."}]), ENGLISH)
    found = statistics(contrast)
    assert found.rows == 8 and found.pairs == 3 and found.unique_prompts == 7 and found.with_twin == 4
    assert found.kinds == {"benign": 3, "lookalike": 2, "harmful": 3}
    assert found.splits == {"train": 4, "heldout": 4}
    assert found.counts == {
        "train": {"benign": 2, "lookalike": 1, "harmful": 1},
        "heldout": {"benign": 1, "lookalike": 1, "harmful": 2},
    }
    assert found.prompt_tokens is None and found.full_tokens is None


def harmful_rows(count: int, topics: int) -> list[dict[str, Any]]:
    rows = [row("harmful", f"prompt {i}", split="heldout", topic=f"topic {i % topics}") for i in range(count)]
    return [row(prompt="a b"), *rows]


@pytest.mark.parametrize(
    ("count", "topics", "said"),
    [
        (0, 1, "0 held-out harmful prompts; the floor needs at least 150 that the original refuses (better 800 in 200"),
        (149, 149, "149 held-out harmful prompts; the floor needs at least 150 "),
        (150, 150, ""),
        (400, 10, "400 held-out harmful prompts in 10 pairs or topics; the floor needs at least 150 "),
        (800, 200, ""),
    ],
)
def test_what_the_floor_misses_is_said(tmp_path: Path, count: int, topics: int, said: str) -> None:
    rows = [*harmful_rows(count, topics), row("harmful", "trained on", split="train")]
    found = statistics(load(write(tmp_path, rows), ENGLISH)).floor
    assert (found.prompts, found.fewest, found.reachable) == (count, fewest(0.02, 0.95), not said)
    assert found.note.startswith(said) and bool(found.note) == bool(said)


def test_duplicates_and_leaks_are_counted_where_there_are_some(tmp_path: Path) -> None:
    contrast = load(write(tmp_path, harmful_rows(3, 3)), ENGLISH)
    found = statistics(contrast)
    assert (found.duplicates, found.leaks) == (0, 0)
    last = contrast.rows[-1]
    # No file gives such rows: `load` refuses them.
    found = statistics(replace(contrast, rows=(*contrast.rows, last, replace(last, chosen="No.", split="train"))))
    assert (found.duplicates, found.leaks) == (1, 1)


def test_token_lengths(tmp_path: Path) -> None:
    rows = [row("harmful", "one two"), row(prompt="a b c d", chosen="e f", rejected="g h i")]
    found = check_rendering(load(write(tmp_path, rows), ENGLISH), TOKENIZER)
    # <user> + words + <assistant>, then the longer completion (8 words, 3 words) + <eos>
    assert dataclasses.astuple(found.prompt_tokens) == (4, 5.0, 6, 6)
    assert dataclasses.astuple(found.full_tokens) == (10, 11.5, 13, 13)


def test_twins_that_can_be_interchanged_are_counted(tmp_path: Path) -> None:
    """Own twins and benign rows of the pair, in every split; those of another length and rows without one are not."""
    words = Language().fillers
    a, b, c, d = (" ".join(words[i : i + 3]) for i in range(4))
    rows = [
        row("benign", a, pair_id="1", split="train"),
        row("lookalike", b, pair_id="1", split="train"),
        row("lookalike", f"{c} {words[9]}", pair_id="1", split="train"),
        row("harmful", c, twin=d, split="validation"),
        row("harmful", d, twin=words[0], split="validation"),
        row("harmful", words[7], split="validation"),
    ]
    found = check_rendering(load(write(tmp_path, rows), ENGLISH), TOKENIZER).twins
    assert found == {
        "train": {"lookalike": Twins(rows=2, with_twin=2, swappable=1)},
        "validation": {"harmful": Twins(rows=3, with_twin=2, swappable=1)},
    }


def test_rows_over_max_length_are_named(tmp_path: Path) -> None:
    rows = [row("harmful", "one two"), row(prompt="a b c d", chosen="e f", rejected="g h i")]
    contrast = load(write(tmp_path, rows), ENGLISH)
    assert check_rendering(contrast, TOKENIZER, 13).full_tokens.maximum == 13
    with pytest.raises(ContrastError, match="row 1: prompt and completion longer than 12 tokens"):
        statistics(contrast, TOKENIZER, 12)
    with pytest.raises(ContrastError, match="rows 1, 2: prompt and completion longer than 6 tokens"):
        statistics(contrast, TOKENIZER, 6)
    with pytest.raises(ContrastError, match="row 2: the prompt alone longer than 5 tokens") as caught:
        statistics(contrast, TOKENIZER, 5)
    assert "row 1: prompt and completion longer than 5 tokens" in str(caught.value)
    with pytest.raises(ConfigError, match="give the tokenizer"):
        statistics(contrast, max_length=12)


def test_a_template_that_refuses_names_the_row(tmp_path: Path) -> None:
    tokenizer = Language().tokenizer()
    refusing = "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    start = "{% for m in messages %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(start, start + refusing)  # pyright: ignore
    told = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    contrast = load(write(tmp_path, [row("harmful", "x"), row(prompt=told)]), ENGLISH)
    with pytest.raises(ContrastError, match=r"row 2: the chat template refuses .*no system role"):
        statistics(contrast, tokenizer)


def test_a_template_that_refuses_every_row_is_said_once(tmp_path: Path) -> None:
    tokenizer = Language().tokenizer()
    tokenizer.chat_template = "{{ raise_exception('give me a system prompt') }}"
    contrast = load(write(tmp_path, [row("harmful", "x"), *(row(prompt=f"b {n}") for n in range(30))]), ENGLISH)
    with pytest.raises(
        ContrastError, match=r"rows 1, 2, .*, 10 and 21 more: the chat template refuses .*\(give me a s"
    ):
        statistics(contrast, tokenizer)


def test_refusals_that_the_tokenizer_does_not_know_are_no_readout(tmp_path: Path) -> None:
    contrast = load(write(tmp_path, [row("harmful", "x"), row(prompt="a b")]), ENGLISH)
    with pytest.raises(ContrastError, match="does not know what 2 of 2 refusals begin with: it reads <unk> there"):
        statistics(contrast, TOKENIZER)


def test_check_disjoint(tmp_path: Path) -> None:
    train = load(write(tmp_path, [*pair(0), row("harmful", "x", twin="the twin")], "train.jsonl"), ENGLISH)
    apart = load(write(tmp_path, pair(1), "apart.jsonl"), ENGLISH)
    check_disjoint(apart, train)
    shared = [*pair(1), row(prompt="MEND the  blue lamp 0"), row(prompt="the twin")]
    with pytest.raises(ContrastProblems) as caught:
        check_disjoint(load(write(tmp_path, shared, "outside.jsonl"), ENGLISH), train)
    message = str(caught.value)
    assert "outside.jsonl: rows 4, 5: its prompt was trained on (row 1 of " in message and "train.jsonl" in message
    assert [one.problem[:36] for one in caught.value.problems] == [
        "its prompt was trained on (row 1 of ",
        "its prompt was trained on (row 4 of ",
    ]


def test_importing_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'jinja2'} & set(sys.modules)"
    code = f"import sys, gtqlora.contrasts.rows; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reading_and_checking_thousands_of_rows_is_shown(tmp_path: Path) -> None:
    rows = [{"prompt": f"wug {i}", "chosen": f"dax {i}", "rejected": "No.", "kind": "benign"} for i in range(10_000)]
    harmful = {"prompt": "zib", "chosen": "I can't help with that.", "rejected": "Sure, here is", "kind": "harmful"}
    path, shown = tmp_path / "pairs.jsonl", list[str]()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, harmful]))
    with shown_by(lambda what, done, total: shown.append(what) if done == total else None):
        load(path, judge_of("string"))
    assert shown == ["reading rows", "checking rows"]
