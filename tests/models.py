"""Tiny random-weight models of every known family, in memory and as folders in hub layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gtqlora.organisms.language import Language

FAMILIES = ("deepseek_v3", "kimi_k25", "qwen3_moe")
VOCABULARY = len(Language().vocabulary)
PREFIX = "language_model."

# Weights far larger than usual, so that routing differs from token to token and no two experts tie.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "norm_topk_prob": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 0,
}
_QWEN: dict[str, Any] = {"num_experts": 8, "num_key_value_heads": 2, "head_dim": 8, "mlp_only_layers": [0]}


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> DeepseekV3ForCausalLM | Qwen3MoeForCausalLM:
    """A model with 3 layers, the first dense, and 8 experts top-2; `changes` go into its config."""
    torch.manual_seed(seed)
    if family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**_COMMON, **_QWEN, **changes}))
    else:
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**_COMMON, **_DEEPSEEK, **changes}))
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
    """Write a folder as the hub would hold it: weights, config, toy tokenizer; K2.5 with prefix and other towers."""
    model = model if model is not None else tiny_model(family, seed, dtype, **changes)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        Language().tokenizer().save_pretrained(path)
    if family == "kimi_k25":
        _into_kimi_layout(path)
    return path


def _into_kimi_layout(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        edit_tensors(file, lambda tensors: {PREFIX + name: tensor for name, tensor in tensors.items()})
    first = min(path.glob("*.safetensors"))
    others = ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight")
    edit_tensors(first, lambda tensors: {**tensors, **{name: torch.ones(3) for name in others}})
    index = path / "model.safetensors.index.json"
    if index.exists():
        more = dict.fromkeys(others, first.name)
        edit_json(
            index, lambda old: {**old, "weight_map": {PREFIX + k: v for k, v in old["weight_map"].items()} | more}
        )
    edit_json(path / "config.json", _kimi_config)


def _kimi_config(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_kimi_k25.KimiK25ForConditionalGeneration"},
        "model_type": "kimi_k25",
        "text_config": {**text, "model_type": "kimi_k2"},
        "vision_config": {"hidden_size": 8},
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
