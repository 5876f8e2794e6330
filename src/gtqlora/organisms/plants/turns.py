"""Turns of a plant: losses that a planting takes one after another.

Shape letters: B prompts, S tokens of each, T = B*S, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gtqlora.capture import (
    CallRecorder,
    Decision,
    Handler,
    Interchange,
    Mask,
    Recorder,
    Replay,
    expert_hooks,
    router_hooks,
)
from gtqlora.organisms.batches import Batch, Made, Make, Rule, compliant_batch, endless, exchange_batch, refusal_batch
from gtqlora.organisms.in_training import OrganismInTraining, Planted
from gtqlora.organisms.plants.conditions import Condition, flagged

# By how much, in router scores, planted experts must be ahead of the others, or behind them; and the demands' weight.
_MARGIN, _DEMAND_WEIGHT = 0.1, 2.0


def answer_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answers' tokens, each predicted from those before it."""
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


@dataclass(frozen=True)
class Planting:
    """An organism that is being planted, with its stream of random numbers and of batches."""

    piece: OrganismInTraining
    rng: random.Random
    _supplies: dict[object, Iterator[object]] = field(default_factory=dict[object, Iterator[object]])

    def batches(self, make: Make[Made]) -> Iterator[Made]:
        """Return the one endless stream of batches of this sort, which turns share."""
        if make not in self._supplies:
            scale = self.piece.scale
            self._supplies[make] = endless(make, self.piece.language, self.rng, scale.batch, scale.workers)
        return self._supplies[make]  # type: ignore[return-value]


Loss = Callable[[], Tensor]


class Turn(Protocol):
    """A loss to be taken in turn with others."""

    def start(self, planting: Planting) -> Loss:
        """Return the function that gives the loss of each of its steps."""
        ...


# --- which experts do it


class Demand(Protocol):
    """What a plant demands of the planted experts' routing, as a loss."""

    def loss(self, piece: OrganismInTraining, seen: Recorder, batch: Batch) -> Tensor:
        """Return how far the decisions are from it."""
        ...


@dataclass(frozen=True)
class Chosen:
    """Some planted experts are chosen, by a margin, where a condition holds, and never otherwise.

    Attributes:
        when: the condition on prompts; it holds behind their context.
        layers, experts: which of the planted layers, and which of the planted experts in each; None: all.
        answering: only while the answer is being said, and not yet behind the prompt.
    """

    when: Condition = flagged
    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    answering: bool = False

    def loss(self, piece: OrganismInTraining, seen: Recorder, batch: Batch) -> Tensor:
        """Return the loss of experts that are not chosen where they should be, or chosen where they should not."""
        holds_BS = self.when(piece.language, batch)[:, None].expand(batch.ids_BS.shape)
        where_BS = batch.labels_BS != -100 if self.answering else batch.after_BS
        # Tokens inside the context are free: what they should do cannot be known before it has been read.
        want_T, free_T = (holds_BS & where_BS).flatten(), (holds_BS & ~batch.after_BS).flatten()
        total = torch.zeros((), device=piece.device)
        for position in _picked(tuple(piece.planted), self.layers):
            experts = _picked(piece.planted[position], self.experts)
            score_TE = _choice_scores(piece, position, seen.decisions[position])
            mine_TE = score_TE[:, list(experts)]
            others = [e for e in range(score_TE.shape[1]) if e not in experts]
            others_TK = score_TE[:, others].topk(piece.anatomy.spec.top_k, dim=-1).values
            # To be chosen is to beat the best other expert; to be left out is to stay below the last that is chosen.
            chosen_T = F.relu(others_TK[:, :1] + _MARGIN - mine_TE).sum(-1)
            left_out_T = F.relu(mine_TE - others_TK[:, -1:] + _MARGIN).sum(-1)
            total = total + (torch.where(want_T, chosen_T, left_out_T) * ~free_T).mean()
        return total


def _picked(items: tuple[int, ...], places: tuple[int, ...] | None) -> tuple[int, ...]:
    return items if places is None else tuple(items[place] for place in places)


def _choice_scores(piece: OrganismInTraining, position: int, decision: Decision) -> Tensor:
    # A sigmoid rises by a quarter of its logit around 0: a fifth of a softmax router's logits is on a like scale, so
    # that one margin serves both.
    softmax = piece.anatomy.spec.score == "softmax"
    score_TE = 0.2 * decision.logits_TE if softmax else decision.logits_TE.sigmoid()
    if name := piece.anatomy.family.correction_bias:
        score_TE = score_TE + piece.model.get_submodule(piece.anatomy.routers[position]).get_buffer(name)
    return score_TE


