"""Inspection: exact counts from config.json alone, at the checkpoint's dtype, with names on disk and in memory."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gtqlora.errors import ConfigError, ModelError
from gtqlora.experts import FORMATS, quantized_expert_counts
from gtqlora.experts import load_model as load_frozen
from gtqlora.families import FAMILIES, load_model
from gtqlora.stages.inspect import Inspection, inspect
from tests import models

torch.set_num_threads(1)
KIMI = Path(__file__).parents[1] / "data" / "kimi_k25_config.json"


BIASED = ("deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe", "glm4_moe_lite")
"""Families whose routers have a correction bias for each expert."""


@pytest.fixture(scope="module")
def kimi() -> Inspection:
    started = time.monotonic()
    inspection = inspect(str(KIMI))
    assert time.monotonic() - started < 10
    return inspection


def test_kimi_has_its_published_counts(kimi: Inspection) -> None:
    assert (kimi.family, kimi.class_name, kimi.score) == ("kimi_k25", "DeepseekV3ForCausalLM", "sigmoid")
    assert (kimi.layers, kimi.moe_layers, kimi.routers) == (61, tuple(range(1, 61)), 60)
    assert (kimi.experts, kimi.top_k, kimi.n_group, kimi.topk_group) == (384, 8, 1, 1)
    assert kimi.gate_parameters == 60 * 384 * 7168 == 165_150_720
    assert kimi.text_parameters == 1_026_408_209_408
    assert kimi.correction_bias_values == 60 * 384 == 23_040
    routed = next(group for group in kimi.groups if group.name == "routed experts")
    assert routed.parameters == 1_014_686_023_680


def test_kimi_lora_is_counted_by_hand(kimi: Inspection) -> None:
    mla = [(1536, 7168), (64 * 192, 1536), (512 + 64, 7168), (64 * 256, 512), (7168, 64 * 128)]
    attention = 61 * sum(32 * (a + b) for a, b in mla)
    shared = 60 * 3 * 32 * (7168 + 2048)
    assert kimi.lora_parameters == attention + shared
    assert 0.165e9 < kimi.lora_parameters < 0.18e9
    assert kimi.trained_parameters == kimi.lora_parameters + kimi.gate_parameters
    assert kimi.trained_bytes == 2 * kimi.lora_parameters + 4 * kimi.gate_parameters
    assert kimi.expert_format == "int4-g32"
    assert kimi.bytes == 2 * (kimi.text_parameters - 1_014_686_023_680) + 1_014_686_023_680 * 45 // 80
    assert inspect(kimi.model, expert_format="bf16").bytes == 2 * kimi.text_parameters


def test_kimi_is_told_to_be_quantized_and_without_tokenizer(kimi: Inspection) -> None:
    assert (kimi.quantized, kimi.dtype, kimi.chat_template) == ("compressed-tensors", "bfloat16", None)


def test_lora_grows_with_its_rank_and_gates_do_not(kimi: Inspection) -> None:
    smaller = inspect(str(KIMI), lora_rank=8)
    assert smaller.lora_parameters * 4 == kimi.lora_parameters
    assert smaller.gate_parameters == kimi.gate_parameters
    with pytest.raises(ConfigError, match="lora_rank = 0"):
        inspect(str(KIMI), lora_rank=0)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspection_agrees_with_the_loaded_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = models.save_tiny(tmp_path, family, dtype=dtype)
    inspection = inspect(str(folder))
    _, loaded = load_model(str(folder))
    assert inspection.text_parameters == sum(p.numel() for p in loaded.parameters())
    assert inspection.bytes == sum(p.numel() * p.element_size() for p in loaded.parameters())
    assert inspection.chat_template is True and inspection.quantized is None
    has_bias = FAMILIES[family].correction_bias is not None
    assert inspection.correction_bias_values == has_bias * 2 * 8


@pytest.mark.parametrize("family", models.FAMILIES)
def test_names_are_really_those_on_disk_and_in_memory(tmp_path: Path, family: str) -> None:
    folder = models.save_tiny(tmp_path, family)
    inspection = inspect(str(folder))
    on_disk = models.load_file(folder / "model.safetensors")
    in_memory = load_model(str(folder))[1].state_dict()
    for name in inspection.names:
        assert tuple(in_memory[name.memory].shape) == name.shape
        for disk in name.disk:
            source, target = on_disk[disk], in_memory[name.memory]
            assert torch.equal(source, target) or ".experts." in disk
    layer = f"model.layers.{models.moe_layers(family)[0]}."
    assert {n.memory for n in inspection.names} == {n for n in in_memory if n.startswith(layer)}


def test_fused_experts_are_gate_then_up(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "kimi_k25")
    fused = next(n for n in inspect(str(folder)).names if n.memory.endswith("gate_up_proj"))
    on_disk = models.load_file(folder / "model.safetensors")
    parameter = load_model(str(folder))[1].state_dict()[fused.memory]
    gate_first, up_first, gate_last, up_last = (on_disk[name] for name in fused.disk)
    assert torch.equal(parameter[0], torch.cat([gate_first, up_first]))
    assert torch.equal(parameter[-1], torch.cat([gate_last, up_last]))


def test_config_alone_is_enough_and_dtype_falls_back_to_bf16(tmp_path: Path) -> None:
    source = models.save_tiny(tmp_path / "whole", "qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    inspection = inspect(str(tmp_path))
    assert inspection.dtype == "bfloat16"
    assert inspection.bytes == 2 * inspection.text_parameters
    assert inspection.chat_template is None
    by_file = inspect(str(tmp_path / "config.json"))
    assert {**asdict(by_file), "model": str(tmp_path)} == asdict(inspection)


def test_weights_are_not_read(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "deepseek_v3")
    before = inspect(str(folder))
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert inspect(str(folder)) == before


def test_chat_template_in_any_of_its_places(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3")
    (folder / "chat_template.jinja").unlink()
    assert inspect(str(folder)).chat_template is False
    models.edit_json(folder / "tokenizer_config.json", lambda c: {**c, "chat_template": "{{ messages }}"})
    assert inspect(str(folder)).chat_template is True


def test_dense_model_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="dense"):
        inspect(str(tmp_path))


def test_impossible_sizes_are_told_plainly(tmp_path: Path) -> None:
    shutil.copy(KIMI, tmp_path / "config.json")
    models.edit_json(tmp_path / "config.json", lambda c: {**c, "text_config": {**c["text_config"], "hidden_size": -1}})
    with pytest.raises(ModelError) as caught:
        inspect(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k25", "qwen3_moe"])
@pytest.mark.parametrize("expert_format", FORMATS)
def test_experts_are_counted_as_they_will_be_held(tmp_path: Path, family: str, expert_format: str) -> None:
    folder = models.save_tiny(tmp_path / "m", family)
    found, (facts, loaded) = (
        inspect(str(folder), expert_format=expert_format),
        load_frozen(str(folder), expert_format=expert_format),
    )
    (routed,) = (group for group in found.groups if group.name == "routed experts")
    census = quantized_expert_counts(loaded, facts)
    assert (routed.parameters, routed.bytes) == (census.expert_parameters, census.expert_bytes)
    assert found.expert_format == expert_format
    assert found.text_parameters == inspect(str(folder)).text_parameters


@pytest.mark.parametrize("expert_format", FORMATS)
def test_a_checkpoint_in_4_bits_is_counted_and_named_as_it_is(tmp_path: Path, expert_format: str) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3")
    _, loaded = load_frozen(str(folder), expert_format=expert_format)
    loaded.save_pretrained(tmp_path / "packed")
    found = inspect(str(tmp_path / "packed"))
    assert found.expert_format == expert_format
    assert found.bytes == inspect(str(folder), expert_format=expert_format).bytes
    with safe_open(tmp_path / "packed" / "model.safetensors", framework="pt") as file:
        assert {tensor for name in found.names for tensor in name.disk} <= set(file.keys())
    assert inspect(str(tmp_path / "packed"), expert_format="native").bytes == found.bytes


def test_what_cannot_be_loaded_can_be_looked_at(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3")
    models.edit_json(folder / "config.json", lambda raw: {**raw, "quantization_config": {"quant_method": "fp8"}})
    found = inspect(str(folder))
    assert (found.quantized, found.expert_format) == ("fp8", None)
    with pytest.raises(ModelError, match="FP8"):
        inspect(str(folder), expert_format="native")


def test_unknown_experts_are_refused(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "qwen3_moe")
    with pytest.raises(ConfigError, match="nf5"):
        inspect(str(folder), expert_format="nf5")
    with pytest.raises(ModelError, match="not quantized"):
        inspect(str(folder), expert_format="native")
