"""Learning rates of gates by their effect on router logits, and what is on record of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gtqlora.config import TrainConfig
from gtqlora.edits.wrapping import gate_weights
from gtqlora.errors import ConfigError
from gtqlora.results.adapter import Training, read_info
from gtqlora.results.metrics import LOGITS_BY_GATES, LOGITS_BY_LORA, read_metrics
from tests import helpers
from tests.helpers import trained

STEP = 0.02


def by_effect(toy: helpers.Toy, model: Path, **changes: object) -> TrainConfig:
    settings = {"gate_step": STEP, "lr_gates": None, "batch_size": 16, "min_overlap": 0.0, **changes}
    return toy.train_config(model, **settings)


def details(run: Path) -> Training:
    found = read_info(run / "adapter").details
    assert isinstance(found, Training)
    return found


@pytest.mark.parametrize(
    ("family", "hidden"), [("qwen3_moe", 32), ("qwen3_moe", 256), ("deepseek_v3", 32), ("deepseek_v3", 256)]
)
def test_a_step_moves_logits_by_what_was_asked_for(toy: helpers.Toy, tmp_path: Path, family: str, hidden: int) -> None:
    """Whatever the width and the score function; the second line is logged after one whole step.

    There is one MoE layer: in more of them, the later ones would be given other inputs as well.
    """
    config = by_effect(toy, toy.model(family, hidden_size=hidden, num_hidden_layers=2), mode="gates", steps=2)
    trained(config, tmp_path)
    line = read_metrics(tmp_path / "metrics.jsonl")[1]
    assert line[LOGITS_BY_GATES] == pytest.approx(STEP, rel=0.25)
    assert line[LOGITS_BY_LORA] == 0.0
    # Adam moves every weight by the rate, and 32 or 256 inputs of length about 1 a logit by some of these.
    assert all(STEP / hidden < rate < 2 * STEP / hidden**0.5 for rate in details(tmp_path).gate_rates.values())


def test_every_router_has_a_group_and_rates_follow_the_step(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("deepseek_v3")
    slow, fast = (
        helpers.Inside.start(by_effect(toy, model, gate_step=step), tmp_path / str(step)).trainer
        for step in (STEP, 10 * STEP)
    )
    for path, rate in slow.gate_rates.items():
        assert fast.gate_rates[path] == pytest.approx(10 * rate, rel=0.01)
    groups = slow.create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [slow.settings.lr_lora, *slow.gate_rates.values()]
    gates = gate_weights(slow.model)
    assert list(gates) == list(slow.gate_rates) == list(slow.anatomy.routers)
    assert [[id(p) for p in group["params"]] for group in groups[1:]] == [[id(p)] for p in gates.values()]
    # measuring leaves nothing behind
    assert all(p.grad is None for p in slow.model.parameters()) and not slow._metrics["train"]
    assert all(
        torch.equal(wrapper, slow.model.get_base_model().get_submodule(path).original_module.weight)
        for path, wrapper in gates.items()
    )


def test_what_moved_the_routing_is_on_record(toy: helpers.Toy, tmp_path: Path) -> None:
    trained(by_effect(toy, toy.model("qwen3_moe"), mode="lora"), tmp_path / "lora")
    trained(by_effect(toy, toy.model("qwen3_moe")), tmp_path / "gt")
    lora, both = details(tmp_path / "lora"), details(tmp_path / "gt")
    assert lora.gate_rates == {} and lora.moved is not None and lora.moved.gates == 0.0 < lora.moved.lora
    assert both.moved is not None and both.moved.gates > STEP and both.moved.lora > 0.0
    last = read_metrics(tmp_path / "gt" / "metrics.jsonl")[-1]
    assert (last[LOGITS_BY_GATES], last[LOGITS_BY_LORA]) == (both.moved.gates, both.moved.lora)


def test_how_exact_the_reference_is_stands_on_record(toy: helpers.Toy, tmp_path: Path) -> None:
    """In fp32 one batch is looked at; in bf16, where the order of rows may change a little, all of them."""
    fp32 = helpers.Inside.start(toy.train_config(toy.model("qwen3_moe")), tmp_path / "fp32").trainer
    bf16 = helpers.Inside.start(toy.train_config(toy.model("qwen3_moe", torch.bfloat16)), tmp_path / "bf16").trainer
    assert fp32.reference is not None and bf16.reference is not None
    assert fp32.reference.rows == 4 and fp32.reference.max < 1e-4
    assert bf16.reference.rows == len(bf16.train_dataset) == 48
    assert 0.0 <= bf16.reference.mean <= bf16.reference.max < 1.0
    # A reference that is stored wrongly shows: by half a nat for every row, so mean and largest are that.
    key, kept = "ref_chosen_logps", bf16.train_dataset
    bf16.train_dataset = kept.map(
        lambda row: {key: row[key] + 0.5, "ref_rejected_logps": row["ref_rejected_logps"] - 0.5}
    )
    bf16.assert_exact_reference()
    assert bf16.reference.mean == pytest.approx(0.5, abs=0.05)


def test_rates_are_given_in_one_way() -> None:
    given = {"model": "m", "contrast": "c"}
    with pytest.raises(ConfigError, match=r"gate_step = 0\.1 and lr_gates = 5e-06 both say.* 'none'"):
        TrainConfig(**given, gate_step=0.1, lr_gates=5e-6)  # type: ignore[arg-type]
    assert TrainConfig(**given).gate_step is not None and TrainConfig(**given).lr_gates is None  # type: ignore[arg-type]
    old = TrainConfig(**given, lr_gates=5e-6)  # type: ignore[arg-type]
    assert old.gate_step is None and TrainConfig(**asdict(old)) == old
