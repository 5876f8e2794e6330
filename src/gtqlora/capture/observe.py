"""One counting pass over prompts: which experts their tokens choose, which are chosen together, and residual states.

Hooks keep the decisions of one batch (K indices and K weights for each token and MoE layer, which is less than one
residual state). When its forward pass ends they are added up for all layers at once, on the device: few kernels are
launched, and the CPU waits for none of them.

Shape letters: N prompts, L MoE layers, E experts, K experts per token, B batch, S sequence, T = B*S tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora import routing
from gtqlora.capture.batches import by_length, forward, left_padded
from gtqlora.capture.hooks import Decision, router_hooks, state_hooks
from gtqlora.capture.subject import Subject
from gtqlora.errors import ModelError
from gtqlora.progress import track


@dataclass(frozen=True, kw_only=True)
class Region:
    """Which experts are chosen by the tokens of one region of each prompt.

    Attributes:
        rates_NLE: for each prompt, the share of these tokens that choose each expert, fp32; 0 without such tokens.
        mass_NLE: for each prompt, the share of a layer's routing weight that each expert has, fp32; 0 without such
            tokens. It is one scale for routers that normalize their weights, scale them or do neither.
        counts_LE: number of these tokens, in all prompts, that choose each expert, int64.
        weight_LE: mean routing weight of an expert when it is chosen, fp32; 0 where it never is.
        tokens: number of these tokens in all prompts.
    """

    rates_NLE: np.ndarray
    mass_NLE: np.ndarray
    counts_LE: np.ndarray
    weight_LE: np.ndarray
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one pass over N prompts shows.

    Attributes:
        prompt: tokens of the prompt from the position given on.
        last: the last token of the prompt.
        answer: the answer's tokens; None without answers.
        coactivation_LEE: tokens of `prompt` that choose both experts, int64; the diagonal is `prompt.counts_LE`.
        states_NSD: residual stream at the last prompt token after the embedding and each decoder layer (S of them; the
            last after the final norm), fp32, on the CPU.
    """

    prompt: Region
    last: Region
    answer: Region | None
    coactivation_LEE: np.ndarray
    states_NSD: Tensor

    def of(self, rows: Sequence[int]) -> Observation:
        """Return the rates and states of some prompts; sums over tokens stay those of all prompts."""

        def picked(region: Region) -> Region:
            return replace(region, rates_NLE=region.rates_NLE[rows], mass_NLE=region.mass_NLE[rows])

        answer = None if self.answer is None else picked(self.answer)
        states_NSD = self.states_NSD[rows]
        return replace(self, prompt=picked(self.prompt), last=picked(self.last), answer=answer, states_NSD=states_NSD)


@torch.no_grad()
def observe(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    *,
    answers: Sequence[Sequence[int]] | None = None,
    since: Sequence[int],
    batch_size: int,
    label: str,
) -> Observation:
    """Run every prompt once, followed by its answer if answers are given, and count.

    Args:
        since: for each prompt, the first position that counts. Before the first token in which twins differ, a causal
            model computes the same for both.

    Raises:
        ModelError: a layer's routing or residual stream holds NaN or infinity.
    """
    tokens = [[*p, *a] for p, a in zip(prompts, answers or [()] * len(prompts), strict=True)]
    batches = by_length(tokens, batch_size)
    tally = _Tally(subject, [i for chosen in batches for i in chosen])
    for chosen in track(batches, label, len(batches)):
        ids_BS, mask_BS = left_padded([tokens[i] for i in chosen], subject.pad_id, subject.device)
        edges_2B = torch.tensor([[since[i] for i in chosen], [len(prompts[i]) for i in chosen]], device=subject.device)
        prompt_BS, last_B, answer_BS = _regions(mask_BS, edges_2B)
        kept = _Kept(last_B)
        with (
            router_hooks(subject.model, subject.anatomy, kept.decision),
            state_hooks(subject.model, subject.anatomy, kept.state),
        ):
            forward(subject, ids_BS, mask_BS)
        tally.add(kept, prompt_BS, answer_BS)
    return tally.result(answered=answers is not None)


