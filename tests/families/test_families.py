"""Families: loading is exact, anatomy is counted, routing maths is the modules' own, and every bad folder says why."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtqlora.capture import Decision, router_hooks
from gtqlora.errors import ModelError
from gtqlora.families import FAMILIES, bind, load_config, load_model, load_tokenizer, meta_model, parameter_counts
from gtqlora.routing import choose, weigh
from tests import models

torch.set_num_threads(1)
every_family = pytest.mark.parametrize("family", models.FAMILIES)
N_MOE, N_EXPERTS, HIDDEN, INNER = 2, 8, 32, 16


def refused(folder: Path | str, *words: str) -> str:
    """Loading fails with one clean line that holds these words."""
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# --- loading ---------------------------------------------------------------------------------------------------------


def test_families_here_are_all_that_gtqlora_knows() -> None:
    assert set(FAMILIES) == set(models.FAMILIES)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_model_is_bitwise_the_saved_one(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    original = models.tiny_model(family, dtype=dtype)
    folder = models.save_tiny(tmp_path, family, model=original)
    found, loaded = load_model(str(folder))
    tokens = models.some_tokens()
    assert found.model_type == family and loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(original(tokens).logits, loaded(tokens).logits)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@every_family
def test_sharded_checkpoint_loads_the_same(tmp_path: Path, family: str) -> None:
    original = models.tiny_model(family)
    folder = models.save_tiny(tmp_path, family, model=original, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    _, loaded = load_model(str(folder))
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_dtype_can_be_asked_for_and_bias_stays_fp32(tmp_path: Path) -> None:
    _, loaded = load_model(str(models.save_tiny(tmp_path, "deepseek_v3")), dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert loaded.state_dict()["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_kimi_checkpoint_is_really_in_another_layout(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "kimi_k25")
    names = models.load_file(folder / "model.safetensors")
    assert "vision_tower.patch_embed.proj.weight" in names
    assert "language_model.model.layers.1.mlp.experts.7.down_proj.weight" in names
    assert not any(name.startswith("model.") for name in names)


def test_prediction_layers_after_the_last_are_left_out(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "deepseek_v3", num_nextn_predict_layers=1)
    models.edit_tensors(folder / "model.safetensors", lambda t: {**t, "model.layers.3.eh_proj.weight": torch.ones(2)})
    assert len(bind(load_model(str(folder))[1], FAMILIES["deepseek_v3"]).moe) == N_MOE


def test_loader_ignores_settings_that_steer_it_elsewhere(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "qwen3_moe")
    steering = {
        "transformers_weights": "../elsewhere.safetensors",
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "attn_implementation": "some-org/some-kernel",
        "_attn_implementation": "some-org/some-kernel",
    }
    models.edit_json(folder / "config.json", lambda c: {**c, **steering})
    _, loaded = load_model(str(folder))
    assert loaded.config._attn_implementation in ("sdpa", "eager")


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "it-ran"
    script = f"open({str(run)!r}, 'w').close()\ndef generate(*args, **kwargs): ...\nclass Model: ...\n"
    (folder / "custom_generate").mkdir()
    for name in ("custom_generate/generate.py", "evil.py"):
        (folder / name).write_text(script)
    for file in ("config.json", "tokenizer_config.json"):
        models.edit_json(folder / file, lambda c: {**c, "auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    load_model(str(folder))
    load_tokenizer(str(folder))
    assert not run.exists()


@every_family
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_read_under_both_names(tmp_path: Path, family: str, key: str) -> None:
    folder = models.save_tiny(tmp_path, family)

    def change(config: dict[str, Any]) -> dict[str, Any]:
        (config.get("text_config") or config).pop("dtype")
        return {**config, key: "float16"}

    models.edit_json(folder / "config.json", change)
    assert load_config(str(folder))[1].dtype == torch.float16


def test_unknown_dtype_is_refused(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "qwen3_moe")
    models.edit_json(folder / "config.json", lambda c: {**c, "dtype": "float12"})
    refused(folder, "float12", "bfloat16")


@pytest.mark.parametrize("nested", [True, False])
def test_quantized_checkpoint_is_refused_but_its_anatomy_is_known(tmp_path: Path, nested: bool) -> None:
    folder = models.save_tiny(tmp_path, "kimi_k25")
    settings = {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}

    def change(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "text_config": {**config["text_config"], **settings}} if nested else {**config, **settings}

    models.edit_json(folder / "config.json", change)
    refused(folder, "compressed-tensors", "bf16, fp16 and fp32")
    family, config = load_config(str(folder))
    assert len(bind(meta_model(family, config), family).moe) == N_MOE


# --- anatomy ---------------------------------------------------------------------------------------------------------


@every_family
def test_anatomy_and_census_have_the_counts_of_the_config(family: str) -> None:
    model = models.tiny_model(family)
    anatomy = bind(model, FAMILIES[family])
    groups = {group.name: group for group in parameter_counts(model, anatomy, lora_rank=4)}
    moe, dense = models.moe_layers(family), models.LAYERS - len(models.moe_layers(family))
    gates = len(moe) * N_EXPERTS * HIDDEN
    assert tuple(layer.index for layer in anatomy.moe) == moe
    assert (groups["routers (gates)"].modules, groups["routers (gates)"].parameters) == (len(moe), gates)
    assert groups["routers (gates)"].trained_bytes == 4 * gates
    assert groups["routed experts"].parameters == len(moe) * N_EXPERTS * 3 * HIDDEN * INNER
    assert (groups["dense MLPs"].parameters if dense else 0) == dense * 3 * HIDDEN * 48
    assert groups["embeddings, head"].parameters == 2 * models.VOCABULARY * HIDDEN
    assert sum(g.parameters for g in groups.values()) == sum(p.numel() for p in model.parameters())
    assert all(group.bytes == 4 * group.parameters for group in groups.values())


def test_attention_and_shared_counts_of_deepseek() -> None:
    model = models.tiny_model("deepseek_v3", dtype=torch.bfloat16)
    anatomy = bind(model, FAMILIES["deepseek_v3"])
    groups = {group.name: group for group in parameter_counts(model, anatomy, lora_rank=4)}
    shapes = [(16, 32), (64, 16), (24, 32), (64, 16), (32, 32)]  # q_a, q_b, kv_a, kv_b, o
    assert groups["attention"].parameters == 3 * sum(a * b for a, b in shapes)
    assert groups["attention"].trained_parameters == 3 * sum(4 * (a + b) for a, b in shapes)
    assert groups["shared experts"].trained_parameters == N_MOE * 3 * 4 * (HIDDEN + INNER)
    assert groups["shared experts"].trained_bytes == 2 * groups["shared experts"].trained_parameters
    assert len(anatomy.lora_targets) == 3 * 5 + 2 * 3


def test_attention_counts_of_qwen() -> None:
    anatomy = bind(models.tiny_model("qwen3_moe"), FAMILIES["qwen3_moe"])
    assert anatomy.shared == () and len(anatomy.attention) == 3 * 4
    attention_out = {f"model.layers.{i}.self_attn.o_proj" for i in range(3)}
    assert set(anatomy.residual_writers) == attention_out | {"model.layers.0.mlp.down_proj"}


def test_linear_attention_carries_lora_and_its_gates_and_state_are_frozen() -> None:
    model = models.tiny_model("qwen3_next")
    anatomy = bind(model, FAMILIES["qwen3_next"])
    groups = {group.name: group for group in parameter_counts(model, anatomy, lora_rank=4)}
    linear = [(64 + 32, 32), (2 * 4, 32), (32, 32)]  # qkvz, ba, out
    full = [(2 * 32, 32), (16, 32), (16, 32), (32, 32)]  # q with its gate, k, v, o
    expected = sum(2 * a * b for a, b in linear) + sum(a * b for a, b in full)
    assert groups["attention"].parameters == expected and groups["attention"].trained.startswith("LoRA")
    rest, gate = groups["linear attention, rest"], groups["shared-expert gates"]
    assert (rest.parameters, rest.trained) == (2 * (64 * 4 + 4 + 4), "frozen")  # convolution, A_log, dt_bias
    assert (gate.modules, gate.parameters, gate.trained) == (N_MOE, N_MOE * HIDDEN, "frozen")
    blocks = [path.rpartition(".")[2] for path in anatomy.blocks]
    assert blocks == ["linear_attn", "mlp", "self_attn", "mlp", "linear_attn", "mlp"]


def test_query_without_low_rank_is_found() -> None:
    model = models.tiny_model("deepseek_v3", q_lora_rank=None)
    assert "model.layers.0.self_attn.q_proj" in bind(model, FAMILIES["deepseek_v3"]).attention


@every_family
def test_tied_embeddings_count_once(family: str) -> None:
    model = models.tiny_model(family, tie_word_embeddings=True)
    groups = parameter_counts(model, bind(model, FAMILIES[family]), lora_rank=4)
    assert next(g for g in groups if g.name == "embeddings, head").parameters == models.VOCABULARY * HIDDEN


def test_census_refuses_a_parameter_of_no_known_kind() -> None:
    model = models.tiny_model("qwen3_moe")
    anatomy = bind(model, FAMILIES["qwen3_moe"])
    model.get_submodule("model.layers.1.self_attn").register_module("sink", nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"self_attn\.sink\.weight"):
        parameter_counts(model, anatomy, lora_rank=4)


def test_bind_refuses_a_model_that_lost_a_router() -> None:
    model = models.tiny_model("deepseek_v3")
    model.get_submodule("model.layers")[2].mlp = nn.Identity()  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ModelError, match=r"layers \[1\].*\[1, 2\]"):
        bind(model, FAMILIES["deepseek_v3"])


@pytest.mark.parametrize("tensor", ["gate.weight", "experts.down_proj"])
def test_bind_refuses_shapes_that_disagree_with_the_config(tensor: str) -> None:
    model = models.tiny_model("deepseek_v3")
    owner, _, name = f"model.layers.1.mlp.{tensor}".rpartition(".")
    wrong = nn.Parameter(model.get_parameter(f"{owner}.{name}")[:7].clone())
    setattr(model.get_submodule(owner), name, wrong)
    with pytest.raises(ModelError, match="layer 1"):
        bind(model, FAMILIES["deepseek_v3"])


# --- routing maths ---------------------------------------------------------------------------------------------------

ROUTERS = [
    ("deepseek_v3", {}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2}),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "routed_scaling_factor": 1.0}),
    ("kimi_k25", {}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ("glm4_moe", {}),
    ("glm4_moe", {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
    ("glm4_moe_lite", {}),
    ("glm4_moe_lite", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ("qwen3_next", {}),
    ("qwen3_next", {"norm_topk_prob": False}),
    ("qwen3_5_moe", {}),
    ("qwen3_5_moe_text", {"norm_topk_prob": False, "num_experts_per_tok": 3}),  # which its router does not read
    ("mixtral", {}),
    ("mixtral", {"norm_topk_prob": False, "num_experts_per_tok": 3}),  # nor this one
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
]


def decisions(model: Any, family: str, seed: int = 0) -> list[tuple[Any, Tensor, Decision]]:
    """(router, its input_TD, its decision) of every MoE layer on random tokens, through the real forward pass."""
    anatomy = bind(model, FAMILIES[family])
    inputs: dict[int, Tensor] = {}
    seen: list[tuple[Any, Tensor, Decision]] = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda m, args: inputs.update({id(m): args[0]}))
        for path in anatomy.routers
    ]

    def handler(_position: int, router: nn.Module, decision: Decision) -> None:
        seen.append((router, inputs[id(router)].reshape(-1, anatomy.hidden_size), decision))

    with torch.no_grad(), router_hooks(model, anatomy, handler):
        model(models.some_tokens(seed, (8, 16)))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "changes"), ROUTERS)
def test_choose_and_weigh_are_what_the_real_router_does(
    family: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    model = models.tiny_model(family, dtype=dtype, **changes)
    anatomy = bind(model, FAMILIES[family])
    seen = decisions(model, family)
    assert len(seen) == len(models.moe_layers(family))
    for router, _, decision in seen:
        bias = getattr(router, anatomy.family.correction_bias) if anatomy.family.correction_bias else None
        chosen = choose(decision.logits_TE, anatomy.spec, bias)
        assert torch.equal(chosen.sort(-1).values, decision.indices_TK.sort(-1).values)
        weights = weigh(decision.logits_TE, decision.indices_TK, anatomy.spec)
        assert weights.dtype == decision.weights_TK.dtype
        torch.testing.assert_close(weights, decision.weights_TK, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "changes"), ROUTERS)
def test_random_routing_is_not_degenerate(family: str, changes: dict[str, Any]) -> None:
    """The comparison above could pass by accident if every token chose alike, or if bias and groups never mattered."""
    model = models.tiny_model(family, **changes)
    spec = bind(model, FAMILIES[family]).spec
    for router, _, decision in decisions(model, family):
        assert decision.indices_TK.unique().numel() == N_EXPERTS
        plain = decision.logits_TE.topk(spec.top_k).indices.sort(-1).values
        differs = (plain != decision.indices_TK.sort(-1).values).any()
        assert bool(differs) == hasattr(router, "e_score_correction_bias")


@every_family
def test_first_output_of_the_router_is_raw_logits(family: str) -> None:
    model = models.tiny_model(family)
    for router, inputs_TD, decision in decisions(model, family):
        expected_TE = inputs_TD @ router.weight.T
        torch.testing.assert_close(decision.logits_TE, expected_TE, atol=1e-5, rtol=1e-5)
        assert decision.logits_TE.min() < 0


@every_family
def test_recorded_router_logits_are_raw_too(family: str) -> None:
    model = models.tiny_model(family)
    if "router_logits" not in (model._can_record_outputs or {}):
        pytest.skip("this version of transformers records no router logits for this family")
    with torch.no_grad():
        recorded = model(models.some_tokens(0, (8, 16)), output_router_logits=True).router_logits
    for (_, _, decision), logits_TE in zip(decisions(model, family), recorded, strict=True):
        assert torch.equal(decision.logits_TE, logits_TE.reshape(decision.logits_TE.shape))


# --- what a user can get wrong ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny(tmp_path_factory.mktemp("model") / "m", "deepseek_v3", max_shard_size="60KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A good sharded folder to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "m"))


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def test_the_folder_to_spoil_is_good(folder: Path) -> None:
    load_model(str(folder))


def test_missing_folder() -> None:
    refused("/no/such/folder", "/no/such/folder", "no such model folder")
    refused("relative-name", "no such model folder")


def test_hub_id_without_a_hub_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    started = time.monotonic()
    refused("some-org/no-such-model", "some-org/no-such-model", "hub")
    with pytest.raises(ModelError, match="hub"):
        load_tokenizer("some-org/no-such-model")
    refused("some org/bad name!", "hub")
    assert time.monotonic() - started < 5


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "no config.json", "hub layout")


@pytest.mark.parametrize("text", ['{"model_type": ', "[1, 2]", "{}", "\x00\xff", "[" * 100_000])
def test_corrupt_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"vocab_size": -3},
        {"num_attention_heads": None},
        {"rope_parameters": {"rope_type": "no-such-rope"}},
        {"hidden_act": "no-such-activation"},
        {"n_group": 3},
        {"topk_group": 5},
        {"num_experts_per_tok": 9},
        {"model_type": ["deepseek_v3"]},
    ],
)
def test_config_that_makes_no_model(folder: Path, change: dict[str, Any]) -> None:
    models.edit_json(folder / "config.json", lambda c: {**c, **change})

    def bound() -> None:
        family, config = load_config(str(folder))
        bind(meta_model(family, config), family)

    with pytest.raises(ModelError) as caught:
        bound()
    assert "\n" not in str(caught.value)


def test_missing_shard(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    shard.unlink()
    refused(folder, shard.name, "missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_truncated_shard(folder: Path, keep: int) -> None:
    shard = shard_of(folder, "model.norm.weight")
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, shard.name, "corrupt or cut short")


def test_garbage_shard(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    shard.write_bytes(b"\xff" * 4096)
    refused(folder, shard.name, "corrupt")


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.2.mlp.experts.7.down_proj.weight",
    ],
)
def test_missing_tensor_is_named(folder: Path, name: str) -> None:
    models.edit_tensors(shard_of(folder, name), lambda t: {k: v for k, v in t.items() if k != name})
    refused(folder, name, "missing")


def test_missing_expert_layer_is_named(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        models.edit_tensors(shard, lambda t: {k: v for k, v in t.items() if ".1.mlp.experts." not in k})
    refused(folder, "model.layers.1.mlp.experts", "missing")


def test_foreign_tensor_is_named(folder: Path) -> None:
    shard = shard_of(folder, "model.norm.weight")
    models.edit_tensors(shard, lambda t: {**t, "model.sink": torch.ones(1)})
    refused(folder, "model.sink", shard.name, "the index does not name")
    index = folder / "model.safetensors.index.json"
    models.edit_json(index, lambda old: {**old, "weight_map": {**old["weight_map"], "model.sink": shard.name}})
    refused(folder, "model.sink", "not of this architecture")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.2.mlp.gate.e_score_correction_bias"),
        ("model.layers.2.mlp.experts.6.up_proj.weight", "model.layers.2.mlp.experts.gate_up_proj[6]"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(folder: Path, name: str, shown: str, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[3] = value
        return tensors

    models.edit_tensors(shard_of(folder, name), spoil)
    refused(folder, shown, "NaN")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_routed_experts": 16}, "missing"),
        ({"n_routed_experts": 4}, "(8, 32, 32) on disk, (4, 32, 32) by config"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"moe_intermediate_size": 8}, "shape"),
        ({"kv_lora_rank": 8}, "shape"),
        ({"first_k_dense_replace": 0}, "model.layers.0.mlp"),
        ({"n_shared_experts": 2}, "shared_experts"),
    ],
)
def test_config_that_disagrees_with_the_weights(folder: Path, change: dict[str, Any], word: str) -> None:
    models.edit_json(folder / "config.json", lambda c: {**c, **change})
    refused(folder, word)


def test_pickle_only_folder(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "safetensors")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "no model.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "{outside}",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "model.bin",
        7,
    ],
)
def test_shard_outside_the_folder(folder: Path, shard: Any) -> None:
    """The file is there and would load, so only the name can be the reason."""
    outside = folder.parent / "outside.safetensors"
    shutil.copy(shard_of(folder, "model.norm.weight"), outside)
    name = str(outside) if shard == "{outside}" else shard
    index = folder / "model.safetensors.index.json"
    models.edit_json(index, lambda i: {**i, "weight_map": {**i["weight_map"], "model.norm.weight": name}})
    message = refused(folder, index.name, "shard")
    assert "outside the model folder" in message or "not a .safetensors file" in message


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_corrupt_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00000-of-00001.safetensors"])
def test_files_that_would_divert_the_loader(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    refused(folder, name)


def test_dense_model_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    refused(tmp_path, "'llama' is a dense model", *models.FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "phimoe", "num_local_experts": 16},
        {"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 128}},
    ],
)
def test_unknown_moe_family_lists_the_known(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, f"unknown MoE family '{config['model_type']}'", *models.FAMILIES)


@pytest.mark.parametrize("change", [{"num_experts": 0}, {"mlp_only_layers": [0, 1, 2]}])
def test_known_family_without_moe_layers(change: dict[str, Any]) -> None:
    config = models.tiny_model("qwen3_moe").config
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(ModelError):
        bind(meta_model(FAMILIES["qwen3_moe"], config), FAMILIES["qwen3_moe"])


def test_kimi_with_another_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "kimi_k25", "text_config": {"model_type": "llama"}})
    )
    refused(tmp_path, "'llama'", "kimi_k2")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25"}))
    refused(tmp_path, "text_config")


# --- tokenizer -------------------------------------------------------------------------------------------------------


@every_family
def test_tokenizer_has_the_models_vocabulary_and_pads_left(tmp_path: Path, family: str) -> None:
    tokenizer = load_tokenizer(str(models.save_tiny(tmp_path, family)))
    assert len(tokenizer) == models.VOCABULARY and tokenizer.padding_side == "left"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "copy"}], tokenize=False) == "<user> copy"


def test_tokenizer_without_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "text", ["{", '{"a": 1}', '{"version": "1.0", "added_tokens": [], "model": {"type": "no-such"}}']
)
def test_corrupt_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_no_tokenizer(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path, "deepseek_v3", tokenizer=False)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder))
