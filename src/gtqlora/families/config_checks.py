"""What an untrusted config.json may say: bounds and types, as data, and settings that are switched off."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from gtqlora.errors import ModelError
from gtqlora.progress import note


@dataclass(frozen=True)
class Bound:
    """The least and the most that a key's whole number may be; `why` gives the reason in the message."""

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
# Keys that may be null, which configs write for "not in this model".
OPTIONAL = {
    *("head_dim", "q_lora_rank", "num_key_value_heads", "sliding_window"),
    *("n_group", "topk_group", "n_shared_experts", "num_nextn_predict_layers"),
}
POSITIVE = ("rms_norm_eps", "routed_scaling_factor", "rope_theta")
"""Numbers by which is divided or multiplied: at 0 or below, and at infinity, what comes out is NaN or nothing."""
# Rotary positions divide by these, or raise them to a power; their other numbers may be 0.
_ROPE_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_MLPS = {"dense", "sparse"}
# Far above any number that a config has, and still finite when it is squared in fp32.
_MOST = 1e12
MAX_EXPERTS = 500_000
"""Of all layers together: every expert's tensors are looked up by name, which takes time."""
MAX_PARAMETERS = 10**14
"""In one model: a hundred times the largest released ones."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Parts of names, as every architecture has other ones: `attention_dropout`, `embd_pdrop`, `router_jitter_noise`.
_OFF_WORDS = ("dropout", "pdrop", "jitter", "layerdrop")
# With these a model returns more, or something else, than hooks and scoring expect.
_OFF: dict[str, object] = {
    "output_router_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
}


def check_sizes(where: str, values: Mapping[str, object]) -> None:
    """Refuse sizes that make no model, or one that no machine can hold, before anything is built.

    Raises:
        ModelError: the message names the key.
    """
    # Bounds come first: the checks after them calculate with sizes, and rely on their being whole numbers.
    for key, bound in BOUNDS.items():
        value = values.get(key, bound.least)
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
    # Newer configs have the first section, older ones the second.
    for section in ("rope_parameters", "rope_scaling"):
        _check_rope(where, section, values.get(section))
    _check_layer_lists(where, values)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _labels(value: object) -> bool:
    return isinstance(value, dict) and all(
        _LABEL.fullmatch(key) and isinstance(name, str) for key, name in value.items()
    )


def _label_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_int, value.values()))


_LABEL = re.compile(r"-?\d{1,18}")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
# Types of keys that say nothing of the architecture. gtqlora uses none of these values, but other programs read them
# from the same file: a model that is accepted here must not be one that they cannot open.
_TYPES: dict[str, tuple[Callable[[object], bool], str]] = {
    "architectures": (lambda value: value is None or _texts(value), "a list of class names"),
    "auto_map": (lambda value: isinstance(value, dict), "an object"),
    "transformers_version": (lambda value: value is None or isinstance(value, str), "a text"),
    "is_encoder_decoder": (lambda value: isinstance(value, bool), "true or false"),
    "id2label": (lambda value: value is None or _labels(value), "an object of texts by whole number"),
    "label2id": (lambda value: value is None or _label_numbers(value), "an object of whole numbers"),
    "problem_type": (lambda value: value is None or value in _PROBLEMS, f"one of {', '.join(_PROBLEMS)}"),
}


def check_types(where: str, values: Mapping[str, object]) -> None:
    """Refuse wrongly typed values of keys that do not describe the architecture, and are not used.

    Raises:
        ModelError: the message names the key.
    """
    for key, (is_right, wanted) in _TYPES.items():
        if key in values and not is_right(values[key]):
            raise ModelError(f"{where}: {key} = {_shown(values[key])} in config.json; must be {wanted}")


def _whole_window(values: Mapping[str, object]) -> bool:
    """Return whether no layer slides: transformers then writes a window of 0 for Qwen2-MoE."""
    return values.get("use_sliding_window") is False


def _check_layer_lists(where: str, values: Mapping[str, object]) -> None:
    dense, types = values.get("mlp_only_layers"), values.get("mlp_layer_types")
    if dense is not None and not (isinstance(dense, list | tuple) and all(map(_is_int, dense))):
        raise ModelError(f"{where}: mlp_only_layers = {_shown(dense)} in config.json; must be a list of layer numbers")
    if types is None:
        return
    known = isinstance(types, list | tuple) and all(isinstance(kind, str) and kind in _MLPS for kind in types)
    if not isinstance(types, list | tuple) or not known or len(types) < _size(values, "num_hidden_layers"):
        raise ModelError(
            f"{where}: mlp_layer_types = {_shown(types)} in config.json; must be a list of "
            f"{' and '.join(sorted(_MLPS))}, one for each layer"
        )


def _size(values: Mapping[str, object], key: str) -> int:
    """Return a size that `BOUNDS` has been held against, or 0 where there is none."""
    value = values.get(key)
    return value if _is_int(value) else 0


def _check_heads(where: str, values: Mapping[str, object]) -> None:
    for key in ("head_dim", "qk_rope_head_dim"):
        if _size(values, key) % 2:
            raise ModelError(f"{where}: {key} = {values[key]} in config.json; must be even, as rotary positions need")
    # Latent attention: every head has keys of its own, and only their rotary part is turned by the position.
    if values.get("kv_lora_rank"):
        for one, other in (("head_dim", "qk_rope_head_dim"), ("num_key_value_heads", "num_attention_heads")):
            if values.get(one) and values.get(other) and values[one] != values[other]:
                raise ModelError(f"{where}: {one} = {values[one]} in config.json; must be {other} = {values[other]}")
    heads, shared = _size(values, "num_attention_heads"), _size(values, "num_key_value_heads")
    if heads and shared and heads % shared:
        raise ModelError(
            f"{where}: num_attention_heads = {heads} in config.json; "
            f"must be a multiple of num_key_value_heads = {shared}"
        )


def _is_int(value: object) -> TypeGuard[int]:
    # JSON's true is Python's True, which is an int and equal to 1.
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    # Cut and in ASCII: a stranger's text may be long, or hold characters that steer a terminal.
    return ascii(value)[:60]


def _check_positive(where: str, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
        raise ModelError(f"{where}: {key} = {_shown(value)} in config.json; must be a positive, finite number")


def _check_rope(where: str, section: str, rope: object) -> None:
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


def _check_mrope(where: str, key: str, value: object) -> None:
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(_is_int(n) and 0 <= n <= _HEADS.most for n in value)
    ):
        raise ModelError(
            f"{where}: {key} = {_shown(value)} in config.json; must be three whole numbers, of frequencies for time, "
            "height and width"
        )


def _is_small(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= _MOST)


# JSON has no infinity, so transformers writes it as an object with this one key.
_TAG, _INFINITIES = "__float__", {"Infinity": math.inf, "-Infinity": -math.inf}


def with_floats(where: str, value: object) -> object:
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


def check_aliases(where: str, settings: Mapping[str, object], aliases: Mapping[str, str]) -> None:
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


def check_token_ids(where: str, values: Mapping[str, object], vocabulary: int) -> None:
    """Check that special tokens are rows of the embedding.

    Raises:
        ModelError: one is no token id, or beyond the embedding; the message names the key.
    """
    for key in _TOKEN_IDS:
        found = values.get(key)
        # Several tokens may end an answer, as in Llama's and Qwen's chat models; the others are one token each.
        ids = found if isinstance(found, list | tuple) and key == "eos_token_id" else [found]
        for token in ids:
            if token is not None and (not _is_int(token) or not 0 <= token < vocabulary):
                raise ModelError(
                    f"{where}: {key} = {_shown(found)}; must be a token id from 0 to {vocabulary - 1}, which the "
                    "model's embedding has"
                )


def switched_off(where: str, settings: Mapping[str, object]) -> dict[str, object]:
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


def _changed(settings: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    for key, value in settings:
        # 0 and null are how configs say off; a value that is off already needs no word to the user.
        if any(word in key for word in _OFF_WORDS) and value not in (None, 0, False):
            yield key, 0.0
        elif key in _OFF and value != _OFF[key]:
            yield key, _OFF[key]
