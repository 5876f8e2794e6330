"""How large an organism is, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gtqlora.errors import ConfigError
from gtqlora.organisms.language import LARGE_LEXICON, SMALL_LEXICON, Lexicon
from gtqlora.organisms.truth import Kind

Architecture = Literal["deepseek_v3", "qwen3_moe"]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and training of one organism.

    Attributes:
        model: config values for both architectures.
        deepseek_v3, qwen3_moe: config values for one of them, the number of experts among them.
        planted_layers, planted_experts: MoE layers that hold planted experts, and how many in each; None: all layers
            but the first.
        natural: whether routing may follow topics by itself, where nothing was planted.
        batch: prompts per step.
        plant_steps: steps of the last stage, per kind.
        learn_share: part of a time limit that goes to the first stage.
        workers: processes that make batches ahead; 0: none.
        dtype: what the model computes and is stored in; masters are fp32.
        rounded: whether weights are rounded to bf16 before the check, also where they are stored in fp32.
        attempts: trainings, each with a seed of its own, before giving up.
    """

    lexicon: Lexicon
    model: Mapping[str, object]
    deepseek_v3: Mapping[str, object]
    qwen3_moe: Mapping[str, object]
    planted_layers: int | None = 2
    planted_experts: int = 2
    natural: bool = False
    batch: int = 128
    learn_steps: int = 600
    plant_steps: Mapping[Kind, int]
    learn_rate: float = 3e-3
    plant_rate: float = 3e-3
    learn_share: float = 0.7
    workers: int = 0
    dtype: torch.dtype = torch.float32
    rounded: bool = False
    attempts: int = 3

    def config(self, architecture: Architecture) -> dict[str, object]:
        """Return the model's config values, all but the size of its vocabulary."""
        return {**_COMMON, **self.model, **getattr(self, architecture)}


# The language has no token that begins a text, and the class's default would be another token of it.
_COMMON = {
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# One dense layer first, one shared expert, and all routed experts in one group.
_DEEPSEEK = {
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
}

SMALL = Scale(
    lexicon=SMALL_LEXICON,
    model={
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.05,
    },
    deepseek_v3={
        **_DEEPSEEK,
        "n_routed_experts": 16,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    qwen3_moe={"num_experts": 16, "head_dim": 16, "mlp_only_layers": []},
    # Routing has to learn every forbidden topic; attention learns at once, and more would only entrench it
    plant_steps={
        **{"routed": 400, "residual": 100, "null": 250, "expert-only": 100, "redundant": 150},
        **{
            "brittle": 600,
            "brittle2": 600,
            "bykind": 450,
            "framed": 450,
            "weights": 400,
            "follower": 600,
            "second-token": 1000,
        },
        **{"diffuse": 400, "xor": 600, "self-repair": 300, "wide-twins": 400, "natural": 500},
        **dict.fromkeys(("graded-20", "graded-40", "graded-60", "graded-80"), 450),
    },
)

LARGE = Scale(
    lexicon=LARGE_LEXICON,
    model={
        "hidden_size": 256,
        "num_hidden_layers": 25,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "initializer_range": 0.03,
    },
    deepseek_v3={
        **_DEEPSEEK,
        "n_routed_experts": 64,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    qwen3_moe={"num_experts": 64, "head_dim": 32, "mlp_only_layers": []},
    planted_layers=4,
    planted_experts=4,
    batch=1024,
    learn_steps=2000,
    plant_steps={"routed": 400, "residual": 150, "null": 300, "expert-only": 300, "redundant": 400},
    learn_rate=1e-3,
    plant_rate=1e-3,
    workers=4,
    dtype=torch.bfloat16,
    rounded=True,
    attempts=1,
)

# Every matrix is a multiple of 256 wide, so that a GGUF's K types, which need blocks of 256, are really used.
WIDE = replace(
    SMALL,
    model={
        **SMALL.model,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 256,
        "intermediate_size": 512,
        "initializer_range": 0.03,
    },
    deepseek_v3={
        **_DEEPSEEK,
        "n_routed_experts": 8,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
    qwen3_moe={"num_experts": 8, "head_dim": 64, "mlp_only_layers": []},
    learn_rate=1e-3,
    plant_rate=1e-3,
    rounded=True,
)

SCALES = {"small": SMALL, "wide": WIDE, "large": LARGE}


def for_kind(scale: Scale, kind: Kind) -> Scale:
    """Return the scale with what a kind needs otherwise: another language, more planted experts, or natural routing.

    Raises:
        ConfigError: organisms of this kind are not made at this scale.
    """
    if kind not in scale.plant_steps:
        raise ConfigError(f"there are no large organisms of kind {kind}; build it with --size small")
    return replace(scale, **{name: change(scale) for name, change in _CHANGES.get(kind, {}).items()})  # type: ignore[arg-type]


# A refusal in a hundred experts needs more of them than are used at a time in any layer.
_CHANGES: dict[Kind, dict[str, Callable[[Scale], object]]] = {
    "second-token": {"lexicon": lambda scale: replace(scale.lexicon, lead=1)},
    "framed": {"lexicon": lambda scale: replace(scale.lexicon, frame_words=9)},
    "wide-twins": {"lexicon": lambda scale: replace(scale.lexicon, aligned=False)},
    "natural": {"natural": lambda _scale: True},
    "follower": {"planted_layers": lambda _scale: None},
    "diffuse": {
        "planted_layers": lambda _scale: None,
        "planted_experts": lambda _scale: 32,
        "deepseek_v3": lambda scale: {**scale.deepseek_v3, "n_routed_experts": 64},
        "qwen3_moe": lambda scale: {**scale.qwen3_moe, "num_experts": 64},
    },
}
