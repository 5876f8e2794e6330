"""Checkpoints: vouched for by hashes, given up for the one before, never dropped unasked; the old edit stays."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from gtqlora.config import TrainConfig
from gtqlora.edits.checkpoint_files import MARK, NEEDED, Origin, check_origin, drop, mark_complete, tidy, usable
from gtqlora.errors import RunError, TrainingError
from gtqlora.progress import note, shown_by
from gtqlora.results.metrics import read_metrics
from gtqlora.run import Run
from gtqlora.storage.contents import sha256_file
from tests import helpers
from tests.helpers import trained
from tests.stages.test_resume import steps_seen

ORIGIN = Origin({"steps": 4, "lr": 0.1}, {"model": "m", "contrast": "c"})


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def made(checkpoints: Path, *steps: int) -> None:
    for step in steps:
        folder = checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in NEEDED:
            (folder / name).write_bytes(f"{name} of {step}, ".encode() * 100)
        mark_complete(folder, step, ORIGIN)


def zero_half(file: Path) -> None:
    """As a power cut leaves a file that was not synced."""
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2] + b"\0" * (size - size // 2))


def edit_mark(folder: Path, **changes: Any) -> None:
    mark = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps({**mark, **changes}))


# --- which are usable


def test_the_newest_come_first_by_number(tmp_path: Path) -> None:
    made(tmp_path, 2, 10, 4)
    assert [c.step for c in usable(tmp_path)] == [10, 4, 2]
    assert all(c.origin == ORIGIN for c in usable(tmp_path))


@pytest.mark.parametrize("name", sorted(NEEDED))
@pytest.mark.parametrize("damage", [zero_half, lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_a_file_that_is_not_what_was_written(tmp_path: Path, name: str, damage: Callable[[Path], object]) -> None:
    made(tmp_path, 2, 4)
    damage(tmp_path / "checkpoint-4" / name)
    assert [c.step for c in usable(tmp_path)] == [2]


@pytest.mark.parametrize(
    "spoil",
    [
        *(lambda f, text=text: (f / MARK).write_text(text) for text in ("", "{", "[]", "null", "7", "[" * 99_999)),
        lambda f: (f / MARK).write_bytes(b"\xff\xfe\0"),
        lambda f: ((f / MARK).unlink(), (f / MARK).mkdir()),
        lambda f: ((f / MARK).unlink(), os.mkfifo(f / MARK)),
        lambda f: (f / MARK).write_text(json.dumps({"hash": "x", "step": 4, "sizes": {}})),
        *(lambda f, step=step: edit_mark(f, step=step) for step in ("x", None, 5, 4.0, True, [4])),
        *(lambda f, files=files: edit_mark(f, files=files) for files in ([], None, {}, {"edit.safetensors": 3}, "x")),
        lambda f: edit_mark(f, files=dict.fromkeys(NEEDED)),
        lambda f: edit_mark(f, files={**json.loads((f / MARK).read_text())["files"], "../x": "y"}),
        *(lambda f, v=v: edit_mark(f, settings=v) for v in (None, [], 3)),
        *(lambda f, v=v: edit_mark(f, inputs=v) for v in (None, [], 3)),
        *(lambda f, v=v: edit_mark(f, threads=v) for v in (None, "1")),
        *(lambda f, v=v: edit_mark(f, format=v) for v in (None, 1, "2")),
    ],
)
def test_a_malformed_mark_is_no_traceback(
    tmp_path: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path, 2, 4)
    spoil(tmp_path / "checkpoint-4")
    assert [c.step for c in usable(tmp_path)] == [2]
    tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "unusable-checkpoint-4"]
    assert f"{tmp_path / 'checkpoint-4'} cannot be used" in caplog.text


def test_what_a_kill_left_is_removed_and_what_is_not_ours_is_kept(tmp_path: Path) -> None:
    made(tmp_path, 2, 4, 6)
    (tmp_path / "checkpoint-4" / MARK).unlink()
    (tmp_path / "checkpoint-6" / MARK).unlink()
    (tmp_path / "checkpoint-6" / "adapter_model.safetensors").write_text("of another trainer")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-8").symlink_to("checkpoint-2")
    tidy(tmp_path)
    kept = ["checkpoint-2", "checkpoint-best", "unusable-checkpoint-6", "unusable-checkpoint-8"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_two_unusable_ones_of_a_step_are_both_kept(tmp_path: Path) -> None:
    for _ in range(2):
        made(tmp_path, 4)
        zero_half(tmp_path / "checkpoint-4" / "optimizer.pt")
        tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unusable-checkpoint-4", "unusable-checkpoint-4.2"]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(ORIGIN, settings={"steps": 8, "lr": 0.1}), "steps = 4 and not 8"),
        (replace(ORIGIN, settings={"steps": 8, "lr": 0.2}), r"lr = 0\.1 and not 0\.2 and with steps = 4 and not 8"),
        (replace(ORIGIN, inputs={"model": "other", "contrast": "c"}), "another model"),
        (replace(ORIGIN, settings={"steps": 4, "lr": 0.1, "new": 1}), "new = none and not 1"),
    ],
)
def test_other_settings_are_named_and_nothing_is_touched(tmp_path: Path, now: Origin, said: str) -> None:
    made(tmp_path / "checkpoints", 2, 4)
    before = listing(tmp_path)
    check_origin(usable(tmp_path / "checkpoints"), ORIGIN)
    with pytest.raises(RunError, match=rf"checkpoints: .* made with {said}; --again drops .* another --run"):
        check_origin(usable(tmp_path / "checkpoints"), now)
    assert listing(tmp_path) == before


def test_dropping_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made(tmp_path, 2, 4)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "notes").write_text("mine")
    drop(tmp_path, "metrics.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
    assert f"{tmp_path}: 2 checkpoints of before dropped (--again)" in caplog.text
    caplog.clear()
    drop(tmp_path, "metrics.jsonl")
    assert caplog.text == ""


# --- figures


def test_metrics_cut_in_the_middle_of_a_line_are_read_up_to_it(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path / "m")] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "null", "7", "{}", '{"step": "2"}', '{"step": null}', '{"step": true}', '{"step": 2.0}', "{"),
        *('{"step": 2, "loss": "x"}', '{"step": 2, "loss": null}', '{"step": 2, "loss": [1]}', '{"step": 2, "a": NaN}'),
        *('{"step": 2, "step": 3}', '{"step": 2, "loss": 1e999}', "[" * 99_999, '{"step": ' + "9" * 5000 + "}"),
    ],
)
def test_a_line_that_training_did_not_write_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(RunError, match=rf"{file}: line 2 is not what training writes .*; move the file away"):
        read_metrics(file)


# --- training


class Cut(Exception):
    """Stands for whatever ends a training."""


@pytest.fixture(scope="module")
def config(toy: helpers.Toy) -> TrainConfig:
    return toy.train_config(toy.model("qwen3_moe"), steps=6)


def cut_at(step: int, config: TrainConfig, path: Path, **more: Any) -> None:
    def look(what: str, done: int, _total: int) -> None:
        if (what, done) == ("train", step):
            raise Cut

    with shown_by(look), pytest.raises(Cut):
        trained(config, path, **more)


@pytest.fixture(scope="module")
def straight(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    return trained(config, tmp_path_factory.mktemp("straight") / "run").adapter.parent


@pytest.fixture(scope="module")
def cut(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was cut at step 5, with checkpoints of 2 and 4; copy it."""
    path = tmp_path_factory.mktemp("cut") / "run"
    cut_at(5, config, path)
    return path


