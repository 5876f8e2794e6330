"""Four ranks against one process: what they tell one another, the experts they share, the edits they train."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gtqlora.config import TrainConfig
from gtqlora.results.adapter import Training, read_info
from gtqlora.results.metrics import read_metrics
from gtqlora.run import Run
from tests import helpers, warm
from tests.ranks import checks, machines
from tests.stages.test_resume import steps_seen

CHECKS = [(module, name) for module in (checks, machines) for name in vars(module) if name.startswith("check_")]
CODE = "import sys, importlib\nfrom tests.ranks import checks\n"
CODE += "importlib.import_module(sys.argv[1])\nchecks.run(sys.argv[1], sys.argv[2])"
ROWS = 22
"""Three batches of eight, of which the last has six: two ranks of four have a filler there."""


def _variants(toy: helpers.Toy, contrast: Path) -> dict[str, TrainConfig]:
    """Trainings that differ in what ranks have to do otherwise."""
    fp32, half = toy.model("qwen3_moe"), toy.model("qwen3_moe", torch.bfloat16)
    config = partial(toy.train_config, contrast=str(contrast), batch_size=8)
    return {
        "nf4": config(fp32, expert_format="nf4", accumulation=2, steps=3),
        "gates": config(fp32, mode="gates", lr_gates=None, gate_step=0.03, steps=3),
        "lora": config(half, mode="lora", steps=3),
        "harden": config(fp32, expert_format="nf4", objective="harden", steps=3),
        "guard": config(fp32, expert_format="nf4", steps=2, save_steps=1, lr_gates=0.5, min_overlap=0.9),
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
    models = {"float32": toy.model("qwen3_moe"), "tied": toy.model("qwen3_moe", tie_word_embeddings=True)}
    (folder / "models.json").write_text(json.dumps({name: str(path) for name, path in models.items()}))
    of_one = warm.ranks(CODE, checks.__name__, folder, count=4)
    of_two = warm.ranks(CODE, machines.__name__, folder, count=4, machines=2)
    for ended in (*of_one, *of_two):
        assert ended.returncode == 0, ended.stderr
    return folder


def halfway(done: Path, run: Path) -> None:
    """Make a run that was cut off after the second step."""
    with Run(run):
        shutil.copytree(done / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-2")
        shutil.copyfile(done / "checkpoints" / "metrics.jsonl", run / "checkpoints" / "metrics.jsonl")


@pytest.mark.parametrize(("module", "name"), CHECKS, ids=lambda part: part if isinstance(part, str) else "")
def test_on_every_rank(world: Path, module: ModuleType, name: str) -> None:
    for rank in range(4):
        file = world / checks.SAID.format(module.__name__, rank)
        said = dict(map(json.loads, file.read_text().splitlines()))
        assert said[name] is None, f"rank {rank}: {said[name]}"


# --- the edit is that of one process

FAMILY_OF = {"resumed": "nf4", "sharded": "nf4", "machines": "nf4"}
"""Trainings of the ranks whose twin in one process has another name."""
OF_TRL = {"rewards", "logps", "logits", "entropy", "mean_token_accuracy"}
EXACT, HALF = 1e-3, 0.05
"""How far adapters may be apart, in relation to their size, in fp32 and in bf16, where a tie in a router may fall
otherwise: Adam's first steps go as far for a small gradient as for a large one, and so for what rounding left of it."""


@pytest.mark.parametrize("name", ["nf4", "gates", "lora", "harden", "resumed", "sharded", "machines"])
def test_four_ranks_train_what_one_process_trains(world: Path, name: str) -> None:
    one, four = world / "one" / FAMILY_OF.get(name, name), world / "ranks" / name
    half = name == "lora"
    figures = [read_metrics(run / "metrics.jsonl") for run in (one, four)]
    assert [line["step"] for line in figures[0]] == [line["step"] for line in figures[1]]
    for step, (alone, together) in enumerate(zip(*figures, strict=True)):
        assert alone.keys() == together.keys()
        for key in ("loss", "grad_norm"):
            near = 5e-3 if half else 1e-4 if step else 1e-6
            assert together[key] == pytest.approx(alone[key], rel=near), (step, key)
        named = [key for key in alone if key.split("/")[0] in OF_TRL]
        assert len(named) == 10
        for key in named if step == 0 or not half else ():  # rows that only fill up count for none of them
            assert together[key] == pytest.approx(alone[key], rel=0.02 if half else 2e-3, abs=1e-3), (step, key)
    distance = apart(helpers.weights(four / "adapter"), helpers.weights(one / "adapter"))
    assert distance < (HALF if half else EXACT)
    rates = [_made(run).gate_rates for run in (one, four)]
    assert rates[0] == rates[1] and bool(rates[0]) == (name == "gates")


def test_first_gradients_are_those_of_one_process(world: Path) -> None:
    """Adam's first mean after one step is a tenth of the gradient."""
    kept = Path("checkpoints") / "checkpoint-1" / "optimizer.pt"
    one, four = (torch.load(world / who / "guard" / kept)["state"] for who in ("one", "ranks"))
    assert one.keys() == four.keys()
    assert sum(bool(state["exp_avg"].any()) for state in one.values()) >= len(one) // 2  # of LoRA only B, at first
    for alone, together in zip(one.values(), four.values(), strict=True):
        torch.testing.assert_close(together["exp_avg"], alone["exp_avg"], rtol=1e-4, atol=1e-7)


def test_ranks_stop_where_one_process_does(world: Path) -> None:
    one, four = (_made(world / who / "guard") for who in ("one", "ranks"))
    assert one.steps == four.steps == 1
    assert one.stopped == four.stopped and "routing of harmful prompts left the original at step 2" in str(four.stopped)


def test_ranks_go_on_where_one_process_was_cut_off(world: Path) -> None:
    """The figures before the cut are the one process's, to the last bit."""
    one, resumed = (read_metrics(world / run / "metrics.jsonl") for run in ("one/nf4", "ranks/resumed"))
    whole = read_metrics(world / "ranks" / "nf4" / "metrics.jsonl")
    assert one[:2] == resumed[:2] != whole[:2]
    assert one[2:] != resumed[2:]


def test_one_process_goes_on_where_ranks_were_cut_off(world: Path, tmp_path: Path) -> None:
    for name in ("nf4", "sharded"):
        run = tmp_path / name
        halfway(world / "ranks" / name, run)
        config = TrainConfig(**json.loads((world / "variants.json").read_text())["nf4"])
        assert steps_seen(config, run)[0] == 2
        assert apart(helpers.weights(run / "adapter"), helpers.weights(world / "one" / "nf4" / "adapter")) < EXACT


def test_copies_of_the_run_directory_are_gone(world: Path) -> None:
    assert sorted(path.name for path in (world / "ranks").iterdir()) == [
        *("gates", "guard", "harden", "lora", "machines", "nf4", "resumed", "sharded")
    ]
    assert (world / "ranks" / "nf4" / "checkpoints" / "checkpoint-3" / "rng_state.pth").exists()


def _made(run: Path) -> Training:
    made = read_info(run / "adapter").details
    assert isinstance(made, Training)
    return made


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How far weights are from others, in relation to how large those are."""
    assert found.keys() == expected.keys()
    off = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in found)
    return (off / sum(float(weight.double().square().sum()) for weight in expected.values())) ** 0.5
