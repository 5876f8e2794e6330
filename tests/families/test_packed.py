"""compressed-tensors INT4 checkpoints, as Kimi-K2.5 ships: kept bit for bit; every other kind is named and refused."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from gtqlora import families
from gtqlora.errors import ConfigError, ModelError
from gtqlora.experts import FORMATS, FrozenExperts, FrozenExpertsConfig, load_model
from gtqlora.families.files import read_json
from tests import helpers, models

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
packed_family = pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k25"])


def settings(group_size: int = 32, **weights: Any) -> dict[str, Any]:
    """Kimi-K2.5's own quantization settings, as its config.json has them."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            "language_model.model.embed_tokens",
        ],
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": group_size},
                    **{"num_bits": 4, "observer": "minmax", "observer_kwargs": {}, "strategy": "group"},
                    **{"symmetric": True, "type": "int", **weights},
                },
            }
        },
    }


def compress(weight_NK: Tensor, quantization: dict[str, Any]) -> dict[str, Any]:
    """One linear's tensors, by compressed-tensors' own functions."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme: Any = QuantizationConfig.model_validate(quantization).config_groups["group_0"]
    groups = weight_NK.unflatten(-1, (-1, scheme.weights.group_size))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    state: dict[str, Any] = {"weight": weight_NK, "weight_scale": scale.to(weight_NK.dtype)}
    return BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)


def packed(path: Path, family: str, *, group_size: int = 32, nested: bool = True, **more: Any) -> Path:
    """A tiny checkpoint with INT4 experts and everything else in bf16."""
    sizes = {"hidden_size": group_size, "moe_intermediate_size": group_size}
    models.save_tiny(path, family, dtype=torch.bfloat16, **sizes, **more)
    quantization = settings(group_size)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            linear = compress(tensors.pop(name), quantization)
            tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in linear.items()}
        return tensors

    models.edit_tensors(path / "model.safetensors", change)
    set_quantization(path, quantization, nested=nested and family == "kimi_k25")
    return path


def set_quantization(path: Path, quantization: Any, *, nested: bool = False) -> None:
    def change(config: dict[str, Any]) -> dict[str, Any]:
        part = config["text_config"] if nested else config
        part["quantization_config"] = quantization
        return config

    models.edit_json(path / "config.json", change)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    dtypes = [{name: tensor.dtype for name, tensor in tensors.items()} for tensors in (first, second)]
    return dtypes[0] == dtypes[1] and helpers.same(first, second)


def language_tensors(folder: Path, family: str) -> dict[str, Tensor]:
    """The language model's tensors by the names they have in it."""
    prefix = models.disk_name(family, "")
    every = tensors_of(folder).items()
    return {name.removeprefix(prefix): tensor for name, tensor in every if name.startswith(prefix)}


def layer_experts(model: PreTrainedModel, layer: int) -> FrozenExperts:
    module = model.get_submodule(f"model.layers.{layer}.mlp.experts")
    assert isinstance(module, FrozenExperts)
    return module


# --- kept bit for bit ------------------------------------------------------------------------------------------------


@packed_family
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
def test_packed_integers_and_scales_are_kept(tmp_path: Path, family: str, nested: bool, group_size: int) -> None:
    folder = packed(tmp_path / "m", family, nested=nested, group_size=group_size)
    tensors = language_tensors(folder, family)
    _, model = load_model(str(folder), expert_format="native")
    for layer in (1, 2):
        module = layer_experts(model, layer)
        assert module.format.name == f"int4-g{group_size}"
        for expert in range(8):
            for place, (fused, row) in zip(PROJECTIONS, (("gate_up", 0), ("gate_up", 1), ("down", 0)), strict=True):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{place}"
                held = module.parts(fused, slice(expert, expert + 1))  # type: ignore[arg-type]
                assert torch.equal(held["packed"][0, row], tensors[f"{stem}.weight_packed"])
                assert torch.equal(held["scale"][0, row], tensors[f"{stem}.weight_scale"])


