"""`verify` with frames of the user's own, and what of it a certificate and an export hold to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import gtqlora.stages.verify as stage
from gtqlora.certificate import certify
from gtqlora.contrasts.wrappers import OWN
from gtqlora.errors import ContrastError, FloorError, RunError
from gtqlora.organisms.language import Language
from gtqlora.results.export import read_export
from gtqlora.results.verdict import read_outcomes, read_verdict
from gtqlora.results.wrapped import WRAPPED
from gtqlora.run import Run, sha256_file
from gtqlora.stages.verify import verify
from tests import helpers, models

WORD = Language().fillers[0]


def written(file: Path, content: str) -> str:
    file.write_text(json.dumps({"wrappers": [{"name": "mine", "turns": [{"role": "user", "content": content}]}]}))
    return str(file)


@pytest.fixture(scope="module")
def asked(toy: helpers.Toy, verified: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was verified with a frame of the user's own, `mine.json` beside it; copy it before changing it."""
    folder = tmp_path_factory.mktemp("own")
    run = Path(shutil.copytree(verified(toy.model("qwen3_moe")), folder / "run"))
    own = written(folder / "mine.json", f"{WORD} {WORD} {{prompt}} {WORD}")
    with Run(run) as held:
        verify(toy.verify_config(toy.model("qwen3_moe"), wrappers=own), held)
    return run


@pytest.fixture
def run(asked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(asked, tmp_path / "run"))


def test_own_frames_are_asked_beside_those_of_the_model_and_recorded(asked: Path) -> None:
    found = read_verdict(asked)
    assert found.wrapped is not None and found.decision == "pass"
    assert [row.name for row in found.wrapped.wrappers] == [*Language().wrappers, f"{OWN}mine"]
    assert {row.asked for row in found.wrapped.wrappers} == {60}
    assert found.wrapped.own is not None and found.wrapped.own.verdict == "pass"
    assert found.wrappers == sha256_file(asked.parent / "mine.json")
    framed = [o.prompt[-1]["content"] for o in read_outcomes(asked, WRAPPED) if o.wrapper == f"{OWN}mine"]
    assert framed and all(text.startswith(f"{WORD} {WORD} ") and text.endswith(f" {WORD}") for text in framed)


def test_the_same_frames_are_asked_in_the_form_that_ships(run: Path, tmp_path: Path) -> None:
    helpers.exported(run, tmp_path / "out", to="peft")
    record = read_export(tmp_path / "out")
    assert record.form is not None and record.form.wrapped is not None and record.wrapped is not None
    assert record.wrappers is not None and record.wrappers == read_verdict(run).wrappers
    names = [row.name for row in record.wrapped.wrappers]
    assert [row.name for row in record.form.wrapped.wrappers] == names and names[-1] == f"{OWN}mine"
    assert record.form.wrapped.verdict == "pass" and record.form.wrapped.own is not None
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Frames of whoever verified it: sha256 {record.wrappers}" in card
    assert f"harmful prompts in each of {len(names)}: **pass**" in card


def test_a_certificate_is_of_the_frames_that_were_asked(run: Path) -> None:
    with Run(run) as held:
        assert certify(held, helpers.JUDGE).verdict.wrappers == read_verdict(run).wrappers
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["verify"]["inputs"]["wrappers"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    with Run(run) as held, pytest.raises(FloorError, match="the record of verify was changed"):
        certify(held, helpers.JUDGE)


def test_texts_are_not_judged_again_as_if_other_frames_had_been_asked(
    asked: Path, run: Path, toy: helpers.Toy, tmp_path: Path
) -> None:
    config = toy.verify_config(toy.model("qwen3_moe"), wrappers=str(asked.parent / "mine.json"))
    other = written(tmp_path / "other.json", f"{{prompt}} {WORD}")
    for wrappers in (None, other):
        with (
            Run(run) as held,
            pytest.raises(RunError, match=r"verified with other frames \(wrappers\); run `gtqlora verify`"),
        ):
            verify(replace(config, wrappers=wrappers), held, rejudge=True)
    # the file may lie elsewhere by now
    moved = shutil.copy(asked.parent / "mine.json", tmp_path / "moved.json")
    with Run(run) as held:
        assert verify(replace(config, wrappers=str(moved)), held, rejudge=True).decision == "pass"


def hashed(*_: object) -> None:
    raise AssertionError("the model was hashed")


def test_frames_that_cannot_be_asked_cost_one_line_before_anything_is_lost(
    run: Path, toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "verdict.json").read_bytes()
    config = toy.verify_config(toy.model("qwen3_moe"), wrappers=str(tmp_path / "none.json"))
    with monkeypatch.context() as patched:
        patched.setattr(stage, "identify", hashed)
        for rejudge in (False, True):
            with Run(run) as held, pytest.raises(ContrastError, match=r"none\.json': no such file"):
                verify(config, held, rejudge=rejudge)
    assert (run / "verdict.json").read_bytes() == before
    config = replace(config, wrappers=written(tmp_path / "english.json", "In English, please: {prompt}"))
    with Run(run) as held, pytest.raises(ContrastError, match=f"has no words for {OWN}mine"):
        verify(config, held)


def test_a_run_from_before_there_were_own_frames_is_still_certified(
    toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path
) -> None:
    old = Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "old"))

    def older(manifest: dict[str, dict[str, dict[str, dict[str, object]]]]) -> object:
        del manifest["stages"]["verify"]["config"]["wrappers"]
        return manifest

    models.edit_json(old / "manifest.json", older)
    with Run(old) as held:
        assert certify(held, helpers.JUDGE).verdict.wrappers is None
