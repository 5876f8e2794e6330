"""A GT-QLoRA edit on a model in training, and adapters written and read.

Two kinds: `gt-qlora` (LoRA on attention and shared experts, whole routers in PEFT's `modules_to_save`) and `projection`
(one residual direction removed from everything that writes the residual stream).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, transformers_weight_conversion
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from gtqlora.config import Mode
from gtqlora.errors import RunError, TrainingError
from gtqlora.experts.layout import bits_of
from gtqlora.experts.module import FrozenExperts
from gtqlora.families import Anatomy, language_model
from gtqlora.results.adapter import (
    DIRECTION,
    EDIT_WEIGHTS,
    INFO,
    PEFT_SETTINGS,
    PROJECTION,
    Info,
    digest_of,
    info_from,
    read_files,
    scale_of,
    write_settings,
)

_SUMMED_AT_ONCE = 2**26
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
    """PEFT's description of a GT-QLoRA edit; every module is named in full."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=DUMMY_TARGET_MODULES if mode == "gates" else list(anatomy.lora_targets),
        modules_to_save=None if mode == "lora" else list(anatomy.routers),
        task_type="CAUSAL_LM",
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_gate(name: str) -> bool:
    return ".modules_to_save." in name


def freeze_rest_of_routers(model: nn.Module, anatomy: Anatomy) -> None:
    """Freeze what a router has beside the parameters that its family says train: PEFT lets all of the copy train."""
    kept = set(anatomy.family.router_parameters)
    for wrapper in routers_of(model).values():
        for name, parameter in wrapper.modules_to_save["default"].named_parameters():
            parameter.requires_grad_(name in kept)


def assert_trains_exactly(model: PeftModel, anatomy: Anatomy, *, mode: Mode, rank: int) -> None:
    """Check that every intended module trains, nothing else does, and gates are fp32.

    Raises:
        TrainingError: names the first module that is too many or missing.
    """
    base = model.get_base_model()
    expected: dict[str, tuple[int, ...]] = {}
    if mode != "gates":
        for path in anatomy.lora_targets:
            linear: Any = base.get_submodule(path)
            expected[f"{path}.lora_A.default.weight"] = (rank, linear.in_features)
            expected[f"{path}.lora_B.default.weight"] = (linear.out_features, rank)
    if mode != "lora":
        for path in anatomy.routers:
            router: Any = base.get_submodule(path)
            original = getattr(router, "original_module", router)
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


FrozenState = dict[str, tuple[int, int]]
"""Per buffer: how often it was written to in place, and the sum of its bits as whole numbers."""


def sum_of_bits(tensor: Tensor) -> int:
    """Of its elements' bits as whole numbers; a piece at a time, as CUDA makes a 64-bit copy of what it adds up."""
    bits = bits_of(tensor).flatten()
    return int(torch.stack([piece.sum(dtype=torch.int64) for piece in bits.split(_SUMMED_AT_ONCE)]).sum())


def frozen_state(model: nn.Module) -> FrozenState:
    """Of all frozen experts, by name in the model inside any PEFT wrapper; one pass over their memory, no copy."""
    state: FrozenState = {}
    for path, module in language_model(model).named_modules():
        if isinstance(module, FrozenExperts):
            module.arrange(tiled=False)  # products may have put the weights into another order
            for name, buffer in module.named_buffers():
                state[f"{path}.{name}"] = (buffer._version, sum_of_bits(buffer))
    return state


def assert_experts_frozen(model: nn.Module, before: FrozenState) -> None:
    """Check that the experts' 4-bit weights are what `frozen_state` saw.

    Raises:
        TrainingError: names the first buffer that was written to.
    """
    now = frozen_state(model)
    if now != before:
        written = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        raise TrainingError(f"{len(written)} buffers of frozen experts were written to, first: {written[0]}")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """For passes without gradients: `PeftModel.disable_adapter` without its status report and requires_grad rounds.

    Those cost more than the forward pass of a small model, and both callers switch once a step.
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


def save_edit(model: nn.Module, folder: Path) -> None:
    """Write the trained tensors, as they train, in the form that no other loader opens."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in sorted(edit_parameters(model).items())}
    save_file(tensors, folder / EDIT_WEIGHTS, metadata={"format": "pt"})


