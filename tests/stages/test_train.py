"""Training: exact reference, anchor, health, guard, resume; every claim on real runs of tiny models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from gtqlora.capture import Decision, Recorder, router_hooks
from gtqlora.config import TrainConfig
from gtqlora.contrasts import ALL_KINDS, KINDS
from gtqlora.edits import reference
from gtqlora.edits.head import completions_only
from gtqlora.edits.reference import Batch, ReferenceTrainer
from gtqlora.edits.trainer import Health
from gtqlora.edits.wrapping import trainable
from gtqlora.errors import TrainingError
from gtqlora.organisms import embedded
from gtqlora.results.metrics import read_metrics
from gtqlora.routing import divergence_T
from gtqlora.stages import train as train_stage
from tests import helpers, models
from tests.helpers import gates, trained

every_family = pytest.mark.parametrize("family", models.CORE)


class Watch(TrainerCallback):
    """Calls back with the step number and the model before every optimizer step."""

    def __init__(self, look: Callable[[int, Any], None]) -> None:
        self.look = look

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.look(state.global_step, model)


# --- the reference ---------------------------------------------------------------------------------------------------


def test_edits_of_one_model_on_the_same_rows_share_a_reference_and_those_of_another_do_not(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, once = list[int](), ReferenceTrainer.compute_ref_log_probs

    def counted(self: ReferenceTrainer, model: Any, inputs: Batch) -> tuple[Tensor, Tensor]:
        passes[-1] += 1
        return once(self, model, inputs)

    monkeypatch.setattr(ReferenceTrainer, "compute_ref_log_probs", counted)
    monkeypatch.setattr(reference, "_LAST", {})
    edits = list[dict[str, Tensor]]()
    for name, family, mode in [
        ("first", "qwen3_moe", "gt"),
        ("as the first", "qwen3_moe", "lora"),
        ("another model", "kimi_k25", "lora"),
        ("by itself", "qwen3_moe", "lora"),
    ]:
        passes.append(0)
        config = toy.train_config(toy.model(family), mode=mode, steps=1)
        edits.append(helpers.weights(trained(config, tmp_path / name).adapter))
    assert passes[0] == passes[2] == passes[3] > passes[1] == 2  # one batch is computed again to hold it against
    assert helpers.same(edits[1], edits[3])


@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_moe"])
def test_a_tampered_start_is_no_reference(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    trainer = helpers.Inside.start(toy.train_config(toy.model(family)), tmp_path).trainer  # asserts once itself
    gate = next(iter(gates(trainer.model).values()))
    kept = gate.data.clone()
    gate.data += 0.01
    with pytest.raises(TrainingError, match="step-0 margin"):
        trainer.assert_exact_reference()
    gate.data = kept
    trainer.assert_exact_reference()
    frozen = trainer.model.get_parameter("base_model.model.lm_head.weight")
    frozen.data *= 1.01  # policy and reference still agree, but the stored log-probs are another model's
    with pytest.raises(TrainingError, match="precomputed"):
        trainer.assert_exact_reference()


def _drops(module: Any, _inputs: object, output: Tensor) -> Tensor:
    return torch.nn.functional.dropout(output, 0.1, training=module.training)


def test_what_is_random_in_training_is_found_before_it(toy: helpers.Toy, tmp_path: Path) -> None:
    trainer = helpers.Inside.start(toy.train_config(toy.model("qwen3_moe")), tmp_path).trainer
    attention = [module for module in trainer.model.modules() if hasattr(module, "attention_dropout")]
    assert attention
    for module in attention:
        module.attention_dropout = 0.2
    trainer.model.config.attention_dropout = 0.2
    with pytest.raises(TrainingError, match=r"at random. Set attention_dropout to 0"):
        trainer.assert_exact_reference()
    for module in attention:
        module.attention_dropout = 0.0
    trainer.assert_exact_reference()
    with trainer.model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(_drops):
        trainer.model.eval()  # the check has to look in training mode by itself
        with pytest.raises(TrainingError, match="at random"):
            trainer.assert_exact_reference()


@every_family
def test_margins_start_at_zero_and_then_move(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    path = tmp_path / "run"
    assert trained(toy.train_config(toy.model(family)), path).stopped is None
    lines = read_metrics(path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    first, *later = (line["rewards/margins"] for line in lines)
    assert abs(first) < 1e-5
    # Each is of another batch, so that any one may come near zero: qwen3_moe's third is 2e-4 with AVX-512, and 9e-5
    # on a CPU without AVX2 (ATEN_CPU_CAPABILITY=default), whatever the versions.
    assert all(margin != 0 for margin in later) and max(map(abs, later)) > 1e-3


def test_same_seed_same_adapter_other_seed_another(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(toy.model("deepseek_v3"))
    found = [helpers.weights(trained(config, tmp_path / name).adapter) for name in ("a", "b")]
    other = toy.train_config(toy.model("deepseek_v3"), seed=1)
    assert helpers.same(*found)
    assert not helpers.same(found[0], helpers.weights(trained(other, tmp_path / "c").adapter))


# --- anchor ----------------------------------------------------------------------------------------------------------


def anchor_of(inside: helpers.Inside, kinds: list[str]) -> tuple[float, Tensor | None]:
    """The anchor of one batch with these kinds, and its gradient on the first gate."""
    trainer = inside.trainer
    rows = [trainer.train_dataset[i] for i in range(len(kinds))]
    batch = trainer.data_collator(rows)
    batch["kind"] = torch.tensor([ALL_KINDS.index(kind) for kind in kinds])
    trainer._whole = trainer._whole_of([batch])
    kind_B, anchored = batch.pop("kind"), trainer._whole.sums.anchored
    both = Recorder()
    with router_hooks(trainer.model, trainer.anatomy, both):
        trainer.model(**{name: part for name, part in batch.items() if name != "completion_mask"}, use_cache=False)
    value = trainer._anchor(both, batch, kind_B, None) / max(anchored, 1.0)
    gate = next(iter(gates(trainer.model).values()))
    gradient = torch.autograd.grad(value, gate, allow_unused=True)[0] if value.requires_grad else None
    return float(value.detach()), gradient


def test_anchor_is_zero_at_the_start_and_weighs_by_kind(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(
        toy.model("deepseek_v3"), anchor_harmful=2.0, anchor_benign=0.5, logging_steps=1000, batch_size=4
    )
    inside = helpers.Inside.start(config, tmp_path)
    assert abs(anchor_of(inside, ["harmful"] * 4)[0]) < 1e-6
    for gate in gates(inside.trainer.model).values():
        gate.data += 0.3 * torch.randn(gate.shape, generator=torch.Generator().manual_seed(0))
    harmful, gradient = anchor_of(inside, ["harmful"] * 4)
    benign, _ = anchor_of(inside, ["benign"] * 4)
    assert harmful > 0.01
    assert harmful == pytest.approx(4 * benign, rel=1e-4)  # same tokens, weights 2.0 and 0.5
    assert anchor_of(inside, ["lookalike"] * 4) == (0.0, None)
    assert anchor_of(inside, ["instructed"] * 4)[0] == harmful  # a user's own refusals are kept alike
    assert gradient is not None and gradient.abs().max() > 1e-4
    # By hand: the mean over anchored tokens and layers, so unanchored rows dilute nothing.
    one, _ = anchor_of(inside, ["harmful", "lookalike", "lookalike", "lookalike"])
    kinds = [["harmful" if i == j else "lookalike" for j in range(4)] for i in range(4)]
    four = [anchor_of(inside, each)[0] for each in kinds]
    assert one == pytest.approx(four[0])
    assert harmful == pytest.approx(sum(four) / 4, rel=1e-3)  # toy prompts have equal lengths


@pytest.mark.parametrize(("weight", "extra"), [(0.0, 2), (1.0, 7)])
def test_without_anchor_other_passes_are_for_logging_steps_only(
    toy: helpers.Toy, tmp_path: Path, weight: float, extra: int
) -> None:
    config = toy.train_config(
        toy.model("qwen3_moe"), anchor_harmful=weight, anchor_benign=weight, logging_steps=4, batch_size=12
    )
    inside = helpers.Inside.start(config, tmp_path)
    calls: list[int] = []
    inside.trainer.model.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))
    inside.fit()
    assert len(calls) == 4 + extra


@pytest.mark.parametrize("change", [{"logging_steps": 3}, {"save_steps": 3}, {"gradient_checkpointing": True}])
def test_settings_that_are_no_part_of_the_result_change_no_bit(
    toy: helpers.Toy, tmp_path: Path, change: dict[str, Any]
) -> None:
    model = toy.model("deepseek_v3")  # in which one other rounding grows to 1e-2 within these steps
    found = [trained(toy.train_config(model, steps=6, **c), tmp_path / str(len(c))).adapter for c in ({}, change)]
    assert helpers.same(*map(helpers.weights, found))
    assert change.keys() <= train_stage.ASIDE


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(config: TrainConfig, path: Path) -> dict[str, Tensor]:
    """Of the second optimizer step: at the first one LoRA's A has none."""
    found: dict[str, Tensor] = {}
    inside = helpers.Inside.start(config, path)

    def look(step: int, model: Any) -> None:
        if step == 1:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    inside.trainer.add_callback(Watch(look))
    inside.fit()
    return found


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(tensor, second[name], rtol=1e-3, atol=1e-5) for name, tensor in first.items()
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_gradient_checkpointing_changes_nothing(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    base = {"steps": 2, "lr_lora": 1e-3, "lr_gates": 1e-3, "anchor_harmful": 5.0, "anchor_benign": 5.0}
    plain, saving = (
        gradients(toy.train_config(toy.model(family), gradient_checkpointing=flag, **base), tmp_path / str(flag))
        for flag in (False, True)
    )
    assert all(tensor.abs().max() > 0 for tensor in plain.values())
    assert close(plain, saving)


def test_anchor_reaches_the_gates_under_checkpointing(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = helpers.Inside.start(toy.train_config(toy.model("deepseek_v3"), logging_steps=1000), tmp_path)
    for gate in gates(inside.trainer.model).values():
        gate.data += 0.3 * torch.randn(gate.shape, generator=torch.Generator().manual_seed(0))
    inside.trainer.model.train()
    _, plain = anchor_of(inside, ["harmful"] * 4)
    inside.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert inside.trainer.model.get_base_model().model.gradient_checkpointing
    _, saving = anchor_of(inside, ["harmful"] * 4)
    assert plain is not None and saving is not None and saving.abs().max() > 1e-3
    assert torch.allclose(plain, saving, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def uneven(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 pairs of unequal lengths, four of them held to the original's routing: many parts of a batch have none."""
    rows = helpers.toy_rows({("train", "lookalike"): 10, ("train", "benign"): 2, ("train", "harmful"): 2})
    for i, row in enumerate(rows):
        row["prompt"] = " ".join([row["prompt"], *row["prompt"].split()[: 3 * i % 7]])
        row["chosen"] = row["chosen"] if row["kind"] == "harmful" else " ".join([row["chosen"]] * (1 + i % 3))
        row.pop("twin", None)
    return helpers.write_rows(tmp_path_factory.mktemp("uneven") / "pairs.jsonl", rows)


class Cut:
    """Gradients and logged lines of a short training whose batches come in parts, away from the original model."""

    def __init__(self, config: TrainConfig, path: Path) -> None:
        self.steps: list[dict[str, Tensor]] = []
        inside = helpers.Inside.start(config, path)
        generator = torch.Generator().manual_seed(0)
        for p in trainable(inside.trainer.model).values():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
        inside.trainer.add_callback(Watch(self._look))
        inside.fit()
        self.lines = read_metrics(inside.metrics)

    def _look(self, _step: int, model: Any) -> None:
        self.steps.append({n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad})

    def furthest(self, other: Cut) -> float:
        """The largest difference of a tensor's gradient, in parts of its length, in any step."""
        pairs = [(mine[n], theirs[n]) for mine, theirs in zip(self.steps, other.steps, strict=True) for n in mine]
        return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


@pytest.mark.parametrize(("objective", "checkpointing"), [("edit", False), ("harden", True)])
def test_a_batch_is_the_same_in_any_number_of_parts(
    toy: helpers.Toy, uneven: Path, tmp_path: Path, objective: str, checkpointing: bool
) -> None:
    """Steps 2 and 4 end an epoch: their batch has 6 rows, so parts of 4 are unequal."""
    base = {"contrast": str(uneven), "judge": embedded.JUDGE, "steps": 4, "max_grad_norm": 1e6}
    base |= {"lr_lora": 1e-12, "lr_gates": 1e-12, "min_overlap": 0.0, "anchor_harmful": 30.0}
    base |= {"objective": objective, "gradient_checkpointing": checkpointing}
    whole, *cuts = (
        Cut(toy.train_config(toy.model("deepseek_v3"), batch_size=8 // n, accumulation=n, **base), tmp_path / str(n))
        for n in (1, 2, 4, 8)
    )
    assert all(g.abs().max() > 0 for step in whole.steps for g in step.values())
    assert max(line["loss/anchor"] for line in whole.lines) > 1e-2
    for cut in cuts:
        assert cut.furthest(whole) < 5e-6
        for key in ("loss", "loss/anchor", "health/load_cv", "health/max_vio", "health/load_entropy"):
            figures = [line.get(key) for line in cut.lines]
            assert figures == pytest.approx([line.get(key) for line in whole.lines], rel=1e-3, abs=1e-7), key


# --- health ----------------------------------------------------------------------------------------------------------

HEALTH = {"load_cv", "load_cv_original", "max_vio", "load_entropy", "logits_by_gates", "logits_by_lora"}
HEALTH |= {f"{what}_{kind}" for what in ("overlap", "kl") for kind in KINDS}


def test_health_stands_in_every_line(toy: helpers.Toy, tmp_path: Path) -> None:
    config = toy.train_config(
        toy.model("deepseek_v3"), steps=6, logging_steps=2, batch_size=16, dead_budget=300, lr_gates=0.1
    )
    trained(config, tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {f"health/{name}" for name in HEALTH} <= line.keys()
        assert all(math.isfinite(value) for value in line.values())
    # Measured in the very step of the line: after one update the routing has left the original a little.
    assert lines[0]["health/kl_harmful"] > 1e-4
    assert lines[0]["health/kl_harmful"] < lines[-1]["health/kl_harmful"]
    assert [("health/dead_experts" in line) for line in lines] == [False, True, True]


def test_health_of_a_case_counted_by_hand(toy: helpers.Toy, tmp_path: Path) -> None:
    anatomy = helpers.Inside.start(toy.train_config(toy.model("deepseek_v3")), tmp_path).trainer.anatomy
    # Two rows (benign, harmful) of two tokens; the last token of the first row is padding. 8 experts, top-2, 2 layers.
    mask_BS, kind_B = torch.tensor([[1, 0], [1, 1]]), torch.tensor([0, 2])
    old_TK = torch.tensor([[0, 1], [7, 7], [0, 1], [0, 1]])
    new_TK = torch.tensor([[0, 1], [5, 6], [0, 2], [2, 3]])

    def recorder(indices_TK: Tensor, step: float) -> Recorder:
        made = Recorder()
        logits_TE = (step * torch.arange(8.0)).expand(4, 8)
        made.decisions = {layer: Decision(logits_TE, torch.ones(4, 2), indices_TK) for layer in (0, 1)}
        return made

    health = Health(anatomy, dead_budget=6)
    health.add(recorder(new_TK, 1.0), recorder(old_TK, 0.5), recorder(old_TK, 0.75), mask_BS, kind_B)
    found = health.figures()
    # New loads of real tokens: 2, 1, 2, 1, 0, 0, 0, 0 (mean 6/8); old loads: 3, 3, 0, ...
    assert found["health/max_vio"] == pytest.approx((2 - 0.75) / 0.75)
    assert found["health/load_cv"] == pytest.approx(math.sqrt(10 / 8 - 0.75**2) / 0.75)
    assert found["health/load_cv_original"] == pytest.approx(math.sqrt(18 / 8 - 0.75**2) / 0.75)
    shares = [2 / 6, 1 / 6, 2 / 6, 1 / 6]
    assert found["health/load_entropy"] == pytest.approx(-sum(s * math.log(s) for s in shares) / math.log(8))
    assert found["health/overlap_benign"] == 1.0
    assert found["health/overlap_harmful"] == pytest.approx((0.5 + 0.0) / 2)
    assert found["health/overlap_harmful_worst"] == pytest.approx((0.5 + 0.0) / 2)  # both layers are alike
    # by hand in tests/test_routing.py; here, that it is the mean over tokens and layers
    one = divergence_T(0.5 * torch.arange(8.0)[None], torch.arange(8.0)[None], anatomy.spec).item()
    assert found["health/kl_harmful"] == pytest.approx(one, rel=1e-5) and one > 0.01
    # A router of 8 experts whose logits are 0, s, 2s ... : log scores less their mean, by hand for both parts.
    logs = {step: torch.tensor([-math.log1p(math.exp(-step * e)) for e in range(8)]) for step in (0.5, 0.75, 1.0)}
    logs = {step: values - values.mean() for step, values in logs.items()}
    assert found["health/logits_by_gates"] == pytest.approx(float((logs[1.0] - logs[0.75]).square().mean().sqrt()))
    assert found["health/logits_by_lora"] == pytest.approx(float((logs[0.75] - logs[0.5]).square().mean().sqrt()))
    assert "health/overlap_lookalike" not in found and "health/dead_experts" not in found  # 3 of 6 tokens
    health.add(recorder(new_TK, 1.0), recorder(old_TK, 0.5), recorder(old_TK, 0.75), mask_BS, kind_B)
    found = health.figures()
    assert found["health/dead_experts"] == 8  # experts 4 to 7 in both layers


def test_the_head_computes_completions_only_and_the_same(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, apply = list[int](), ChunkedLogProbFunction.apply

    def counted(hidden: Tensor, *more: Any) -> Any:
        seen.append(len(hidden))
        return apply(hidden, *more)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", counted)
    inside = helpers.Inside.start(toy.train_config(toy.model("qwen3_moe")), tmp_path)
    inside.fit()
    batch, model = inside.trainer.collated(range(4)), inside.trainer.model
    scored, whole_batch = int(batch["completion_mask"][:, 1:].sum()), batch["input_ids"][:, 1:].numel()
    assert seen and max(seen) < whole_batch / 2  # for the reference, the gates' rates and every step
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
    seen.clear()
    with torch.no_grad():
        whole = model(**given, fused_lm_head=True)
        with completions_only():
            found = model(**given, fused_lm_head=True)
    assert seen == [whole_batch, scored]
    torch.testing.assert_close(found.log_probs, whole.log_probs)
    torch.testing.assert_close(found.entropy, whole.entropy)
