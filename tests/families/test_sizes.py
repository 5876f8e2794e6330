"""Sizes from a config.json alone against the models that transformers makes of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gtqlora.errors import ModelError
from gtqlora.families import bind, load_config, meta_model, parameter_counts
from gtqlora.families.kinds import ATTENTION, EMBEDDINGS, GATES, ROUTED
from gtqlora.families.sizes import sizes_of
from tests import models

KIMI = Path(__file__).parents[1] / "data" / "kimi_k25_config.json"
OPTIONAL = ("layer_types", "mlp_layer_types", "mlp_only_layers", "decoder_sparse_step", "tie_word_embeddings")


def config_of(family: str, folder: Path, **changes: Any) -> str:
    """The config.json of a tiny model, alone in a folder, with keys changed, or left out where the value is None."""
    models.save_tiny(folder / "whole", family)
    raw = json.loads((folder / "whole" / "config.json").read_text())
    text = raw.get("text_config", raw)
    for key, value in changes.items():
        text.pop(key, None) if value is None else text.update({key: value})
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder / "config.json")


def counted(path: str, rank: int) -> tuple[dict[str, int], int]:
    """What the model itself has by kind, and its LoRA weights."""
    family, config = load_config(path)
    skeleton = meta_model(family, config)
    groups = parameter_counts(skeleton, bind(skeleton, family), rank)
    lora = sum(group.trained_parameters for group in groups if group.name != GATES)
    return {group.name: group.parameters for group in groups}, lora


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict.fromkeys(OPTIONAL),
        {"tie_word_embeddings": True, "attention_bias": True, "use_qk_norm": True, "q_lora_rank": 16},
        {"hidden_size": 48, "num_hidden_layers": 5, "vocab_size": 700, "mlp_only_layers": [0, 1]},
    ],
    ids=["as it is", "options left out", "options on", "other sizes"],
)
def test_sizes_are_those_of_the_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    if "num_hidden_layers" in changes:
        changes |= dict.fromkeys(("layer_types", "mlp_layer_types"))
    path = config_of(family, tmp_path, **changes)
    found = sizes_of(path)
    assert (found.counts(), found.lora(4)) == counted(path, 4)


def test_queries_of_latent_attention_may_be_one_matrix(tmp_path: Path) -> None:
    path = config_of("deepseek_v3", tmp_path)
    raw = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**raw, "q_lora_rank": None}))
    assert (sizes_of(path).counts(), sizes_of(path).lora(8)) == counted(path, 8)


def test_the_published_sizes_of_kimi_k2_5() -> None:
    found = sizes_of(str(KIMI))
    counts = found.counts()
    assert sum(counts.values()) == 1_026_408_209_408
    assert counts[ROUTED] == 1_014_686_023_680 and counts[GATES] == 165_150_720
    assert counts[EMBEDDINGS] == 2 * 163_840 * 7168 and counts[ATTENTION] > 0
    assert found.native == "int4-g32" and found.context == 262_144 and found.width == 2
    assert found.active() == pytest.approx(32.6e9, rel=0.05)  # "1 T parameters, 32 B active"


def refused(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        sizes_of(str(folder / "config.json"))
    return str(error.value)


def test_what_cannot_be_sized_is_refused_by_name(tmp_path: Path) -> None:
    assert "num_hidden_layers" in refused(tmp_path, {"model_type": "mixtral", "hidden_size": 8})
    dense = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    assert "mixtral" in refused(tmp_path, dense)
    unknown = refused(tmp_path, {"model_type": "brandnew_moe", "num_experts": 8})
    assert "qwen3_moe" in unknown and "brandnew_moe" in unknown
    tiny = json.loads(Path(config_of("qwen3_moe", tmp_path)).read_text())
    assert "num_experts_per_tok = 99" in refused(tmp_path, {**tiny, "num_experts_per_tok": 99})
    assert "no layer" in refused(tmp_path, {**tiny, "mlp_only_layers": [0, 1, 2]})
