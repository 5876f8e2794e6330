"""An organism in the making: its model, what is planted in it, and one way to train parameters of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from gtqlora.errors import TrainingError
from gtqlora.families import FAMILIES, Anatomy, bind
from gtqlora.organisms.language import Language
from gtqlora.organisms.scales import Architecture, Scale

Planted = dict[int, tuple[int, ...]]
"""Planted experts by position among the MoE layers."""

Progress = Callable[[int, int, float], None]
"""Told of (step, steps, loss)."""

_REPORT_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class OrganismInTraining:
    """A model with fp32 masters, and what it will be."""

    model: PreTrainedModel
    anatomy: Anatomy
    language: Language
    planted: Planted
    scale: Scale

    @property
    def device(self) -> torch.device:
        return self.model.device

    def others(self, position: int) -> list[int]:
        """The experts of a MoE layer that are not planted."""
        return [e for e in range(self.anatomy.spec.n_experts) if e not in self.planted.get(position, ())]

    def logits(self, ids_BS: Tensor) -> Tensor:
        """Logits_BSV as a checkpoint in the scale's dtype gives them; gradients go to the masters."""
        if self.scale.dtype == torch.float32:
            return self.model(ids_BS).logits
        cast = {name: p.to(self.scale.dtype) for name, p in self.model.named_parameters()}
        return functional_call(self.model, cast, (ids_BS,)).logits.float()


def new_model(architecture: Architecture, language: Language, scale: Scale) -> tuple[PreTrainedModel, Anatomy]:
    """An untrained model of a scale."""
    family = FAMILIES[architecture]
    model_class = getattr(transformers, family.class_name)
    size = {"vocab_size": len(language.vocabulary), **scale.config(architecture)}
    model = model_class(model_class.config_class(**size))
    model.config._experts_implementation = "grouped_mm"  # the same on every version and device
    return model, bind(model, family)


def optimize(
    parameters: list[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    progress: Progress,
    *,
    rate: float,
    steps: int,
    seconds: float | None = None,
    weight_decay: float = 0.0,
) -> None:
    """AdamW with a one-cycle rate.

    Args:
        seconds: limit, counted from the second step; the schedule is then walked in strides that end it in time.

    Raises:
        TrainingError: the loss is not finite.
    """
    on_gpu = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=on_gpu)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    step = done = 0
    started = time.monotonic()
    while done < steps:
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step == 1:
            started = time.monotonic()
        passed = 0.0 if seconds is None else (time.monotonic() - started) / seconds
        stride = min(max(1, int(passed * steps) - done), steps - done)
        for _ in range(stride):
            schedule.step()
        done += stride
        if step % _REPORT_EVERY == 0 or done == steps:
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss is not finite at step {step}; try another --seed")
            progress(done, steps, loss.item())
