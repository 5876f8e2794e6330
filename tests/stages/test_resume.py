"""The train stage: done once, resumed bitwise after a kill, stopped by the guard at the last good checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from gtqlora.config import TrainConfig
from gtqlora.edits.checkpoint_files import MARK
from gtqlora.errors import ContrastError, RunError, TrainingError
from gtqlora.progress import shown_by
from gtqlora.results.adapter import read_info
from gtqlora.results.metrics import read_metrics
from gtqlora.run import write_json
from tests import helpers, warm
from tests.helpers import gates, trained


def steps_seen(config: TrainConfig, path: Path, **more: Any) -> list[int]:
    """Train, and the steps that progress named; the first one is where training took up."""
    seen: list[int] = []
    with shown_by(lambda what, done, _total: seen.append(done) if what == "train" else None):
        trained(config, path, **more)
    return seen


class Poison(TrainerCallback):
    """Writes NaN into a gate after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.step:
            next(iter(gates(model).values())).data[0, 0] = float("nan")


# --- the stage -------------------------------------------------------------------------------------------------------


def stamp(adapter: Path) -> list[tuple[str, int]]:
    return sorted((p.name, p.stat().st_mtime_ns) for p in adapter.iterdir())


def test_a_second_call_does_not_train_again(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(toy.model("qwen3_moe"))
    first = trained(config, tmp_path)
    before = stamp(first.adapter)
    assert steps_seen(config, tmp_path) == []
    assert trained(config, tmp_path) == first
    assert stamp(first.adapter) == before
    trained(config, tmp_path, again=True)
    assert stamp(first.adapter) != before
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_rows_that_do_not_fit_are_named_before_training(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe", max_position_embeddings=12)
    with pytest.raises(ContrastError, match="longer than 12 tokens"):
        trained(toy.train_config(model), tmp_path)
    assert not (tmp_path / "adapter").exists()


# --- resume ----------------------------------------------------------------------------------------------------------

TRAIN_AND_DIE = (
    helpers.KILLED_AT.replace("WHAT", "'train'").replace("DONE", "5")
    + """
from gtqlora.config import TrainConfig
from gtqlora.stages.train import train
with Run(sys.argv[2]) as run, shown_by(die):
    train(TrainConfig(**json.loads(sys.argv[1])), run)
"""
)


def digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[n].numpy().tobytes() for n in sorted(tensors))).hexdigest()


def test_killed_and_resumed_is_bitwise_uninterrupted(toy: helpers.Toy, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 8, "accumulation": 2, "warmup": 0.25, "gate_step": 0.05, "lr_gates": None}
    config = toy.train_config(toy.model("deepseek_v3"), **settings)
    expected = digest(helpers.weights(trained(config, tmp_path / "straight").adapter))
    died = warm.process(TRAIN_AND_DIE, json.dumps(asdict(config)), tmp_path / "killed", knowing=True)
    assert died.returncode == -9, died.stderr
    assert not (tmp_path / "killed" / "adapter").exists()
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "metrics.jsonl"]

    changed = shutil.copytree(tmp_path / "killed", tmp_path / "changed")
    half = checkpoints / "checkpoint-5"  # as a kill in the middle of a save leaves it
    shutil.copytree(checkpoints / "checkpoint-4", half)
    (half / MARK).unlink()
    truncated = shutil.copytree(tmp_path / "killed", tmp_path / "truncated")
    os.truncate(truncated / "checkpoints" / "checkpoint-4" / "optimizer.pt", 100)

    for name, taken_up in (("killed", 4), ("truncated", 2)):
        seen = steps_seen(config, tmp_path / name)
        assert seen[0] == taken_up and seen[-1] == 8, name
        assert digest(helpers.weights(tmp_path / name / "adapter")) == expected, name
        assert read_info(tmp_path / name / "adapter").details == read_info(tmp_path / "straight" / "adapter").details
        lines = [line["step"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        assert lines == list(range(1, 9)), name
        assert not half.exists()

    other = toy.train_config(toy.model("deepseek_v3"), **settings, beta=0.2)
    with pytest.raises(RunError, match=r"made with beta = 0\.1 and not 0\.2; --again drops them"):
        trained(other, changed)
    assert len(list((changed / "checkpoints").glob("checkpoint-*"))) == 2
    assert steps_seen(other, changed, again=True)[0] == 0
    assert [line["step"] for line in read_metrics(changed / "metrics.jsonl")] == list(range(1, 9))


def test_killed_after_the_last_step_trains_no_further(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(toy.model("qwen3_moe"))
    first = trained(config, tmp_path)
    expected = helpers.weights(first.adapter)
    shutil.rmtree(first.adapter)
    write_json(tmp_path / "manifest.json", {"format": 1, "stages": {}})
    assert trained(config, tmp_path) == first
    assert helpers.same(helpers.weights(first.adapter), expected)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


# --- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "good"), [(3, 2), (4, 2), (6, 4)])
def test_nan_weights_bring_the_last_good_checkpoint_back(
    toy: helpers.Toy, tmp_path: Path, step: int, good: int
) -> None:
    """Poisoned off a save, just before a save (which must not count as good), and at the very end (no loss follows)."""
    inside = helpers.Inside.start(toy.train_config(toy.model("deepseek_v3"), steps=6), tmp_path)
    inside.trainer.add_callback(Poison(step))
    steps, stopped = inside.fit()
    assert steps == good
    assert stopped is not None and ("finite" in stopped or "nan" in stopped)
    checkpoint = helpers.weights(tmp_path / "checkpoints" / f"checkpoint-{good}")
    assert helpers.same(helpers.weights(inside.save()), checkpoint)
    assert torch.isfinite(helpers.logits(inside.trainer.model)).all()
    assert [line["step"] for line in read_metrics(inside.metrics)] == list(range(1, step + 1))


def test_nan_without_a_good_checkpoint_is_an_error(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = helpers.Inside.start(toy.train_config(toy.model("deepseek_v3"), save_steps=100), tmp_path)
    inside.trainer.add_callback(Poison(1))
    with pytest.raises(TrainingError, match="no checkpoint was good yet"):
        inside.fit()


def test_absurd_learning_rate_stops_by_itself(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(toy.model("deepseek_v3"), lr_lora=1e30, lr_gates=1e30, save_steps=100)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)|not finite|collapsed|overlap|no longer finite"):
        trained(config, tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"] == {}


def test_collapse_guard_stops_the_stage_at_a_checkpoint(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(toy.model("deepseek_v3"), steps=9, logging_steps=3, max_load_cv=1e-6)
    result = trained(config, tmp_path)
    assert result.steps == 2
    assert result.stopped is not None and "routing collapsed at step 3" in result.stopped
    assert helpers.same(helpers.weights(result.adapter), helpers.weights(tmp_path / "checkpoints" / "checkpoint-2"))
    assert trained(config, tmp_path) == result  # fresh, with the reason still known


def test_overlap_guard_watches_harmful_prompts(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(toy.model("deepseek_v3"), lr_gates=0.1, batch_size=8, min_overlap=0.9, save_steps=1)
    stopped = trained(config, tmp_path).stopped
    assert stopped is not None and "routing of harmful prompts left the original" in stopped
