"""What an untrusted config.json may say: bounds, as data, and settings that are switched off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from gtqlora.errors import ModelError
from gtqlora.progress import note


@dataclass(frozen=True)
class Bound:
    """Whole numbers that a key may have. `why` is what a larger or smaller one would do."""

    least: int
    most: int
    why: str


_LAYERS = Bound(1, 1_000, "every layer is built, and the deepest models known have less than 200")
_EXPERTS = Bound(1, 100_000, "every expert is looked for by name, and the largest models known have less than 1000")
_WIDTH = Bound(1, 2**20, "the widest models known have less than 2^15")
_INNER = Bound(1, 2**22, "the widest models known have less than 2^18")
_HEADS = Bound(1, 2**14, "the widest models known have less than 2^9 heads")
_RANK = Bound(1, 2**18, "heads and their ranks are narrower than the model")
_COUNT = Bound(0, 1_000, "a count of layers, or of experts that every token uses")

BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(("num_hidden_layers", "decoder_sparse_step"), _LAYERS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok"), _EXPERTS),
    **dict.fromkeys(("n_group", "topk_group"), _EXPERTS),
    **dict.fromkeys(("hidden_size",), _WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), _INNER),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _HEADS),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), _RANK),
    **dict.fromkeys(("qk_rope_head_dim", "qk_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _RANK),
    "linear_conv_kernel_dim": Bound(1, 1_000, "a token sees that many others in its convolution"),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"), _COUNT),
    "vocab_size": Bound(1, 2**24, "the largest vocabularies known have less than 2^19 tokens"),
    "max_position_embeddings": Bound(1, 2**31, "positions are 32-bit numbers in places"),
    "sliding_window": Bound(0, 2**31, "positions are 32-bit numbers in places; 0 is none"),
    "num_labels": Bound(0, 100_000, "each gets a name wherever transformers reads the file by itself"),
    "moe_layer_freq": Bound(1, 1_000, "every layer is built"),
}
OPTIONAL = {
    *("head_dim", "q_lora_rank", "num_key_value_heads", "sliding_window"),
    *("n_group", "topk_group", "n_shared_experts", "num_nextn_predict_layers"),
}
POSITIVE = ("rms_norm_eps", "routed_scaling_factor", "rope_theta")
"""Numbers by which is divided or multiplied: at 0 or below, and at infinity, what comes out is NaN or nothing."""
_ROPE_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_MLPS = {"dense", "sparse"}
_MOST = 1e12
MAX_EXPERTS = 500_000
"""In all layers together, for the time that their names take."""
MAX_PARAMETERS = 10**14

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OFF_WORDS = ("dropout", "pdrop", "jitter", "layerdrop")
_OFF: dict[str, Any] = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
}


def check_sizes(where: str, values: Mapping[str, Any]) -> None:
    """Refuse sizes that make no model, or one that no machine can hold, before anything is built.

    Raises:
        ModelError: the message names the key.
    """
    for key, bound in BOUNDS.items():
        value: Any = values.get(key, bound.least)
        if (value is None and key in OPTIONAL) or (key == "sliding_window" and value == 0 and _whole_window(values)):
            continue
        if not _is_int(value) or not bound.least <= value <= bound.most:
            raise ModelError(
                f"{where}: {key} = {_shown(value)} in config.json; must be a whole number from {bound.least} to "
                f"{bound.most} ({bound.why})"
            )
    for key in POSITIVE:
        if values.get(key) is not None:
            _check_positive(where, key, values[key])
    _check_heads(where, values)
    for section in ("rope_parameters", "rope_scaling"):
        _check_rope(where, section, values.get(section))
    _check_layer_lists(where, values)


def _whole_window(values: Mapping[str, Any]) -> bool:
    """Return whether no layer slides: transformers then writes a window of 0 for Qwen2-MoE."""
    return values.get("use_sliding_window") is False


def _check_layer_lists(where: str, values: Mapping[str, Any]) -> None:
    dense, types = values.get("mlp_only_layers"), values.get("mlp_layer_types")
    if dense is not None and not (isinstance(dense, list | tuple) and all(map(_is_int, dense))):
        raise ModelError(f"{where}: mlp_only_layers = {_shown(dense)} in config.json; must be a list of layer numbers")
    known = isinstance(types, list | tuple) and all(isinstance(kind, str) and kind in _MLPS for kind in types)
    if types is not None and not (known and len(types) >= values.get("num_hidden_layers", 0)):
        raise ModelError(
            f"{where}: mlp_layer_types = {_shown(types)} in config.json; must be a list of "
            f"{' and '.join(sorted(_MLPS))}, one for each layer"
        )


def _check_heads(where: str, values: Mapping[str, Any]) -> None:
    for key in ("head_dim", "qk_rope_head_dim"):
        if (values.get(key) or 0) % 2:
            raise ModelError(f"{where}: {key} = {values[key]} in config.json; must be even, as rotary positions need")
    if values.get("kv_lora_rank"):  # latent attention: every head has keys of its own, turned in their rotary part
        for one, other in (("head_dim", "qk_rope_head_dim"), ("num_key_value_heads", "num_attention_heads")):
            if values.get(one) and values.get(other) and values[one] != values[other]:
                raise ModelError(f"{where}: {one} = {values[one]} in config.json; must be {other} = {values[other]}")
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise ModelError(
            f"{where}: num_attention_heads = {heads} in config.json; "
            f"must be a multiple of num_key_value_heads = {shared}"
        )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return ascii(value)[:60]


def _check_positive(where: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
        raise ModelError(f"{where}: {key} = {_shown(value)} in config.json; must be a positive, finite number")


def _check_rope(where: str, section: str, rope: Any) -> None:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise ModelError(f"{where}: {section} = {_shown(rope)} in config.json; must be an object")
    for key, value in rope.items():
        if key in _ROPE_POSITIVE and value is not None:
            _check_positive(where, f"{section}.{key}", value)
        elif key == "mrope_section":
            _check_mrope(where, f"{section}.{key}", value)
        elif not (isinstance(value, str) if key in ("rope_type", "type") else _is_small(value)):
            raise ModelError(f"{where}: {section}.{key} = {_shown(value)} in config.json; must be a finite number")


def _check_mrope(where: str, key: str, value: Any) -> None:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(_is_int(n) and 0 <= n <= _HEADS.most for n in value)
    ):
        raise ModelError(
            f"{where}: {key} = {_shown(value)} in config.json; must be three whole numbers, of frequencies for time, "
            "height and width"
        )


def _is_small(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= _MOST)


_TAG, _INFINITIES = "__float__", {"Infinity": math.inf, "-Infinity": -math.inf}


def with_floats(where: str, value: Any) -> Any:
    """Return a JSON value with what transformers writes for numbers that JSON lacks, `{"__float__": "Infinity"}`.

    Raises:
        ModelError: such an object says anything but an infinity; NaN is no setting.
    """
    if isinstance(value, dict) and _TAG in value:
        name = value[_TAG]
        if len(value) != 1 or not isinstance(name, str) or name not in _INFINITIES:
            known = " or ".join(_INFINITIES)
            raise ModelError(f"{where}: {_shown(value)} in config.json; {_TAG} must be alone, and {known}")
        return _INFINITIES[name]
    if isinstance(value, dict):
        return {key: with_floats(where, item) for key, item in value.items()}
    return [with_floats(where, item) for item in value] if isinstance(value, list) else value


def check_aliases(where: str, settings: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
    """Refuse one setting under two names with two values: libraries differ in which they take.

    Raises:
        ModelError: the message names both.
    """
    for alias, name in aliases.items():
        if alias in settings and name in settings and settings[alias] != settings[name]:
            raise ModelError(
                f"{where}: config.json says {alias} = {_shown(settings[alias])} and {name} = {_shown(settings[name])}, "
                "which are the same setting; remove one"
            )


def check_total(where: str, parameters: int) -> None:
    """Refuse a model larger than any.

    Raises:
        ModelError: it has more parameters than `MAX_PARAMETERS`.
    """
    if parameters > MAX_PARAMETERS:
        raise ModelError(
            f"{where}: the sizes in config.json make a model of {parameters:.1e} parameters; at most "
            f"{MAX_PARAMETERS:.0e} are taken"
        )


def check_token_ids(where: str, values: Mapping[str, Any], vocabulary: int) -> None:
    """Check that special tokens are rows of the embedding.

    Raises:
        ModelError: one is no token id, or beyond the embedding; the message names the key.
    """
    for key in _TOKEN_IDS:
        found = values.get(key)
        ids = found if isinstance(found, list | tuple) and key == "eos_token_id" else [found]
        token: Any
        for token in ids:
            if token is not None and (not _is_int(token) or not 0 <= token < vocabulary):
                raise ModelError(
                    f"{where}: {key} = {_shown(found)}; must be a token id from 0 to {vocabulary - 1}, which the "
                    "model's embedding has"
                )


def switched_off(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those that would change training or decoding behind our back; the user is told once.

    Dropout and jitter make the reference and the routing anchor inexact, and the others change what a model returns.

    Raises:
        ModelError: one of them is neither a number nor true or false, which no other loader would take.
    """
    off = dict(_changed(settings.items()))
    for key in sorted(off):
        if not isinstance(settings[key], int | float):
            found = _shown(settings[key])
            raise ModelError(f"{where}: {key} = {found} in config.json; must be a number, true or false")
    if off:
        found = ", ".join(f"{key} = {_shown(settings[key])}" for key in sorted(off))
        note(f"{where}: config.json sets {found}; gtqlora switches it off, in training and evaluation")
    return {**settings, **off}


def _changed(settings: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for key, value in settings:
        if any(word in key for word in _OFF_WORDS) and value not in (None, 0, False):
            yield key, 0.0
        elif key in _OFF and value != _OFF[key]:
            yield key, _OFF[key]
