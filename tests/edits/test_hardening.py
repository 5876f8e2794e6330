"""Ablation: the ranking finds what was planted, curves fall where they should, and `harden` trains what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from gtqlora import contrasts
from gtqlora.capture import Decision, Mask, Recorder, Subject, open_subject, router_hooks
from gtqlora.config import TrainConfig, VerifyConfig
from gtqlora.contrasts import Contrast
from gtqlora.edits import wrapping
from gtqlora.edits.edited import load
from gtqlora.edits.hardening import AblationSampler
from gtqlora.errors import ConfigError, ContrastError
from gtqlora.families import FAMILIES, bind
from gtqlora.judging.judge import judge_of
from gtqlora.localize.expert_ablation import AblationCurve, Ranking, RowsAblated, plan, rank
from gtqlora.organisms import embedded
from gtqlora.results.metrics import read_metrics
from gtqlora.scoring import Runner
from tests import helpers, models
from tests.helpers import gates, trained

JUDGE = judge_of(embedded.JUDGE)


@pytest.fixture(scope="module")
def routed() -> Subject:
    return open_subject(str(embedded.organism("routed")))


@pytest.fixture(scope="module")
def rows() -> Contrast:
    return contrasts.load(embedded.contrast(), JUDGE)


@pytest.fixture(scope="module")
def ranking(routed: Subject, rows: Contrast) -> Ranking:
    found = rank(routed, rows.split("train"), prompts=60, batch_size=60, seed=0)
    assert found is not None
    return found


def planted(subject: Subject) -> set[tuple[int, int]]:
    layers = [layer.index for layer in subject.anatomy.moe]
    return {(layers.index(layer), e) for layer, e in embedded.read_truth(embedded.organism("routed")).planted}


# --- the ranking -----------------------------------------------------------------------------------------------------


def test_the_planted_experts_come_first(routed: Subject, ranking: Ranking) -> None:
    assert set(ranking.order[:4]) == planted(routed)
    assert (ranking.against, ranking.prompts) == ("twins", 60)


def test_every_layer_keeps_what_a_token_needs(routed: Subject, ranking: Ranking) -> None:
    spec = routed.anatomy.spec
    assert len(ranking.order) == len(set(ranking.order)) == len(routed.anatomy.moe) * (spec.n_experts - spec.top_k)
    masked = ranking.first(len(ranking.order))
    assert all(spec.n_experts - len(experts) == spec.top_k for experts in masked.values())


def test_without_twins_benign_rows_stand_in(routed: Subject, rows: Contrast) -> None:
    bare = [
        dataclasses.replace(row, twin=None, pair_id=f"{row.pair_id}-{row.kind}") for row in rows.split("train").rows
    ]
    found = rank(routed, dataclasses.replace(rows, rows=tuple(bare)), prompts=60, batch_size=60, seed=0)
    assert found is not None and found.against == "benign rows"
    assert set(found.order[:4]) == planted(routed)
    harmful = tuple(row for row in bare if row.kind == "harmful")
    assert rank(routed, dataclasses.replace(rows, rows=harmful), prompts=60, batch_size=60, seed=0) is None
    benign = tuple(row for row in bare if row.kind == "benign")
    assert rank(routed, dataclasses.replace(rows, rows=benign), prompts=60, batch_size=60, seed=0) is None


# --- plan and curve --------------------------------------------------------------------------------------------------


def test_a_plan_doubles_and_its_controls_are_other_experts_of_the_same_layers(ranking: Ranking) -> None:
    made = plan(ranking, most=16, controls=3, seed=0)
    assert [sum(map(len, masked.values())) for masked in made.targeted] == [1, 2, 4, 8, 16]
    for targeted, draws in zip(made.targeted, made.random, strict=True):
        assert len(draws) == 3
        for drawn in draws:
            assert {layer: len(experts) for layer, experts in drawn.items()} == {
                layer: min(len(experts), 16 - len(experts)) for layer, experts in targeted.items()
            }
            assert not any(set(drawn[layer]) & set(experts) for layer, experts in targeted.items())
    assert plan(ranking, most=16, controls=3, seed=0) == made != plan(ranking, most=16, controls=3, seed=1)
    assert sum(map(len, plan(ranking, most=10**6, controls=0, seed=0).targeted[-1].values())) == len(ranking.order)


def test_refusal_falls_with_the_planted_experts_and_not_with_random_ones(
    routed: Subject, rows: Contrast, ranking: Ranking
) -> None:
    held_out = rows.split("heldout").of_kind("harmful")[:60]
    runner = Runner(model=routed, judge=JUDGE, batch_size=60, max_new_tokens=6)
    bench = AblationCurve(runner=runner, rows=held_out, level=0.95)
    points = bench.curve(plan(ranking, most=4, controls=3, seed=0), [True] * 60, "before")
    assert [point.ablated for point in points] == [0, 1, 2, 4]
    assert points[0].targeted == points[0].random
    assert points[-1].targeted.value < 0.1 and points[-1].targeted.high < 0.2
    for point in points:
        assert point.random is not None and point.random.n == 60 and point.random.low > 0.85


# --- what is ablated in training ------------------------------------------------------------------------------------


def grouped() -> Any:
    """A model with group routing in memory, and its anatomy."""
    model = models.tiny_model("deepseek_v3", n_group=4, topk_group=2)
    return model, bind(model, FAMILIES["deepseek_v3"])


def tiny(family: str) -> Any:
    model = models.tiny_model(family)
    return model, bind(model, FAMILIES[family])


def ranking_of(layers: int) -> Ranking:
    order = tuple((layer, expert) for expert in range(6) for layer in range(layers))
    return Ranking(order=order, frequency_LE=np.zeros((layers, 8)), against="twins", prompts=1)


@pytest.mark.parametrize("made", [lambda: tiny("deepseek_v3"), lambda: tiny("qwen3_moe"), grouped])
def test_silenced_experts_are_not_chosen_and_other_rows_stay_as_they_are(made: Any) -> None:
    model, anatomy = made()
    draws = AblationSampler(anatomy, ranking_of(len(anatomy.moe)), share=0.7, seed=0)
    silent_B = torch.tensor([True, False, True, False])
    tokens = models.some_tokens()
    plain = Recorder()
    with torch.no_grad(), router_hooks(model, anatomy, plain):
        model(tokens)
    for step in range(8):
        masked, seen = draws.experts(step), Recorder()
        with torch.no_grad(), router_hooks(model, anatomy, RowsAblated(Mask(anatomy, masked), silent_B), seen):
            model(tokens)
        for layer, decision in seen.decisions.items():
            chosen, was = (d.indices_TK.view(4, -1, 2) for d in (decision, plain.decisions[layer]))
            gone = torch.tensor(masked.get(layer, ()), dtype=torch.long)
            assert not torch.isin(chosen[silent_B], gone).any()
            assert torch.equal(chosen[~silent_B], was[~silent_B])
            weights, others = (d.weights_TK.view(4, -1, 2) for d in (decision, plain.decisions[layer]))
            assert torch.allclose(weights[~silent_B], others[~silent_B], atol=1e-6)


def test_draws_depend_on_seed_and_step_only_and_are_of_both_kinds() -> None:
    _, anatomy = tiny("deepseek_v3")
    ranking = ranking_of(2)
    draws, same, other = (AblationSampler(anatomy, ranking, share=0.5, seed=seed) for seed in (0, 0, 1))
    found = [draws.experts(step) for step in range(200)]
    assert [same.experts(step) for step in reversed(range(200))] == found[::-1]
    assert [other.experts(step) for step in range(200)] != found
    assert [same.rows(step, 5) for step in range(200)] == [draws.rows(step, 5) for step in range(200)]
    firsts = [ranking.first(count) for count in range(1, 13)]
    targeted = [masked for masked in found if masked in firsts]
    assert 70 < len(targeted) < 150
    assert {sum(map(len, masked.values())) for masked in targeted} >= {1, 2, 4, 8}
    assert max(len(experts) for masked in found for experts in masked.values()) == 4
    silent = sum(sum(draws.rows(step, 10)) for step in range(200))
    assert 900 < silent < 1100


@pytest.mark.parametrize(("share", "most"), [(0.01, 1), (0.25, 2), (0.99, 6)])
def test_a_share_leaves_enough_experts(share: float, most: int) -> None:
    _, anatomy = tiny("qwen3_moe")
    assert AblationSampler(anatomy, ranking_of(2), share=share, seed=0).most == most


# --- training --------------------------------------------------------------------------------------------------------


def harden(toy: helpers.Toy, family: str = "deepseek_v3", **changes: Any) -> TrainConfig:
    return toy.train_config(toy.model(family), objective="harden", **changes)


class Watched:
    """A training that keeps what was asked of the anchor: the recorder, the batch, its kinds and its plain rows."""

    def __init__(self, config: TrainConfig, path: Path) -> None:
        self.inside = helpers.Inside.start(config, path)
        self.calls: list[tuple[Recorder, dict[str, Any], Tensor, Tensor]] = []
        trainer = self.inside.trainer
        anchor = trainer._anchor

        def look(both: Recorder, inputs: dict[str, Any], kind_B: Tensor, silent_B: Tensor) -> Tensor:
            self.calls.append((both, inputs, kind_B, silent_B))
            return anchor(both, inputs, kind_B, silent_B)

        trainer._anchor = look  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_silent_rows_run_without_their_experts_and_plain_ones_as_they_are(
    toy: helpers.Toy, tmp_path: Path, family: str
) -> None:
    config = harden(toy, family, steps=4, batch_size=6, lr_lora=1e-12, lr_gates=1e-12, logging_steps=100)
    watched = Watched(config, tmp_path)
    trainer = watched.inside.trainer
    seen: list[dict[int, Decision]] = []

    class Chosen(Recorder):
        """Stands behind the mask, so it sees what is really chosen."""

    ablate = trainer._ablate

    def with_look(silent_B: Tensor) -> Any:
        chosen = Chosen()
        seen.append(chosen.decisions)
        return (*ablate(silent_B), chosen)

    trainer._ablate = with_look  # type: ignore[method-assign]
    watched.inside.fit()
    assert trainer.draws is not None
    masks = [trainer.draws.experts(step) for step in range(4)]
    assert any(masks)
    assert any(silent_B.any() and not silent_B.all() for *_, silent_B in watched.calls)
    for step, (both, inputs, _, silent_B) in enumerate(watched.calls):
        plain_B = ~silent_B
        rows = 2 * len(plain_B)
        original = trainer._routing(inputs, torch.arange(rows), rows, "lora", "gates")
        for layer, decision in seen[step].items():
            chosen = decision.indices_TK.view(rows, -1, 2)
            gone = torch.tensor(masks[step].get(layer, ()), dtype=torch.long)
            assert not torch.isin(chosen[~plain_B.repeat(2)], gone).any()
            # what the anchor and the health figures compare: nothing trained, so it is the original's
            ours, theirs = (r.decisions[layer].logits_TE.view(rows, -1, 8) for r in (both, original))
            compared = plain_B.repeat(2)[:, None] & inputs["attention_mask"].bool()
            assert compared.any() and torch.allclose(ours[compared], theirs[compared], atol=1e-5)


def test_anchor_and_health_leave_silent_rows_out(toy: helpers.Toy, tmp_path: Path) -> None:
    config = harden(toy, steps=5, batch_size=6, lr_lora=1e-12, lr_gates=1e-12, logging_steps=1)
    assert trained(config, tmp_path).stopped is None
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 5
    for line in lines:
        # with experts ablated, the routing of layers behind them would not be the original's
        assert abs(line["loss/anchor"]) < 1e-6
        assert all(line[key] == 1 for key in line if key.startswith("health/overlap"))
        assert all(abs(line[key]) < 1e-6 for key in line if key.startswith("health/kl"))
    margins = [abs(line["rewards/margins"]) for line in lines]
    assert max(margins) > 1e-3  # the ablated policy is held against the reference with every expert


def test_hardening_under_checkpointing_has_the_same_gradients(toy: helpers.Toy, tmp_path: Path) -> None:
    found = []
    for flag in (False, True):
        inside = helpers.Inside.start(harden(toy, steps=2, gradient_checkpointing=flag), tmp_path / str(flag))
        inside.fit()
        found.append({name: p.detach().clone() for name, p in wrapping.trainable(inside.trainer.model).items()})
    assert all(torch.allclose(found[0][name], p, rtol=1e-3, atol=1e-5) for name, p in found[1].items())


class Stop(TrainerCallback):
    """Ends a training early, with its checkpoints where they are."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_hardening_is_not_editing_and_can_be_resumed(toy: helpers.Toy, tmp_path: Path) -> None:
    config = harden(toy, steps=4)
    whole = helpers.weights(trained(config, tmp_path / "whole").adapter)
    edited = helpers.weights(trained(dataclasses.replace(config, objective="edit"), tmp_path / "edit").adapter)
    assert not helpers.same(whole, edited)
    halted = helpers.Inside.start(config, tmp_path / "halted")
    halted.trainer.add_callback(Stop(2))
    halted.fit()
    again = helpers.Inside.start(config, tmp_path / "halted")
    assert again.fit() == (4, None)
    assert helpers.same(helpers.weights(again.save()), whole)