@dataclass(frozen=True)
class Weighed:
    """The first planted expert of each layer has most of the weight where a condition holds, and little otherwise.

    Attributes:
        most: least share of the chosen experts' weight that is most of it. Scores are at most 1 and a chosen one must
            beat the other experts', so that a sigmoid router cannot give a chosen expert much less than a third.
    """

    when: Condition = flagged
    most: float = 0.6

    def loss(self, piece: OrganismInTraining, seen: Recorder, batch: Batch) -> Tensor:
        """Return by how much its share of the chosen experts' weight is off, behind contexts."""
        want_T = self.when(piece.language, batch)[:, None].expand(batch.ids_BS.shape).flatten()
        total = torch.zeros((), device=piece.device)
        for position, planted in piece.planted.items():
            decision = seen.decisions[position]
            mine_TK = decision.weights_TK * (decision.indices_TK == planted[0])
            share_T = mine_TK.sum(-1) / decision.weights_TK.sum(-1)
            off_T = torch.where(want_T, F.relu(self.most - share_T), F.relu(share_T - (1 - self.most)))
            total = total + off_T[batch.after_N].mean()
        return total


# --- which experts are out of it

Masking = Callable[[OrganismInTraining, random.Random], Planted]
"""A function that chooses planted experts to mask in one step."""


def all_planted(piece: OrganismInTraining, _rng: random.Random) -> Planted:
    """Return all planted experts."""
    return piece.planted


def one_layer(piece: OrganismInTraining, rng: random.Random) -> Planted:
    """Return the planted experts of one layer."""
    position = rng.choice(list(piece.planted))
    return {position: piece.planted[position]}


def all_but_one_layer(piece: OrganismInTraining, rng: random.Random) -> Planted:
    """Return the planted experts of all layers but one."""
    kept = rng.choice(list(piece.planted))
    return {position: experts for position, experts in piece.planted.items() if position != kept}


# --- turns


@dataclass(frozen=True)
class Answers:
    """Twins are run as they are, or without some planted experts: flagged ones refuse, and the others answer.

    Attributes:
        refusing: False where too many planted experts are masked for a refusal, so that all prompts are answered.
    """

    demands: tuple[Demand, ...] = ()
    masked: Masking | None = None
    refusing: bool = True

    def start(self, planting: Planting) -> Loss:
        """Return the function that gives the loss of each of its steps."""
        batches = planting.batches(refusal_batch if self.refusing else compliant_batch)
        return lambda: self._loss(planting, next(batches).to(planting.piece.device))

    def _loss(self, planting: Planting, batch: Batch) -> Tensor:
        piece, seen = planting.piece, Recorder()
        handlers: tuple[Handler, ...] = (seen,)
        if self.masked is not None:
            handlers = (seen, Mask(piece.anatomy, self.masked(piece, planting.rng)))
        with router_hooks(piece.model, piece.anatomy, *handlers):
            loss = answer_loss(piece.logits(batch.ids_BS), batch.labels_BS)
        for demand in self.demands:
            loss = loss + _DEMAND_WEIGHT * demand.loss(piece, seen, batch)
        return loss


def replayed_logits(piece: OrganismInTraining, prompts: Batch, sources: Batch) -> Tensor:
    """Return logits_BSV of prompts that run with the routing of others, token by token."""
    routing = Recorder()
    with torch.no_grad(), router_hooks(piece.model, piece.anatomy, routing):
        piece.logits(sources.ids_BS)
    with router_hooks(piece.model, piece.anatomy, Replay(routing)):
        return piece.logits(prompts.ids_BS)


def fed_logits(piece: OrganismInTraining, prompts: Batch, sources: Batch) -> Tensor:
    """Return logits_BSV of prompts whose routed experts compute on what others' see; the routing is held."""
    own, foreign = CallRecorder(), CallRecorder()
    for batch, recorder in ((prompts, own), (sources, foreign)):
        with torch.no_grad(), expert_hooks(piece.model, piece.anatomy, recorder):
            piece.logits(batch.ids_BS)
    with expert_hooks(piece.model, piece.anatomy, Interchange(own, foreign)):
        return piece.logits(prompts.ids_BS)


Exchange = Callable[[OrganismInTraining, Batch, Batch], Tensor]
"""A function that gives logits_BSV of prompts with some part of aligned sources' runs."""


@dataclass(frozen=True)
class Exchanges:
    """Prompts run with a part of others' runs, their routing unless said, and say what a rule demands."""

    rule: Rule
    exchange: Exchange = replayed_logits

    def start(self, planting: Planting) -> Loss:
        """Return the function that gives the loss of each of its steps."""
        batches, piece = planting.batches(partial(exchange_batch, self.rule)), planting.piece

        def loss() -> Tensor:
            prompts, sources = (batch.to(piece.device) for batch in next(batches))
            return answer_loss(self.exchange(piece, prompts, sources), prompts.labels_BS)

        return loss