@packed_family
@pytest.mark.parametrize("shape_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_saved_checkpoint_has_the_same_tensors(
    tmp_path: Path, family: str, shape_dtype: torch.dtype, shard: str
) -> None:
    folder = packed(tmp_path / "m", family)
    models.edit_tensors(
        folder / "model.safetensors",
        lambda t: {k: v.to(shape_dtype) if k.endswith("weight_shape") else v for k, v in t.items()},
    )
    _, model = load_model(str(folder), expert_format="native")
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    assert same(tensors_of(tmp_path / "again"), language_tensors(folder, family))
    assert (len(list((tmp_path / "again").glob("*.safetensors"))) > 10) == (shard == "8KB")
    _, again = load_model(str(tmp_path / "again"), expert_format="native")
    assert same(again.state_dict(), model.state_dict())


@packed_family
def test_others_read_what_is_saved(tmp_path: Path, family: str) -> None:
    """transformers itself, through compressed-tensors, finds the weights that the frozen experts compute with."""
    folder = packed(tmp_path / "m", family)
    _, model = load_model(str(folder), expert_format="native")
    model.save_pretrained(tmp_path / "again")
    dequantized = CompressedTensorsConfig(dequantize=True)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "again", quantization_config=dequantized)
    assert other.config.model_type == "deepseek_v3"
    for layer in (1, 2):
        own: Any = other.get_submodule(f"model.layers.{layer}.mlp.experts")
        for fused in ("gate_up", "down"):
            expected = layer_experts(model, layer).weights(fused, slice(None), torch.bfloat16)  # type: ignore[arg-type]
            assert torch.equal(getattr(own, f"{fused}_proj"), expected)


