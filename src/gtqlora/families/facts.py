"""Frozen facts of each supported model family. A new family is one more entry in `FAMILIES`, and nothing else.

Everything that gtqlora knows of an architecture stands here: which config keys hold what, where modules lie, what they
are for, and how the router weighs experts. What a checkpoint's tensors are called is not a fact of a family: it is
read from the checkpoint, see `families.names`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from gtqlora.errors import ModelError
from gtqlora.families.unknown import refusal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from gtqlora.routing import RouterSpec

    class TextConfig(PreTrainedConfig):
        """A language model's config, with the keys that gtqlora reads by name.

        It exists for type checkers only: transformers has a class of its own for every family.
        """

        vocab_size: int
        hidden_size: int
        num_hidden_layers: int
        max_position_embeddings: int
        # Only some families have these; a `Family` says which ones count.
        first_k_dense_replace: int
        decoder_sparse_step: int
        mlp_only_layers: list[int] | None
        mlp_layer_types: list[str]
        norm_topk_prob: bool
        n_group: int | None
        topk_group: int | None


MoeLayers = Literal["all", "after_dense", "sparse_step", "by_type"]
Normalize = Literal["key", "always", "never"]
Windows = Literal["none", "all", "by_type"]

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""Parameters into which transformers fuses a layer's routed experts: [E, 2I, D], gate's rows first, and [E, D, I]."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What must be known of an architecture. Module paths are relative to a decoder layer unless said otherwise.

    Attributes:
        model_type: `model_type` in config.json.
        class_name: the transformers class of the language model.
        score: how router logits become scores. The router's first output is the raw logits in every family here.
        normalize: whether the weights of a token's experts are divided by their sum: as `norm_topk_prob` says, always,
            or never.
        scale_key: config key of the factor that the router multiplies weights by, if there is one.
        grouped: whether experts are chosen from `topk_group` of `n_group` groups.
        rounds: whether the router returns weights in the dtype of its logits; otherwise they stay fp32.
        moe_layers_from: which decoder layers have a router: all; those after the first `first_k_dense_replace`; every
            `decoder_sparse_step`-th but for `mlp_only_layers`; or those that `mlp_layer_types` calls "sparse".
        experts_key, topk_key, inner_key: config keys of the number of routed experts, of those that a token uses, and
            of an expert's intermediate size.
        attention: linear projections of attention, linear attention included, that carry LoRA; those that a layer lacks
            depend on the config.
        shared: linear projections of the shared experts, which carry LoRA; every MoE layer has all of them.
        residual_writers: linears whose output is added to the residual stream (dense, shared; not routed).
        router_parameters: parameters of the router that train; others that it may have stay frozen.
        correction_bias: buffer of the router that steers selection only, and never trains.
        gates: linears of a MoE layer, beside the router, that weigh what its parts write; frozen, and never in 4 bits.
        frozen_kinds: other modules with parameters, and what the parameter counts call them; all frozen.
        windows: which layers attend to the last `sliding_window` tokens only, where the config has that key: none, all,
            or those that `layer_types` calls "sliding_attention".
        attention_blocks, mlp_block: modules whose outputs are added to the residual stream; a layer has the MLP block
            and one of the others.
        block_norms: norms of a layer through which a block's input passes. A layer with any other norm normalizes
            what a block writes, so that a direction cannot be taken out of the writer's weights.
        layers, embedding, final_norm, head: paths in the language model.
        text_key: key of config.json that holds the language model's own config, if nested.
        text_types: the nested config's `model_type`s that this family covers.
        wrapper_prefix: what stands before the language model's names in a nested model's checkpoint, where
            transformers' own mapping for the language model's class does not say it.
        other_towers: how tensors of the checkpoint begin that are no part of the language model.
    """

    model_type: str
    class_name: str
    score: Literal["sigmoid", "softmax"]
    normalize: Normalize = "key"
    scale_key: str | None = None
    grouped: bool = False
    rounds: bool = True
    moe_layers_from: MoeLayers
    experts_key: str = "num_experts"
    topk_key: str = "num_experts_per_tok"
    inner_key: str = "moe_intermediate_size"
    attention: tuple[str, ...]
    shared: tuple[str, ...] = ()
    residual_writers: tuple[str, ...]
    router: str = "mlp.gate"
    router_parameters: tuple[str, ...] = ("weight",)
    experts: str = "mlp.experts"
    correction_bias: str | None = None
    gates: tuple[str, ...] = ()
    frozen_kinds: Mapping[str, str] = field(default_factory=dict)
    windows: Windows = "none"
    attention_blocks: tuple[str, ...] = ("self_attn",)
    mlp_block: str = "mlp"
    block_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    text_key: str | None = None
    text_types: tuple[str, ...] = ()
    wrapper_prefix: str | None = None
    other_towers: tuple[str, ...] = ()

    def moe_layers(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Return the indices of the decoder layers that have a router, from the language model's config alone."""
        # transformers makes every layer dense where a config has 0 experts, whatever its other keys say.
        return tuple(self._routed(cast("TextConfig", config))) if self.n_experts(config) else ()

    def _routed(self, config: TextConfig) -> Iterable[int]:
        every = range(config.num_hidden_layers)
        if self.moe_layers_from == "after_dense":
            return every[config.first_k_dense_replace :]
        if self.moe_layers_from == "sparse_step":
            dense = set(config.mlp_only_layers or ())
            # Counted from 1, as in transformers: with a step of 2 layers 1, 3, 5, ... have routers.
            return (i for i in every if i not in dense and (i + 1) % config.decoder_sparse_step == 0)
        if self.moe_layers_from == "by_type":
            return (i for i in every if config.mlp_layer_types[i] == "sparse")
        return every

    def n_experts(self, config: PreTrainedConfig) -> int:
        """Return how many routed experts a MoE layer has."""
        return getattr(config, self.experts_key)

    def inner_size(self, config: PreTrainedConfig) -> int:
        """Return the intermediate size of a routed expert."""
        return getattr(config, self.inner_key)

    def router_spec(self, config: PreTrainedConfig) -> RouterSpec:
        """Return how this model's routers choose and weigh experts.

        Raises:
            ModelError: no router can choose so.
        """
        from gtqlora.routing import RouterSpec  # which needs torch; facts are read without it

        text = cast("TextConfig", config)
        normalize = self.normalize == "always" or (self.normalize == "key" and bool(text.norm_topk_prob))
        spec = RouterSpec(
            score=self.score,
            top_k=getattr(config, self.topk_key),
            n_experts=self.n_experts(config),
            normalize=normalize,
            scale=float(getattr(config, self.scale_key)) if self.scale_key else 1.0,
            rounds=self.rounds,
            n_group=int(text.n_group or 1) if self.grouped else 1,
            topk_group=int(text.topk_group or 1) if self.grouped else 1,
        )
        self._check_spec(spec)
        return spec

    def _check_spec(self, spec: RouterSpec) -> None:
        # A token may only use experts of the groups chosen for it, so these must hold at least as many as it uses.
        eligible = spec.n_experts // spec.n_group * spec.topk_group
        if spec.n_experts % spec.n_group or not 1 <= spec.topk_group <= spec.n_group:
            raise ModelError(f"{self.model_type}: {spec.n_experts} experts do not split into {spec.n_group} groups")
        if not 1 <= spec.top_k <= eligible:
            raise ModelError(f"{self.model_type}: {self.topk_key} is {spec.top_k}, but {eligible} experts are eligible")

    @property
    def only_attends(self) -> bool:
        """Whether tokens of a row meet in attention only, and not in a recurrence over the sequence as well."""
        return self.attention_blocks == Family.attention_blocks

    def window(self, config: PreTrainedConfig, index: int) -> int | None:
        """Return how many tokens a decoder layer attends to at most; None for all."""
        slides = self.windows == "all" or (
            self.windows == "by_type" and getattr(config, "layer_types", ())[index] == "sliding_attention"
        )
        return getattr(config, "sliding_window", None) or None if slides else None

    def layer(self, index: int) -> str:
        """Return the path of a decoder layer in the language model."""
        return f"{self.layers}.{index}"

    def experts_of(self, index: int) -> str:
        """Return the path of a layer's routed experts in the language model."""
        return f"{self.layer(index)}.{self.experts}"

    def router_of(self, index: int) -> str:
        """Return the path of a layer's router in the language model."""
        return f"{self.layer(index)}.{self.router}"

    def extra_layers(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Return how the names in memory of multi-token-prediction layers would begin.

        They follow the last layer, and are no part of the language model; transformers does not load them.
        """
        first = cast("TextConfig", config).num_hidden_layers
        count = getattr(config, "num_nextn_predict_layers", 0) or 0
        return tuple(f"{self.layer(first + i)}." for i in range(count))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the modules whose outputs are added to the residual stream; a layer lacks some of them."""
        return (*self.attention_blocks, self.mlp_block)


def _paths(block: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


# An MLP of every family here is SwiGLU: down(silu(gate(x)) * up(x)).
_SWIGLU = ("gate_proj", "up_proj", "down_proj")
# Grouped-query attention: several query heads share one head of keys and values.
_GQA = _paths("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
# Latent attention (MLA) of DeepSeek. Queries have either `q_proj`, or `q_a_proj` and `q_b_proj` where the config has a
# `q_lora_rank`; a layer's linears are those of the list that it has.
_MLA = _paths("self_attn", "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")

# The router of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores, a bias for selection, groups, a factor.
_DEEPSEEK_ROUTER: dict[str, Any] = {
    "score": "sigmoid",
    "scale_key": "routed_scaling_factor",
    "grouped": True,
    "rounds": False,
    "experts_key": "n_routed_experts",
    "shared": _paths("mlp.shared_experts", *_SWIGLU),
    "residual_writers": ("self_attn.o_proj", "mlp.shared_experts.down_proj", "mlp.down_proj"),
    "correction_bias": "e_score_correction_bias",
}
_DEEPSEEK = {
    **_DEEPSEEK_ROUTER,
    "class_name": "DeepseekV3ForCausalLM",
    "moe_layers_from": "after_dense",
    "attention": _MLA,
}
# Qwen weighs its shared expert by a sigmoid of a linear of its own, one number per token.
_QWEN_SHARED: dict[str, Any] = {
    "score": "softmax",
    "shared": _paths("mlp.shared_expert", *_SWIGLU),
    "gates": ("mlp.shared_expert_gate",),
}
# Three of four layers are Gated DeltaNet (arXiv 2412.06464): its projections carry LoRA like those of attention.
_QWEN_HYBRID: dict[str, Any] = {
    **_QWEN_SHARED,
    "residual_writers": (
        *("self_attn.o_proj", "linear_attn.out_proj"),
        *("mlp.shared_expert.down_proj", "mlp.down_proj"),
    ),
    "frozen_kinds": {"linear_attn": "linear attention, rest"},
    "attention_blocks": ("self_attn", "linear_attn"),
}
# Qwen3.5 releases are multimodal: the vision tower and the multi-token-prediction layers (`mtp.`) are left on disk.
_QWEN3_5: dict[str, Any] = {
    **_QWEN_HYBRID,
    "class_name": "Qwen3_5MoeForCausalLM",
    "normalize": "always",
    "moe_layers_from": "all",
    "attention": (
        *_GQA,
        *_paths("linear_attn", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    ),
    "other_towers": ("model.visual.", "mtp."),
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="deepseek_v3", **_DEEPSEEK),
        # Kimi K2.5 is DeepSeek-V3's language model inside a vision-language model; only the former is opened here.
        Family(
            model_type="kimi_k25",
            text_key="text_config",
            text_types=("kimi_k2", "deepseek_v3"),
            wrapper_prefix="language_model",
            other_towers=("vision_tower.", "mm_projector."),
            **_DEEPSEEK,
        ),
        Family(
            model_type="glm4_moe",
            class_name="Glm4MoeForCausalLM",
            moe_layers_from="after_dense",
            attention=_GQA,
            **_DEEPSEEK_ROUTER,
        ),
        Family(
            model_type="glm4_moe_lite",
            class_name="Glm4MoeLiteForCausalLM",
            moe_layers_from="by_type",
            attention=_MLA,
            **_DEEPSEEK_ROUTER,
        ),
        Family(
            model_type="qwen3_moe",
            windows="all",
            class_name="Qwen3MoeForCausalLM",
            score="softmax",
            moe_layers_from="sparse_step",
            attention=_GQA,
            residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        ),
        Family(
            model_type="qwen2_moe",
            windows="by_type",
            class_name="Qwen2MoeForCausalLM",
            moe_layers_from="sparse_step",
            attention=_GQA,
            residual_writers=("self_attn.o_proj", "mlp.shared_expert.down_proj", "mlp.down_proj"),
            **_QWEN_SHARED,
        ),
        Family(
            model_type="qwen3_next",
            class_name="Qwen3NextForCausalLM",
            moe_layers_from="sparse_step",
            attention=(*_GQA, *_paths("linear_attn", "in_proj_qkvz", "in_proj_ba", "out_proj")),
            other_towers=("mtp.",),
            **_QWEN_HYBRID,
        ),
        Family(model_type="qwen3_5_moe", text_key="text_config", text_types=("qwen3_5_moe_text",), **_QWEN3_5),
        Family(model_type="qwen3_5_moe_text", **_QWEN3_5),
        Family(
            model_type="mixtral",
            windows="all",
            class_name="MixtralForCausalLM",
            score="softmax",
            normalize="always",
            rounds=False,
            moe_layers_from="all",
            experts_key="num_local_experts",
            inner_key="intermediate_size",
            attention=_GQA,
            residual_writers=("self_attn.o_proj",),
        ),
        Family(
            model_type="olmoe",
            class_name="OlmoeForCausalLM",
            score="softmax",
            moe_layers_from="all",
            inner_key="intermediate_size",
            attention=_GQA,
            residual_writers=("self_attn.o_proj",),
        ),
    )
}


def family_of(config: Mapping[str, object], where: str) -> Family:
    """Return the family of a config.json.

    Raises:
        ModelError: the architecture is not known; the message lists those that are, and what an entry would need.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    raise ModelError(f"{where}: {refusal(config, sorted(FAMILIES))}")