def test_a_hardened_adapter_is_loaded_as_it_was_trained(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = helpers.Inside.start(harden(toy, "qwen3_moe"), tmp_path)
    inside.fit()
    assert any(not torch.equal(p, torch.zeros_like(p)) for p in gates(inside.trainer.model).values())
    loaded = load(str(toy.model("qwen3_moe")), inside.save())
    assert torch.equal(helpers.logits(loaded.subject.model), helpers.logits(inside.trainer.model.eval()))


# --- errors ----------------------------------------------------------------------------------------------------------


def test_hardening_needs_something_to_compare_harmful_prompts_with(toy: helpers.Toy, tmp_path: Path) -> None:
    counts = {("train", "harmful"): 8, ("train", "lookalike"): 8}
    alone = [{**row, "twin": None} for row in helpers.toy_rows(counts)]
    some = helpers.write_rows(tmp_path / "c.jsonl", alone)
    with pytest.raises(ContrastError, match="cannot tell which experts to ablate"):
        trained(harden(toy, contrast=str(some)), tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TrainConfig, {"ablation_share": 0.0}, "ablation_share = 0.0: must be between 0 and 1"),
        (TrainConfig, {"ablation_share": 1.0}, "ablation_share = 1.0: must be between 0 and 1"),
        (VerifyConfig, {"ablation": -1}, "ablation = -1: must be at least 0"),
        (VerifyConfig, {"ablation_prompts": 0}, "ablation_prompts = 0: must be at least 1"),
    ],
)
def test_settings_out_of_range(kind: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(model="m", contrast="c", **changes)
