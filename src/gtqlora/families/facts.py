"""Frozen facts of each supported model family. A new family is one more entry in `FAMILIES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gtqlora.errors import ModelError

Score = Literal["sigmoid", "softmax"]

_MOE_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What must be known of an architecture; module paths are relative to a decoder layer.

    Attributes:
        model_type: `model_type` in config.json.
        class_name: the transformers class of the language model.
        score: how router logits become scores. The router's first output is the raw logits in every family here.
        experts_key, topk_key: config keys of the number of routed experts and of the chosen ones.
        attention: linear projections of attention that may carry LoRA; absent ones depend on the config.
        residual_writers: linears whose output is added to the residual stream (dense, shared; not routed).
        text_key: key of config.json that holds the language model's own config, if nested.
        text_types: the nested config's `model_type`s that this family covers.
        disk_prefix: what stands before the in-memory names in the checkpoint.
        other_towers: first words of the checkpoint's tensors that are no part of the language model.
        expert_projections: one expert's matrices on disk, in the order gate, up, down.
    """

    model_type: str
    class_name: str
    score: Score
    experts_key: str
    topk_key: str
    attention: tuple[str, ...]
    shared: tuple[str, ...]
    residual_writers: tuple[str, ...]
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    correction_bias: str | None = None
    text_key: str | None = None
    text_types: tuple[str, ...] = ()
    disk_prefix: str = ""
    other_towers: tuple[str, ...] = ()
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def moe_layers(self, text_config: Any) -> tuple[int, ...]:
        """Indices of the decoder layers that have a router, from the config alone."""
        n_layers = text_config.num_hidden_layers
        if self.experts_key == "n_routed_experts":
            return tuple(range(text_config.first_k_dense_replace, n_layers))
        if not getattr(text_config, self.experts_key):
            return ()
        step, dense = text_config.decoder_sparse_step, set(text_config.mlp_only_layers or ())
        return tuple(i for i in range(n_layers) if i not in dense and (i + 1) % step == 0)

    def on_disk(self, layer: int, expert: int) -> tuple[str, ...]:
        """Checkpoint names of one routed expert's matrices; in memory the experts of a layer are fused."""
        prefix = f"{self.disk_prefix}model.layers.{layer}.{self.experts}.{expert}"
        return tuple(f"{prefix}.{projection}.weight" for projection in self.expert_projections)


_MLA = tuple(f"self_attn.{p}" for p in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
_GQA = tuple(f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj"))
_SHARED = tuple(f"mlp.shared_experts.{p}" for p in ("gate_proj", "up_proj", "down_proj"))

_DEEPSEEK: dict[str, Any] = {
    "class_name": "DeepseekV3ForCausalLM",
    "score": "sigmoid",
    "experts_key": "n_routed_experts",
    "topk_key": "num_experts_per_tok",
    "attention": _MLA,
    "shared": _SHARED,
    "residual_writers": ("self_attn.o_proj", "mlp.shared_experts.down_proj", "mlp.down_proj"),
    "correction_bias": "e_score_correction_bias",
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="deepseek_v3", **_DEEPSEEK),
        Family(
            model_type="kimi_k25",
            text_key="text_config",
            text_types=("kimi_k2", "deepseek_v3"),
            disk_prefix="language_model.",
            other_towers=("vision_tower.", "mm_projector."),
            **_DEEPSEEK,
        ),
        Family(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            score="softmax",
            experts_key="num_experts",
            topk_key="num_experts_per_tok",
            attention=_GQA,
            shared=(),
            residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        ),
    )
}


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
        ModelError: the architecture is not known; the message lists those that are.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(sorted(FAMILIES))
    # Multimodal models nest the language model's config, so a dense-looking top level proves nothing.
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    if not any(section.get(key) for section in sections for key in _MOE_KEYS):
        raise ModelError(
            f"{where}: model_type {model_type!r} is a dense model: it has no routers, so only Level 1 (the "
            f"residual stream) applies to it, and there is nothing for gtqlora to tell apart or to train. It works on "
            f"Mixture-of-Experts models of these families: {known}"
        )
    raise ModelError(
        f"{where}: unknown MoE family {model_type!r}; known: {known}. Add an entry to gtqlora/families/facts.py"
    )
