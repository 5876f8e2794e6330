"""Loads a model of a known family with its routed experts as they are or frozen in 4 bits."""

from __future__ import annotations

from transformers import PreTrainedModel

from gtqlora import families
from gtqlora.errors import ConfigError
from gtqlora.experts.formats import Format, format_of
from gtqlora.experts.settings import AUTO, CHOICES, KEEP, FrozenExpertsConfig, saved_settings
from gtqlora.families import Family, packed

BF16 = "bf16"
"""Experts in the checkpoint's own dtype, trained through like any other weight."""


def format_on_disk(model: str) -> Format | None:
    """Return the 4-bit format in which MODEL's checkpoint holds its routed experts, None if it does not.

    Raises:
        ModelError: no such model, unreadable config.json, or quantized in a way that is not read.
    """
    settings = families.quantization_settings(model)
    if settings is None:
        return None
    if packed.method_of(settings) == packed.OURS:
        return format_of(saved_settings(settings).format)
    return format_of(f"int4-g{packed.packed_group(settings)}")


def load_model(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    expert_format: str = BF16,
    dense: str = KEEP,
    expert_range: tuple[int, int] | None = None,
    kernel: str = AUTO,
    memory: float | None = None,
    disk: str | None = None,
    layer: int | None = None,
) -> tuple[Family, PreTrainedModel]:
    """Return the language model of MODEL, every tensor accounted for and finite; other towers are left out.

    Args:
        expert_format: "bf16" leaves them unquantized; otherwise a `FrozenExpertsConfig.format`.
        dense, expert_range, kernel, memory, disk: settings of `FrozenExpertsConfig`, for frozen experts only.
        layer: load this decoder layer only, see `families.layers.with_layer`.

    Raises:
        ModelError: as `families.load_model`, or the checkpoint does not go with `expert_format`.
        ConfigError: a setting is unknown or out of range.
    """
    if expert_format == BF16:
        given = {"dense": dense, "expert_range": expert_range, "kernel": kernel, "memory": memory, "disk": disk}
        if given != {"dense": KEEP, "expert_range": None, "kernel": AUTO, "memory": None, "disk": None}:
            raise ConfigError(f"{given}: settings of frozen experts, but expert_format = {BF16!r}")
        return families.load_model(model, dtype=dtype, device=device, layer=layer)
    if expert_format not in CHOICES:
        raise ConfigError(f"expert_format = {expert_format!r}: known are {', '.join((BF16, *CHOICES))}")
    settings = FrozenExpertsConfig(
        format=expert_format, dense=dense, expert_range=expert_range, kernel=kernel, memory=memory, disk=disk
    )
    return families.load_model(model, dtype=dtype, device=device, quantization_config=settings, layer=layer)
