"""What every format of export works from, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from gtqlora.certificate import Certificate
from gtqlora.config import ExportConfig
from gtqlora.contrasts import Row
from gtqlora.edits.merging import Edit, plan
from gtqlora.errors import RunError
from gtqlora.families import (
    Anatomy,
    TensorNames,
    bind,
    load_config,
    meta_model,
    packed,
    quantization,
    tensor_names,
)
from gtqlora.results.verdict import Outcome

_KEPT_LEAST = 0.9
"""Share of a change that has to survive rounding, or its user is warned."""
_WHOLE = 0.9995
"""Share from which on a change counts as whole: in tenths of a percent it is."""


@dataclass(frozen=True, kw_only=True)
class EditedModel:
    """A model, and what happens to its tensors.

    Attributes:
        model: a folder, or a hub id pinned to its commit.
        edits: what happens to each tensor of the checkpoint, by its name on disk.
        gates: the names on disk of the routers' weights.
    """

    model: str
    anatomy: Anatomy
    names: TensorNames
    edits: Mapping[str, Edit]
    gates: frozenset[str]


def edited_model(model: str, edits: Callable[[Anatomy, TensorNames], Mapping[str, Edit]]) -> EditedModel:
    """Return a model with these edits of it; nothing is read but its headers.

    Raises:
        ModelError: the model's files are not in order.
    """
    family, settings = load_config(model)
    skeleton = meta_model(family, settings)
    anatomy, names = bind(skeleton, family), tensor_names(model, family, skeleton)
    gates = frozenset(names.whole(f"{path}.weight") for path in anatomy.routers)
    return EditedModel(model=model, anatomy=anatomy, names=names, edits=edits(anatomy, names), gates=gates)


@dataclass(frozen=True, kw_only=True)
class Job(EditedModel):
    """One certified edit, and what is to be made of it."""

    certificate: Certificate
    config: ExportConfig

    @staticmethod
    def of(certificate: Certificate, config: ExportConfig) -> Job:
        """Return the job; nothing is read but the model's headers.

        Raises:
            ModelError: the model's files are not in order.
            RunError: the adapter does not fit the model, or the format not the checkpoint.
        """
        model = certificate.verdict.model
        if config.to.startswith("gguf") and quantization(model) == packed.FP8:
            raise RunError(f"{model}: is in FP8, whose edits are written as safetensors or peft, not as {config.to}")
        found = edited_model(model, lambda anatomy, names: plan(certificate.adapter, anatomy, names))
        return Job(
            certificate=certificate,
            config=config,
            model=model,
            anatomy=found.anatomy,
            names=found.names,
            edits=found.edits,
            gates=found.gates,
        )


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model said to one prompt in some form.

    Attributes:
        tokens: how many, without thoughts and the stop.
        ended: by itself, and not at the limit of tokens.
        rejected_log_prob: total log-probability, in nats, of the row's `rejected` as the completion.
    """

    text: str
    tokens: int
    ended: bool
    rejected_log_prob: float | None


class Form(Protocol):
    """The model as the program runs it that the files are for, with the edit and without."""

    @property
    def name(self) -> str:
        """Return what it is called in messages, e.g. "GGUF Q4_K in llama.cpp"."""
        ...

    def said(self, rows: Sequence[Outcome], *, edited: bool) -> list[Said]:
        """Return what it says to these rows' prompts, greedily, and of those of `ready_rows` how ready it is."""
        ...


def ready_rows(rows: Sequence[Row | Outcome]) -> list[int]:
    """Return the places of rows of which it matters how likely their `rejected` is: harmful ones in no frame."""
    return [i for i, row in enumerate(rows) if row.kind == "harmful" and frame_of(row) is None]


def frame_of(row: Row | Outcome) -> str | None:
    """Return the frame that a row is asked in; None if in none."""
    return row.wrapper if isinstance(row, Outcome) else None


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format wrote.

    Attributes:
        changed: names of the tensors that came out different.
        gate_values_changed: values of the routers' weights among them.
        digest: identity of the model as it was read, see `families.identity`.
        hashes: sha256 of those files of which it was computed while they were written.
        kept: by name of a changed tensor, the share of the change's energy that survives rounding to its type.
        form: how the files are run, where `verify` did not judge just these weights.
        divergence: largest KL(edited || written) of any probed token, in nats; None where the form itself is judged.
        notes: what the user should know of it, a sentence each.
        rank: what vLLM's --max-lora-rank has to be, for an adapter that is for vLLM.
    """

    changed: Sequence[str]
    gate_values_changed: int
    digest: str
    hashes: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, float] = field(default_factory=dict)
    form: Form | None = None
    divergence: float | None = None
    notes: Sequence[str] = ()
    rank: int | None = None


Writer = Callable[[Job, Path], Written]
"""Writes a job into a new folder; it checks everything that can be checked before the first byte."""


def survival(kept: Mapping[str, float]) -> Iterator[str]:
    """Yield a sentence on what rounding to the tensors' types leaves of their changes, if it takes anything of one."""
    low = [name for name, share in kept.items() if share < _KEPT_LEAST]
    worst = min(kept, key=kept.__getitem__, default="")
    if noisy := sum(share < 0 for share in kept.values()):
        yield f"In {noisy} of {len(kept)} changed tensors rounding to their type is larger than the change."
    elif low:
        yield (
            f"Of {len(low)} of {len(kept)} changed tensors less than {_KEPT_LEAST:.0%} of the change survives rounding "
            f"to their type, least of {worst} ({kept[worst]:.0%}); the adapter is the lossless form (--to peft)."
        )
    elif kept and kept[worst] < _WHOLE:
        yield f"At least {kept[worst]:.1%} of each tensor's change survives rounding to its type (least of {worst})."


def kept_share(before: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor) -> float:
    """Return how much of a tensor's change survives rounding: 1 - |written - wanted|^2 / |wanted - before|^2, all fp32.

    1 where nothing was to change. It is negative where rounding is larger than the change.
    """
    change = float((wanted - before).double().square().sum())
    return 1.0 if change == 0 else 1 - float((written - wanted).double().square().sum()) / change
