"""A GT-QLoRA edit in PEFT's hands: LoRA on attention and shared experts, whole routers in `modules_to_save`.

What trains is named here in full, and asserted; the routers' original weights stay beside the trained copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, transformers_weight_conversion
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gtqlora.config import Mode, Target
from gtqlora.config.values import as_typed
from gtqlora.errors import ConfigError, RunError, TrainingError
from gtqlora.families import Anatomy, Family, language_model
from gtqlora.families.coverage import covered, in_layer

_TRAINED = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.(?:(?P<part>lora_[AB])\.default|modules_to_save\.default)\.weight"
)


@contextmanager
def peft_targets_kept() -> Iterator[None]:
    """Keep PEFT from rewriting shared-expert targets into routed experts, while wrapping and loading (peft#3711)."""
    convert = transformers_weight_conversion._convert_peft_config_moe
    transformers_weight_conversion._convert_peft_config_moe = lambda *_: None
    try:
        yield
    finally:
        transformers_weight_conversion._convert_peft_config_moe = convert


Part = Literal["lora", "gates"]
"""A part of an edit that can be in place without the other."""


@dataclass(frozen=True)
class Parts:
    """What of a model an edit changes, by path: linears that carry LoRA, and whole routers."""

    lora: tuple[str, ...]
    gates: tuple[str, ...]

    @staticmethod
    def of(anatomy: Anatomy, mode: Mode, target: Target | None = None) -> Parts:
        """Return the parts of a mode; of those, where the edit is for a program, the ones that it applies."""
        lora = () if mode == "gates" else anatomy.lora_targets
        gates = () if mode == "lora" else anatomy.routers
        if target is None:
            return Parts(lora, gates)
        applied = covered(anatomy.family, target)
        kept = tuple(path for path in lora if in_layer(anatomy.family, path) in applied.lora)
        return Parts(kept, gates if applied.gates else ())

    def named(self) -> list[tuple[Part, tuple[str, ...]]]:
        """Return each part with its paths, maybe none."""
        return [("lora", self.lora), ("gates", self.gates)]


def check_trains(family: Family, mode: Mode, target: Target | None) -> None:
    """Check that something is left to train where an edit is for a program.

    Raises:
        ConfigError: the program applies nothing of what the mode trains.
    """
    if target is None:
        return
    applied = covered(family, target)
    if not (applied.lora and mode != "gates") and not (applied.gates and mode != "lora"):
        what = "adapters" if not applied.lora else "changed routers, and mode = 'gates' trains nothing else"
        named = f"{as_typed('target')} = {target!r}"
        raise ConfigError(f"{named}: it applies no {what} of {family.model_type} ({applied.source})")


def lora_config(anatomy: Anatomy, *, mode: Mode, rank: int, alpha: int, target: Target | None = None) -> LoraConfig:
    """Return PEFT's description of a GT-QLoRA edit; every module is named in full."""
    parts = Parts.of(anatomy, mode, target)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=list(parts.lora) or DUMMY_TARGET_MODULES,
        modules_to_save=list(parts.gates) or None,
        task_type="CAUSAL_LM",
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_gate(name: str) -> bool:
    """Tell whether a trained parameter of that name is a router's weight."""
    return ".modules_to_save." in name


def freeze_rest_of_routers(model: nn.Module, anatomy: Anatomy) -> None:
    """Freeze what a router has beside the parameters that its family says train: PEFT lets all of the copy train."""
    kept = set(anatomy.family.router_parameters)
    for wrapper in routers_of(model).values():
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            parameter.requires_grad_(name in kept)


def assert_trains_exactly(
    model: PeftModel, anatomy: Anatomy, *, mode: Mode, rank: int, target: Target | None = None
) -> None:
    """Check that every intended module trains, nothing else does, gates are fp32.

    Raises:
        TrainingError: names the first module that is too many or missing; or the gates would get no gradient.
    """
    if anatomy.spec.normalize and anatomy.spec.top_k == 1 and mode != "lora":
        raise TrainingError("a token's one expert has weight 1 whatever its router says, so gates get no gradient here")
    expected = _expected(model.get_base_model(), anatomy.family, Parts.of(anatomy, mode, target), rank)
    found = {name.removeprefix("base_model.model."): tuple(p.shape) for name, p in trainable(model).items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))
        raise TrainingError(f"{len(odd)} trained tensors differ from GT-QLoRA's, first: {odd[0]}")
    for name, p in trainable(model).items():
        if is_gate(name) and p.dtype != torch.float32:
            raise TrainingError(f"{name} trains in {p.dtype}, but gates need fp32")