@pytest.fixture
def run(cut: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cut, tmp_path / "run")


def assert_same(run: Path, straight: Path) -> None:
    assert listing(run / "adapter") == listing(straight / "adapter")
    losses = [[line["loss"] for line in read_metrics(p / "metrics.jsonl")] for p in (run, straight)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_checkpoint_that_does_not_load_gives_way_to_the_one_before(
    config: TrainConfig, run: Path, straight: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Zeros in its second half, and a mark that vouches for them, so that loading finds out."""
    folder = run / "checkpoints" / "checkpoint-4"
    zero_half(folder / name)
    mark = json.loads((folder / MARK).read_text())
    edit_mark(folder, files={**mark["files"], name: sha256_file(folder / name)})
    assert usable(run / "checkpoints")[0].step == 4
    steps = steps_seen(config, run)
    # where loading goes well in spite of zeros the weights are others; those of a safetensors file hold no sum
    if name != "edit.safetensors":
        assert steps[-5:] == [2, 3, 4, 5, 6]
        assert_same(run, straight)
        assert f"{folder} cannot be used" in caplog.text
        assert (run / "checkpoints" / "unusable-checkpoint-4").is_dir()


@pytest.mark.parametrize(
    "text", ["{}", '{"global_step": 3}', '{"global_step": "4"}', '{"global_step": 4, "x": 1}', "[]"]
)
def test_a_trainer_state_of_other_types_gives_way(config: TrainConfig, run: Path, text: str) -> None:
    folder = run / "checkpoints" / "checkpoint-4"
    (folder / "trainer_state.json").write_text(text)
    mark = json.loads((folder / MARK).read_text())
    edit_mark(folder, files={**mark["files"], "trainer_state.json": sha256_file(folder / "trainer_state.json")})
    assert 2 in steps_seen(config, run) and (run / "checkpoints" / "unusable-checkpoint-4").is_dir()


def test_with_no_checkpoint_left_training_starts_anew(config: TrainConfig, run: Path, straight: Path) -> None:
    for step, name in ((2, "optimizer.pt"), (4, "scheduler.pt")):
        zero_half(run / "checkpoints" / f"checkpoint-{step}" / name)
    assert steps_seen(config, run) == list(range(7))
    assert_same(run, straight)


def test_what_changes_no_sum_is_no_other_setting(
    config: TrainConfig, run: Path, straight: Path, toy: helpers.Toy, tmp_path: Path
) -> None:
    """The same bytes elsewhere, other times of files, other intervals of saving; a resume goes on, to the same bits."""
    model = shutil.copytree(config.model, tmp_path / "copied")
    for file in model.iterdir():
        os.utime(file, (1, 1))
    contrast = shutil.copy(config.contrast, tmp_path / "pairs.jsonl")
    moved = replace(config, model=str(model), contrast=str(contrast), save_steps=3, report_to="none", dead_budget=7)
    assert steps_seen(moved, run)[0] == 4
    assert helpers.same(helpers.weights(run / "adapter"), helpers.weights(straight / "adapter"))
    assert steps_seen(config, run) == []  # and it is trained already


def test_more_steps_are_another_schedule(config: TrainConfig, run: Path) -> None:
    before = listing(run)
    with pytest.raises(RunError, match="made with steps = 6 and not 8; --again drops them"):
        trained(replace(config, steps=8), run)
    assert listing(run) == before


def test_another_number_of_threads_is_said(config: TrainConfig, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_mark(run / "checkpoints" / "checkpoint-4", threads=7)
    assert steps_seen(config, run)[0] == 4
    assert caplog.text.count("computed on 7 threads, and now there are 1") == 1


# --- the edit of before


@pytest.mark.parametrize("change", [{"seed": 9}, {}, {"steps": 4}, {"contrast": "other"}])
def test_the_edit_of_before_stays_until_the_next_is_whole(
    config: TrainConfig, straight: Path, tmp_path: Path, toy: helpers.Toy, change: dict[str, Any]
) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    names = ("adapter", "contrast.parquet", "metrics.jsonl", "manifest.json", "verdict.json")
    (run / "verdict.json").write_text("{}")
    before = {name: listing(run / name) or sha256_file(run / name) for name in names}
    if "contrast" in change:
        rows = toy.contrast.read_text().splitlines()
        change = {"contrast": str(tmp_path / "fewer.jsonl")}
        (tmp_path / "fewer.jsonl").write_text("\n".join(rows[1:]))
    other = replace(config, **change)
    if change:
        with pytest.raises(RunError, match="the checkpoints were made with"):
            trained(other, run)
    cut_at(3, other, run, again=True)
    assert {name: listing(run / name) or sha256_file(run / name) for name in names} == before
    assert steps_seen(config, run) == []  # the old one is still what its record says
    assert steps_seen(other, run, **({} if change else {"again": True}))[-1] == other.steps
    after = {name: listing(run / name) or sha256_file(run / name) for name in names}
    assert after["verdict.json"] == before["verdict.json"] and after["manifest.json"] != before["manifest.json"]
    with Run(run) as held:
        outputs = held.manifest()["stages"]["train"]["outputs"]
        assert outputs == held._hashes(outputs)


def test_a_training_that_fails_leaves_the_edit_of_before(config: TrainConfig, straight: Path, tmp_path: Path) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    before = {k: v for k, v in listing(run).items() if not k.startswith("checkpoints")}
    with pytest.raises(TrainingError, match="routing collapsed"):
        trained(replace(config, max_load_cv=1e-9), run, again=True)
    assert {k: v for k, v in listing(run).items() if not k.startswith("checkpoints")} == before


# --- what a checkpoint is to others


def test_peft_does_not_load_a_checkpoint(config: TrainConfig, cut: Path) -> None:
    folder = cut / "checkpoints" / "checkpoint-4"
    assert {p.name for p in folder.iterdir()} == NEEDED | {MARK}
    model = AutoModelForCausalLM.from_pretrained(config.model)
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(model, str(folder))


def test_a_run_removed_while_it_trains_is_an_error(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def look(what: str, done: int, _total: int) -> None:
        if (what, done) == ("train", 3):
            shutil.rmtree(run)

    with shown_by(look), pytest.raises(RunError, match="the run directory was removed or replaced"):
        trained(config, run)
    assert not run.exists()


def test_notes_go_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="gtqlora"):
        note("something was decided")
    assert "something was decided" in caplog.text
