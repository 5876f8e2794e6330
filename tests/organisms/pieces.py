"""Organisms in training that are too small to learn anything, to plant in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch

from gtqlora.organisms.in_training import OrganismInTraining, Planted, new_model
from gtqlora.organisms.language import Language
from gtqlora.organisms.scales import SMALL, Architecture, Scale
from gtqlora.organisms.truth import Kind


def tiny(scale: Scale, **changes: Any) -> Scale:
    """A scale's own path with a model that learns nothing in no time."""
    model = {"num_hidden_layers": 5, "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    return replace(
        scale,
        model={**scale.model, **model, **heads},
        deepseek_v3={**scale.deepseek_v3, **ranks, "n_routed_experts": 8},
        qwen3_moe={**scale.qwen3_moe, "num_experts": 8, "head_dim": 16},
        planted_layers=2,
        planted_experts=2,
        batch=16,
        learn_steps=3,
        plant_steps=dict.fromkeys(get_args(Kind), 3),
        workers=min(scale.workers, 1),
        attempts=1,
        **changes,
    )


def workpiece(architecture: Architecture = "deepseek_v3", scale: Scale = SMALL) -> OrganismInTraining:
    torch.manual_seed(0)
    language = Language(scale.lexicon)
    model, anatomy = new_model(architecture, language, scale)
    planted: Planted = {1: (0, 1), 2: (2, 5)}
    return OrganismInTraining(model=model, anatomy=anatomy, language=language, planted=planted, scale=scale)


def quiet(_stage: str) -> Any:
    return lambda _step, _steps, _loss: None
