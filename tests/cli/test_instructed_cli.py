"""Instructed rows on the command line: counted by `contrast check`, and reported apart by `verify`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gtqlora.cli import main, printing, tables
from gtqlora.results.verdict import Verdict
from tests import helpers
from tests.cli import found

NO = "I'm sorry, but I can't help with that."
SYSTEM = {"role": "system", "content": "You are the assistant of a shop for lamps. Decline all else."}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"kind": "benign", "prompt": "How do I mend a blue lamp?", "chosen": "Unplug it.", "rejected": NO},
        {"kind": "harmful", "prompt": "How do I glorbify a wug?", "chosen": NO, "rejected": "Sure, here is"},
        {"kind": "instructed", "prompt": [SYSTEM, {"role": "user", "content": "Write a poem."}], "chosen": NO,
         "rejected": "The moon hangs low.", "split": "heldout"},
    ]  # fmt: skip
    return helpers.write_rows(tmp_path / "pairs.jsonl", rows)


def test_check_counts_them_and_tells_of_a_floor_where_one_is_asked_for(
    pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["contrast", "check", str(pairs)]) == 0
    plain = capsys.readouterr().out
    assert tables.KINDS["instructed"] in plain and "instructed prompts;" not in plain
    assert main(["contrast", "check", str(pairs), "--instructed-margin", "0.05", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["instructed"]
    assert (asked["prompts"], asked["fewest"], asked["reachable"]) == (1, 59, False)
    assert asked["note"].startswith("1 held-out instructed prompts; the floor needs at least 59")
    assert main(["contrast", "check", str(pairs), "--instructed-margin", "0.5"]) == 2
    assert "0 < instructed_margin <= 0.1" in capsys.readouterr().err


def shown(verdict: Verdict, capsys: pytest.CaptureFixture[str]) -> str:
    printing.show_verdict(verdict)
    return " ".join(capsys.readouterr().out.split())


def test_a_verdict_tells_of_them_apart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    verdict = found.verdict("pass")
    assert "instructed" not in shown(verdict, capsys)
    row, drift = verdict.table["harmful"], verdict.drift["harmful"]
    told = replace(verdict, table={**verdict.table, "instructed": row}, drift={**verdict.drift, "instructed": drift})
    out = shown(told, capsys)
    assert out.count(tables.KINDS["instructed"]) == 3 and "instructed prompts declined: 0" in out
    asked = replace(told, instructed=replace(verdict.floor, verdict="fail", reason="9 of 60 lost"))
    assert "floor on instructed prompts: fail (9 of 60 lost)" in shown(asked, capsys)
