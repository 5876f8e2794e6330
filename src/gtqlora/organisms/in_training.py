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
"""A function called with (step, steps in total, loss)."""

# A loss is read, which waits for a GPU, only this often.
_REPORT_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class OrganismInTraining:
    """A model in fp32 that is becoming an organism, and what it will be.

    Attributes:
        planted: experts that will carry the refusal.
        scale: sizes, rates and steps; its dtype is the one of the finished checkpoint.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    language: Language
    planted: Planted
    scale: Scale

    @property
    def device(self) -> torch.device:
        """Return the device that the model is on."""
        return self.model.device

    def others(self, position: int) -> list[int]:
        """List the experts of a MoE layer that are not planted."""
        return [e for e in range(self.anatomy.spec.n_experts) if e not in self.planted.get(position, ())]

    def logits(self, ids_BS: Tensor) -> Tensor:
        """Return logits_BSV as a checkpoint in the scale's dtype gives them; gradients go to the fp32 weights."""
        if self.scale.dtype == torch.float32:
            return self.model(ids_BS).logits
        # The rounded copies take the weights' places for this pass; the cast hands gradients on to the fp32 weights.
        cast = {name: p.to(self.scale.dtype) for name, p in self.model.named_parameters()}
        return functional_call(self.model, cast, (ids_BS,)).logits.float()


def new_model(architecture: Architecture, language: Language, scale: Scale) -> tuple[PreTrainedModel, Anatomy]:
    """Make an untrained model of a scale."""
    family = FAMILIES[architecture]
    model_class = getattr(transformers, family.class_name)
    size: dict[str, object] = {"vocab_size": len(language.vocabulary), **scale.config(architecture)}
    model = model_class(model_class.config_class(**size))
    # Named, as the default differs between versions and devices, and with it the last bits of a seed's organism.
    model.config._experts_implementation = "grouped_mm"
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
    """Train parameters with AdamW and a one-cycle learning rate.

    Args:
        loss_of: gives the loss of a step.
        seconds: time limit, counted from the second step on. The schedule then advances by as many steps at once as it
            takes to end in time.

    Raises:
        TrainingError: the loss is not finite.
    """
    # One kernel for all parameters instead of some for each: small models on a GPU mostly wait for launches.
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
        if step == 1:  # the first step also compiles and warms up, and would make every stride too long
            started = time.monotonic()
        passed = 0.0 if seconds is None else (time.monotonic() - started) / seconds
        # As far along the schedule as in time, so that the rate has come down when time is up.
        stride = min(max(1, int(passed * steps) - done), steps - done)
        for _ in range(stride):
            schedule.step()
        done += stride
        if step % _REPORT_EVERY == 0 or done == steps:
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss is not finite at step {step}; try another --seed")
            progress(done, steps, loss.item())
