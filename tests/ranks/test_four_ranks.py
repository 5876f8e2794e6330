"""Four ranks against one process: what they tell one another, the experts they share, the edits they train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtqlora.config import TrainConfig
from gtqlora.results.adapter import read_info
from gtqlora.results.metrics import read_metrics
from gtqlora.run import Run
from tests import helpers, warm
from tests.ranks import checks

CHECKS = [name for name in vars(checks) if name.startswith("check_")]
CODE = "import sys\nimport tests.ranks.checks as checks\nchecks.run(checks.__name__, sys.argv[1])"
ROWS = 22
"""Three batches of eight, of which the last has six: two ranks of four have a filler there."""


def _variants(toy: helpers.Toy, contrast: Path) -> dict[str, TrainConfig]:
    """Trainings that differ in what ranks have to do otherwise."""
    fp32, half = toy.model("qwen3_moe"), toy.model("qwen3_moe", torch.bfloat16)
    config = partial(toy.train_config, contrast=str(contrast), batch_size=8)
    return {
        "nf4": config(fp32, expert_format="nf4", accumulation=2, steps=4),
        "gates": config(fp32, mode="gates", lr_gates=None, gate_step=0.03, steps=3),
        "lora": config(half, mode="lora", steps=3),
        "harden": config(fp32, expert_format="nf4", objective="harden", steps=3),
        "guard": config(fp32, expert_format="nf4", steps=4, save_steps=1, lr_gates=0.5, min_overlap=0.9),
    }


@pytest.fixture(scope="module")
def world(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one process has trained all variants, and then four ranks have, and run their checks."""
    folder = tmp_path_factory.mktemp("four")
    rows = helpers.toy_rows({("train", "benign"): 8, ("train", "lookalike"): 7, ("train", "harmful"): 7})
    variants = _variants(toy, helpers.write_rows(folder / "pairs.jsonl", rows))
    assert len(rows) == ROWS
    for name, config in variants.items():
        helpers.trained(config, folder / "one" / name)
    halfway(folder / "one" / "nf4", folder / "ranks" / "resumed")
    variants["resumed"] = variants["nf4"]
    settings = {name: asdict(config) for name, config in variants.items()}
    (folder / "variants.json").write_text(json.dumps(settings))
    (folder / "models.json").write_text(json.dumps({"float32": str(toy.model("qwen3_moe"))}))
    for ended in warm.ranks(CODE, folder, count=4):
        assert ended.returncode == 0, ended.stderr
    return folder


def halfway(done: Path, run: Path) -> None:
    """Make a run that was cut off after the second step."""
    with Run(run):
        shutil.copytree(done / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-2")
        shutil.copyfile(done / "checkpoints" / "metrics.jsonl", run / "checkpoints" / "metrics.jsonl")


@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(world: Path, name: str) -> None:
    for rank in range(4):
        said = dict(map(json.loads, (world / checks.SAID.format(rank)).read_text().splitlines()))
        assert said[name] is None, f"rank {rank}: {said[name]}"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far weights are from others, in relation to how large those are."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in found]
    square: Callable[[Tensor], float] = lambda tensor: float(tensor.square().sum())  # noqa: E731
    return (sum(square(a - b) for a, b in pairs) / sum(square(b) for _, b in pairs)) ** 0.5


def test_probe(world: Path) -> None:
    for name in ("nf4", "gates", "lora", "harden", "guard", "resumed", "sharded"):
        one, four = world / "one" / (name if (world / "one" / name).exists() else "nf4"), world / "ranks" / name
        print(name, losses(one), losses(four), apart(helpers.weights(four / "adapter"), helpers.weights(one / "adapter")), read_info(four/"adapter").details.stopped, read_info(one/"adapter").details.stopped, read_info(four/"adapter").details.gate_rates, read_info(one/"adapter").details.gate_rates)
        print([ (a.get("grad_norm"), b.get("grad_norm")) for a,b in zip(read_metrics(one/"metrics.jsonl"), read_metrics(four/"metrics.jsonl"))])
    assert 0
