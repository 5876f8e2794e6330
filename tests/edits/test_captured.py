"""A training whose passes are CUDA graphs, and its LoRA in half precision, beside what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor
from transformers import TrainerCallback

from gtqlora.config import TrainConfig
from gtqlora.edits.collating import KindCollator
from gtqlora.edits.lora import in_half_precision
from gtqlora.edits.packing import PackedStack
from gtqlora.edits.recomputing import Recomputation
from gtqlora.edits.wrapping import lora_config, peft_targets_kept, trainable
from gtqlora.experts import FrozenExperts
from gtqlora.families import FAMILIES, bind
from tests import helpers, models


def wrapped(dtype: torch.dtype) -> Any:
    """A toy model with LoRA that is not zero."""
    torch.manual_seed(0)
    model = models.tiny_model("qwen3_moe", dtype=dtype)
    anatomy = bind(model, FAMILIES["qwen3_moe"])
    with peft_targets_kept():
        found = get_peft_model(model, lora_config(anatomy, mode="lora", rank=4, alpha=8))
    for name, parameter in trainable(found).items():
        parameter.data = torch.randn_like(parameter, dtype=torch.float32) * (0.1 if "lora_B" in name else 1)
    return found


def gradients(model: Any, ids_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids_BS).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def test_half_precision_rounds_and_changes_nothing_else() -> None:
    """One linear by itself: in a whole model a rounded score may choose another expert."""
    model = wrapped(torch.bfloat16)
    linear: Any = next(module for module in model.modules() if isinstance(module, Linear))
    x, weight = torch.randn(2, 3, linear.in_features, dtype=torch.bfloat16), linear.lora_A["default"].weight

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        out = linear(x)
        out.float().square().sum().backward()
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        return out.detach(), weight.grad.clone()

    by_peft, wanted = run()
    in_half_precision(model)
    out, gradient = run()
    assert out.dtype == torch.bfloat16 and not torch.equal(out, by_peft)
    torch.testing.assert_close(out, by_peft, rtol=0.03, atol=0.03)
    assert (gradient - wanted).norm() < 0.02 * wanted.norm()


def test_a_model_in_fp32_computes_as_peft_does() -> None:
    model, ids_BS = wrapped(torch.float32), torch.arange(24).view(2, 12)
    by_peft, wanted = gradients(model, ids_BS)
    in_half_precision(model)
    logits, found = gradients(model, ids_BS)
    assert torch.equal(logits, by_peft)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_half_precision_of_an_adapter_that_is_off_is_the_frozen_linear() -> None:
    model, ids_BS = wrapped(torch.bfloat16), torch.arange(24).view(2, 12)
    in_half_precision(model)
    linear: Any = next(module for module in model.modules() if isinstance(module, Linear))
    x = torch.randn(2, 3, linear.in_features, dtype=torch.bfloat16)
    assert not torch.equal(linear(x), linear.base_layer(x))
    linear.enable_adapters(False)
    assert torch.equal(linear(x), linear.base_layer(x))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids_BS).logits, model.get_base_model()(input_ids=ids_BS).logits)


@pytest.mark.parametrize(
    ("longest", "padded"), [(5, 32), (33, 64), (200, 224), (224, 224), (225, 256), (257, 320), (1000, 1024)]
)
def test_batches_have_few_shapes(longest: int, padded: int) -> None:
    rows = [
        {"prompt_ids": [1] * (longest - 2), "chosen_ids": [2, 3], "rejected_ids": [2], "kind": "benign"},
        {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2], "kind": "harmful"},
    ]
    few, tight = KindCollator(pad_token_id=0, few_shapes=True)(rows), KindCollator(pad_token_id=0)(rows)
    assert few["input_ids"].shape == (4, padded) and tight["input_ids"].shape == (4, longest)
    # on the right, where causal attention does not look back from
    assert (
        torch.equal(few["input_ids"][:, :longest], tight["input_ids"]) and not few["attention_mask"][:, longest:].any()
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_rows_padded_on_the_right_need_no_mask_and_the_model_has_its_own_again(family: str) -> None:
    model: Any = models.tiny_model(family)
    ids_BS, mask_BS = models.some_tokens(), torch.ones(4, 12, dtype=torch.long)
    mask_BS[1, 7:] = mask_BS[2, 3:] = 0
    padded = torch.cat([ids_BS[:, -4:], ids_BS], dim=1), torch.cat([torch.zeros_like(mask_BS[:, :4]), mask_BS], dim=1)
    own, on_the_left = model.config._attn_implementation, model(input_ids=padded[0], attention_mask=padded[1]).logits
    wanted = model(input_ids=ids_BS, attention_mask=mask_BS).logits
    with PackedStack(model, bind(model, FAMILIES[family])).installed():
        found = model(input_ids=ids_BS, attention_mask=mask_BS).logits
        assert not torch.allclose(model(input_ids=padded[0], attention_mask=padded[1]).logits, on_the_left, atol=1e-3)
    torch.testing.assert_close(found[mask_BS.bool()], wanted[mask_BS.bool()], rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == own
    assert torch.equal(model(input_ids=padded[0], attention_mask=padded[1]).logits, on_the_left)


def test_layers_that_are_not_recomputed_are_the_last() -> None:
    model: Any = models.tiny_model("qwen3_moe")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputation = Recomputation(model, longest=100, limit=0)
    layers = list(model.model.layers)
    recomputation._keep(1)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * (len(layers) - 1) + [False]


# --- on a GPU


def trained(
    toy: helpers.Toy, path: Path, callback: TrainerCallback | None = None, **settings: Any
) -> tuple[dict[str, Tensor], list[float], Any]:
    """The edit after some steps, the losses, and the trainer."""
    base = {"device": "cuda", "dtype": "bfloat16", "expert_format": "nf4", "steps": 8, "logging_steps": 1}
    config: TrainConfig = toy.train_config(toy.model("qwen3_moe"), **{**base, **settings})
    inside = helpers.Inside.start(config, path)
    if callback is not None:
        inside.trainer.add_callback(callback)
    for module in inside.trainer.model.modules():
        if isinstance(module, FrozenExperts):
            module.kernel = "fused"  # at these sizes `auto` takes one that waits for the GPU
    inside.trainer.train()
    losses = [line["loss"] for line in inside.trainer.state.log_history if "loss" in line]
    return {n: p.detach().cpu() for n, p in trainable(inside.trainer.model).items()}, losses, inside.trainer


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_graphs_train_as_eager_passes_do(
    toy: helpers.Toy, tmp_path: Path, checkpointing: bool, accumulation: int
) -> None:
    settings = {"gradient_checkpointing": checkpointing, "accumulation": accumulation, "activation_memory": 0.0}
    eager, wanted, _ = trained(toy, tmp_path / "eager", cuda_graphs=False, **settings)
    edit, losses, trainer = trained(toy, tmp_path / "graphs", **settings)
    assert [graphs for graphs in trainer._stack._graphs.values() if graphs is not None]
    assert losses == pytest.approx(wanted, rel=1e-3)
    for name, tensor in edit.items():
        torch.testing.assert_close(tensor, eager[name], rtol=0.02, atol=1e-3)


@pytest.mark.gpu
def test_a_trained_model_attends_as_it_did(toy: helpers.Toy, tmp_path: Path) -> None:
    _, _, trainer = trained(toy, tmp_path)
    assert trainer.model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
def test_layers_keep_activations_where_memory_is_free(toy: helpers.Toy, tmp_path: Path) -> None:
    _, wanted, none = trained(toy, tmp_path / "none", gradient_checkpointing=True, activation_memory=0.0)
    _, losses, free = trained(toy, tmp_path / "free", gradient_checkpointing=True)
    assert none._stack.recomputation.kept == 0
    assert free._stack.recomputation.kept == free.anatomy.n_layers
    assert losses == pytest.approx(wanted, rel=1e-3)


@pytest.mark.gpu
def test_weights_that_were_put_in_another_order_are_put_back(toy: helpers.Toy, tmp_path: Path) -> None:
    """Reading frozen experts in the plain order must not spoil a recorded pass."""
    _, wanted, _ = trained(toy, tmp_path / "plain")

    class Reads(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for module in model.modules():
                if hasattr(module, "arrange"):
                    module.arrange(tiled=False)

    _, losses, _ = trained(toy, tmp_path / "read", Reads())
    assert losses == pytest.approx(wanted, rel=1e-3)


@pytest.mark.gpu
def test_a_kernel_that_waits_for_the_gpu_runs_as_it_is(
    toy: helpers.Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = toy.train_config(
        toy.model("qwen3_moe"), device="cuda", dtype="bfloat16", expert_format="nf4", steps=3, batch_size=16
    )
    inside = helpers.Inside.start(config, tmp_path)
    for module in inside.trainer.model.modules():
        if isinstance(module, FrozenExperts):
            module.kernel = "chunk"
    inside.trainer.train()
    assert not any(inside.trainer._stack._graphs.values())  # type: ignore[union-attr]
    assert "waits for the GPU" in caplog.text
