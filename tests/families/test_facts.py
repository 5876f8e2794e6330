"""Facts of families: what a config lacks is named, and what is not computed as it should be is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from gtqlora.capture import direction_removed
from gtqlora.errors import ModelError
from gtqlora.experts.module import activation_of
from gtqlora.families import FAMILIES, bind, load_config, load_model
from gtqlora.families.anatomy import check_projectable
from tests import models

# --- unknown families ------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, config: dict[str, Any]) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_config(str(tmp_path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_family_is_told_which_facts_its_config_gives_and_lacks(tmp_path: Path) -> None:
    config = {"model_type": "phimoe", "num_local_experts": 16, "num_experts_per_tok": 2, "intermediate_size": 6400}
    said = refusal(tmp_path, config)
    given, lacking = said.split("config.json gives")[1].split("and lacks")
    for fact in ("num_local_experts", "num_experts_per_tok", "intermediate_size", "PhimoeTopKRouter"):
        assert fact in given
    assert "which layers have a router (none of first_k_dense_replace, decoder_sparse_step" in lacking
    assert "gtqlora/families/facts.py" in said and all(family in said for family in FAMILIES)


def test_a_family_that_transformers_lacks(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"model_type": "kimi_k3", "num_experts": 896})
    lacking = said.split("and lacks")[1]
    assert "a router class in transformers" in lacking and "experts per token (none of" in lacking


def test_a_router_without_a_known_key_is_no_dense_model(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"model_type": "phimoe", "experts_in_words": "sixteen"})
    assert "is a dense model" not in said and "the number of routed experts (none of num_experts, " in said


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"model_type": "madeup_moe", "n_experts": 4}, "model_type 'madeup_moe', the key n_experts looks like"),
        ({"model_type": "madeup_moe"}, "model_type 'madeup_moe' looks like"),
        ({"model_type": "madeup", "text_config": {"moe_layers_count": 2}}, "the key moe_layers_count looks like"),
    ],
)
def test_what_looks_like_experts_is_not_called_dense(tmp_path: Path, config: dict[str, object], hint: str) -> None:
    said = refusal(tmp_path, config)
    assert f"unknown model_type {config['model_type']!r}, and no number of experts under any known key" in said
    assert "dense" not in said and hint in said and "num_local_experts" in said
    assert all(family in said for family in FAMILIES)


@pytest.mark.parametrize("more", [{"num_experts": 0}, {"moe_layers": None}, {"moebius": 3}])
def test_a_key_without_a_value_or_of_another_word_is_no_sign_of_experts(
    tmp_path: Path, more: dict[str, object]
) -> None:
    assert "'llama' is a dense model" in refusal(tmp_path, {"model_type": "llama", **more})


def test_a_dense_model_is_told_which_keys_were_looked_for(tmp_path: Path) -> None:
    assert "'llama' is a dense model" in (said := refusal(tmp_path, {"model_type": "llama"}))
    assert "num_local_experts" in said


# --- configs ---------------------------------------------------------------------------------------------------------


def test_infinity_as_transformers_writes_it(tmp_path: Path) -> None:
    config = models.tiny_model("qwen3_moe").config
    config.time_step_limit = [0.0, math.inf]
    config.save_pretrained(tmp_path)
    assert '"__float__"' in (tmp_path / "config.json").read_text()
    assert load_config(str(tmp_path))[1].time_step_limit == [0.0, math.inf]


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("clip_qkv", {"__float__": "NaN"}, "__float__"),
        ("clip_qkv", {"__float__": "Infinity", "more": 1}, "__float__"),
        ("clip_qkv", {"__float__": ["Infinity"]}, "__float__"),
        ("clip_qkv", [[{"__float__": "1e400"}]], "__float__"),
        ("hidden_size", {"__float__": "Infinity"}, "hidden_size"),
        ("rms_norm_eps", {"__float__": "Infinity"}, "rms_norm_eps"),
        ("rms_norm_eps", {"__float__": "-Infinity"}, "rms_norm_eps"),
    ],
)
def test_other_numbers_that_json_lacks_are_refused(tmp_path: Path, key: str, value: Any, word: str) -> None:
    models.tiny_model("olmoe").config.save_pretrained(tmp_path)
    models.edit_json(tmp_path / "config.json", lambda old: {**old, key: value})
    with pytest.raises(ModelError, match=word):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "types", ["dense", ["dense", "sparse"], ["dense", "sparse", 3], ["dense", "sparse", "mixed"], [[]] * 3]
)
def test_layer_types_that_are_none(tmp_path: Path, types: Any) -> None:
    models.tiny_model("glm4_moe_lite").config.save_pretrained(tmp_path)
    models.edit_json(tmp_path / "config.json", lambda old: {**old, "mlp_layer_types": types})
    with pytest.raises(ModelError, match="mlp_layer_types"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "types", ["linear_attention", ["linear_attention"], ["linear_attention", "no-such", "full_attention"]]
)
def test_attention_types_that_are_none(tmp_path: Path, types: Any) -> None:
    models.save_tiny(tmp_path, "qwen3_next")
    models.edit_json(tmp_path / "config.json", lambda old: {**old, "layer_types": types})
    with pytest.raises(ModelError):
        load_model(str(tmp_path))


@pytest.mark.parametrize("section", [[1, 0], [1, 0, "wide"], [1, 0, -1], {"t": 1}])
def test_mrope_sections_that_are_none(tmp_path: Path, section: Any) -> None:
    models.save_tiny(tmp_path, "qwen3_5_moe")

    def change(old: dict[str, Any]) -> dict[str, Any]:
        rope = {**old["text_config"]["rope_parameters"], "mrope_section": section}
        return {**old, "text_config": {**old["text_config"], "rope_parameters": rope}}

    models.edit_json(tmp_path / "config.json", change)
    with pytest.raises(ModelError, match="mrope_section"):
        load_config(str(tmp_path))


# --- experts in 4 bits -----------------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """Experts as the decorator of transformers takes them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states


