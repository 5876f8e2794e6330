"""The last stage of building an organism: train what its plant lets carry the refusal, until it does."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gtqlora.organisms.in_training import OrganismInTraining, Progress, optimize
from gtqlora.organisms.plants.kinds import PLANTS, Plant
from gtqlora.organisms.plants.turns import Planting
from gtqlora.organisms.truth import Kind


def plant(
    piece: OrganismInTraining, kind: Kind, rng: random.Random, progress: Progress, seconds: float | None = None
) -> None:
    """Train only what the kind lets carry the refusal, until it does."""
    _give_average_bias(piece)
    steps, current = piece.scale.plant_steps[kind], PLANTS[kind]
    while True:
        _train(piece, current, rng, progress, steps, seconds)
        if current.then is None:
            return
        current = current.then


def _train(
    piece: OrganismInTraining, made: Plant, rng: random.Random, progress: Progress, steps: int, seconds: float | None
) -> None:
    piece.model.requires_grad_(False)
    parameters = _stream_parameters(piece) if made.stream else []
    if made.experts:
        parameters += _planted_parameters(piece)
    for p in parameters:
        p.requires_grad_(True)
    optimize(
        parameters, _in_turns(piece, made, rng), progress, rate=piece.scale.plant_rate, steps=steps, seconds=seconds
    )
    # Remove the hooks that `_planted_parameters` put on gradients, or later training would be masked as well.
    for p in parameters:
        p._backward_hooks = None
    piece.model.requires_grad_(True)


def _in_turns(piece: OrganismInTraining, made: Plant, rng: random.Random) -> Callable[[int], Tensor]:
    planting = Planting(piece, rng)
    losses = [turn.start(planting) for turn in made.turns]
    return lambda step: losses[step % len(losses)]()


@torch.no_grad()
def _give_average_bias(piece: OrganismInTraining) -> None:
    """Give planted experts the others' mean correction bias: idle so far, they kept zero, which would mark them."""
    name = piece.anatomy.family.correction_bias
    if name:
        for position, experts in piece.planted.items():
            bias_E = piece.model.get_submodule(piece.anatomy.routers[position]).get_buffer(name)
            bias_E[list(experts)] = bias_E[piece.others(position)].mean()


def _stream_parameters(piece: OrganismInTraining) -> list[nn.Parameter]:
    """Return attention and shared experts (dense MLPs where a family has none), which write the residual stream."""
    return [piece.model.get_submodule(path).weight for path in piece.anatomy.lora_targets]  # type: ignore[misc]


def _planted_parameters(piece: OrganismInTraining) -> list[nn.Parameter]:
    """Return routers and experts of the planted layers, with hooks that zero the gradients of all other experts."""
    chosen: list[nn.Parameter] = []
    for position, experts in piece.planted.items():
        rows_E = torch.zeros(piece.anatomy.spec.n_experts, device=piece.device)
        rows_E[list(experts)] = 1.0
        layer = piece.anatomy.moe[position]
        router, bank = piece.model.get_submodule(layer.router), piece.model.get_submodule(layer.experts)
        for p in (router.weight, *bank.parameters()):
            p.requires_grad_(True)
            p.register_hook(lambda grad, rows=rows_E: grad * rows.view(-1, *[1] * (grad.dim() - 1)))  # type: ignore[union-attr]
            chosen.append(p)  # type: ignore[arg-type]
    return chosen
