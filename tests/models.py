"""Tiny random-weight models of every known family, in memory and as folders in hub layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import tokenization_auto

from gtqlora.families import FAMILIES as KNOWN
from gtqlora.families.anatomy import is_norm
from gtqlora.organisms.language import Language

VOCABULARY = len(Language().vocabulary)
PREFIX = "language_model."
LAYERS, EXPERTS, HIDDEN, INNER, DENSE = 3, 8, 32, 16, 48

# Weights far larger than usual, so that routing differs from token to token and no two experts tie.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "norm_topk_prob": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_ROUTED_FROM_1: dict[str, dict[str, Any]] = {
    "all": {},
    "after_dense": {"first_k_dense_replace": 1},
    "sparse_step": {"mlp_only_layers": [0], "decoder_sparse_step": 1},
    "by_type": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
}
_GQA: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_GROUPED: dict[str, Any] = {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
}
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 24}
_HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_SIZES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**_GROUPED, **_MLA},
    "kimi_k25": {**_GROUPED, **_MLA},
    "glm4_moe": {**_GROUPED, **_GQA, "attention_bias": True, "use_qk_norm": False},
    "glm4_moe_lite": {**_GROUPED, **_MLA},
    "qwen3_moe": _GQA,
    "qwen2_moe": {**_GQA, **_SHARED},
    "qwen3_next": {**_GQA, **_SHARED, **_HYBRID},
    "qwen3_5_moe": {**_GQA, **_SHARED, **_HYBRID},
    "qwen3_5_moe_text": {**_GQA, **_SHARED, **_HYBRID},
    "mixtral": _GQA,
    "olmoe": _GQA,
}
FAMILIES = tuple(_SIZES)
CORE = ("deepseek_v3", "kimi_k25", "qwen3_moe")
"""For what does not hang on the architecture: a correction bias, a wrapper with a prefix, and neither."""
OTHERS = tuple(family for family in FAMILIES if family not in (*CORE, "qwen3_5_moe_text"))
"""All others, but for the one that only differs from `qwen3_5_moe` in how it lies on disk."""

# For these transformers puts Qwen's byte-level BPE in place of whatever tokenizer the folder names, which the words of
# the toy language are not made for.
tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS -= {"qwen3_5_moe", "qwen3_5_moe_text"}


def moe_layers(family: str) -> tuple[int, ...]:
    """Layers of a tiny model that have a router: not the first, where the architecture lets a config choose."""
    return tuple(range(0 if KNOWN[family].moe_layers_from == "all" else 1, LAYERS))


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with 3 layers and 8 experts top-2; `changes` go into its config.

    `moe_intermediate_size` among them is an expert's inner size under whatever name the family has for it.
    """
    torch.manual_seed(seed)
    known = KNOWN[family]
    sizes = {**_COMMON, known.experts_key: EXPERTS, **_ROUTED_FROM_1[known.moe_layers_from], **_SIZES[family]}
    sizes[known.inner_key] = changes.pop("moe_intermediate_size", INNER)
    model_class = getattr(transformers, known.class_name)
    model = model_class(model_class.config_class(**{**sizes, **changes}))
    draw = torch.Generator().manual_seed(seed)
    for module in filter(is_norm, model.modules()):
        for parameter in module.parameters():  # fresh ones are all alike, which hides what norms do
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    # Parameters only: transformers keeps rotary frequencies and the correction bias fp32 at every dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = 0.2 * torch.randn(buffer.shape)
    return model.eval()


def save_tiny(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    model: PreTrainedModel | None = None,
    **changes: Any,
) -> Path:
    """Write a folder as the hub would hold it: weights, config, toy tokenizer; wrapped models with other towers.

    In a run of the tests it is made once for the same arguments, and copied from then on.
    """
    if model is not None or KEPT_IN is None:
        model = model if model is not None else tiny_model(family, seed, dtype, **changes)
        return _written(path, family, model, tokenizer, max_shard_size)
    known = (family, seed, dtype, tokenizer, max_shard_size, repr(sorted(changes.items())))
    if known not in _kept:
        folder = KEPT_IN / str(len(_kept))
        _written(folder, family, tiny_model(family, seed, dtype, **changes), tokenizer, max_shard_size)
        _kept[known] = folder, torch.get_rng_state()
    folder, drawn = _kept[known]
    shutil.copytree(folder, path, copy_function=shutil.copy, dirs_exist_ok=True)
    torch.set_rng_state(drawn)
    return path


