"""Stages under a judge that is a model: the verdict is the same as by code, and hangs on its weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gtqlora.cli import main
from gtqlora.errors import FloorError
from gtqlora.run import Run, read_manifest
from gtqlora.stages.verify import verify
from tests import helpers
from tests.judging import judge_models


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that does as `tests.helpers:refuses`."""
    return judge_models.save_classifier(tmp_path_factory.mktemp("judges") / "counting", judge_models.by_length)


def test_a_verdict_by_a_classifier_is_certified_as_long_as_its_weights_stay(
    toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path, counting: Path
) -> None:
    model, weights = toy.model("qwen3_moe"), Path(shutil.copytree(counting, tmp_path / "judge"))
    judge, found = f"classifier:{weights}", []
    for number, name in enumerate((helpers.JUDGE, judge)):
        path = Path(shutil.copytree(verified(model), tmp_path / str(number)))
        with Run(path) as run:
            found.append(verify(toy.verify_config(model, judge=name, ablation=0), run))
    plain, asked = found
    assert plain.table == asked.table and asked.floor.verdict == "pass"
    assert asked.judge.startswith(f"{judge} sha256:")
    assert read_manifest(path)["stages"]["verify"]["config"]["judge"] == judge
    # weights are data: a recorded judge that is a model needs no naming
    assert main(["export", str(path), str(tmp_path / "out")]) == 0
    tensors = load_file(weights / "model.safetensors")
    tensors["classifier.dense.bias"] += 0.001
    save_file(tensors, weights / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloorError, match="the judge is not the one that it was verified by"):
        helpers.exported(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_pairs_are_checked_by_a_classifier(
    toy: helpers.Toy, counting: Path, classifier_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["contrast", "check", str(toy.contrast), "--judge", f"classifier:{counting}"]) == 0
    capsys.readouterr()
    # it knows another language, in which none of these refuses
    assert main(["contrast", "check", str(toy.contrast), "--judge", f"classifier:{classifier_folder}"]) == 2
    told = capsys.readouterr().err
    assert "and 126 more: chosen of a harmful row" in told and "Traceback" not in told


def test_a_second_judge_has_to_say_the_same_for_a_pass(
    toy: helpers.Toy,
    verified: Callable[..., Path],
    tmp_path: Path,
    counting: Path,
    classifier_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "run"))
    words = ["verify", str(path), *helpers.VERIFY, "--set", "ablation=0"]
    assert main([*words, "--set", f"second_judge=classifier:{counting}"]) == 0
    assert main(["export", str(path), str(tmp_path / "out"), "--set", f"judge={helpers.JUDGE}"]) == 0
    # one that knows another language finds no refusal, so that nothing is kept by both
    assert main([*words, "--set", f"second_judge=classifier:{classifier_folder}"]) == FloorError.exit_code
    assert main(["export", str(path), str(tmp_path / "other"), "--set", f"judge={helpers.JUDGE}"]) == 4
    assert not (tmp_path / "other").exists() and "Traceback" not in capsys.readouterr().err
