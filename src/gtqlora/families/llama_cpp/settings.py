"""What a GGUF says of its architecture, from config.json; whatever llama.cpp would leave out is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from gtqlora.errors import ModelError
from gtqlora.families.anatomy import Anatomy
from gtqlora.families.facts import Family
from gtqlora.families.llama_cpp.layout import HYBRID, Layout
from gtqlora.routing import RouterSpec

Setting = int | float | bool | str | list[int]
"""A value of a GGUF's metadata: an unsigned number, an fp32 one, a flag, a text, or signed numbers."""
_GATING = {"softmax": 1, "sigmoid": 2}
_SECTIONS = [11, 11, 10, 0]
"""Frequencies of time, height and width in Qwen3.5; text has the same position in all of them."""

# config key -> what is written for it; the rest of a config is known to change nothing, or refused.
_SIZES = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
_READ = {
    *_SIZES,
    *("num_experts", "n_routed_experts", "num_local_experts", "n_group", "topk_group", "vocab_size"),
    *("rms_norm_eps", "rope_parameters", "routed_scaling_factor", "norm_topk_prob", "head_dim", "qk_head_dim"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_value_head_dim", "layer_types", "mlp_layer_types"),
    *("tie_word_embeddings", "full_attention_interval"),
    # which tensors there are says the same
    *("mlp_only_layers", "decoder_sparse_step", "use_qk_norm", "qkv_bias", "attention_bias"),
    *("partial_rotary_factor", "rope_theta"),  # also in `rope_parameters`
}
_HARMLESS = {
    *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "is_encoder_decoder"),
    *("output_hidden_states", "output_attentions", "output_router_logits", "chunk_size_feed_forward"),
    *("initializer_range", "attention_dropout", "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha"),
    *("seq_aux", "pretraining_tp", "ep_size", "max_window_layers", "num_nextn_predict_layers"),
    *("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"),
    *("id2label", "label2id", "problem_type", "quantization_config", "rope_scaling"),
}
_ONLY: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rope_interleave": (True,),
    "topk_method": ("noaux_tc", None),
    "moe_layer_freq": (1,),
    "use_sliding_window": (False,),
    "clip_qkv": (None,),
    "attn_output_gate": (True,),
}
"""Values to which llama.cpp's graphs keep, whatever a config says."""
_NORMALIZES = {"llama": True, "qwen3moe": True, "qwen2moe": False, "olmoe": False, "qwen3next": True, "qwen35moe": True}
"""Whether llama.cpp divides the chosen experts' weights by their sum, where no metadata says it."""
_LITE_LAYERS = (26, 27)
"""Numbers of layers at which llama.cpp takes a deepseek2 model for one without a rank of queries."""
_YARN = {
    "factor": "rope.scaling.factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
_ROPE_READ = {
    *(*_YARN, "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
    *("mscale", "mscale_all_dim", "mrope_section", "mrope_interleaved"),
}


class _Settings(dict[str, Setting]):
    """Entries under an architecture's name."""

    def __init__(self, architecture: str) -> None:
        super().__init__({"general.architecture": architecture})
        self.architecture = architecture

    def put(self, key: str, value: object, kind: Callable[..., Setting] = int) -> None:
        """Add an entry, if there is a value."""
        if value is not None:
            self[f"{self.architecture}.{key}"] = kind(value)


def settings(model: str, anatomy: Anatomy, layout: Layout) -> dict[str, Setting]:
    """Return the architecture's metadata.

    Raises:
        ModelError: llama.cpp computes something else than config.json says, or a key is not known.
    """
    config = layout.config.to_dict()
    _check_known(model, layout.architecture, config, anatomy.family)
    found = _Settings(layout.architecture)
    for key, name in _SIZES.items():
        found.put(name, config.get(key))
    found.put("vocab_size", config["vocab_size"])
    found.put("expert_count", anatomy.spec.n_experts)
    found.put("attention.layer_norm_rms_epsilon", config["rms_norm_eps"], float)
    _put_router(found, anatomy.spec)
    _put_heads(found, config, anatomy.family)
    _put_rope(found, cast("dict[str, object]", config["rope_parameters"]), model)
    return found


def _put_router(found: _Settings, spec: RouterSpec) -> None:
    # said even where it is llama.cpp's default: without it a sigmoid router becomes a softmax one in silence
    found.put("expert_gating_func", _GATING[spec.score])
    if found.architecture not in _NORMALIZES:
        found.put("expert_weights_norm", spec.normalize, bool)
        found.put("expert_weights_scale", spec.scale, float)
    if spec.n_group > 1:
        found.put("expert_group_count", spec.n_group)
        found.put("expert_group_used_count", spec.topk_group)


def _put_heads(found: _Settings, config: Mapping[str, object], family: Family) -> None:
    def size(key: str) -> int:
        return cast(int, config[key])

    if found.architecture == "deepseek2":  # one head of keys and values in latent space
        found.put("attention.head_count_kv", 1)
        found.put("attention.key_length", size("kv_lora_rank") + size("qk_rope_head_dim"))
        found.put("attention.value_length", size("kv_lora_rank"))
        found.put("attention.key_length_mla", size("qk_nope_head_dim") + size("qk_rope_head_dim"))
        found.put("attention.value_length_mla", size("v_head_dim"))
        found.put("rope.dimension_count", size("qk_rope_head_dim"))
        if family.moe_layers_from == "by_type":
            found.put("leading_dense_block_count", cast("list[str]", config["mlp_layer_types"]).index("sparse"))
        return
    head = cast("int | None", config.get("head_dim")) or size("hidden_size") // size("num_attention_heads")
    found.put("attention.key_length", head)
    found.put("attention.value_length", head)
    # Partial rotary positions: the first values of a head only.
    factor = cast("dict[str, float]", config["rope_parameters"]).get("partial_rotary_factor", 1.0)
    found.put("rope.dimension_count", int(head * factor))
    if found.architecture in HYBRID:
        found.put("ssm.inner_size", size("linear_value_head_dim") * size("linear_num_value_heads"))
        found.put("full_attention_interval", _interval(cast("list[str]", config["layer_types"])))
    if found.architecture == "qwen35moe":
        sections = cast("dict[str, list[int]]", config["rope_parameters"]).get("mrope_section")
        found.put("rope.dimension_sections", [*sections, 0] if sections else _SECTIONS, list)


def _interval(layer_types: list[str]) -> int | None:
    """Return n where every n-th layer has full attention, and no other."""
    for interval in range(1, len(layer_types) + 2):
        if all((kind == "full_attention") == (i % interval == 0) for i, kind in enumerate(layer_types, 1)):
            return interval
    return None


def _put_rope(found: _Settings, rope: Mapping[str, object], model: str) -> None:
    if odd := sorted(key for key in rope.keys() - _ROPE_READ if rope[key] is not None):
        raise ModelError(f"{model}: rope_parameters.{odd[0]} in config.json is nothing that llama.cpp is known to read")
    found.put("rope.freq_base", rope["rope_theta"], float)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ModelError(f"{model}: rope_type {kind!r} in config.json; GGUFs are written for default and yarn")
    if kind == "default":
        return
    # Attention is scaled by the ratio of the two, which is 1 in every released model.
    if rope.get("mscale") != rope.get("mscale_all_dim"):
        raise ModelError(f"{model}: config.json has mscale other than mscale_all_dim, which llama.cpp cannot say")
    found.put("rope.scaling.type", "yarn", str)
    found.put("rope.scaling.original_context_length", rope.get("original_max_position_embeddings"))
    for key, name in _YARN.items():
        found.put(name, rope.get(key), float)
    if rope.get("mscale_all_dim") is not None:
        # llama.cpp takes the 0.1 away again, for the sake of older files
        found.put("rope.scaling.yarn_log_multiplier", 0.1 * cast(float, rope["mscale_all_dim"]), float)


def _check_known(model: str, architecture: str, config: Mapping[str, object], family: Family) -> None:
    """Refuse settings that would be lost, or that llama.cpp's graph does not follow.

    Raises:
        ModelError: the message names the key.
    """
    only = {**_ONLY, "scoring_func": (family.score,)}
    # These graphs have no setting for it.
    if architecture in _NORMALIZES and family.normalize == "key":
        only["norm_topk_prob"] = (_NORMALIZES[architecture],)
    if architecture in ("deepseek2", "qwen3moe", *HYBRID):
        only["attention_bias"] = (False,)
    for key, allowed in only.items():
        if key in config and config[key] not in allowed:
            raise ModelError(
                f"{model}: {key} = {config[key]!r} in config.json, but llama.cpp's {architecture} computes as with "
                f"{allowed[0]!r}; export to safetensors or peft instead"
            )
    # Qwen writes a window and says that it is not used.
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        raise ModelError(f"{model}: sliding_window in config.json, which llama.cpp's {architecture} does not do")
    # A key that nobody here knows may be the one that makes the model another one.
    known = {*_READ, *_HARMLESS, *only, "sliding_window"}
    if odd := sorted(key for key in config.keys() - known if config[key] is not None):
        raise ModelError(
            f"{model}: {odd[0]} in config.json is not known to the GGUF writer, and might be lost; "
            "convert with llama.cpp's own converter, and export with --onto that file"
        )
    _check_layers(model, architecture, config)


def _check_layers(model: str, architecture: str, config: Mapping[str, object]) -> None:
    if architecture == "deepseek2" and (config["num_hidden_layers"] in _LITE_LAYERS) != (config["q_lora_rank"] is None):
        raise ModelError(
            f"{model}: llama.cpp tells by the number of layers whether a {architecture} model has a q_lora_rank, and "
            f"gets {config['num_hidden_layers']} wrong here"
        )
    types = config.get("mlp_layer_types")
    if architecture == "deepseek2" and isinstance(types, list) and "dense" in types[types.index("sparse") :]:
        raise ModelError(f"{model}: a dense layer after one with experts, which llama.cpp's {architecture} cannot have")
    if architecture == "olmoe" and config["num_key_value_heads"] != config["num_attention_heads"]:
        raise ModelError(f"{model}: llama.cpp's olmoe needs num_key_value_heads = num_attention_heads")
    if architecture not in HYBRID:
        return
    if _interval(cast("list[str]", config["layer_types"])) is None:
        raise ModelError(f"{model}: layer_types in config.json follow no interval, as llama.cpp's {architecture} needs")
    if config["linear_key_head_dim"] != config["linear_value_head_dim"]:
        raise ModelError(f"{model}: llama.cpp's {architecture} needs linear_key_head_dim = linear_value_head_dim")
