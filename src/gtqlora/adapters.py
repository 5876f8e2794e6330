"""What an edit is: on disk, on a model, and switched off again.

Two kinds: `gt-qlora` (a PEFT adapter: LoRA on attention and shared experts, whole routers in `modules_to_save`) and
`projection` (one residual direction removed from everything that writes the residual stream).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, transformers_weight_conversion
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gtqlora.capture import Subject, direction_removed, open_subject
from gtqlora.config import Mode
from gtqlora.errors import RunError, TrainingError
from gtqlora.experts.layout import bits_of
from gtqlora.experts.loading import BF16
from gtqlora.experts.module import FrozenExperts
from gtqlora.families import Anatomy, language_model
from gtqlora.run import sha256_file, sha256_json

INFO = "gtqlora.json"
DIRECTION = "direction.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GT_QLORA, PROJECTION = "gt-qlora", "projection"
_SUMMED_AT_ONCE = 2**26


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


def assert_trains_exactly(model: PeftModel, anatomy: Anatomy, *, mode: Mode, rank: int) -> None:
    """Every intended module trains, nothing else does, gates are fp32.

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
            expected[f"{path}.modules_to_save.default.weight"] = (anatomy.spec.n_experts, anatomy.hidden_size)
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
    """The router's correction bias is the original's, bit for bit.

    Raises:
        TrainingError: names the router whose bias moved.
    """
    name = anatomy.family.correction_bias
    for path, wrapper in routers_of(model).items():
        if name and not torch.equal(
            getattr(wrapper.modules_to_save["default"], name), getattr(wrapper.original_module, name)
        ):
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
    """The experts' 4-bit weights are what `frozen_state` saw.

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


@dataclass(frozen=True)
class Info:
    """`gtqlora.json` beside the weights: what the adapter is and what it was made for."""

    kind: str
    base: str
    family: str
    details: dict[str, Any]


def save_trained(model: PeftModel, path: Path | str) -> None:
    """PEFT's own files of what was trained; frozen experts are left where they are, in the order they are in."""
    experts = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FrozenExperts))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: tensor.detach() for name, tensor in tensors.items() if not name.startswith(experts)}
    # left to itself PEFT adds the embeddings of a nested config
    model.save_pretrained(str(path), state_dict=state, save_embedding_layers=False)


def save(model: PeftModel, path: Path, info: Info) -> None:
    """Write a GT-QLoRA adapter as a folder PEFT can read, plus `gtqlora.json`."""
    save_trained(model, path)
    (path / "README.md").unlink(missing_ok=True)  # PEFT's template card says nothing
    _write_info(path, info)


def save_projection(direction_D: Tensor, path: Path, info: Info) -> None:
    path.mkdir(parents=True)
    save_file({"direction": direction_D.contiguous()}, path / DIRECTION)
    _write_info(path, info)


def _write_info(path: Path, info: Info) -> None:
    (path / INFO).write_text(json.dumps(asdict(info), indent=2, sort_keys=True) + "\n")


