"""A GT-QLoRA edit in PEFT's hands: LoRA on attention and shared experts, whole routers in `modules_to_save`.

What trains is named here in full, and asserted; the routers' original weights stay beside the trained copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, transformers_weight_conversion
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from gtqlora.config import Mode
from gtqlora.errors import RunError, TrainingError
from gtqlora.families import Anatomy

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


def lora_config(anatomy: Anatomy, *, mode: Mode, rank: int, alpha: int) -> LoraConfig:
    """Return PEFT's description of a GT-QLoRA edit; every module is named in full."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=DUMMY_TARGET_MODULES if mode == "gates" else list(anatomy.lora_targets),
        modules_to_save=None if mode == "lora" else list(anatomy.routers),
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


def assert_trains_exactly(model: PeftModel, anatomy: Anatomy, *, mode: Mode, rank: int) -> None:
    """Check that every intended module trains, nothing else does, gates are fp32.

    Raises:
        TrainingError: names the first module that is too many or missing.
    """
    base = model.get_base_model()
    expected: dict[str, tuple[int, ...]] = {}
    if mode != "gates":
        for path in anatomy.lora_targets:
            # The sizes, and not the weight's shape: a weight in 4 bits has that of its packed bytes.
            linear = cast(nn.Linear, base.get_submodule(path))
            expected[f"{path}.lora_A.default.weight"] = (rank, linear.in_features)
            expected[f"{path}.lora_B.default.weight"] = (linear.out_features, rank)
    if mode != "lora":
        for path in anatomy.routers:
            router = base.get_submodule(path)
            original = router.original_module if isinstance(router, ModulesToSaveWrapper) else router
            for name in anatomy.family.router_parameters:
                expected[f"{path}.modules_to_save.default.{name}"] = tuple(original.get_parameter(name).shape)
    found = {name.removeprefix("base_model.model."): tuple(p.shape) for name, p in trainable(model).items()}
    if found != expected:
        odd = sorted(set(found.items()) ^ set(expected.items()))
        raise TrainingError(f"{len(odd)} trained tensors differ from GT-QLoRA's, first: {odd[0]}")
    for name, p in trainable(model).items():
        if is_gate(name) and p.dtype != torch.float32:
            raise TrainingError(f"{name} trains in {p.dtype}, but gates need fp32")


def routers_of(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Return the wrapped routers by name; each holds the trained copy beside the original."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}


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


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the model without its edit, in passes without gradients.

    `PeftModel.disable_adapter` does the same with a status report and rounds of `requires_grad` that cost more than the
    forward pass of a small model, and both callers switch once a step.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


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