def load_edit(model: nn.Module, folder: Path) -> None:
    """Put the tensors of `save_edit` into a wrapped model.

    Raises:
        RunError: the file cannot be read, or its names or shapes are not this model's.
    """
    file = folder / EDIT_WEIGHTS
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: cannot be read ({error})") from error
    put_edit(model, tensors, str(folder))


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


def save(model: PeftModel, path: Path, info: Info) -> None:
    """Write a GT-QLoRA adapter, see `results.adapter`."""
    path.mkdir(parents=True, exist_ok=True)
    save_edit(model, path)
    settings: Any = model.peft_config["default"]
    write_settings(path, info, rank=settings.r, alpha=settings.lora_alpha)


def save_projection(direction_D: Tensor, path: Path, info: Info) -> None:
    path.mkdir(parents=True)
    save_file({"direction": direction_D.contiguous()}, path / DIRECTION)
    write_settings(path, info)


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read, once; what is computed from it is computed from these very bytes.

    Attributes:
        digest: its identity, of the bytes that were read.
        tensors: of `edit.safetensors`, or the direction.
        rank, alpha: of a gt-qlora adapter; LoRA is scaled by alpha / rank.
    """

    path: Path
    info: Info
    digest: str
    tensors: dict[str, Tensor]
    rank: int = 1
    alpha: int = 1

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def mode(self) -> Mode:
        has_lora = any(name.endswith(".lora_A") for name in self.tensors)
        has_gates = any(name.endswith(".weight") for name in self.tensors)
        return "gt" if has_lora and has_gates else "lora" if has_lora else "gates"

    @property
    def direction_D(self) -> Tensor:
        return self.tensors["direction"]


def read_adapter(path: Path) -> Adapter:
    """Read an adapter whole.

    Raises:
        RunError: a file is missing, unknown, or not as we write it.
    """
    files = read_files(path)
    info, digest = info_from(path, files[INFO]), digest_of(files)
    name = DIRECTION if info.kind == PROJECTION else EDIT_WEIGHTS
    try:
        tensors = load(files[name])
    except (SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{path / name}: cannot be read ({error}); run `gtqlora train` again") from error
    if info.kind == PROJECTION:
        if tensors.keys() != {"direction"} or tensors["direction"].ndim != 1:
            raise RunError(f"{path / name}: must hold one vector named 'direction'; run `gtqlora project` again")
        return Adapter(path, info, digest, tensors)
    rank, alpha = scale_of(path, info, files[PEFT_SETTINGS])
    for key, tensor in tensors.items():
        if key.endswith(".lora_A") and tensor.shape[:1] != (rank,):
            raise RunError(f"{path / name}: {key} is {tuple(tensor.shape)}, but the rank is {rank}")
    return Adapter(path, info, digest, tensors, rank, alpha)


def wrapped(model: nn.Module, anatomy: Anatomy, adapter: Adapter) -> PeftModel:
    """Return a model with a GT-QLoRA adapter on it, as it was trained.

    Raises:
        RunError: the adapter does not fit the model.
        TrainingError: PEFT scales LoRA otherwise than the merge does.
    """
    settings = lora_config(anatomy, mode=adapter.mode, rank=adapter.rank, alpha=adapter.alpha)
    with peft_targets_kept():
        found = get_peft_model(model, settings)  # type: ignore[arg-type]
    freeze_rest_of_routers(found, anatomy)
    put_edit(found, adapter.tensors, str(adapter.path))
    for layer in (m for m in found.modules() if isinstance(m, LoraLayer)):
        if layer.scaling["default"] != adapter.scale:
            raise TrainingError(f"{adapter.path}: PEFT scales LoRA by {layer.scaling['default']}, not {adapter.scale}")
    return found.eval()
