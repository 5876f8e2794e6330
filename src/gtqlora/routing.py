"""Pure tensor maths on routing decisions.

Shape letters: T tokens, E experts, K experts chosen per token, L MoE layers, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How one family turns router logits into chosen experts and their weights.

    Attributes:
        normalize: whether a token's weights are divided by their sum.
        scale: factor of the weights, after that.
        rounds: whether weights come in the logits' dtype; otherwise in fp32.
        n_group, topk_group: experts are chosen from the best `topk_group` of `n_group` groups.
    """

    score: Literal["sigmoid", "softmax"]
    top_k: int
    n_experts: int
    normalize: bool
    scale: float = 1.0
    rounds: bool = True
    n_group: int = 1
    topk_group: int = 1


def scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Router scores_TE in [0, 1]: sigmoid (DeepSeek-V3, arXiv 2412.19437 eq. 15) or softmax (Qwen3)."""
    logits_TE = logits_TE.float()
    return logits_TE.sigmoid() if spec.score == "sigmoid" else logits_TE.softmax(dim=-1)


_LAST_RESORT = 1e3
"""Taken off what experts outside the kept groups score, far more than scores and biases differ."""


def _group_mask(choice_TE: Tensor, spec: RouterSpec) -> Tensor:
    grouped = choice_TE.clamp(min=-_LAST_RESORT).view(len(choice_TE), spec.n_group, -1)
    group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1)
    kept = torch.zeros_like(group_score, dtype=torch.bool)
    kept.scatter_(1, group_score.topk(spec.topk_group, dim=-1)[1], True)
    return kept.unsqueeze(-1).expand_as(grouped).reshape(choice_TE.shape)


def choose(logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, masked_E: Tensor | None = None) -> Tensor:
    """Indices_TK of the experts a router picks, with some experts optionally masked out (bool, True = removed).

    If the masks leave too few experts in the groups a router keeps, the best of the other groups fill up.

    Raises:
        ValueError: fewer experts are left than the router picks.
    """
    choice_TE = scores(logits_TE, spec)
    if bias_E is not None:
        choice_TE = choice_TE + bias_E.to(choice_TE)
    if masked_E is not None:
        if int((~masked_E).sum()) < spec.top_k:
            raise ValueError(f"{int(masked_E.sum())} of {spec.n_experts} experts masked, but {spec.top_k} are needed")
        choice_TE = choice_TE.masked_fill(masked_E, float("-inf"))
    if spec.n_group > 1:
        choice_TE = torch.where(_group_mask(choice_TE, spec), choice_TE, choice_TE - _LAST_RESORT)
    return choice_TE.topk(spec.top_k, dim=-1).indices


def weigh(logits_TE: Tensor, indices_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Weights_TK of given experts, as the router itself would weigh them."""
    weights_TK = scores(logits_TE, spec).gather(1, indices_TK)
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    weights_TK = weights_TK * spec.scale
    return weights_TK.to(logits_TE.dtype) if spec.rounds else weights_TK


def selection_TE(indices_TK: Tensor, n_experts: int) -> Tensor:
    """0/1 selection of each expert by each token, float."""
    out = torch.zeros(len(indices_TK), n_experts, device=indices_TK.device)
    return out.scatter_(1, indices_TK, 1.0)


def per_expert(
    indices_LTK: Tensor, weights_LTK: Tensor, slot_T: Tensor, n_slots: int, n_experts: int
) -> tuple[Tensor, Tensor]:
    """How often the tokens of each slot choose each expert, and with what weight altogether; shapes (L, slots, E)."""
    shape = (len(indices_LTK), n_slots, n_experts)
    first_L11 = n_slots * n_experts * torch.arange(len(indices_LTK), device=slot_T.device)[:, None, None]
    place = (indices_LTK + first_L11 + n_experts * slot_T[:, None]).flatten()
    sums = torch.zeros(2, indices_LTK.shape[0] * n_slots * n_experts, device=slot_T.device)
    sums[0].scatter_add_(0, place, sums.new_ones(1).expand_as(place))
    sums[1].scatter_add_(0, place, weights_LTK.flatten())
    return sums[0].view(shape), sums[1].view(shape)


_ONE_HOTS = 2**25
"""Values of one-hot selections held at once, 128 MiB."""


def add_coactivation(total_LEE: Tensor, indices_LTK: Tensor, counted_T: Tensor) -> None:
    """Add how many of the counted tokens choose both of two experts; integers, in place.

    Sums of zeros and ones are exact in fp32, and in TF32, below 2^24 tokens.
    """
    (_, n_tokens, _), n_experts = indices_LTK.shape, total_LEE.shape[-1]
    step = max(1, _ONE_HOTS // (n_tokens * n_experts))
    for indices_lTK, total_lEE in zip(indices_LTK.split(step), total_LEE.split(step), strict=True):
        chosen_lTE = torch.zeros(len(indices_lTK), n_tokens, n_experts, device=counted_T.device)
        chosen_lTE.scatter_(2, indices_lTK, counted_T.float().view(1, -1, 1).expand(indices_lTK.shape))
        total_lEE += (chosen_lTE.mT @ chosen_lTE).to(total_lEE.dtype)


@dataclass(frozen=True)
class Load:
    """How evenly one layer's tokens are spread over its experts.

    Attributes:
        cv: coefficient of variation of the load.
        max_vio: (max - mean) / mean load (Wang et al., arXiv 2408.15664).
        entropy: of the load, as a share of the largest possible.
    """

    cv: float
    max_vio: float
    entropy: float


def load(counts_E: Tensor) -> Load:
    """Balance of selection counts; zeros everywhere count as even."""
    counts_E = counts_E.double()
    mean = counts_E.mean()
    if mean <= 0:
        return Load(0.0, 0.0, 1.0)
    share_E = counts_E / counts_E.sum()
    entropy = -(share_E * share_E.clamp(min=1e-300).log()).sum() / torch.tensor(len(counts_E)).double().log()
    return Load(float(counts_E.std(unbiased=False) / mean), float((counts_E.max() - mean) / mean), float(entropy))


def overlap_T(indices_TK: Tensor, others_TK: Tensor) -> Tensor:
    """Share of a token's experts that two routings have in common."""
    return (indices_TK.unsqueeze(-1) == others_TK.unsqueeze(-2)).any(-1).float().mean(-1)


def divergence_T(original_TE: Tensor, edited_TE: Tensor, spec: RouterSpec) -> Tensor:
    """KL(original || edited) of a token's router scores, in nats; logits in.

    Softmax scores are one distribution over experts. Sigmoid scores are one Bernoulli per expert; their divergences
    add up, so an expert's drift counts the same however many experts there are. Zero when the routing is the original.
    """
    if spec.score == "softmax":
        p_TE, q_TE = original_TE.log_softmax(-1), edited_TE.log_softmax(-1)
        return F.kl_div(q_TE, p_TE, log_target=True, reduction="none").sum(-1)
    p_TE = original_TE.sigmoid()
    cross_TE = F.binary_cross_entropy_with_logits(edited_TE, p_TE, reduction="none")
    return (cross_TE - F.binary_cross_entropy_with_logits(original_TE, p_TE, reduction="none")).sum(-1)