def test_config_of_the_checkpoint_gives_way_to_ours_in_plain_transformers(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", "deepseek_v3")
    native, shared = FrozenExpertsConfig(format="native"), families.load_config(str(folder))[1]
    model = AutoModelForCausalLM.from_pretrained(folder, config=shared, quantization_config=native)
    assert same(model.state_dict(), load_model(str(folder), expert_format="native")[1].state_dict())
    assert vars(native) == vars(FrozenExpertsConfig(format="native"))  # it can be used for another checkpoint


def test_saved_settings_are_the_checkpoints_own(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", "kimi_k25")
    load_model(str(folder), expert_format="native")[1].save_pretrained(tmp_path / "again")
    found = read_json(tmp_path / "again" / "config.json")
    expected = settings()
    expected["ignore"][-1] = "model.embed_tokens"
    assert (found["model_type"], found["quantization_config"]) == ("deepseek_v3", expected)


def test_ranks_of_a_packed_checkpoint(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", "kimi_k25")
    whole = layer_experts(load_model(str(folder), expert_format="native")[1], 1)
    part = layer_experts(load_model(str(folder), expert_format="native", expert_range=(1, 2))[1], 1)
    assert torch.equal(part.get_buffer("down_packed"), whole.get_buffer("down_packed")[4:])


def test_prediction_layers_may_be_packed_as_well(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", "deepseek_v3", num_nextn_predict_layers=1)
    stem = "model.layers.3.mlp.experts.0.gate_proj"
    models.edit_tensors(
        folder / "model.safetensors", lambda t: {**t, f"{stem}.weight_packed": torch.ones(2, 2, dtype=torch.int32)}
    )
    load_model(str(folder), expert_format="native")


def test_native_and_dense_in_four_bits_loads_but_is_not_saved(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    _, model = load_model(str(packed(tmp_path / "m", "kimi_k25")), expert_format="native", dense="nf4")
    assert helpers.logits(model).isfinite().all()
    with pytest.raises(ModelError, match="dense = 'nf4'"):
        model.save_pretrained(tmp_path / "again")


# --- what does not go together ---------------------------------------------------------------------------------------


def refused(folder: Path, expert_format: str, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), expert_format=expert_format)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message


def test_native_needs_a_quantized_checkpoint(tmp_path: Path) -> None:
    refused(models.save_tiny(tmp_path / "m", "qwen3_moe"), "native", "not quantized", *FORMATS)


@pytest.mark.parametrize("expert_format", FORMATS)
def test_packed_checkpoint_is_not_quantized_again(tmp_path: Path, expert_format: str) -> None:
    refused(packed(tmp_path / "m", "deepseek_v3"), expert_format, "INT4 already", "'native'")


def test_plain_load_points_to_native(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", "kimi_k25")
    refused(folder, "bf16", "--expert-format native", "INT4")
    load_model(str(folder), expert_format="native")[1].save_pretrained(tmp_path / "again")
    refused(tmp_path / "again", "bf16", "--expert-format native")


def test_our_own_checkpoint_is_not_quantized_again(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "qwen3_moe", moe_intermediate_size=32)
    load_model(str(folder), expert_format="nf4")[1].save_pretrained(tmp_path / "again")
    refused(tmp_path / "again", "int4-g32", "saved as nf4", "'native'")
    refused(tmp_path / "again", "bf16", "--expert-format native")


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "FP8"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "no-such"}, "no-such"),
        ({}, "unnamed"),
        ("int4", "int4"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "no config_groups"),
        ({**settings(), "format": "int-quantized"}, "'int-quantized'"),
        ({**settings(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({**settings(), "sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
        ({**settings(), "transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
        (settings(num_bits=8), "8-bit int"),
        (settings(type="float"), "4-bit float"),
        (settings(symmetric=False), "asymmetric"),
        (settings(actorder="group"), "actorder group"),
        (settings(strategy="channel"), "'channel'"),
        (settings(64), "group_size 64"),
        (settings(dynamic=True), "dynamic"),
    ],
)
def test_other_quantized_checkpoints_are_named(tmp_path: Path, quantization: Any, word: str) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3")
    set_quantization(folder, quantization)
    for experts in ("native", "nf4"):
        refused(folder, experts, word)
    with pytest.raises(ModelError, match="is quantized"):
        families.load_model(str(folder))


def test_quantized_activations_and_mixed_groups_are_named(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3")
    activations, mixed = settings(), settings()
    activations["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    mixed["config_groups"]["group_1"] = deepcopy(settings(128)["config_groups"]["group_0"])
    for quantization, word in ((activations, "quantized input_activations"), (mixed, "groups of several sizes")):
        set_quantization(folder, quantization)
        refused(folder, "native", word)


STEM = "model.layers.2.mlp.experts.7.up_proj"


def _to_fp16(tensor: Tensor) -> Tensor:
    return tensor.half()


def _spoil(tensor: Tensor) -> Tensor:
    tensor[1, 0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (f"{STEM}.weight_packed", None, ("1 tensors missing", f"{STEM}.weight_packed")),
        (f"{STEM}.weight_scale", None, ("1 tensors missing", f"{STEM}.weight_scale")),
        (f"{STEM}.weight_shape", None, ("1 tensors missing", f"{STEM}.weight_shape")),
        (f"{STEM}.weight_packed", lambda t: t[1:].clone(), (f"{STEM}.weight_packed (31, 4) on disk, (32, 4) by",)),
        (f"{STEM}.weight_packed", lambda t: t.long(), (f"{STEM}.weight_packed is I64, expected int32",)),
        (f"{STEM}.weight_scale", _to_fp16, (f"{STEM}.weight_scale is F16, expected bfloat16",)),
        (f"{STEM}.weight_scale", _spoil, (f"{STEM}.weight_scale", "NaN")),
        (f"{STEM}.weight_shape", lambda t: t.flip(0) + 1, (f"{STEM}.weight_shape says [33, 33]", "[32, 32]")),
    ],
)
def test_spoiled_packed_tensor_is_named(tmp_path: Path, name: str, change: Any, words: tuple[str, ...]) -> None:
    folder = packed(tmp_path / "m", "deepseek_v3")

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = tensors.pop(name)
        return tensors if change is None else {**tensors, name: change(old)}

    models.edit_tensors(folder / "model.safetensors", spoil)
    refused(folder, "native", *words)


@pytest.mark.parametrize("ending", ["weight_zero_point", "weight_g_idx"])
def test_zero_points_and_orders_are_refused(tmp_path: Path, ending: str) -> None:
    folder = packed(tmp_path / "m", "deepseek_v3")
    models.edit_tensors(folder / "model.safetensors", lambda t: {**t, f"{STEM}.{ending}": torch.ones(32)})
    refused(folder, "native", f"{STEM}.{ending}", "not of these experts")


@pytest.mark.parametrize("linear", ["model.layers.1.mlp.shared_experts.up_proj", "model.layers.0.self_attn.o_proj"])
def test_only_routed_experts_may_be_packed(tmp_path: Path, linear: str) -> None:
    folder = packed(tmp_path / "m", "kimi_k25")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = compress(tensors.pop(f"language_model.{linear}.weight"), settings())
        return {**tensors, **{f"language_model.{linear}.{part}": tensor for part, tensor in parts.items()}}

    models.edit_tensors(folder / "model.safetensors", change)
    refused(folder, "native", "quantized, but not of a routed expert", f"language_model.{linear}.weight_packed")


# --- what a user can get wrong with an unquantized one ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, ("1 tensors missing", f"{STEM}.weight")),
        (lambda t: t[1:].clone(), (f"{STEM}.weight (31, 32) on disk, (32, 32) by config",)),
        (lambda t: t.to(torch.float8_e4m3fn), (f"{STEM}.weight is F8_E4M3",)),
        (_spoil, (f"{STEM}.weight", "NaN")),
    ],
)
def test_spoiled_weight_is_named(tmp_path: Path, change: Any, words: tuple[str, ...]) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3", moe_intermediate_size=32)

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = tensors.pop(f"{STEM}.weight")
        return tensors if change is None else {**tensors, f"{STEM}.weight": change(old)}

    models.edit_tensors(folder / "model.safetensors", spoil)
    refused(folder, "nf4", *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_routed_experts": 16}, ("missing", "model.layers.1.mlp.experts.8.gate_proj.weight")),
        ({"n_routed_experts": 4}, ("not of these experts", "model.layers.1.mlp.experts.4.")),
        ({"moe_intermediate_size": 64}, ("(32, 32) on disk, (64, 32) by config",)),
        ({"num_hidden_layers": 2}, ("model.layers.2",)),
        ({"num_hidden_layers": 4}, ("missing", "model.layers.3")),
        ({"first_k_dense_replace": 3}, ("no MoE layer",)),
    ],
)
def test_config_that_disagrees_with_the_experts(tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]) -> None:
    folder = models.save_tiny(tmp_path / "m", "deepseek_v3", moe_intermediate_size=32)
    models.edit_json(folder / "config.json", lambda c: {**c, **change})
    refused(folder, "nf4", *words)


def test_format_that_cannot_hold_the_matrices(tmp_path: Path) -> None:
    refused(models.save_tiny(tmp_path / "m", "qwen3_moe", hidden_size=48), "int4-g32", "int4-g32", "48")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dense": "int8"}, "int8"),
        ({"kernel": "magic"}, "magic"),
        ({"expert_range": (2, 2)}, "(2, 2)"),
        ({"expert_range": (0, 9)}, "8 experts"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    folder = models.save_tiny(tmp_path / "m", "qwen3_moe")
    with pytest.raises(ConfigError) as caught:
        load_model(str(folder), expert_format="nf4", **change)
    assert word in str(caught.value)
    with pytest.raises(ConfigError, match=r"int5.*nf4"):
        load_model(str(folder), expert_format="int5")
    with pytest.raises(ConfigError, match=r"int5.*nf4.*native"):
        FrozenExpertsConfig(format="int5")
