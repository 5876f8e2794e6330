"""Show a model's parts from its config.json alone: what is trained, what stays frozen, what it is called on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gtqlora.contrasts.prompting import Prompting, prompting_of
from gtqlora.errors import ConfigError, ModelError
from gtqlora.experts.formats import Format, format_of
from gtqlora.experts.loading import BF16, format_on_disk
from gtqlora.experts.quantizer import replace_experts
from gtqlora.experts.settings import NATIVE, FrozenExpertsConfig
from gtqlora.experts.sources import PACKED_PARTS, PACKED_SHAPE
from gtqlora.families import (
    GATES,
    Anatomy,
    Group,
    TensorNames,
    bind,
    correction_bias_values,
    load_config,
    load_tokenizer,
    meta_model,
    names_on_disk,
    parameter_counts,
    quantization,
)
from gtqlora.families.facts import DOWN, GATE_UP
from gtqlora.families.files import has, small_files, weight_map
from gtqlora.families.packed import OURS
from gtqlora.families.tokenizers import chat_template, check_generation

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model")


@dataclass(frozen=True, kw_only=True)
class Name:
    """Tensors on disk and the parameter in memory they become; `shape` is the parameter's."""

    disk: tuple[str, ...]
    memory: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's parts and totals. Bytes are at the checkpoint's dtype, trained gates at fp32.

    Attributes:
        gate_parameters: router weights, all of them trained.
        correction_bias_values: router biases that only steer selection; buffers, never trained.
        chat_template: whether the tokenizer files hold one; None when there are no tokenizer files.
        prompting: what it can be told, and where it has answers begin; None where the tokenizer cannot be loaded.
        quantized: the checkpoint's quant method, if it is quantized.
        expert_format: the 4-bit format that bytes of routed experts are counted in; None if they are not in 4 bits,
            or in a way that gtqlora does not read, and counted as the unpacked model's.
        names: one MoE layer's tensors; of the routed experts, the first and the last stand for all.
        names_from: where names on disk come from: the checkpoint's own, or, where there are no weights, those that
            transformers would write; the checkpoint may lie otherwise.
    """

    model: str
    family: str
    class_name: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    score: str
    n_group: int
    topk_group: int
    hidden_size: int
    dtype: str
    quantized: str | None
    expert_format: str | None
    lora_rank: int
    groups: tuple[Group, ...]
    text_parameters: int
    bytes: int
    routers: int
    gate_parameters: int
    correction_bias_values: int
    lora_parameters: int
    trained_parameters: int
    trained_bytes: int
    chat_template: bool | None
    prompting: Prompting | None
    names: tuple[Name, ...]
    names_from: Literal["checkpoint", "transformers"] = field(compare=False)


def inspect(model: str, *, lora_rank: int = 32, expert_format: str | None = None) -> Inspection:
    """Return the parts of MODEL (folder, config.json or hub id); no weights are read and none need be there.

    Args:
        expert_format: count routed experts as `--expert-format` would hold them; as the checkpoint does by default.

    Raises:
        ModelError: no such model, unreadable config.json, dense or unknown architecture, sizes that make no model or
            do not go with the format.
        ConfigError: `lora_rank` is below 1, or unknown `expert_format`.
    """
    if lora_rank < 1:
        raise ConfigError(f"lora_rank = {lora_rank}: must be at least 1")
    family, config = load_config(model)
    skeleton = meta_model(family, config)
    quantized, on_disk = quantization(model), _on_disk(model)
    anatomy, found = bind(skeleton, family), names_on_disk(model)
    of_layer = [name for name in found if f".{anatomy.moe[0].index}." in name]
    names = _names(skeleton, anatomy, TensorNames(skeleton, family, of_layer), _suffixes(on_disk, quantized))
    held = _held(model, expert_format, on_disk)
    if held is not None:
        replace_experts(skeleton, family, held, FrozenExpertsConfig())
    anatomy = bind(skeleton, family)
    groups = parameter_counts(skeleton, anatomy, lora_rank)
    gates = next(group.trained_parameters for group in groups if group.name == GATES)
    trained = sum(group.trained_parameters for group in groups)
    return Inspection(
        model=model,
        family=family.model_type,
        class_name=family.class_name,
        layers=anatomy.n_layers,
        moe_layers=tuple(layer.index for layer in anatomy.moe),
        experts=anatomy.spec.n_experts,
        top_k=anatomy.spec.top_k,
        score=anatomy.spec.score,
        n_group=anatomy.spec.n_group,
        topk_group=anatomy.spec.topk_group,
        hidden_size=anatomy.hidden_size,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        quantized=quantized,
        expert_format=held.name if held else None,
        lora_rank=lora_rank,
        groups=groups,
        text_parameters=sum(group.parameters for group in groups),
        bytes=sum(group.bytes for group in groups),
        routers=len(anatomy.routers),
        gate_parameters=gates,
        correction_bias_values=correction_bias_values(skeleton, anatomy),
        lora_parameters=trained - gates,
        trained_parameters=trained,
        trained_bytes=sum(group.trained_bytes for group in groups),
        chat_template=(templated := _chat_template(model, config.vocab_size)),
        prompting=_prompting(model) if templated else None,
        names=names,
        names_from="checkpoint" if of_layer else "transformers",
    )


def _on_disk(model: str) -> Format | None:
    """Return the 4-bit format of the checkpoint; None, too, if it is quantized in a way that is not read."""
    try:
        return format_on_disk(model)
    except ModelError:
        return None


def _held(model: str, expert_format: str | None, on_disk: Format | None) -> Format | None:
    """Return the 4-bit format in which to count the experts."""
    if expert_format is None:
        return on_disk
    if expert_format == NATIVE:
        found = format_on_disk(model)
        if found is None:
            raise ModelError(f"{model}: experts {NATIVE!r}, but the checkpoint is not quantized")
        return found
    return None if expert_format == BF16 else format_of(FrozenExpertsConfig(format=expert_format).format)


def _chat_template(model: str, vocabulary: int) -> bool | None:
    """Return whether there is a chat template, as the verbs that need one find it; None without a tokenizer."""
    folder = small_files(model)
    check_generation(model, folder, vocabulary)
    weight_map(folder)
    found = chat_template(folder)
    return None if not any(has(folder, name) for name in _TOKENIZER_FILES) else found is not None


def _prompting(model: str) -> Prompting | None:
    try:
        return prompting_of(load_tokenizer(model))
    except ModelError:  # whoever needs it says what is wrong with it
        return None


def _suffixes(on_disk: Format | None, quantized: str | None) -> tuple[str, ...]:
    """Return what follows a matrix's name in those of its tensors on disk."""
    if on_disk is None:
        return ("weight",)
    if quantized == OURS:
        return tuple(on_disk.layout(on_disk.group, on_disk.group))
    return (*PACKED_PARTS.values(), PACKED_SHAPE)


def _names(
    skeleton: torch.nn.Module, anatomy: Anatomy, names: TensorNames, suffixes: tuple[str, ...]
) -> tuple[Name, ...]:
    """Return the first MoE layer's parameters, with the checkpoint tensors that make each."""
    layer, ends = anatomy.moe[0], (0, anatomy.spec.n_experts - 1)
    parts = {f"{layer.experts}.{GATE_UP}": 2, f"{layer.experts}.{DOWN}": 1}

    def disk(memory: str) -> tuple[str, ...]:
        if memory not in parts or names.is_whole(memory):
            return (names.whole(memory),)
        stems = [name.removesuffix("weight") for name in names.makers(memory, ends, parts[memory])]
        return tuple(f"{stem}{suffix}" for stem in stems for suffix in suffixes)

    path = f"{anatomy.layers[layer.index]}."
    tensors = {name: tensor for name, tensor in skeleton.state_dict().items() if name.startswith(path)}
    return tuple(Name(disk=disk(name), memory=name, shape=tuple(tensor.shape)) for name, tensor in tensors.items())
