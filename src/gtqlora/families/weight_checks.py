"""Whether the headers of a checkpoint's weights go with its config.json; nothing is read but headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gtqlora.errors import ModelError
from gtqlora.families import packed
from gtqlora.families.facts import Family
from gtqlora.families.headers import Header

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes of weights, as safetensors spells them, and their bytes."""
_OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_PLAIN = (".weight", ".bias")
_WEIGHTS_PER_BYTE = 2.2
"""At four bits each, and a little more for weights that are tied."""


def check_headers(model: str, family: Family, config: Any, headers: Mapping[str, Header], settings: Any) -> None:
    """Every weight of the language model is there once, in a dtype that weights have.

    Args:
        settings: how config.json says that the checkpoint is quantized, if it is.

    Raises:
        ModelError: the message names the tensor.
    """
    ours = _language(family, config, headers)
    _check_once(model, family, ours, headers)
    if packed.method_of(settings) == packed.OURS and settings.get("dense") is not None:
        return  # bitsandbytes' tensors, of many dtypes, which its own loader checks
    for short, name in ours.items():
        quantized = settings is not None and (f".{family.experts}." in short or not short.endswith(_PLAIN))
        if headers[name].dtype not in FLOATS and not quantized:
            raise ModelError(
                f"{model}: tensor {name} is {headers[name].dtype}, and config.json does not say that it is quantized; "
                f"weights must be one of {', '.join(FLOATS)}"
            )


def _language(family: Family, config: Any, headers: Mapping[str, Header]) -> dict[str, str]:
    """Tensors of the language model, by their name without the family's prefix."""
    others = (*family.other_towers, *extra_layers(config, family.disk_prefix))
    found: dict[str, str] = {}
    for name in headers:
        if not name.startswith(others):
            found.setdefault(name.removeprefix(family.disk_prefix), name)
    return found


def extra_layers(config: Any, prefix: str = "") -> tuple[str, ...]:
    """How tensors of multi-token-prediction layers begin: they follow the last layer, and are no part of the model."""
    first, count = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 0
    return tuple(f"{prefix}model.layers.{first + i}." for i in range(count))


def _check_once(model: str, family: Family, ours: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    for short in ours:
        long = f"{family.disk_prefix}{short}"
        if long != short and long in headers and short in headers:
            raise ModelError(f"{model}: tensors {long} and {short} are the same weight; remove one")
    for name, single in _fused(family, ours):
        raise ModelError(f"{model}: tensors {name} and {single} hold the same experts; remove one form")


def _fused(family: Family, ours: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Layers that hold their experts both in one tensor and one by one."""
    singles = {name.partition(f".{family.experts}.")[0]: name for name in ours if _is_single(family, name)}
    for name in ours:
        if name.endswith((f".{family.experts}.gate_up_proj", f".{family.experts}.down_proj")):
            layer = name.partition(f".{family.experts}.")[0]
            if layer in singles:
                yield name, singles[layer]


def _is_single(family: Family, name: str) -> bool:
    return name.partition(f".{family.experts}.")[2].partition(".")[0].isdigit()


def check_size(model: str, parameters: int, headers: Mapping[str, Header]) -> None:
    """The config's model is no larger than what is on disk, before memory is taken for it.

    Raises:
        ModelError: it is, so most of it would be missing.
    """
    held = sum(header.numel * {**_OTHERS, **FLOATS}.get(header.dtype, 1) for header in headers.values())
    if parameters > _WEIGHTS_PER_BYTE * held:
        raise ModelError(
            f"{model}: config.json describes {parameters:,} parameters, but the weights have {held:,} bytes, so most "
            "tensors are missing or have another shape; take the config.json that belongs to the weights"
        )
