"""What a config.json says of how its weights are quantized, and which of that gtqlora reads as it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from gtqlora.errors import ModelError

OURS = "gtqlora"
"""`quant_method` of checkpoints whose experts were quantized, and saved, by gtqlora itself."""

FP8 = "fp8"
"""`quant_method` of checkpoints with 8-bit floats."""

_COMPRESSED, _PACKED = "compressed-tensors", "pack-quantized"
# Older checkpoints of compressed-tensors have the second name.
_KEYS = ("quantization_config", "compression_config")
# Weights that share one scale; the kernels know these sizes.
_GROUP_SIZES = (32, 128)
_NAMES = {"fp8": "FP8", "awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes"}


def settings_of(raw: Mapping[str, object], text_key: str | None, where: str) -> dict[str, object] | None:
    """Return the quantization settings of a config.json, the language model's own before the whole model's, or None.

    Raises:
        ModelError: they are no settings.
    """
    text = raw.get(text_key) if text_key else None
    parts = [part for part in (text, raw) if isinstance(part, dict)]
    found = next((part[key] for part in parts for key in _KEYS if part.get(key) is not None), None)
    if found is not None and not (isinstance(found, dict) and isinstance(found.get("quant_method", ""), str)):
        raise ModelError(
            f"{where}: the checkpoint is quantized, but config.json does not say how: quantization_config = "
            f"{ascii(found)[:60]}; must be an object with a quant_method"
        )
    return found


def method_of(settings: Mapping[str, object] | None) -> str:
    """Return the `quant_method` of quantization settings."""
    return str((settings or {}).get("quant_method", "unnamed"))


def _section(holder: Mapping[str, object], key: str) -> dict[str, object]:
    """Return a part of the settings that is an object, or may be left out.

    Raises:
        ModelError: it is something else.
    """
    found = holder.get(key)
    if found is not None and not isinstance(found, dict):
        raise ModelError(f"quantization_config: {key} = {ascii(found)[:60]} in config.json; must be an object")
    return found or {}


def is_block_fp8(settings: Mapping[str, object] | None) -> bool:
    """Return whether these are the settings of e4m3 weights with a scale for each block of 128 x 128."""
    if settings is None or method_of(settings) != FP8:
        return False
    # Keys that are left out mean this. Scales that are powers of two would have to stay such when weights change.
    known = {"fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "float", "expert_dtype": FP8}
    return settings.get("weight_block_size") == [128, 128] and all(settings.get(k, v) == v for k, v in known.items())


def is_packed_int4(settings: Mapping[str, object]) -> bool:
    """Return whether these are settings that `packed_group` accepts."""
    return method_of(settings) == _COMPRESSED and not list(_objections(settings))


def packed_group(settings: Mapping[str, object]) -> int:
    """Return how many inputs share a scale in a compressed-tensors INT4 checkpoint.

    Raises:
        ModelError: it is quantized in another way; the message names the way.
    """
    method = method_of(settings)
    if method != _COMPRESSED:
        what = _NAMES.get(method, "quantized in a way of its own")
        raise ModelError(
            f"the checkpoint is {what} (quant_method {method}); gtqlora reads unquantized checkpoints and "
            "compressed-tensors INT4 (pack-quantized) ones"
        )
    for objection in _objections(settings):
        raise ModelError(
            f"the checkpoint is {_COMPRESSED} with {objection}; gtqlora reads symmetric INT4 in the "
            f"{_PACKED} format with groups of {' or '.join(map(str, _GROUP_SIZES))}, and nothing else quantized"
        )
    return cast(int, next(_weights(settings))["group_size"])


def _groups(settings: Mapping[str, object]) -> list[dict[str, object]]:
    groups = _section(settings, "config_groups")
    return [_section(groups, name) for name in groups]


def _weights(settings: Mapping[str, object]) -> Iterator[dict[str, object]]:
    return (_section(group, "weights") for group in _groups(settings))


def _objections(settings: Mapping[str, object]) -> Iterator[str]:
    """Yield what keeps compressed-tensors settings from being plain INT4, in the order a reader would want to know."""
    groups = _groups(settings)
    if not groups:
        yield "no config_groups"
    for group in groups:
        yield from _weight_objections(_section(group, "weights"))
        layout = group.get("format") or settings.get("format")
        if layout != _PACKED:
            yield f"format {layout!r}"
        yield from (f"quantized {key}" for key in ("input_activations", "output_activations") if group.get(key))
    if len({str(weights.get("group_size")) for weights in _weights(settings)}) > 1:
        yield "groups of several sizes"
    yield from (key for key in ("kv_cache_scheme", "transform_config") if settings.get(key))
    sparsity = _section(settings, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        yield f"sparse weights ({sparsity['format']})"


def _weight_objections(weights: Mapping[str, object]) -> Iterator[str]:
    # Defaults are those that compressed-tensors gives keys that are left out.
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    if (bits, kind) != (4, "int"):
        yield f"{bits}-bit {kind} weights"
    if weights.get("symmetric", True) is not True:
        yield "asymmetric weights (zero points)"
    if weights.get("actorder"):
        yield f"activation-ordered groups (actorder {weights['actorder']})"
    strategy, size = weights.get("strategy", "group"), weights.get("group_size")
    if strategy != "group" or size not in _GROUP_SIZES:
        yield f"strategy {strategy!r} and group_size {size}"
    if weights.get("dynamic"):
        yield "dynamic weight scales"