def read_info(path: Path) -> Info:
    """Raises RunError when the folder is not an adapter of ours."""
    try:
        return Info(**json.loads((path / INFO).read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise RunError(f"{path}: not a gtqlora adapter (no readable {INFO}); run `gtqlora train` first") from error


def adapter_hash(path: Path) -> str:
    """Identity of an adapter's weights and settings; `export` demands that it is the one `verify` certified."""
    names = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    return sha256_json([(name, sha256_file(path / name)) for name in names])


def read_direction(path: Path) -> Tensor:
    try:
        return load_file(path / DIRECTION)["direction"]
    except (OSError, KeyError, SafetensorError) as error:
        raise RunError(f"{path / DIRECTION}: cannot be read ({error}); run `gtqlora project` again") from error


def norm_preserving(info: Info) -> bool:
    """Whether a projection keeps the lengths of the weights' columns."""
    return info.details.get("config", {}).get("norm_preserving", False)


def projected(weight_DI: Tensor, direction_D: Tensor, *, norm_preserving: bool = False) -> Tensor:
    """(I - r r^T) W for outputs D and inputs I, r of unit length; in fp32.

    Args:
        norm_preserving: give every column, what one input writes, its length back. It stays orthogonal to r.
    """
    weight_DI, r_D = weight_DI.float(), direction_D.float()
    kept_DI = weight_DI - torch.outer(r_D, r_D @ weight_DI)
    if not norm_preserving:
        return kept_DI
    norm_I, left_I = weight_DI.norm(dim=0), kept_DI.norm(dim=0)
    # what is left of a column along r is rounding, which must not be blown up
    return kept_DI * torch.where(left_I > 1e-5 * norm_I, norm_I / left_I, 0.0)


class WeightsProjected:
    """Every writer of the residual stream projected, its columns' lengths kept.

    How much a column grows depends on the input, inside the fused experts too, so unlike `direction_removed` this
    holds a second copy of these weights while it lives.

    Raises:
        RunError: the routed experts are frozen.
    """

    def __init__(self, subject: Subject, direction_D: Tensor) -> None:
        base, anatomy = language_model(subject.model), subject.anatomy
        banks = [base.get_submodule(layer.experts) for layer in anatomy.moe]
        if any(isinstance(bank, FrozenExperts) for bank in banks):
            raise RunError("a norm-preserving projection rescales experts; load them with experts = 'bf16'")
        r_D = direction_D / direction_D.norm()
        embedding = base.get_submodule("model.embed_tokens").get_parameter("weight")
        linears = [base.get_submodule(path).get_parameter("weight") for path in anatomy.residual_writers]
        experts = [bank.get_parameter("down_proj") for bank in banks]
        self._enabled = False
        self._others = [
            (embedding, _edited(embedding.mT[None], r_D)[0].mT),
            *((weight, _edited(weight[None], r_D)[0]) for weight in linears),
            *((weight, _edited(weight, r_D)) for weight in experts),
        ]

    def _swap(self, enabled: bool) -> None:
        if enabled != self._enabled:
            for i, (weight, other) in enumerate(self._others):
                self._others[i], weight.data = (weight, weight.data), other
            self._enabled = enabled

    def enable(self) -> None:
        self._swap(True)

    def disable(self) -> None:
        self._swap(False)

    def __enter__(self) -> None:
        self.enable()

    def __exit__(self, *_: object) -> None:
        self.disable()


@torch.no_grad()
def _edited(weights_EDI: Tensor, r_D: Tensor) -> Tensor:
    """One matrix at a time, as fp32 copies of a layer's experts are large."""
    out = torch.empty_like(weights_EDI)
    for mine, weight_DI in zip(out, weights_EDI, strict=True):
        mine.copy_(projected(weight_DI, r_D, norm_preserving=True))
    return out


def removal(subject: Subject, direction_D: Tensor, *, norm_preserving: bool) -> direction_removed | WeightsProjected:
    """Takes a direction out of a subject when entered or enabled, and puts it back."""
    if norm_preserving:
        return WeightsProjected(subject, direction_D)
    return direction_removed(subject.model, direction_D)


class Edited:
    """A subject with an edit that can be switched off: `subject` runs edited, within `original()` as it was."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self.info = read_info(path)
        family = subject.anatomy.family.model_type
        if self.info.family != family:
            raise RunError(f"{path}: the adapter was made for {self.info.family}, but the model is {family}")
        self._removal: direction_removed | WeightsProjected | None = None
        if self.info.kind == PROJECTION:
            direction_D = read_direction(path)
            if direction_D.shape != (subject.anatomy.hidden_size,):
                raise RunError(
                    f"{path}: the adapter does not fit the model (a direction of {len(direction_D)} values, "
                    f"hidden size {subject.anatomy.hidden_size})"
                )
            direction_D = direction_D.to(subject.device)
            self._removal = removal(subject, direction_D, norm_preserving=norm_preserving(self.info))
            self._removal.enable()
            self.subject = subject
        else:
            self.subject = replace(subject, model=_load_peft(subject.model, path))
            assert_bias_frozen(self.subject.model, subject.anatomy)

    @contextmanager
    def original(self) -> Iterator[None]:
        """Within, the model computes what it computed before the edit."""
        if self._removal is None:
            with adapters_off(self.subject.model):
                yield
            return
        self._removal.disable()
        try:
            yield
        finally:
            self._removal.enable()


def trained_experts(info: Info) -> str:
    """The routed experts that an edit was made with; before there was a choice, the checkpoint's own."""
    return info.details.get("config", {}).get("experts", BF16)


def load(
    model: str, adapter: str | Path, *, dtype: str = "auto", device: str = "cpu", experts: str | None = None
) -> Edited:
    """MODEL with the adapter of a run, ready to run; bitwise the logits it had when it was trained.

    Args:
        experts: as in `open_subject`; None takes those that the adapter was made with.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: unknown `experts`.
        RunError: the adapter is missing, or made for another architecture or shape.
    """
    path = Path(adapter)
    experts = trained_experts(read_info(path)) if experts is None else experts
    return Edited(open_subject(model, dtype=dtype, device=device, experts=experts), path)


def _load_peft(model: nn.Module, path: Path) -> PeftModel:
    try:
        on_disk = load_file(path / ADAPTER_WEIGHTS)
        with peft_targets_kept():
            loaded = PeftModel.from_pretrained(model, str(path)).eval()  # type: ignore[arg-type]
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise RunError(f"{path}: the adapter does not fit the model ({reason})") from error
    # PEFT only warns of tensors that are missing or have no place
    odd = sorted(on_disk.keys() ^ get_peft_model_state_dict(loaded, save_embedding_layers=False).keys())
    if odd:
        raise RunError(f"{path}: the adapter does not fit the model ({len(odd)} tensors differ, e.g. {odd[0]})")
    return loaded
