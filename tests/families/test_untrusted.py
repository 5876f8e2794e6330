"""A model folder is untrusted: what is in it is refused in one line, quickly, by `inspect` and by what loads it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gtqlora.capture import open_subject
from gtqlora.cli import main
from gtqlora.errors import ModelError
from gtqlora.experts.loading import load_model as load_frozen
from gtqlora.families import load_config, load_model, load_tokenizer, strict_json
from gtqlora.families.files import first_line
from tests import models

INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: models.save_tiny(folder / name, name, max_shard_size="60KB") for name in models.CORE}


@pytest.fixture
def folder(pristine: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine["qwen3_moe"], tmp_path / "m"))


def edited(folder: Path, file: str, **changes: Any) -> Path:
    models.edit_json(folder / file, lambda old: {**old, **changes})
    return folder


def refused(call: Callable[[str], Any], folder: Path, *words: str) -> None:
    """One clean, short line that holds these words, at once."""
    started = time.monotonic()
    with pytest.raises(ModelError) as caught:
        call(str(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and message.isprintable()
    assert all(word in message for word in words), message
    assert time.monotonic() - started < 5


def refused_by_inspect(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "\x1b[31mX" not in said
    assert all(word in " ".join(said.split()) for word in words), said


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a": 1, "a": 2}', "'a' twice"),
        ('{"b": {"a": 1, "c": [{"a": 1, "a": 1}]}}', "'a' twice"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"a": -' + "9" * 200 + "}", "digits"),
        ('{"a": NaN}', "NaN"),
        ('{"a": [-Infinity]}', "-Infinity"),
        ('{"a": 1e999}', "too large"),
        ("[" * 70 + "]" * 70, "deeper"),
        ("[" * 100_000, "deeper"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ("{'a': 1}", ""),
    ],
)
def test_json_that_is_not_taken(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        strict_json.parse(text)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json", INDEX])
def test_every_json_of_the_folder_is_read_so(folder: Path, file: str) -> None:
    good = (folder / file).read_text()
    for text in ('{"x": 1, "x": 2,' + good[1:], '{"x": ' + "9" * 5000 + "," + good[1:], good[:-2]):
        (folder / file).write_text(text)
        refused(open_subject, folder, file, "not valid JSON")


def test_json_takes_what_real_files_hold() -> None:
    text = '{"model_max_length": 1000000000000000019884624838656, "a": [1.5e-06, null, true], "ü": "\\u00fc"}'
    assert strict_json.parse(text) == json.loads(text)


def test_a_small_file_that_is_huge_is_not_read(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**40)
    refused(load_config, folder, "larger than 32 MiB")


def test_words_of_a_stranger_are_cut_and_escaped() -> None:
    assert first_line("a\x1b[2Jb\nsecond") == "a\\x1b[2Jb"
    assert len(first_line("x" * 10_000)) == 300


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("num_hidden_layers", value) for value in (10**9, 10**40, 0, -1, 1.5, "3", True, None, [3], {})],
        *[(key, 10**9) for key in ("num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size")],
        *[(key, 0) for key in ("num_attention_heads", "hidden_size", "vocab_size", "intermediate_size", "head_dim")],
        *[("vocab_size", 10**15), ("num_key_value_heads", 3), ("head_dim", 7), ("max_position_embeddings", 10**12)],
        *[("rms_norm_eps", value) for value in (0, -1e-6, 1e300, "x", True)],
        *[("mlp_only_layers", value) for value in ("x", 7, [[0]], ["a"])],
        *[("rope_parameters", value) for value in (7, {"rope_theta": 0}, {"rope_theta": -1, "rope_type": "default"})],
        ("num_labels", 10**9),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_scaling", {"type": "yarn", "factor": 4.0, "mscale": "x"}),
        ("rope_scaling", {"type": "longrope", "factor": 4.0, "long_factor": [1.0], "short_factor": [1.0]}),
        ("rope_scaling", {"type": ["yarn"], "factor": 4.0}),
    ],
)
def test_sizes_out_of_bounds(folder: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any) -> None:
    edited(folder, "config.json", **{key: value})
    refused(load_config, folder, key.removeprefix("rope_") if key == "rope_parameters" else key)
    refused_by_inspect(folder, capsys, "config.json")


@pytest.mark.parametrize(("key", "value"), [("head_dim", 64), ("num_key_value_heads", 2)])
def test_heads_of_latent_attention(pristine: dict[str, Path], tmp_path: Path, key: str, value: int) -> None:
    folder = Path(shutil.copytree(pristine["deepseek_v3"], tmp_path / "m"))
    refused(load_config, edited(folder, "config.json", **{key: value}), key)


def test_the_outer_part_of_a_nested_config_is_bounded_too(pristine: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine["kimi_k25"], tmp_path / "m"))
    refused(load_tokenizer, edited(folder, "config.json", num_labels=10**9), "num_labels")


@pytest.mark.parametrize("value", [0, -1.0, 1e300, "x"])
def test_scaling_of_routed_experts_is_positive(pristine: dict[str, Path], tmp_path: Path, value: Any) -> None:
    folder = Path(shutil.copytree(pristine["deepseek_v3"], tmp_path / "m"))
    refused(load_config, edited(folder, "config.json", routed_scaling_factor=value), "routed_scaling_factor")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 1000, "num_local_experts": 100_000},
        {"hidden_size": 2**20, "moe_intermediate_size": 2**22, "num_local_experts": 100_000},
    ],
)
def test_sizes_that_are_large_together(folder: Path, capsys: pytest.CaptureFixture[str], sizes: dict[str, int]) -> None:
    edited(folder, "config.json", **sizes)
    refused_by_inspect(folder, capsys, "at most")


@pytest.mark.parametrize("value", [4, 100_000])
def test_one_setting_under_two_names(folder: Path, capsys: pytest.CaptureFixture[str], value: int) -> None:
    edited(folder, "config.json", num_experts=value, num_local_experts=8)
    refused_by_inspect(folder, capsys, "num_experts", "num_local_experts", "the same setting")
    edited(folder, "config.json", num_experts=8)
    load_config(str(folder))


def test_a_config_far_larger_than_its_weights_takes_no_memory(folder: Path) -> None:
    edited(folder, "config.json", hidden_size=2**15, intermediate_size=2**20, num_hidden_layers=100)
    refused(load_model, folder, "parameters, but the weights have")


@pytest.mark.parametrize(
    "settings", ["nf4", 7, ["x"], {"quant_method": ["x"]}, {"quant_method": {}}, True, {"quant_method": 7}]
)
def test_quantization_of_a_wrong_type(folder: Path, capsys: pytest.CaptureFixture[str], settings: Any) -> None:
    edited(folder, "config.json", quantization_config=settings)
    refused(load_model, folder, "quantiz")
    refused_by_inspect(folder, capsys, "quantization_config")


@pytest.mark.parametrize(
    "changes",
    [
        {"config_groups": [1]},
        {"config_groups": {"a": 7}},
        {"config_groups": {"a": {"weights": "x"}}},
        {"config_groups": {"a": {"weights": {"group_size": [32]}}}},
        {"sparsity_config": "x"},
    ],
)
def test_quantization_with_parts_of_a_wrong_type(folder: Path, changes: dict[str, Any]) -> None:
    edited(folder, "config.json", quantization_config={"quant_method": "compressed-tensors", **changes})
    refused(lambda model: load_frozen(model, expert_format="native"), folder)


@pytest.mark.parametrize("changes", [{"format": "x"}, {"format": ["nf4"]}, {"no_such": 1}, {"expert_range": 7}])
def test_quantization_that_is_not_as_we_write_it(folder: Path, changes: dict[str, Any]) -> None:
    edited(folder, "config.json", quantization_config={"quant_method": "gtqlora", **changes})
    refused(lambda model: load_frozen(model, expert_format="native"), folder, "quantization_config")


# --- settings that are switched off ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "becomes"),
    [
        ("attention_dropout", 0.2, 0.0),
        ("hidden_dropout", 1, 0.0),
        ("resid_pdrop", 0.1, 0.0),
        ("router_jitter_noise", 0.3, 0.0),
        ("output_router_logits", True, False),
        ("output_hidden_states", True, False),
        ("return_dict", False, True),
    ],
)
def test_what_changes_training_is_off_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any, becomes: Any
) -> None:
    edited(folder, "config.json", **{key: value})
    with caplog.at_level(logging.WARNING, "gtqlora"):
        for _ in range(2):
            assert getattr(load_config(str(folder))[1], key) == becomes
    said = [record.message for record in caplog.records if str(folder) in record.message]
    assert len(said) == 1 and f"{key} = {value}" in said[0] and "switches it off" in said[0]


def test_a_model_with_dropout_trains_as_it_evaluates(folder: Path) -> None:
    model = load_model(str(edited(folder, "config.json", attention_dropout=0.5)))[1]
    ids = models.some_tokens()
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_an_ordinary_config_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_config(str(folder))
    assert not [record for record in caplog.records if str(folder) in record.message]


@pytest.mark.parametrize("setting", [{"num_labels": 100}, {"is_decoder": False}, {"pruned_heads": {"0": [1]}}])
def test_settings_of_other_tasks_do_nothing(folder: Path, setting: dict[str, Any]) -> None:
    started = time.monotonic()
    load_model(str(edited(folder, "config.json", **setting)))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("architectures", value)
            for value in ([None], "Qwen3MoeForCausalLM", 7, {"a": 1}, [["Qwen3MoeForCausalLM"]])
        ],
        *[("auto_map", value) for value in (None, 7, ["AutoConfig"])],
        *[("transformers_version", value) for value in (5, [None])],
        *[("is_encoder_decoder", value) for value in (None, 0, "no")],
        *[("id2label", value) for value in ([], {"first": "a"}, {"0": None}, {"9" * 5000: "a"})],
        *[("label2id", value) for value in (["a"], {"a": "0"}, {"a": True})],
        *[("problem_type", value) for value in ("poetry", ["regression"])],
    ],
)
def test_unused_settings_of_a_wrong_type(
    folder: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    edited(folder, "config.json", **{key: value})
    refused(load_config, folder, f"{key} = ", "config.json; must be ")
    refused_by_inspect(folder, capsys, f"{key} = ")


def test_types_are_checked_around_and_inside_of_a_nested_config(pristine: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine["kimi_k25"], tmp_path / "m"))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    refused(load_config, edited(folder, "config.json", text_config={**text, "architectures": [None]}), "architectures")
    refused(load_config, edited(folder, "config.json", text_config=text, id2label=7), "id2label")


@pytest.mark.parametrize(
    "setting",
    [
        *[{"architectures": value} for value in (None, [], ["Other"])],
        *[{"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, {"problem_type": "regression"}],
        *[{"auto_map": {"AutoConfig": "code.Config"}}, {"transformers_version": None}, {"is_encoder_decoder": False}],
    ],
)
def test_unused_settings_of_a_right_type(folder: Path, setting: dict[str, Any]) -> None:
    assert load_config(str(edited(folder, "config.json", **setting)))[0].model_type == "qwen3_moe"


@pytest.mark.parametrize("text", ['{"__float__": "Infinity"}', '{"__float__": "Infinity", "model_type": "qwen3_moe"}'])
def test_a_config_that_is_a_number(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(load_config, folder, "config.json")


# --- weights ---------------------------------------------------------------------------------------------------------


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def other_shard(folder: Path, tensor: str) -> Path:
    return next(file for file in sorted(folder.glob("*.safetensors")) if file != shard_of(folder, tensor))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", [GATE, "model.embed_tokens.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
@pytest.mark.parametrize("expert_format", ["bf16", "nf4"])
def test_weights_are_floats_unless_declared(folder: Path, dtype: torch.dtype, name: str, expert_format: str) -> None:
    models.edit_tensors(shard_of(folder, name), lambda t: {**t, name: t[name].to(dtype)})
    refused(lambda model: load_frozen(model, expert_format=expert_format), folder, name, "quantized")


@pytest.mark.parametrize("same", [True, False])
def test_a_tensor_in_two_shards(folder: Path, same: bool) -> None:
    right = load_file(shard_of(folder, GATE))[GATE]
    copy = right.clone() if same else torch.zeros_like(right)
    models.edit_tensors(other_shard(folder, GATE), lambda t: {**t, GATE: copy})
    for experts in ("bf16", "nf4"):
        refused(
            lambda model, expert_format=experts: load_frozen(model, expert_format=expert_format),
            folder,
            GATE,
            "remove one",
        )


def test_a_tensor_in_the_wrong_shard(folder: Path) -> None:
    moved, home = load_file(shard_of(folder, GATE))[GATE], shard_of(folder, GATE)
    models.edit_tensors(other_shard(folder, GATE), lambda t: {**t, GATE: moved})
    models.edit_tensors(home, lambda t: {name: tensor for name, tensor in t.items() if name != GATE})
    refused(load_model, folder, GATE, home.name, "does not hold it")


def test_a_tensor_that_only_the_index_has(folder: Path) -> None:
    models.edit_json(
        folder / INDEX, lambda old: {**old, "weight_map": {**old["weight_map"], "model.x": shard_of(folder, GATE).name}}
    )
    refused(load_model, folder, "model.x", "does not hold it")


def test_a_tensor_under_two_names(pristine: dict[str, Path], tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "kimi_k25")
    models.edit_tensors(folder / "model.safetensors", lambda t: {**t, GATE: torch.zeros(8, 32)})
    refused(load_model, folder, GATE, "the same weight")


def test_experts_in_two_forms(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "qwen3_moe")
    fused = "model.layers.1.mlp.experts.down_proj"
    models.edit_tensors(folder / "model.safetensors", lambda t: {**t, fused: torch.zeros(8, 32, 16)})
    refused(load_model, folder, fused, "the same experts")


@pytest.mark.parametrize("exists", [True, False])
def test_an_index_that_was_left_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], exists: bool) -> None:
    folder = models.save_tiny(tmp_path / "m", "qwen3_moe")
    other = "model-00001-of-00002.safetensors"
    if exists:
        save_file({"lm_head.weight": torch.zeros(3)}, folder / other)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": other}}))
    refused(load_model, folder, INDEX, other, "left over")
    refused_by_inspect(folder, capsys, INDEX)


def test_an_index_of_the_one_file_is_in_order(tmp_path: Path) -> None:
    folder = models.save_tiny(tmp_path / "m", "qwen3_moe")
    names = load_file(folder / "model.safetensors")
    mapped = dict.fromkeys(names, "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    load_model(str(folder))


# --- tokenizer and generation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", [[1]], 10**9, -1, True, 1.5, {}, [1, "x"], models.VOCABULARY])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_tokens_are_tokens(folder: Path, capsys: pytest.CaptureFixture[str], file: str, value: Any) -> None:
    edited(folder, file, eos_token_id=value)
    refused(open_subject, folder, "eos_token_id" if file.startswith("gen") or isinstance(value, int) else "config")
    refused_by_inspect(folder, capsys)


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id"])
def test_other_special_tokens_are_tokens(folder: Path, key: str) -> None:
    refused(open_subject, edited(folder, "generation_config.json", **{key: 10**6}), key)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"temperature": "hot"}', '{"num_beams": [1]}'])
def test_broken_generation_config(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (folder / "generation_config.json").write_text(text)
    if text.startswith('{"'):
        open_subject(str(folder))  # nothing that is used
        return
    refused(open_subject, folder, "generation_config.json")
    refused_by_inspect(folder, capsys, "generation_config.json")


@pytest.mark.parametrize("token", ["pad_token", "eos_token"])
def test_a_token_beyond_the_embedding_is_named(folder: Path, token: str) -> None:
    edited(folder, "tokenizer_config.json", **{token: "[NEW]"})
    refused(load_tokenizer, folder, token, "'[NEW]'", f"{models.VOCABULARY} rows")


def test_a_tokenizer_without_pad_and_end(folder: Path) -> None:
    edited(folder, "tokenizer_config.json", pad_token=None, eos_token=None)
    refused(load_tokenizer, folder, "neither a pad_token nor an eos_token")


def test_a_model_that_nothing_ends(folder: Path) -> None:
    edited(folder, "tokenizer_config.json", eos_token=None)
    edited(folder, "generation_config.json", eos_token_id=None)
    edited(folder, "config.json", eos_token_id=None)
    refused(open_subject, folder, "no token ends an answer")


@pytest.mark.parametrize("found", [7, True, [], [{"name": "rag", "template": "x"}], {"rag": "x"}, "", " ", [7]])
def test_a_chat_template_that_is_none(folder: Path, capsys: pytest.CaptureFixture[str], found: Any) -> None:
    (folder / "chat_template.jinja").unlink()
    edited(folder, "tokenizer_config.json", chat_template=found)
    refused(load_tokenizer, folder, "chat template")
    refused_by_inspect(folder, capsys, "chat template")


def test_a_list_of_templates_gives_its_default(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ messages }}"}]
    edited(folder, "tokenizer_config.json", chat_template=several)
    assert load_tokenizer(str(folder)).chat_template == "{{ messages }}"


def test_inspect_counts_no_template_that_is_not_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chat_template"] is False
    refused(load_tokenizer, folder, "no chat template", "processors only")
