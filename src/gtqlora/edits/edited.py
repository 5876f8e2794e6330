"""A model with an edit on it that can be switched off: as it was trained, or merged and rounded as it ships."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora.capture import Subject, direction_removed, open_subject
from gtqlora.config import Dtype, ModelConfig
from gtqlora.edits.adapters import Adapter, read_adapter, wrapped
from gtqlora.edits.merging import Edit, Projected, merged, plan
from gtqlora.edits.wrapping import Part, Parts, switched
from gtqlora.errors import RunError
from gtqlora.experts.module import FrozenExperts
from gtqlora.experts.sharding import exchanged, part_of
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.families import TensorNames, check_projectable, fp8, language_model
from gtqlora.families.facts import DOWN
from gtqlora.families.files import weight_files
from gtqlora.families.layers import Absent
from gtqlora.results.adapter import PROJECTION


class Change(Protocol):
    """An edit in place, and out of the way."""

    def enable(self) -> None:
        """Put the edit in place."""
        ...

    def disable(self) -> None:
        """Take it out of the way."""
        ...


class WeightsReplaced:
    """Parameters that take other values while it is enabled; it holds a second copy of these."""

    def __init__(self, others: list[tuple[nn.Parameter, Tensor]]) -> None:
        self._others = [(parameter, part_of(parameter, other)) for parameter, other in others]
        self._enabled = False

    def __len__(self) -> int:
        return len(self._others)

    def _swap(self, enabled: bool) -> None:
        if enabled != self._enabled:
            for i, (parameter, other) in enumerate(self._others):
                self._others[i] = parameter, exchanged(parameter, other)
            self._enabled = enabled

    def enable(self) -> None:
        """Take the other values."""
        self._swap(True)

    def disable(self) -> None:
        """Take the own values again."""
        self._swap(False)

    def __enter__(self) -> None:
        self.enable()

    def __exit__(self, *_: object) -> None:
        self.disable()


def weights_projected(
    subject: Subject, direction_D: Tensor, *, norm_preserving: bool, as_written: bool = False
) -> WeightsReplaced:
    """Return the change that projects every writer of the residual stream.

    Args:
        as_written: compute it on the CPU, as `export` does, so that not a bit differs from what ships.

    Raises:
        RunError: the routed experts are frozen.
    """
    base, anatomy = language_model(subject.model), subject.anatomy
    check_projectable(anatomy)
    banks = [base.get_submodule(layer.experts) for layer in anatomy.moe]
    if any(isinstance(bank, FrozenExperts) for bank in banks):
        raise RunError("a norm-preserving projection rescales experts; load them with expert_format = 'bf16'")
    direction_D = direction_D.to("cpu" if as_written else subject.device)
    r_D = direction_D / direction_D.norm()
    embedding = base.get_submodule(anatomy.family.embedding)
    linears = [base.get_submodule(path).get_parameter("weight") for path in anatomy.residual_writers]
    experts = [bank.get_parameter(DOWN) for bank in banks]
    written, embedded = Projected(r_D, norm_preserving), Projected(r_D, norm_preserving, rows=True)
    edits = [(weight, written) for weight in (*linears, *experts)]
    if not isinstance(embedding, Absent):
        edits.append((embedding.get_parameter("weight"), embedded))
    with torch.no_grad():
        others = [(weight, merged(weight.to(r_D.device), edit).to(weight.device)) for weight, edit in edits]
    return WeightsReplaced(others)


def removal(subject: Subject, direction_D: Tensor, *, norm_preserving: bool) -> direction_removed | WeightsReplaced:
    """Takes a direction out of a subject when entered or enabled, and puts it back.

    How much a column grows to keep its length depends on the input, inside the fused experts too, so that needs a
    second copy of the weights; without it the stream can be projected as it is written.
    """
    if norm_preserving:
        return weights_projected(subject, direction_D, norm_preserving=True)
    return direction_removed(subject.model, subject.anatomy, direction_D)


def _direction(subject: Subject, adapter: Adapter) -> Tensor:
    direction_D, wanted = adapter.direction_D, subject.anatomy.hidden_size
    if direction_D.shape != (wanted,):
        raise RunError(
            f"{adapter.path}: the adapter does not fit the model (a direction of {len(direction_D)} values, "
            f"hidden size {wanted})"
        )
    return direction_D.to(subject.device)


def _weights_merged(subject: Subject, model: str, adapter: Adapter, paths: Iterable[str]) -> WeightsReplaced:
    base, family = cast(PreTrainedModel, language_model(subject.model)), subject.anatomy.family
    folder, shards = weight_files(model)
    with TensorFiles([folder / shard for shard in shards]) as files:
        names = TensorNames(base, family, files.where)
        return weights_merged(subject, model, files, names, plan(adapter, subject.anatomy, names), paths)


def weights_merged(
    subject: Subject,
    model: str,
    files: TensorFiles,
    names: TensorNames,
    edits: Mapping[str, Edit],
    paths: Iterable[str] | None = None,
) -> WeightsReplaced:
    """Return the checkpoint's tensors with the edit, rounded as they would be written, then cast as they are loaded.

    Args:
        subject: the model or a layer of it.
        paths: of the modules whose weights are wanted; None: of all that an edit can change.

    Raises:
        RunError: a tensor is not there, or of another shape.
    """
    base, others = language_model(subject.model), []
    for path in (*subject.anatomy.lora_targets, *subject.anatomy.routers) if paths is None else paths:
        name = names.whole(f"{path}.weight")
        if name not in edits:
            continue
        if name not in files.where:
            raise RunError(f"{model}: the checkpoint has no tensor {name}, which the edit changes")
        parameter = base.get_submodule(path).get_parameter("weight")
        tensor = _as_written(files, name, edits[name]).to(base.dtype)  # type: ignore[arg-type]
        others.append((parameter, tensor.to(parameter.device, parameter.dtype)))
    return WeightsReplaced(others)


def _as_written(files: TensorFiles, name: str, edit: Edit) -> Tensor:
    """Return a tensor of the checkpoint with its edit, rounded as it is written; one in FP8 as it is read again."""
    tensor = files.read(name)
    if tensor.dtype == fp8.DTYPE:
        return fp8.changed(tensor, files.read(name + fp8.SCALES), edit)
    return merged(tensor, edit)


class Edited:
    """A subject with an edit that can be switched off, whole or in parts: `subject` runs edited.

    Attributes:
        drawn_by: what prompts are drawn by, see `Adapter`.
        parts: what the edit changes, by path; None of a projection, which has no parts.

    Args:
        shipped: the model that the subject was opened from; its tensors with the edit, rounded to the checkpoint's
            dtype, take the place of the subject's. None: LoRA and gates as they were trained.

    Raises:
        RunError: the adapter was made for another architecture or shape.
    """

    def __init__(self, subject: Subject, adapter: Adapter, *, shipped: str | None = None) -> None:
        self.drawn_by = adapter.drawn_by
        self.info, family = adapter.info, subject.anatomy.family.model_type
        if self.info.family != family:
            raise RunError(f"{adapter.path}: the adapter was made for {self.info.family}, but the model is {family}")
        self.subject, self.parts = subject, None
        if self.info.kind == PROJECTION:
            self._changes: dict[str, Change] = {PROJECTION: self._projected(adapter, shipped)}
        else:
            self.parts = Parts.of(subject.anatomy, self.info.mode, self.info.target)
            self._changes = dict(self._changed(adapter, shipped, self.parts))
        for change in self._changes.values():
            change.enable()

    def _projected(self, adapter: Adapter, shipped: str | None) -> Change:
        direction_D, keep = _direction(self.subject, adapter), self.info.norm_preserving
        # what is written are projected weights; frozen experts have none to project, and are not exported so
        if shipped is not None and not _has_frozen_experts(self.subject):
            return weights_projected(self.subject, direction_D, norm_preserving=keep, as_written=True)
        return removal(self.subject, direction_D, norm_preserving=keep)

    def _changed(self, adapter: Adapter, shipped: str | None, parts: Parts) -> Iterator[tuple[Part, Change]]:
        """Give the change that each part of the edit makes, with the count of what it changes asserted."""
        plain = self.subject
        if shipped is None:
            self.subject = replace(plain, model=wrapped(plain.model, plain.anatomy, adapter))
        for part, paths in parts.named():
            change = (
                switched(self.subject.model, part)
                if shipped is None
                else _weights_merged(plain, shipped, adapter, paths)
            )
            if len(change) != len(paths):
                raise RunError(
                    f"{adapter.path}: {len(change)} of {len(paths)} modules of its {part} part can be switched"
                )
            yield part, change

    def original(self) -> AbstractContextManager[None]:
        """Let the model compute what it computed before the edit."""
        return self._without(*self._changes)

    def gates_only(self) -> AbstractContextManager[None]:
        """Let the model compute with the edited routers alone, LoRA out of the way."""
        return self._without("lora")

    def lora_only(self) -> AbstractContextManager[None]:
        """Let the model compute with LoRA alone, its routers as they were."""
        return self._without("gates")

    @contextmanager
    def _without(self, *parts: str) -> Iterator[None]:
        changes = [self._changes[part] for part in parts]
        for change in changes:
            change.disable()
        try:
            yield
        finally:
            for change in changes:
                change.enable()


def _has_frozen_experts(subject: Subject) -> bool:
    return any(isinstance(module, FrozenExperts) for module in subject.model.modules())


def load(
    model: str, adapter: str | Path, *, dtype: Dtype = "auto", device: str = "cpu", expert_format: str | None = None
) -> Edited:
    """Load MODEL with the adapter of a run, ready to run; bitwise the logits it had when it was trained.

    Args:
        expert_format: as in `ModelConfig`; None takes those that the adapter was made with.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: no such device, dtype or format of experts.
        RunError: the adapter is missing, or made for another architecture or shape.
    """
    found = read_adapter(Path(adapter))
    expert_format = found.info.expert_format if expert_format is None else expert_format
    settings = {"dtype": dtype, "device": device, "expert_format": expert_format, "template": found.info.template}
    return Edited(open_subject(ModelConfig(model=model, **settings)), found)  # type: ignore[arg-type]
