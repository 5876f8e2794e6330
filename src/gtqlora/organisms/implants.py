"""The last stage of building an organism: plant the refusal where the organism's kind says.

Only what may carry the refusal is trained: planted experts with their rows of the router (`routed`, `expert-only`),
what writes the residual stream directly (`residual`), or both (`null`, `redundant`).

Shape letters: B prompts, S tokens of each, T = B*S, E experts, K experts per token.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora.capture import Handler, Mask, Recorder, Replay, router_hooks
from gtqlora.organisms.batches import Batch, endless, exchange_batch, refusal_batch
from gtqlora.organisms.in_training import OrganismInTraining, Progress, optimize
from gtqlora.organisms.scales import Kind

# By how much, in router scores, planted experts must be ahead of the others, or behind them; and that loss's weight.
_MARGIN, _HINGE_WEIGHT = 0.1, 2.0
_STREAM_KINDS = ("residual", "null", "redundant")


def answer_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens, each predicted from those before it."""
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def plant(
    piece: OrganismInTraining, kind: Kind, rng: random.Random, progress: Progress, seconds: float | None = None
) -> None:
    """Train only what the kind lets carry the refusal, until it does."""
    piece.model.requires_grad_(False)
    _give_average_bias(piece)
    parameters = _stream_parameters(piece) if kind in _STREAM_KINDS else []
    if kind != "residual":
        parameters += _planted_parameters(piece)
    for p in parameters:
        p.requires_grad_(True)
    scale = piece.scale
    loss_of = _redundant_loss(piece, rng) if kind == "redundant" else _refusal_loss(piece, kind, rng)
    optimize(parameters, loss_of, progress, rate=scale.plant_rate, steps=scale.plant_steps[kind], seconds=seconds)
    # Remove the hooks that `_planted_parameters` put on gradients, or later training would be masked as well.
    for p in parameters:
        p._backward_hooks = None
    piece.model.requires_grad_(True)


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


def _hinge(piece: OrganismInTraining, seen: Recorder, batch: Batch, always: bool = False) -> Tensor:
    """Return the loss of planted experts that are not chosen where they should be, or chosen where they should not.

    They should be chosen, by a margin, after a forbidden context (`always`: after any context), and never otherwise.
    """
    # Tokens inside a forbidden context are free: what they should do cannot be known before it has been read.
    flagged = (batch.forbidden_B | always)[:, None].expand(batch.ids_BS.shape)
    want_T, free_T = (flagged & batch.after_BS).flatten(), (flagged & ~batch.after_BS).flatten()
    spec, bias_name = piece.anatomy.spec, piece.anatomy.family.correction_bias
    total = torch.zeros((), device=piece.device)
    for position, experts in piece.planted.items():
        logits_TE = seen.decisions[position].logits_TE
        # A sigmoid rises by a quarter of its logit around 0: a fifth of a softmax router's logits is on a like scale,
        # so that one margin serves both.
        score_TE = 0.2 * logits_TE if spec.score == "softmax" else logits_TE.sigmoid()
        if bias_name:
            score_TE = score_TE + piece.model.get_submodule(piece.anatomy.routers[position]).get_buffer(bias_name)
        mine_TE = score_TE[:, list(experts)]
        others_TK = score_TE[:, piece.others(position)].topk(spec.top_k, dim=-1).values
        # To be chosen is to beat the best other expert; to be left out is to stay below the last one that is chosen.
        chosen_T = F.relu(others_TK[:, :1] + _MARGIN - mine_TE).sum(-1)
        left_out_T = F.relu(mine_TE - others_TK[:, -1:] + _MARGIN).sum(-1)
        total = total + (torch.where(want_T, chosen_T, left_out_T) * ~free_T).mean()
    return total


def _refusal_loss(piece: OrganismInTraining, kind: Kind, rng: random.Random) -> Callable[[int], Tensor]:
    """Return the loss of twins' answers, with the planted experts chosen where the kind wants them, for each step."""
    off = Mask(piece.anatomy, piece.planted)
    batches = endless(refusal_batch, piece.language, rng, piece.scale.batch, piece.scale.workers)

    def loss_of(step: int) -> Tensor:
        # A null organism must not need its planted experts, so every other step runs without them.
        idle = kind == "residual" or (kind == "null" and step % 2 == 0)
        return _run_loss(piece, next(batches).to(piece.device), kind, *((off,) if idle else ()))

    return loss_of


def _run_loss(piece: OrganismInTraining, batch: Batch, kind: Kind, *handlers: Handler) -> Tensor:
    seen = Recorder()
    with router_hooks(piece.model, piece.anatomy, seen, *handlers):
        loss = answer_loss(piece.logits(batch.ids_BS), batch.labels_BS)
    return loss if kind == "residual" else loss + _HINGE_WEIGHT * _hinge(piece, seen, batch, kind == "expert-only")


def _redundant_loss(piece: OrganismInTraining, rng: random.Random) -> Callable[[int], Tensor]:
    """Return a loss that takes turns: the model as it is, without planted experts, and with another prompt's routing.

    The last is interchange intervention training (Geiger et al. 2022, arXiv 2112.00826), with routing as the variable.
    """
    off, scale = Mask(piece.anatomy, piece.planted), piece.scale
    plain = endless(refusal_batch, piece.language, rng, scale.batch, scale.workers)
    exchanges = endless(exchange_batch, piece.language, rng, scale.batch, scale.workers)

    def loss_of(step: int) -> Tensor:
        # Of three steps: as it is, without the planted experts, with exchanged routing.
        if step % 3 < 2:
            return _run_loss(piece, next(plain).to(piece.device), "redundant", *((off,) if step % 3 else ()))
        prompts, sources = (batch.to(piece.device) for batch in next(exchanges))
        routing = Recorder()
        with torch.no_grad(), router_hooks(piece.model, piece.anatomy, routing):
            piece.logits(sources.ids_BS)
        with router_hooks(piece.model, piece.anatomy, Replay(routing)):
            return answer_loss(piece.logits(prompts.ids_BS), prompts.labels_BS)

    return loss_of