class _Clamped(_Experts):
    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.clamp(max=7).chunk(2, dim=-1)
        return self.act_fn(gate) * up


class _Silent(_Experts):
    def __init__(self, config: Any) -> None:
        nn.Module.__init__(self)


def _decorated(kind: type[nn.Module], **layout: bool) -> nn.Module:
    decorate: Any = use_experts_implementation
    made = decorate(type("Own", (kind,), {}), **layout)
    return made(models.tiny_model("qwen3_moe").config)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_experts_of_every_family_are_computed(family: str) -> None:
    model = models.tiny_model(family)
    for layer in bind(model, FAMILIES[family]).moe:
        assert activation_of(model.get_submodule(layer.experts), layer.experts)(torch.ones(1)) > 0.7


@pytest.mark.parametrize(
    ("experts", "word"),
    [
        (lambda: _decorated(_Experts, is_transposed=True), "is_transposed is True"),
        (lambda: _decorated(_Experts, has_bias=True), "has_bias is True"),
        (lambda: _decorated(_Experts, is_concatenated=False), "is_concatenated is False"),
        (lambda: _decorated(_Experts, has_gate=False), "has_gate is False"),
        (lambda: _decorated(_Clamped), "a gate of its own"),
        (lambda: _decorated(_Silent), "no act_fn"),
        (lambda: _Experts(None), "is_concatenated is None"),  # a class that does not say how it computes
    ],
)
def test_experts_that_compute_something_else_are_refused(experts: Any, word: str) -> None:
    with pytest.raises(ModelError, match=rf"layers\.1\.experts: .* do not \(.*{word}"):
        activation_of(experts(), "layers.1.experts")


def test_clamped_experts_of_a_real_family_are_refused() -> None:
    """DeepSeek-V4's have an act_fn like all others; what they compute with it differs."""
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = transformers.DeepseekV4Config(hidden_size=16, moe_intermediate_size=8, n_routed_experts=2)
    with pytest.raises(ModelError, match=r"DeepseekV4Experts computes .*_apply_gate"):
        activation_of(v4.DeepseekV4Experts(config), "model.layers.3.mlp.experts")


# --- projection ------------------------------------------------------------------------------------------------------


def test_a_norm_between_block_and_stream_forbids_projection() -> None:
    """FlexOlmo normalizes what a block writes: its norms put the direction back that the writer was rid of."""
    config = models.tiny_model("olmoe").config.to_dict()
    torch.manual_seed(0)
    model = transformers.FlexOlmoForCausalLM(transformers.FlexOlmoConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape) if "layernorm" in name else 0.0
    anatomy = bind(model, replace(FAMILIES["olmoe"], model_type="flex_olmo", class_name="FlexOlmoForCausalLM"))
    assert anatomy.post_norms
    with pytest.raises(ModelError, match=r"flex_olmo: model\.layers\.0\.post_feedforward_layernorm normalizes"):
        direction_removed(model, anatomy, torch.ones(models.HIDDEN))
    direction_D = torch.nn.functional.normalize(torch.ones(models.HIDDEN), dim=0)
    with torch.no_grad(), direction_removed(model, replace(anatomy, post_norms=()), direction_D):
        states = model(models.some_tokens(), output_hidden_states=True).hidden_states
    assert max(float((state @ direction_D).abs().max()) for state in states[1:-1]) > 0.1  # what would have shipped


@pytest.mark.parametrize("family", models.FAMILIES)
def test_known_families_write_straight_into_the_stream(family: str) -> None:
    anatomy = bind(models.tiny_model(family), FAMILIES[family])
    check_projectable(anatomy)
    assert len(anatomy.blocks) == 2 * models.LAYERS


def test_a_config_that_says_of_no_model_what_it_is_is_not_called_dense(tmp_path: Path) -> None:
    said = refusal(tmp_path, {"hidden_size": 3})
    assert "no model_type" in said and "deepseek_v3" in said and "dense" not in said
