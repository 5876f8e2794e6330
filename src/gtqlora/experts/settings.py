"""The setting that puts frozen 4-bit experts into a transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from gtqlora.errors import ConfigError, ModelError
from gtqlora.experts import kernels
from gtqlora.experts.formats import FORMATS
from gtqlora.families import packed
from gtqlora.ranks import share

NATIVE, KEEP, NF4 = "native", "keep", "nf4"
"""Experts as the checkpoint has them; dense weights as they are, or in 4 bits."""
AUTO = "auto"
"""The kernel that fits the processor and the number of tokens."""
_OF_THIS_MACHINE = ("on_disk", "memory", "disk")
"""Settings that say nothing of the weights."""
CHOICES = (*FORMATS, NATIVE)
"""Known values of `FrozenExpertsConfig.format`."""


class FrozenExpertsConfig(QuantizationConfigMixin):
    """Routed experts frozen in 4 bits, as `quantization_config` of `from_pretrained` and in config.json.

    Attributes:
        format: "nf4", "int4-g32" or "int4-g128" quantizes; "native" keeps a quantized checkpoint's own bits.
        dense: "keep", or "nf4" for the linears of attention, dense MLPs and shared experts through bitsandbytes.
        expert_range: (rank, n_ranks): hold experts rank*E/n_ranks up to (rank+1)*E/n_ranks of E; None holds all.
        kernel: how to multiply by them, see `FrozenExperts.kernel`.
        on_disk: what config.json says instead, where the saved weights are another library's.
        memory: GiB of the GPU for experts; layers that do not fit wait on the host, see `streaming`. Without it, what
            is free. No part of what is saved, as `disk` is none.
        disk: folder in which those layers wait that do not fit the host's memory either.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        format: str = "nf4",
        dense: str = KEEP,
        expert_range: tuple[int, int] | list[int] | None = None,
        kernel: str = AUTO,
        on_disk: dict[str, object] | None = None,
        quant_method: str = packed.OURS,
        memory: float | None = None,
        disk: str | None = None,
    ) -> None:
        for key, value, known in (
            ("format", format, CHOICES),
            ("dense", dense, (KEEP, NF4)),
            ("kernel", kernel, kernels.NAMES),
            ("quant_method", quant_method, (packed.OURS,)),
        ):
            if value not in known:
                raise ConfigError(f"{key} = {value!r}: known are {', '.join(known)}")
        self.quant_method: Any = packed.OURS
        self.format, self.dense, self.kernel, self.on_disk = format, dense, kernel, on_disk
        self.expert_range = _checked_range(expert_range)
        self.memory, self.disk = memory, disk

    @classmethod
    def from_dict(cls, config_dict: dict[str, object], return_unused_kwargs: bool = False, **kwargs: object) -> object:
        """Read the settings in a config.json."""
        return super().from_dict(_present_names(config_dict), return_unused_kwargs, **kwargs)

    def held(self, n_experts: int) -> tuple[int, int]:
        """Return the first expert held and how many there are.

        Raises:
            ConfigError: there are more ranks than experts.
        """
        rank, n_ranks = self.expert_range or (0, 1)
        if n_ranks > n_experts:
            raise ConfigError(f"expert_range = {self.expert_range}: the model has {n_experts} experts a layer")
        held = share(n_experts, rank, n_ranks)
        return held.start, len(held)

    def to_dict(self) -> dict[str, object]:
        """Return the settings as config.json holds them."""
        if self.on_disk is not None:
            return copy.deepcopy(self.on_disk)
        settings = {key: value for key, value in vars(self).items() if key not in _OF_THIS_MACHINE}
        return {**settings, "expert_range": list(self.expert_range) if self.expert_range else None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"


def _present_names(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings under the names they have now: gtqlora 0.1.0 called the kernel a product."""
    return {"kernel" if key == "product" else key: value for key, value in settings.items()}


def _checked_range(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ConfigError(f"expert_range = {value!r}: must be (rank, n_ranks) with 0 <= rank < n_ranks")
    parts = tuple(value)
    if len(parts) != 2 or not all(isinstance(part, int) for part in parts) or not 0 <= parts[0] < parts[1]:
        raise ConfigError(f"expert_range = {value!r}: must be (rank, n_ranks) with 0 <= rank < n_ranks")
    return parts


def saved_settings(settings: Mapping[str, object]) -> FrozenExpertsConfig:
    """Return the settings of a checkpoint that gtqlora saved, from its config.json.

    Raises:
        ModelError: they are none.
    """
    try:
        return FrozenExpertsConfig(**_present_names(settings))  # type: ignore[arg-type]
    except (ConfigError, TypeError, ValueError) as error:
        raise ModelError(f"quantization_config in config.json is none that gtqlora wrote ({error})") from error


# Not as a decorator, which would hide the class from type checkers.
register_quantization_config(packed.OURS)(FrozenExpertsConfig)
