"""Projection: a layer is picked by what its removal does, and the adapter says all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gtqlora import adapters
from gtqlora.capture import direction_removed, open_subject
from gtqlora.config import ProjectConfig
from gtqlora.edit import train
from gtqlora.errors import ConfigError, ContrastError, RunError
from gtqlora.organisms import embedded
from gtqlora.project import Projected, project
from gtqlora.run import Run
from gtqlora.verify import verify
from tests import helpers, models


def projected(config: ProjectConfig, path: Path) -> Projected:
    with Run(path) as run:
        return project(config, run)


def test_the_layer_with_the_fewest_lookalike_refusals_is_taken(tmp_path: Path) -> None:
    rows = helpers.toy_rows({("train", kind): 40 for kind in ("benign", "lookalike", "harmful")})
    contrast = helpers.write_rows(tmp_path / "c.jsonl", rows)
    config = ProjectConfig(
        model=str(embedded.organism("residual")), contrast=str(contrast), judge=embedded.JUDGE, max_new_tokens=6
    )
    found = projected(config, tmp_path / "run")
    refusals = {candidate["layer"]: candidate["refusal"] for candidate in found.candidates}
    assert list(refusals) == [1, 2, 3, 4, 5]
    assert refusals[found.layer] == min(refusals.values()) < max(refusals.values())
    info = adapters.read_info(found.adapter)
    assert (info.kind, info.base, info.family) == ("projection", config.model, "deepseek_v3")
    assert (info.details["layer"], info.details["candidates"]) == (found.layer, found.candidates)
    direction_D = adapters.read_direction(found.adapter)
    assert direction_D.shape == (64,) and float(direction_D.norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_loaded_projection_switches_on_and_off(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    model = toy.model(family)
    found = projected(toy.project_config(model, layer=2), tmp_path)
    assert found.layer == 2 and len(found.candidates) == 1
    subject = open_subject(str(model))
    base = helpers.logits(subject.model)
    with direction_removed(subject.model, adapters.read_direction(found.adapter)):
        removed = helpers.logits(subject.model)
    edited = adapters.load(str(model), found.adapter)
    assert not torch.equal(base, removed)
    assert torch.equal(helpers.logits(edited.subject.model), removed)
    with edited.original():
        assert torch.equal(helpers.logits(edited.subject.model), base)
    assert torch.equal(helpers.logits(edited.subject.model), removed)


@pytest.mark.parametrize("layer", [-1, 0, 4])
def test_layers_that_are_not_there_are_refused(toy: helpers.Toy, tmp_path: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match="this model has layers 1 to 3"):
        projected(toy.project_config(toy.model("qwen3_moe"), layer=layer), tmp_path)


def test_no_twins_no_direction(toy: helpers.Toy, tmp_path: Path) -> None:
    rows = helpers.toy_rows({("train", "benign"): 4, ("train", "harmful"): 4})
    contrast = helpers.write_rows(tmp_path / "c.jsonl", rows)
    with pytest.raises(ContrastError, match="lookalike rows with twins"):
        projected(toy.project_config(toy.model("qwen3_moe"), contrast=str(contrast)), tmp_path / "run")


def test_a_direction_of_another_size_is_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    adapters.save_projection(torch.ones(5), tmp_path / "a", adapters.Info("projection", "m", "qwen3_moe", {}))
    with pytest.raises(RunError, match="does not fit the model"):
        adapters.load(str(toy.model("qwen3_moe")), tmp_path / "a")


def test_projection_and_training_do_not_pass_for_each_other(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    with Run(tmp_path) as run:
        trained = train(toy.train_config(model), run)
        project(toy.project_config(model, layer=1), run)
        assert adapters.read_info(tmp_path / "adapter").kind == "projection"
        assert verify(toy.verify_config(model), run).kind == "projection"
        assert train(toy.train_config(model), run) == trained
        assert adapters.read_info(tmp_path / "adapter").kind == "gt-qlora"
        assert verify(toy.verify_config(model), run).kind == "gt-qlora"
