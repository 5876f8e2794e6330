"""Find the tokens that choose an expert most often, which hint at what it is for.

Shape letters: X experts asked for, K experts per token, B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gtqlora.capture.batches import by_length, forward, left_padded
from gtqlora.capture.hooks import Decision, router_hooks
from gtqlora.capture.subject import Subject
from gtqlora.progress import track

MIN_OCCURRENCES = 5
"""Tokens met less often are left out: a token met once that chooses an expert would have a rate of 1."""


@dataclass(frozen=True)
class TokenRate:
    """How often a token chooses an expert.

    Attributes:
        rate: share of the token's occurrences that choose the expert.
        lift: this rate divided by the share of all tokens that choose it.
    """

    token: str
    rate: float
    lift: float


@torch.no_grad()
def top_tokens(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    since: Sequence[int],
    experts: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    label: str = "tokens of experts",
    limit: int = 8,
) -> list[list[TokenRate]]:
    """Return, for each expert, the tokens that choose it most often, at most `limit`.

    Args:
        since: for each prompt, the first position that counts.
        experts: experts as (position among the MoE layers, index).
    """
    counts = _Counts(subject, experts)
    batches = by_length(prompts, batch_size)
    for chosen in track(batches, label, len(batches)):
        ids_BS, mask_BS = left_padded([prompts[i] for i in chosen], subject.pad_id, subject.device)
        since_B1 = torch.tensor([[since[i]] for i in chosen], device=subject.device)
        # The sum over the mask is a token's position plus 1, so > keeps positions from `since` on.
        counts.next(ids_BS, mask_BS.cumsum(-1) > since_B1)
        with router_hooks(subject.model, subject.anatomy, counts.decision):
            forward(subject, ids_BS, mask_BS)
    return [counts.ranked(subject, place)[:limit] for place in range(len(experts))]


class _Counts:
    """Occurrences of every token, and those in which it chooses each expert."""

    def __init__(self, subject: Subject, experts: Sequence[tuple[int, int]]) -> None:
        self.experts = experts
        vocabulary = subject.model.get_input_embeddings().num_embeddings
        self.met_V = torch.zeros(vocabulary, device=subject.device)
        self.chosen_XV = torch.zeros(len(experts), vocabulary, device=subject.device)

    def next(self, ids_BS: Tensor, counted_BS: Tensor) -> None:
        """Count the tokens of a batch whose pass comes next."""
        self.ids_T, self.counted_T = ids_BS.flatten(), counted_BS.flatten()
        self.met_V.scatter_add_(0, self.ids_T, self.counted_T.float())

    def decision(self, position: int, _module: nn.Module, decision: Decision) -> None:
        for place, (layer, expert) in enumerate(self.experts):
            if layer == position:
                hit_T = (decision.indices_TK == expert).any(-1) & self.counted_T
                self.chosen_XV[place].scatter_add_(0, self.ids_T, hit_T.float())

    def ranked(self, subject: Subject, place: int) -> list[TokenRate]:
        chosen_V, met_V = self.chosen_XV[place].cpu(), self.met_V.cpu()
        overall = float(chosen_V.sum() / met_V.sum().clamp(min=1))
        rate_V = chosen_V / met_V.clamp(min=1)
        known = ((met_V >= MIN_OCCURRENCES) & (chosen_V > 0)).nonzero().flatten().tolist()
        # Of tokens with equal rates, the one met more often says more.
        known.sort(key=lambda token: (-float(rate_V[token]), -float(met_V[token])))
        return [
            TokenRate(str(subject.tokenizer.decode([token])), float(rate_V[token]), float(rate_V[token]) / overall)
            for token in known
        ]