def _regions(mask_BS: Tensor, edges_2B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return bools prompt_BS, places last_B of the last prompt tokens in the flattened batch, and bools answer_BS.

    Args:
        edges_2B: the first positions that count, and the prompts' lengths.
    """
    position_BS = mask_BS.cumsum(-1) - 1  # -1 in the padding
    since_B1, length_B1 = edges_2B[0, :, None], edges_2B[1, :, None]
    prompt_BS = (position_BS >= since_B1) & (position_BS < length_B1)
    n_rows, length = mask_BS.shape
    # In each row one column alone is the last prompt token; argmax of 0s and a 1 finds it without waiting.
    column_B = (position_BS == length_B1 - 1).int().argmax(1)
    return prompt_BS, column_B + length * torch.arange(n_rows, device=mask_BS.device), position_BS >= length_B1


class _Kept:
    """What is kept of one batch: decisions of all tokens, states of the last prompt tokens."""

    def __init__(self, last_B: Tensor) -> None:
        self.last_B = last_B
        self.indices: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.states: list[Tensor] = []

    def decision(self, _position: int, _module: nn.Module, decision: Decision) -> None:
        self.indices.append(decision.indices_TK)
        self.weights.append(decision.weights_TK)

    def state(self, _index: int, state_BSD: Tensor) -> None:
        self.states.append(state_BSD.flatten(0, 1).index_select(0, self.last_B))


_OUTSIDE, _PROMPT, _ANSWER = range(3)
"""Regions of tokens. Tokens outside both are counted too, and dropped: that costs less than leaving them out."""


class _Tally:
    """Sums over batches, kept on the device so that nothing waits for it before the last one.

    Prompts stand in the order in which they run; `result` puts them back.
    """

    def __init__(self, subject: Subject, order: list[int]) -> None:
        anatomy, self.device = subject.anatomy, subject.device
        self.order, self.done = order, 0
        self.moe = [layer.index for layer in anatomy.moe]
        n_layers, self.n_experts = len(self.moe), anatomy.spec.n_experts
        shape = (n_layers, len(order), 3, self.n_experts)
        self.counts_LNRE = torch.zeros(shape, device=self.device)
        self.weights_LNRE = torch.zeros(shape, device=self.device)
        self.last_LNE = torch.zeros(n_layers, len(order), self.n_experts, device=self.device)
        self.last_weights_LNE = torch.zeros_like(self.last_LNE)
        self.tokens_NR = torch.zeros(len(order), 3, device=self.device)
        shape_LEE = (n_layers, self.n_experts, self.n_experts)
        self.coactivation_LEE = torch.zeros(shape_LEE, dtype=torch.int64, device=self.device)
        self.states: list[Tensor] = []

    def add(self, kept: _Kept, prompt_BS: Tensor, answer_BS: Tensor) -> None:
        n_rows = len(prompt_BS)
        rows = slice(self.done, self.done + n_rows)
        self.done += n_rows
        region_BS = prompt_BS * _PROMPT + answer_BS * _ANSWER
        # A slot for each prompt and region: one scatter then counts all of them in all layers.
        slot_T = (region_BS + 3 * torch.arange(n_rows, device=self.device)[:, None]).flatten()
        indices_LTK, weights_LTK = torch.stack(kept.indices), torch.stack(kept.weights).float()
        counts, weights = routing.per_expert(indices_LTK, weights_LTK, slot_T, 3 * n_rows, self.n_experts)
        self.counts_LNRE[:, rows] = counts.unflatten(1, (n_rows, 3))
        self.weights_LNRE[:, rows] = weights.unflatten(1, (n_rows, 3))
        last_LBK, weights_LBK = (x.index_select(1, kept.last_B) for x in (indices_LTK, weights_LTK))
        self.last_LNE[:, rows].scatter_(2, last_LBK, 1.0)
        self.last_weights_LNE[:, rows].scatter_(2, last_LBK, weights_LBK)
        self.tokens_NR[rows] = F.one_hot(region_BS, 3).sum(1).float()
        routing.add_coactivation(self.coactivation_LEE, indices_LTK, prompt_BS.flatten())
        self.states.append(torch.stack(kept.states, dim=1))

    def result(self, *, answered: bool) -> Observation:
        states_NSD = torch.cat(self.states).float().cpu()[self._back()]
        self._check(states_NSD)
        prompt, answer = (self._region(region) for region in (_PROMPT, _ANSWER))
        ones_N = torch.ones(len(self.order), device=self.device)
        return Observation(
            prompt=prompt,
            last=self._summed(self.last_LNE, self.last_weights_LNE, ones_N),
            answer=answer if answered else None,
            coactivation_LEE=self.coactivation_LEE.cpu().numpy(),
            states_NSD=states_NSD,
        )

    def _back(self) -> list[int]:
        """Return, for each prompt, its place in the order in which they ran."""
        return sorted(range(len(self.order)), key=lambda place: self.order[place])

    def _region(self, region: int) -> Region:
        return self._summed(self.counts_LNRE[:, :, region], self.weights_LNRE[:, :, region], self.tokens_NR[:, region])

    def _summed(self, counts_LNE: Tensor, weights_LNE: Tensor, tokens_N: Tensor) -> Region:
        shares = (
            counts_LNE / tokens_N.clamp(min=1)[:, None],
            (weights_LNE / weights_LNE.sum(-1, keepdim=True)).nan_to_num(nan=0.0),  # 0 / 0 without tokens
        )
        rates_NLE, mass_NLE = (share_LNE.transpose(0, 1).cpu().numpy()[self._back()] for share_LNE in shares)
        # fp32 counts whole numbers only up to 2^24, which many prompts exceed together.
        counts_LE, weights_LE = counts_LNE.double().sum(1), weights_LNE.double().sum(1)
        return Region(
            rates_NLE=rates_NLE,
            mass_NLE=mass_NLE,
            counts_LE=counts_LE.long().cpu().numpy(),
            weight_LE=(weights_LE / counts_LE.clamp(min=1)).float().cpu().numpy(),
            tokens=int(tokens_N.sum()),
        )

    def _check(self, states_NSD: Tensor) -> None:
        """Check that routing and residual stream are finite.

        Routing weights show a NaN in any router logit: softmax spreads it, and top-k takes it for the largest.
        """
        counted_LNRE = self.weights_LNRE[:, :, [_PROMPT, _ANSWER]]
        routed_L = counted_LNRE.isfinite().flatten(1).all(1) & self.last_weights_LNE.isfinite().flatten(1).all(1)
        flowing_S = states_NSD.isfinite().all(-1).all(0)
        bad = [layer for layer, finite in zip(self.moe, routed_L.tolist(), strict=True) if not finite]
        # State 0 is the embedding, state i + 1 the output of layer i.
        bad += [index - 1 for index, finite in enumerate(flowing_S.tolist()) if not finite]
        if bad:
            where = "the embedding" if min(bad) < 0 else f"layer {min(bad)}"
            raise ModelError(f"{where}: its routing or its output holds NaN or infinity; check its weights and dtype")