def _expected(base: nn.Module, family: Family, parts: Parts, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what should train, by name."""
    expected: dict[str, tuple[int, ...]] = {}
    for path in parts.lora:
        # The sizes, and not the weight's shape: a weight in 4 bits has that of its packed bytes.
        linear = cast(nn.Linear, base.get_submodule(path))
        expected[f"{path}.lora_A.default.weight"] = (rank, linear.in_features)
        expected[f"{path}.lora_B.default.weight"] = (linear.out_features, rank)
    for path in parts.gates:
        router = base.get_submodule(path)
        original = router.original_module if isinstance(router, ModulesToSaveWrapper) else router
        for name in family.router_parameters:
            expected[f"{path}.modules_to_save.default.{name}"] = tuple(original.get_parameter(name).shape)
    return expected


def routers_of(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Return the wrapped routers by name; each holds the trained copy beside the original."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


def gate_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained weight of every router, by the router's path as in `Anatomy`."""
    return {
        name: module.modules_to_save["default"].get_parameter("weight")
        for name, module in language_model(model).named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def assert_bias_frozen(model: nn.Module, anatomy: Anatomy) -> None:
    """Check that all of a router but what trains, its correction bias above all, is the original's, bit for bit.

    Raises:
        TrainingError: names the router, and what of it moved.
    """
    trained = set(anatomy.family.router_parameters)
    for path, wrapper in routers_of(model).items():
        copy, original = wrapper.modules_to_save["default"].state_dict(), wrapper.original_module.state_dict()
        for name in original.keys() - trained:
            if not torch.equal(copy[name], original[name]):
                raise TrainingError(f"{path}.{name} moved; it must stay frozen")


class Switched:
    """PEFT's layers of one part of an edit, which can be taken out of the way, in passes without gradients.

    `PeftModel.disable_adapter` does the same for all of them with a status report and rounds of `requires_grad` that
    cost more than the forward pass of a small model, and who uses this switches once a step.
    """

    def __init__(self, layers: Sequence[BaseTunerLayer | AuxiliaryTrainingWrapper]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def _switch(self, off: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = off

    def enable(self) -> None:
        """Put them in place."""
        self._switch(False)

    def disable(self) -> None:
        """Take them out of the way."""
        self._switch(True)


def switched(model: nn.Module, part: Part) -> Switched:
    """Return the layers of one part of the edit on a wrapped model."""
    kind = BaseTunerLayer if part == "lora" else AuxiliaryTrainingWrapper
    return Switched([module for module in model.modules() if isinstance(module, kind)])


@contextmanager
def adapters_off(model: nn.Module, *off: Part) -> Iterator[None]:
    """Run the model without these parts of its edit, in passes without gradients."""
    parts = [switched(model, part) for part in off]
    for part in parts:
        part.disable()
    try:
        yield
    finally:
        for part in parts:
            part.enable()


def edit_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what a GT-QLoRA edit consists of, by the names of `edit.safetensors`.

    `<path>.lora_A` and `<path>.lora_B` of each linear, `<path>.weight` of each router; paths as in `Anatomy`.
    """
    found = {}
    for name, parameter in model.named_parameters():
        match = _TRAINED.fullmatch(name)
        if match:
            found[f"{match['path']}.{match['part'] or 'weight'}"] = parameter
    return found


@torch.no_grad()
def put_edit(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put an edit's tensors into a wrapped model.

    Raises:
        RunError: names or shapes are not this model's.
    """
    parameters = edit_parameters(model)
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    odd = sorted(set(wanted.items()) ^ {(name, tuple(tensor.shape)) for name, tensor in tensors.items()})
    if odd:
        raise RunError(f"{where}: the adapter does not fit the model ({len(odd)} tensors differ, e.g. {odd[0][0]})")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


@torch.no_grad()
def restore_masters(model: PeftModel) -> None:
    """Put what trains into fp32 again: TRL casts it to bf16 when bitsandbytes holds the dense weights in 4 bits."""
    for p in trainable(model).values():
        p.data = p.data.float()
    for wrapper in routers_of(model).values():
        wrapper.modules_to_save["default"].get_parameter("weight").copy_(wrapper.original_module.weight)
