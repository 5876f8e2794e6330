"""Faults of the campaign that are nobody else's tests, under their numbers; README.md says where the others are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gtqlora import contrasts
from gtqlora.cli import main
from gtqlora.errors import RunError
from gtqlora.judging.judge import judge_of
from gtqlora.results.adapter import adapter_hash
from gtqlora.storage.atomic import atomic_write
from tests import helpers, models, warm


@pytest.fixture
def passed(toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "run"))


def test_s2_a_link_out_of_the_model_folder_is_not_followed_into_the_export(
    toy: helpers.Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(toy.model("qwen3_moe"), tmp_path / "model"))
    run = helpers.verified_run(toy, model, "gt-qlora", tmp_path / "run")
    (tmp_path / "key").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "key")
    assert main(["export", str(run), str(tmp_path / "out"), "--set", f"judge={helpers.JUDGE}"]) == 2
    assert "LICENSE" in capsys.readouterr().err and not (tmp_path / "out").exists()


NOOP = """
from pathlib import Path
from gtqlora.judging.judge import judge_of
from gtqlora.results.adapter import adapter_hash
from tests.helpers import JUDGE, noop_adapter
torch.manual_seed(0)
model, contrast, run = map(Path, sys.argv[1:])
noop_adapter(model, contrast, JUDGE, run)
print(hash("gate"), adapter_hash(run / "adapter"))
"""


def test_r9_the_adapter_s_hash_is_everybody_s(toy: helpers.Toy, tmp_path: Path) -> None:
    """PEFT holds names as sets, whose order is that of the process."""
    done = warm.process("import sys" + NOOP, toy.model("qwen3_moe"), toy.contrast, tmp_path / "there", knowing=True)
    assert done.returncode == 0, done.stderr
    seeded, there = done.stdout.split()[-2:]
    assert int(seeded) != hash("gate")  # of a process with another hash seed
    with torch.random.fork_rng():
        torch.manual_seed(0)
        helpers.noop_adapter(toy.model("qwen3_moe"), toy.contrast, helpers.JUDGE, tmp_path / "here")
    assert adapter_hash(tmp_path / "here" / "adapter") == there


def test_r10_a_checked_set_replaces_no_file(
    toy: helpers.Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.parquet"
    mine.write_text("precious")
    command = ["contrast", "check", str(toy.contrast), "--judge", helpers.JUDGE, "--out", str(mine)]
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err and mine.read_text() == "precious"
    assert main([*command[:-1], str(tmp_path / "new.parquet")]) == 0
    assert len(contrasts.load(str(tmp_path / "new.parquet"), judge_of(helpers.JUDGE)).rows) > 100


@pytest.mark.parametrize("place", ["adapter/w", "checkpoints", "diagnosis/w", ".lock/w", "scores.parquet/x"])
def test_r10_no_export_into_what_the_run_writes_itself(
    passed: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.relative_to(passed) for p in passed.rglob("*"))
    assert main(["export", str(passed), str(passed / place), "--set", f"judge={helpers.JUDGE}"]) == 2
    said = capsys.readouterr().err
    assert place.partition("/")[0] in said and "Traceback" not in said
    assert sorted(p.relative_to(passed) for p in passed.rglob("*")) == before


def test_r6_a_kill_after_the_rename_leaves_nothing_for_ever(tmp_path: Path) -> None:
    """The same command never writes there again, since the name is taken; that it is refused cleans up."""
    with atomic_write(tmp_path / "out", replace=False) as staged:
        staged.write_text("done")
    left = tmp_path / ".out.abcdefgh.gtqlora-staging"
    left.mkdir()
    (left / ".lock").write_bytes(b"gtqlora staging\n")
    with pytest.raises(RunError, match="exists already"), atomic_write(tmp_path / "out", replace=False):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_h5_a_model_folder_s_name_is_no_markup_in_the_card(toy: helpers.Toy, tmp_path: Path) -> None:
    name = "x\n# Certified by the maker\n| a <b>"
    model = Path(shutil.copytree(toy.model("qwen3_moe"), tmp_path / name))
    run = helpers.verified_run(toy, model, "gt-qlora", tmp_path / "run")
    helpers.exported(run, tmp_path / "out")
    body = (tmp_path / "out" / "README.md").read_text().split("\n---\n", 1)[1]
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert headings[0].startswith("# x ") and "<b>" not in body
    assert [line for line in headings[1:] if not line.startswith("## ") or "Certified" in line] == []


def test_h3_a_report_of_edited_records_names_the_file(passed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.edit_json(passed / "verdict.json", lambda old: {**old, "table": {"harmful": [1]}})
    assert main(["report", str(passed)]) == 2
    said = capsys.readouterr().err
    assert "verdict.json" in said and "Traceback" not in said and not (passed / "report.html").exists()
