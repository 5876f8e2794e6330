"""Projection: a direction and a layer, picked by what its removal does; the adapter says all of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gtqlora.capture import open_subject
from gtqlora.config import ProjectConfig
from gtqlora.edits import adapters, merging
from gtqlora.edits.edited import load, removal
from gtqlora.errors import ConfigError, ContrastError, RunError
from gtqlora.localize.directions.named import FALSE_REFUSAL, ORTHOGONAL, REFUSAL
from gtqlora.organisms import embedded
from gtqlora.results import adapter as adapter_files
from gtqlora.run import Run
from gtqlora.stages.export import export
from gtqlora.stages.project import Projected, project
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify
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
    refusals = {candidate.layer: candidate.refusal for candidate in found.candidates}
    assert list(refusals) == [1, 2, 3, 4, 5]
    assert refusals[found.layer] == min(refusals.values()) < max(refusals.values())
    info = adapter_files.read_info(found.adapter)
    assert (info.kind, info.base, info.family) == ("projection", config.model, "deepseek_v3")
    assert isinstance(info.details, adapter_files.Projection)
    assert (info.details.layer, info.details.candidates) == (found.layer, found.candidates)
    direction_D = adapters.read_adapter(found.adapter).direction_D
    assert direction_D.shape == (64,) and float(direction_D.norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", models.CORE)
def test_loaded_projection_switches_on_and_off(toy: helpers.Toy, tmp_path: Path, family: str, keep: bool) -> None:
    model = toy.model(family)
    found = projected(toy.project_config(model, layer=2, norm_preserving=keep), tmp_path)
    assert found.layer == 2 and len(found.candidates) == 1
    subject = open_subject(str(model))
    base = helpers.logits(subject.model)
    with removal(subject, adapters.read_adapter(found.adapter).direction_D, norm_preserving=keep):
        removed = helpers.logits(subject.model)
    edited = load(str(model), found.adapter)
    assert not torch.equal(base, removed)
    assert torch.equal(helpers.logits(edited.subject.model), removed)
    with edited.original():
        assert torch.equal(helpers.logits(edited.subject.model), base)
    assert torch.equal(helpers.logits(edited.subject.model), removed)


@pytest.mark.parametrize("direction", [FALSE_REFUSAL, ORTHOGONAL])
def test_a_direction_is_chosen_by_name(toy: helpers.Toy, tmp_path: Path, direction: str) -> None:
    config = toy.project_config(toy.model("qwen3_moe"), layer=2)
    vectors = {}
    for name in (REFUSAL, FALSE_REFUSAL, direction):
        found = projected(replace(config, direction=name), tmp_path / name)
        vectors[name] = adapters.read_adapter(found.adapter).direction_D
        assert adapter_files.read_info(found.adapter).config["direction"] == name
        assert float(vectors[name].norm()) == pytest.approx(1, rel=1e-5)
    assert len({tuple(vector.tolist()) for vector in vectors.values()}) == len(vectors)


# --- columns that keep their lengths


@pytest.mark.parametrize("family", models.FAMILIES)
def test_columns_keep_their_lengths_and_write_nothing_along_the_direction(toy: helpers.Toy, family: str) -> None:
    subject = open_subject(str(toy.model(family)))
    before = {name: weight.clone() for name, weight in subject.model.state_dict().items()}
    direction_D = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    r_D = direction_D / direction_D.norm()
    with removal(subject, direction_D, norm_preserving=True), torch.no_grad():
        after = {name: weight.clone() for name, weight in subject.model.state_dict().items()}
        states = subject.model(models.some_tokens(), output_hidden_states=True).hidden_states
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    writers = ("embed_tokens.weight", "o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
    assert changed == {name for name in before if name.endswith(writers)}
    for name in changed:
        was, now = (w.mT if "embed_tokens" in name else w for w in (before[name], after[name]))
        torch.testing.assert_close(now.norm(dim=-2), was.norm(dim=-2))
        assert (r_D @ now).abs().max() < 1e-5
        # turned away from r and no other way: along what was left of it
        left = was - r_D[:, None] * (r_D @ was)[..., None, :]
        lengths = (w.norm(dim=-2, keepdim=True) for w in (left, now))
        torch.testing.assert_close(now * next(lengths), left * next(lengths))
    assert all((state @ r_D).abs().max() < 1e-4 for state in states[:-1])  # the last one has passed the final norm
    assert all(torch.equal(weight, before[name]) for name, weight in subject.model.state_dict().items())


def test_a_column_along_the_direction_is_gone() -> None:
    r_D = torch.nn.functional.normalize(torch.arange(1.0, 6.0), dim=0)
    weight_DI = torch.stack([2 * r_D, torch.eye(5)[0]], dim=1)
    found = merging.projected(weight_DI, r_D, norm_preserving=True)
    assert not found[:, 0].any() and float(found[:, 1].norm()) == pytest.approx(1)


def test_frozen_experts_are_not_rescaled(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    with pytest.raises(ConfigError, match="nf4 experts are frozen; set expert_format = 'bf16'"):
        toy.project_config(model, norm_preserving=True, expert_format="nf4")
    found = projected(toy.project_config(model, norm_preserving=True, layer=1), tmp_path)
    with pytest.raises(RunError, match="load them with expert_format = 'bf16'"):
        load(str(model), found.adapter, expert_format="nf4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", models.CORE)
def test_rescaled_columns_ship_as_they_were_verified(
    toy: helpers.Toy, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """To the bit: what runs and what is written come from the checkpoint's weights by the same steps."""
    model = toy.model(family, dtype)
    with Run(tmp_path / "run") as run:
        for layer in (1, 2, 3):
            project(toy.project_config(model, layer=layer, norm_preserving=True), run)
            if verify(toy.verify_config(model), run).floor.verdict == "pass":
                break
        export(run, tmp_path / "out", judge=helpers.JUDGE)
    edited = load(str(model), tmp_path / "run" / "adapter").subject.model
    written = open_subject(str(tmp_path / "out")).model
    assert helpers.same(edited.state_dict(), written.state_dict())
    assert torch.equal(helpers.logits(edited), helpers.logits(written))