KEPT_IN: Path | None = None
"""A folder for models that are copied."""
_kept: dict[tuple[object, ...], tuple[Path, Tensor]] = {}
"""Folders there, and the state of the generator after they were made."""


def _written(path: Path, family: str, model: PreTrainedModel, tokenizer: bool, max_shard_size: str) -> Path:
    model.save_pretrained(path, max_shard_size=max_shard_size, save_original_format=family != "qwen3_5_moe")
    if tokenizer:
        Language().save(path)
    if family in _WRAPPED:
        _wrap(path, family)
    return path


def _kimi_name(name: str) -> str:
    return PREFIX + name


def _qwen_name(name: str) -> str:
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


_WRAPPED: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "kimi_k25": (_kimi_name, ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight")),
    "qwen3_5_moe": (
        _qwen_name,
        ("model.visual.patch_embed.proj.weight", "mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight"),
    ),
}


def disk_name(family: str, name: str) -> str:
    """What a tensor of the language model is called in the checkpoint."""
    if family == "mixtral":
        return name.replace(".mlp.", ".block_sparse_moe.")
    return _WRAPPED[family][0](name) if family in _WRAPPED else name


def expert_matrices(
    family: str,
    tensors: dict[str, Tensor],
    layer: int,
    expert: int,
    get: Callable[[str], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of one expert in a checkpoint, in whichever form it has them."""
    get = get or tensors.__getitem__
    if family == "qwen3_5_moe":  # fused
        stem = disk_name(family, f"model.layers.{layer}.mlp.experts")
        gate, up = get(f"{stem}.gate_up_proj")[expert].chunk(2)
        return gate, up, get(f"{stem}.down_proj")[expert]
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    stem = disk_name(family, f"model.layers.{layer}.mlp.experts.{expert}")
    gate, up, down = (get(f"{stem}.{name}.weight") for name in names)
    return gate, up, down


def _wrap(path: Path, family: str) -> None:
    rename, others = _WRAPPED[family]
    for file in path.glob("*.safetensors"):
        edit_tensors(file, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    first = min(path.glob("*.safetensors"))
    edit_tensors(first, lambda tensors: {**tensors, **{name: torch.ones(3, 3) for name in others}})
    index = path / "model.safetensors.index.json"
    if index.exists():
        more = dict.fromkeys(others, first.name)
        edit_json(index, lambda old: {**old, "weight_map": {rename(k): v for k, v in old["weight_map"].items()} | more})
    edit_json(path / "config.json", _kimi_config if family == "kimi_k25" else _qwen_config)


def _kimi_config(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration"},
        "model_type": "kimi_k25",
        "text_config": {**text, "model_type": "kimi_k2"},
        "vision_config": {"hidden_size": 8},
    }


def _qwen_config(text: dict[str, Any]) -> dict[str, Any]:
    """As the released models have it: keys that transformers ignores among them, and no `norm_topk_prob`."""
    rope = {**text["rope_parameters"], "mrope_interleaved": True, "mrope_section": [1, 0, 0]}
    more = {"rope_parameters": rope, "attn_output_gate": True, "full_attention_interval": 4, "mtp_num_hidden_layers": 1}
    kept = {key: value for key, value in text.items() if key != "norm_topk_prob"}
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "image_token_id": 3,
        "text_config": {**kept, **more, "model_type": "qwen3_5_moe_text"},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"hidden_size": 8, "model_type": "qwen3_5_moe"},
    }


def edit_json(file: Path, change: Any) -> None:
    """Rewrite a JSON file through `change(old) -> new`."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def edit_tensors(file: Path, change: Any) -> None:
    """Rewrite a safetensors file through `change(tensors) -> tensors`."""
    tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})


def some_tokens(seed: int = 0, shape: tuple[int, int] = (4, 12)) -> Tensor:
    """Random token ids of the toy vocabulary, none of them special."""
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
