"""Whether the headers of a checkpoint's weights go with its config.json; nothing is read but headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gtqlora.errors import ModelError
from gtqlora.families import fp8, packed
from gtqlora.families.facts import DOWN, GATE_UP, Family
from gtqlora.families.headers import Header
from gtqlora.families.names import TensorNames

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes of weights, as safetensors spells them, and their bytes."""
# Integers that hold packed weights; dtypes that are not listed have one byte.
_OTHERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_PLAIN = (".weight", ".bias")
_WEIGHTS_PER_BYTE = 2.2
"""Weights that a byte holds at most: two of four bits, and some more as tied weights are on disk only once."""


def check_headers(
    model: str,
    family: Family,
    names: TensorNames,
    headers: Mapping[str, Header],
    settings: Mapping[str, object] | None,
) -> None:
    """Check that every weight of the language model is there once, in a dtype that weights have.

    Args:
        settings: how config.json says that the checkpoint is quantized, if it is.

    Raises:
        ModelError: the message names the tensor.
    """
    for one, other in names.twice():
        raise ModelError(f"{model}: tensors {one} and {other} are the same weight; remove one")
    for fused, single in names.both_forms():
        raise ModelError(f"{model}: tensors {fused} and {single} hold the same experts; remove one form")
    if settings is not None and packed.method_of(settings) == packed.OURS and settings.get("dense") is not None:
        return  # bitsandbytes' tensors, of many dtypes, which its own loader checks
    in_fp8 = packed.is_block_fp8(settings)
    if in_fp8:
        fp8.check_headers(model, {disk: headers[disk] for disk in names.places})
    for disk, place in names.places.items():
        quantized = settings is not None and (f".{family.experts}." in place.name or not disk.endswith(_PLAIN))
        if headers[disk].dtype not in FLOATS and not quantized and not (in_fp8 and headers[disk].dtype == fp8.ON_DISK):
            raise ModelError(
                f"{model}: tensor {disk} is {headers[disk].dtype}, and config.json does not say that it is quantized; "
                f"weights must be one of {', '.join(FLOATS)}"
            )


def check_experts(model: str, family: Family, config: PreTrainedConfig, names: TensorNames) -> None:
    """Check that every expert's matrices are there, one by one or fused, in a checkpoint that is not quantized.

    The loader fuses what it finds, so it cannot name the one that is missing.

    Raises:
        ModelError: the message counts those of a layer that are missing, and names the first.
    """
    experts = range(family.n_experts(config))
    for layer in family.moe_layers(config):
        path = family.experts_of(layer)
        wanted = {*names.makers(f"{path}.{GATE_UP}", experts, parts=2), *names.makers(f"{path}.{DOWN}", experts)}
        if missing := sorted(wanted - names.places.keys()):
            raise ModelError(f"{model}: {len(missing)} tensors missing, e.g. {', '.join(missing[:3])}")


def check_size(model: str, parameters: int, headers: Mapping[str, Header]) -> None:
    """Check that the config's model is no larger than what is on disk, before memory is taken for it.

    Raises:
        ModelError: it is, so most of it would be missing.
    """
    # In bytes: packed weights of 4 bits stand in integers of any width, but never more than two in a byte.
    held = sum(header.numel * {**_OTHERS, **FLOATS}.get(header.dtype, 1) for header in headers.values())
    if parameters > _WEIGHTS_PER_BYTE * held:
        raise ModelError(
            f"{model}: config.json describes {parameters:,} parameters, but the weights have {held:,} bytes, so most "
            "tensors are missing or have another shape; take the config.json that belongs to the weights"
        )