# --- what is refused


@pytest.mark.parametrize("layer", [-1, 0, 4])
def test_layers_that_are_not_there_are_refused(toy: helpers.Toy, tmp_path: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match="this model has layers 1 to 3"):
        projected(toy.project_config(toy.model("qwen3_moe"), layer=layer), tmp_path)


def test_no_twins_no_direction(toy: helpers.Toy, tmp_path: Path) -> None:
    rows = helpers.toy_rows({("train", "benign"): 4, ("train", "harmful"): 4})
    contrast = helpers.write_rows(tmp_path / "c.jsonl", rows)
    with pytest.raises(ContrastError, match="lookalike rows with twins"):
        projected(toy.project_config(toy.model("qwen3_moe"), contrast=str(contrast)), tmp_path / "run")


def test_the_orthogonalized_direction_needs_harmful_twins(toy: helpers.Toy, tmp_path: Path) -> None:
    rows = helpers.toy_rows({("train", kind): 8 for kind in ("benign", "lookalike", "harmful")})
    for row in rows:
        if row["kind"] == "harmful":
            row.update(twin=None, pair_id=f"alone {row['pair_id']}")
    contrast = helpers.write_rows(tmp_path / "c.jsonl", rows)
    config = toy.project_config(toy.model("qwen3_moe"), contrast=str(contrast), layer=1)
    with pytest.raises(ContrastError, match="false_refusal_orthogonal needs harmful rows with twins in split 'train'"):
        projected(replace(config, direction=ORTHOGONAL), tmp_path / "run")
    assert projected(replace(config, direction=FALSE_REFUSAL), tmp_path / "run").layer == 1


def test_a_direction_of_another_size_is_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    info = adapter_files.Info("projection", "m", "qwen3_moe", adapter_files.Projection())
    adapters.save_projection(torch.ones(5), tmp_path / "a", info)
    with pytest.raises(RunError, match="does not fit the model"):
        load(str(toy.model("qwen3_moe")), tmp_path / "a")


def test_projection_and_training_do_not_pass_for_each_other(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    with Run(tmp_path) as run:
        trained = train(toy.train_config(model), run)
        project(toy.project_config(model, layer=1), run)
        assert adapter_files.read_info(tmp_path / "adapter").kind == "projection"
        assert verify(toy.verify_config(model), run).kind == "projection"
        assert train(toy.train_config(model), run) == trained
        assert adapter_files.read_info(tmp_path / "adapter").kind == "gt-qlora"
        assert verify(toy.verify_config(model), run).kind == "gt-qlora"
