"""The ledger of verdicts: what one try is, that none is lost, and that nothing odd beside the pairs is followed."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gtqlora.errors import RunError
from gtqlora.floor import arithmetic, ledger
from gtqlora.floor.ledger import Entry
from gtqlora.organisms import embedded


def entry(adapter: str = "a", prompts: str = "pqr", judge: str = "string") -> Entry:
    return Entry(
        finished="2026-01-01T00:00:00+00:00",
        adapter=adapter,
        model="m",
        contrast="c",
        judge=judge,
        shipped=True,
        decided=True,
        verdict="fail",
        reason="because",
        prompts={prompt: [True, True, "g"] for prompt in prompts},
    )


def test_one_edit_on_the_same_prompts_is_one_try_however_often() -> None:
    assert arithmetic.tries([], entry()) == 1
    assert arithmetic.tries([entry()] * 5, entry()) == 1
    assert arithmetic.tries([entry("b"), entry("c")], entry()) == 3
    assert arithmetic.tries([entry(prompts="pqrs")], entry()) == 2  # a prompt more is another look
    assert arithmetic.tries([entry(judge="string:x")], entry()) == 2
    assert arithmetic.tries([entry("b", prompts="rst")], entry()) == 2  # shares one
    assert arithmetic.tries([entry("b", prompts="xyz")], entry()) == 1


def test_levels_of_many_tries_keep_one_together() -> None:
    assert arithmetic.corrected(0.95, 1) == pytest.approx(0.95)
    assert arithmetic.corrected(0.95, 10) == pytest.approx(0.995)


def test_it_lies_beside_the_pairs_or_with_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    pairs, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    pairs.touch()
    with_user = [tmp_path / "state" / "gtqlora" / ledger.NAME, run / ledger.NAME]
    assert ledger.places(str(pairs), run) == [tmp_path / ledger.NAME, *with_user]
    assert ledger.places(f"{tmp_path}:train", run)[0] == tmp_path.parent / ledger.NAME
    assert ledger.places("owner/name:test", run) == with_user
    assert ledger.places(str(embedded.contrast()), run) == with_user  # never into the installed package


def test_entries_are_appended_and_read_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / ledger.NAME
    assert ledger.read(file) == []
    assert ledger.append([file], entry()) == file
    with file.open("ab") as stream:
        stream.write(b'{"adapter": "cut of')  # a kill in the middle of a line
    ledger.append([file], entry("b"))
    assert ledger.read(file) == [entry(), entry("b")]
    assert file.read_bytes().count(b"\n") == 3


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / ledger.NAME
    writers = [
        threading.Thread(target=lambda i=i: [ledger.append([file], entry(f"{i}-{j}")) for j in range(20)])
        for i in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {e.adapter for e in ledger.read(file)} == {f"{i}-{j}" for i in range(4) for j in range(20)}


def test_an_edit_has_one_past_wherever_it_was_judged(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("run", "beside", "user")]
    for file in files[:2]:
        ledger.append([file], entry())
    ledger.append([files[2]], replace(entry(), finished="2025-01-01T00:00:00+00:00", verdict="pass"))
    ledger.append([files[1]], entry("b"))
    every = [known for file in (*files, tmp_path / "none") for known in ledger.read(file)]
    assert [known.verdict for known in ledger.on_edit("a", every)] == ["pass", "fail"]


def test_where_it_cannot_be_written_the_next_place_is_taken(tmp_path: Path) -> None:
    odd = {name: tmp_path / name for name in ("pipe", "link", "folder")}
    os.mkfifo(odd["pipe"])
    odd["link"].symlink_to(tmp_path / "target")
    odd["folder"].mkdir()
    (tmp_path / "plain").touch()
    for place in (*odd.values(), tmp_path / "plain" / "below"):
        assert ledger.append([place, tmp_path / "good"], entry()) == tmp_path / "good"
    assert not (tmp_path / "target").exists()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        ledger.append([odd["folder"]], entry())


@pytest.mark.parametrize("change", [{"prompts": []}, {"adapter": 7}, {"more": 1}, {"shipped": "yes"}], ids=str)
def test_a_line_that_is_not_ours_is_an_error_that_names_it(tmp_path: Path, change: dict[str, object]) -> None:
    file = tmp_path / ledger.NAME
    file.write_text(json.dumps(asdict(entry())) + "\n" + json.dumps({**asdict(entry()), **change}) + "\n")
    with pytest.raises(RunError, match=r"ledger\.jsonl: line 2"):
        ledger.read(file)


def test_special_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="not a plain file"):
        ledger.read(tmp_path / "pipe")


def test_the_ledger_holds_no_words() -> None:
    assert ledger.short_hash("some prompt") == ledger.short_hash("some prompt")
    assert len(ledger.short_hash("some prompt")) == 12
    assert replace(entry(), verdict="pass").try_id == entry().try_id
