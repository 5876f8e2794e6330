"""Adapters written and read, and put on a model again; what lies in the folder is in `results.adapter`.

Two kinds: `gt-qlora` (LoRA on attention and shared experts, whole routers) and `projection` (one residual direction
removed from everything that writes the residual stream).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from gtqlora.edits.lora import in_half_precision
from gtqlora.edits.wrapping import (
    edit_parameters,
    freeze_rest_of_routers,
    lora_config,
    peft_targets_kept,
    put_edit,
)
from gtqlora.errors import RunError, TrainingError
from gtqlora.families import Anatomy
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


def save(model: PeftModel, path: Path, info: Info) -> None:
    """Write a GT-QLoRA adapter, see `results.adapter`."""
    path.mkdir(parents=True, exist_ok=True)
    save_edit(model, path)
    settings = model.peft_config["default"]
    assert isinstance(settings, LoraConfig)
    write_settings(path, info, rank=settings.r, alpha=settings.lora_alpha)


def save_projection(direction_D: Tensor, path: Path, info: Info) -> None:
    """Write a projection: its direction, and what it was made for."""
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
        """Return what LoRA's product is multiplied by."""
        return self.alpha / self.rank

    @cached_property
    def drawn_by(self) -> str:
        """Return what prompts are drawn by: a hash of what the edit does to weights, and so nobody's choice.

        Paths and settings that leave the tensors as they are move `digest`, which binds to all of the folder, not this.
        """
        does = [self.info.kind, self.info.norm_preserving, self.rank, self.alpha]
        told = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in sorted(self.tensors.items())]
        found = hashlib.sha256(json.dumps([*does, told]).encode())
        for _, tensor in sorted(self.tensors.items()):
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    @property
    def direction_D(self) -> Tensor:
        """Return a projection's direction."""
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
    settings = lora_config(
        anatomy, mode=adapter.info.mode, rank=adapter.rank, alpha=adapter.alpha, target=adapter.info.target
    )
    with peft_targets_kept():
        found = get_peft_model(model, settings)  # type: ignore[arg-type]
    freeze_rest_of_routers(found, anatomy)
    in_half_precision(found)
    put_edit(found, adapter.tensors, str(adapter.path))
    for layer in (m for m in found.modules() if isinstance(m, LoraLayer)):
        if layer.scaling["default"] != adapter.scale:
            raise TrainingError(f"{adapter.path}: PEFT scales LoRA by {layer.scaling['default']}, not {adapter.scale}")
    return found.eval()
