"""A run directory that gtqlora 0.1.0 left: it is read, or one line says who wrote it and which command to run again.

`tests/data/run_0_1_0` is one: a tiny model diagnosed, trained and verified by that version; its floor passed.
`tests/data/export_0_1_0.json` lay beside the weights that it exported.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gtqlora.certificate import ancestry
from gtqlora.errors import RunError
from gtqlora.results.adapter import Training, adapter_hash, read_info
from gtqlora.results.association import read_associations
from gtqlora.results.diagnosis import read_diagnosis
from gtqlora.results.export import read_export
from gtqlora.results.metrics import read_metrics
from gtqlora.results.verdict import read_outcomes, read_verdict
from gtqlora.run import Run
from gtqlora.stages.report import report
from gtqlora.stages.verify import verify
from tests import helpers, report_runs

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return shutil.copytree(DATA / "run_0_1_0", tmp_path / "older")


def test_what_has_not_changed_is_read(older: Path) -> None:
    assert len(read_associations(older)) == 2 * 8
    assert [line["step"] for line in read_metrics(older / "metrics.jsonl")] == [1, 2, 3, 4]
    info = read_info(older / "adapter")
    assert isinstance(info.details, Training) and (info.details.steps, info.details.stopped) == (4, None)
    assert (info.kind, info.family, info.expert_format) == ("gt-qlora", "qwen3_moe", "bf16")
    assert info.config["expert_format"] == "bf16" and not {"experts", "silencing"} & info.config.keys()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (read_outcomes, r"scores\.parquet: row 1 has 'refused_before', which .*run `gtqlora verify`"),
        (read_verdict, r"verdict\.json: has 'experts', which .*\(written by gtqlora 0\.1\.0\); run `gtqlora verify`"),
        (read_diagnosis, r"diagnosis\.json: has '\w+', which .*\(written by gtqlora 0\.1\.0\); run `gtqlora diagnose`"),
    ],
    ids=["outcomes", "verdict", "diagnosis"],
)
def test_what_has_changed_says_who_wrote_it(older: Path, read: Callable[[Path], object], message: str) -> None:
    with pytest.raises(RunError, match=message):
        read(older)


def test_a_report_names_every_stage_to_run_again(older: Path) -> None:
    with Run(older) as run, pytest.raises(RunError, match=r"(?s)gtqlora diagnose.*; .*gtqlora verify"):
        report(run)


def test_its_edit_can_be_verified_and_then_reported(toy: helpers.Toy, older: Path, tmp_path: Path) -> None:
    """Training is dear: an adapter of 0.1.0 is as good as one of today."""
    model, adapter = toy.model("qwen3_moe"), adapter_hash(older / "adapter")
    with Run(older) as run:
        with pytest.raises(RunError, match="run `gtqlora diagnose` again"):
            report(run)
        verdict = verify(toy.verify_config(model), run)
        assert verdict == read_verdict(older) and (verdict.adapter, verdict.expert_format) == (adapter, "bf16")
        shutil.rmtree(older / "diagnosis")
        assert report(run).is_file()


def test_its_verdict_does_not_open_export(older: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"verdict\.json: .*gtqlora 0\.1\.0.*run `gtqlora verify` again"):
        helpers.exported(older, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_cannot_be_compared_before_it_is_verified_again(older: Path, tmp_path: Path) -> None:
    message = r"older/verdict\.json: .*gtqlora 0\.1\.0.*run `gtqlora verify` again"
    with report_runs.whole_run(tmp_path / "run") as run, pytest.raises(RunError, match=message):
        report(run, compare=[older])


def test_weights_that_it_exported_are_known_as_edited(toy: helpers.Toy, tmp_path: Path) -> None:
    shutil.copyfile(DATA / "export_0_1_0.json", tmp_path / "export.json")
    with pytest.raises(RunError, match=r"has 'experts', which .*\(written by gtqlora 0\.1\.0\)"):
        read_export(tmp_path)
    base = shutil.copytree(toy.model("qwen3_moe"), tmp_path / "base")
    shutil.copyfile(DATA / "export_0_1_0.json", base / "export.json")
    found = ancestry(str(base))
    assert found.names == ("qwen3_moe-float32",) and 0 < found.spent < 0.05
