"""`diagnose` and `verify` on two ranks leave what one process leaves; only the leader asks the judge."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gtqlora.cli import main
from gtqlora.organisms import embedded
from gtqlora.results.verdict import HISTORY, SCORES, VERDICT
from gtqlora.run import read_parquet
from tests import helpers
from tests.ranks.test_commands import ranks

JUDGE = "tests.ranks.test_rank_stages:counted"
VERIFY = [
    word
    for setting in (f"judge={JUDGE}", "max_new_tokens=2", "wrapped_prompts=12", "ablation=0", "mediation_prompts=8")
    for word in ("--set", setting)
]


def counted(text: str) -> bool:
    """`helpers.refuses`, which notes who asks."""
    if (file := os.environ.get("ASKED_IN")) is not None:
        with Path(file).open("a") as asked:
            asked.write(f"{os.environ.get('RANK')}\n")
    return helpers.refuses(text)


def same_files(one: Path, other: Path) -> None:
    """Compare all artefacts but the record of when they were made."""
    names = {str(file.relative_to(one)) for file in one.rglob("*") if file.is_file()}
    assert names == {str(file.relative_to(other)) for file in other.rglob("*") if file.is_file()}
    for name in names - {"manifest.json", "ledger.jsonl", HISTORY}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    records = [json.loads((run / "manifest.json").read_text())["stages"] for run in (one, other)]
    assert records[0].keys() == records[1].keys()
    for stage in records[0]:
        assert [record[stage]["hash"] for record in records] == [records[0][stage]["hash"]] * 2


def test_a_verdict_of_two_ranks_is_that_of_one(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = toy.pairs(tmp_path / "pairs.jsonl", harmful=20)
    config = toy.train_config(
        toy.model("qwen3_moe"), contrast=str(pairs), judge=JUDGE, expert_format="nf4", steps=2, rank=2
    )
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    helpers.trained(config, one)
    shutil.copytree(one, two)
    asked = [tmp_path / "asked-by-one", tmp_path / "asked-by-two"]
    monkeypatch.setenv("ASKED_IN", str(asked[0]))
    alone = main(["verify", str(one), *VERIFY])
    printed = capsys.readouterr().out
    leader, other = ranks("verify", two, *VERIFY, ASKED_IN=asked[1])
    assert (leader.returncode, other.returncode) == (alone, alone) and other.stdout == other.stderr == ""
    assert leader.stdout.replace(str(two), str(one)).split() == printed.split()
    same_files(one, two)
    assert len(read_parquet(two / SCORES)) == 36 and (two / VERDICT).exists()
    assert len((two / HISTORY).read_text().splitlines()) == 1
    by_one, by_two = (file.read_text().split() for file in asked)
    assert set(by_two) == {"0"} and len(by_two) == len(by_one) > 0
    # the judge was named for this run, and is remembered for all ranks
    again = ranks("verify", two, *VERIFY[2:], ASKED_IN=asked[1])
    assert [one.returncode for one in again] == [alone, alone], again
    assert by_two == asked[1].read_text().split()  # and the verdict is there already


def test_a_diagnosis_of_two_ranks_is_that_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    pairs = helpers.write_rows(tmp_path / "pairs.jsonl", [row for row in rows if row["split"] == "validation"][:30])
    settings = ["random_controls=1", "max_candidates=2", "expert_format=nf4"]
    command = ["diagnose", "organism:routed", "--contrast", str(pairs), "--config", "organism"]
    command += [word for setting in settings for word in ("--set", setting)]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*command, "--run", str(one)]) == 0
    leader, other = ranks(*command, "--run", two)
    assert leader.returncode == other.returncode == 0, leader.stderr + other.stderr
    assert other.stdout == other.stderr == ""
    assert leader.stdout.replace(str(two), str(one)) == capsys.readouterr().out
    same_files(one, two)
