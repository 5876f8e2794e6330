"""Tensor maths on routing decisions: which experts a router chooses, with which weights, and how two routings differ.

Nothing here knows a model. A router gives each token one logit per expert; `scores` turns logits into scores, `choose`
picks the best K experts, `weigh` gives them weights.

Shape letters: T tokens, E experts, K experts chosen per token, L MoE layers, B sequences.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How one model turns router logits into chosen experts and their weights.

    Attributes:
        score: the function from logits to scores.
        top_k: experts chosen for each token.
        n_experts: routed experts of a layer.
        normalize: whether the chosen experts' weights are divided by their sum.
        scale: what weights are multiplied by in the end.
        rounds: whether weights come in the logits' dtype; otherwise in fp32.
        n_group, topk_group: experts come in `n_group` groups, of which a token may use the best `topk_group`.
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
    """Return router scores_TE in [0, 1]: sigmoid (DeepSeek-V3, arXiv 2412.19437 eq. 15) or softmax (Qwen3)."""
    logits_TE = logits_TE.float()
    return logits_TE.sigmoid() if spec.score == "sigmoid" else logits_TE.softmax(dim=-1)


_LAST_RESORT = 1e3
"""Subtracted from the choice scores of experts outside the kept groups. It is far more than scores and biases differ,
so such experts are chosen only where too few others are left; minus infinity would make several of them equal."""


def _group_mask(choice_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return bool_TE: whether an expert is in a group that the token may use, by the sum of the group's best two."""
    # Ablated experts score minus infinity; clamped, a group with one ablated expert still has a finite sum.
    grouped = choice_TE.clamp(min=-_LAST_RESORT).view(len(choice_TE), spec.n_group, -1)
    group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1)
    kept = torch.zeros_like(group_score, dtype=torch.bool)
    kept.scatter_(1, group_score.topk(spec.topk_group, dim=-1)[1], True)
    return kept.unsqueeze(-1).expand_as(grouped).reshape(choice_TE.shape)


def check_mask(masked: Collection[int], spec: RouterSpec) -> None:
    """Assert that enough experts are left beside masked ones.

    Raises:
        ValueError: fewer than the router picks.
    """
    if spec.n_experts - len(masked) < spec.top_k:
        raise ValueError(f"{len(masked)} of {spec.n_experts} experts masked, but {spec.top_k} are needed")


def choose(logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None, masked_E: Tensor | None = None) -> Tensor:
    """Return indices_TK of the experts a router chooses, best first.

    Args:
        bias_E: correction bias, which counts in the choice but not in the weights.
        masked_E: bool, True for experts that may not be chosen; it leaves as many as the router picks, see
            `check_mask`. If too few are left in the groups a router keeps, the best of the other groups fill up.
    """
    choice_TE = scores(logits_TE, spec)
    # The bias balances the load by steering the choice alone; weights come from the scores without it.
    if bias_E is not None:
        choice_TE = choice_TE + bias_E.to(choice_TE)
    if masked_E is not None:
        choice_TE = choice_TE.masked_fill(masked_E, float("-inf"))
    if spec.n_group > 1:
        choice_TE = torch.where(_group_mask(choice_TE, spec), choice_TE, choice_TE - _LAST_RESORT)
    return choice_TE.topk(spec.top_k, dim=-1).indices


def weigh(logits_TE: Tensor, indices_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Return weights_TK of given experts, as the router itself would weigh them."""
    weights_TK = scores(logits_TE, spec).gather(1, indices_TK)
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    weights_TK = weights_TK * spec.scale
    # Rounded as the family's router rounds: some return their model's dtype, others fp32.
    return weights_TK.to(logits_TE.dtype) if spec.rounds else weights_TK


def selection_TE(indices_TK: Tensor, n_experts: int) -> Tensor:
    """Return, as floats, 1 where a token chooses an expert and 0 elsewhere."""
    out = torch.zeros(len(indices_TK), n_experts, device=indices_TK.device)
    return out.scatter_(1, indices_TK, 1.0)


def per_expert(
    indices_LTK: Tensor, weights_LTK: Tensor, slot_T: Tensor, n_slots: int, n_experts: int
) -> tuple[Tensor, Tensor]:
    """Count how often the tokens of each slot choose each expert, and sum up their weights; shapes (L, slots, E).

    Args:
        slot_T: the slot that each token belongs to, such as its prompt; the same in every layer.
    """
    # One scatter over flattened (layer, slot, expert) places costs two kernel launches for all layers together.
    shape = (len(indices_LTK), n_slots, n_experts)
    first_L11 = n_slots * n_experts * torch.arange(len(indices_LTK), device=slot_T.device)[:, None, None]
    place = (indices_LTK + first_L11 + n_experts * slot_T[:, None]).flatten()
    sums = torch.zeros(2, indices_LTK.shape[0] * n_slots * n_experts, device=slot_T.device)
    sums[0].scatter_add_(0, place, sums.new_ones(1).expand_as(place))
    sums[1].scatter_add_(0, place, weights_LTK.flatten())
    return sums[0].view(shape), sums[1].view(shape)


_ONE_HOTS = 2**25
"""How many values of one-hot selections are held at once: 128 MiB in fp32."""


def add_coactivation(total_LEE: Tensor, indices_LTK: Tensor, counted_T: Tensor) -> None:
    """Add, in place, the number of counted tokens that choose both of two experts, for each pair of experts.

    The product of 0/1 matrices is exact in fp32, and in TF32, below 2^24 tokens, so it may run on tensor cores.
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
        entropy: entropy of the load, as a share of the largest possible.
    """

    cv: float
    max_vio: float
    entropy: float


def load(counts_E: Tensor) -> Load:
    """Measure how balanced selection counts are; zeros everywhere count as even."""
    counts_E = counts_E.double()
    mean = counts_E.mean()
    if mean <= 0:
        return Load(0.0, 0.0, 1.0)
    share_E = counts_E / counts_E.sum()
    entropy = -(share_E * share_E.clamp(min=1e-300).log()).sum() / torch.tensor(len(counts_E)).double().log()
    return Load(float(counts_E.std(unbiased=False) / mean), float((counts_E.max() - mean) / mean), float(entropy))


def overlap_T(indices_TK: Tensor, others_TK: Tensor) -> Tensor:
    """Return the share of each token's experts that two routings have in common."""
    return (indices_TK.unsqueeze(-1) == others_TK.unsqueeze(-2)).any(-1).float().mean(-1)


_SOFTNESS = 0.5
"""In logits. An expert two of these from the threshold is chosen, or not, with a chance of 88 %: what lies much farther
off can move without changing the choice, and hardly counts."""
_FARTHEST = 20.0
"""In the same unit; farther margins are as good as certain, and those of experts outside the kept groups are huge."""


def _margins_TE(logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> Tensor:
    """Return how far each expert lies above the threshold of the choice, halfway between the last in and the first out.

    In logits; where a bias steers the choice, in scores times 4, which near the middle of a sigmoid are logits.
    """
    choice_TE = logits_TE.float()
    if bias_E is not None or spec.n_group > 1:
        choice_TE = 4 * scores(logits_TE, spec)
        choice_TE = choice_TE if bias_E is None else choice_TE + 4 * bias_E.to(choice_TE)
    if spec.n_group > 1:
        choice_TE = torch.where(_group_mask(choice_TE, spec), choice_TE, choice_TE - _LAST_RESORT)
    edge_T2 = choice_TE.topk(spec.top_k + 1, dim=-1).values[:, -2:]
    return choice_TE - edge_T2.mean(-1, keepdim=True)


def _choice_divergence_T(
    original_TE: Tensor, edited_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None
) -> Tensor:
    """Return the divergence of the choice, each expert's by the chance that its margin gives, per chosen expert."""
    if spec.top_k == spec.n_experts:
        return torch.zeros(len(edited_TE), device=edited_TE.device)
    p_TE, q_TE = (
        (_margins_TE(logits_TE, spec, bias_E) / _SOFTNESS).clamp(-_FARTHEST, _FARTHEST)
        for logits_TE in (original_TE, edited_TE)
    )
    chance_TE = p_TE.sigmoid()
    # Cross-entropy less the original's own entropy is exactly 0 where the routing is the original.
    cross_TE = F.binary_cross_entropy_with_logits(q_TE, chance_TE, reduction="none")
    own_TE = F.binary_cross_entropy_with_logits(p_TE, chance_TE, reduction="none")
    return (cross_TE - own_TE).sum(-1) / spec.top_k


def _log_weights_TK(logits_TE: Tensor, indices_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Return the logarithms of given experts' weights, normalized over these."""
    logits_TK = logits_TE.float().gather(1, indices_TK)
    return (F.logsigmoid(logits_TK) if spec.score == "sigmoid" else logits_TK).log_softmax(-1)


def log_scores_TE(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return the logarithms of router scores, in nats, each token's less their mean over experts.

    This is the scale on which logits count alike in all routers: a change of 1 of one expert multiplies its weight,
    beside the others', by e. In a softmax router it is the logits' own, and what is added to all of them does nothing;
    in a sigmoid router a logit counts less the nearer its score is to 1.
    """
    logits_TE = logits_TE.float()
    logs_TE = F.logsigmoid(logits_TE) if spec.score == "sigmoid" else logits_TE
    return logs_TE - logs_TE.mean(-1, keepdim=True)


def divergence_T(original_TE: Tensor, edited_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None = None) -> Tensor:
    """Return how far each token's routing is from the original's in nats, from the logits: choice plus weights.

    The weights' part is the KL divergence of the weights of the experts that the original chooses, normalized. The
    choice's is that of each expert's chance to be chosen, which falls off with its margin to the threshold, over the
    number of chosen experts. Both mean the same for softmax and sigmoid routers, and for few and many experts.

    Args:
        bias_E: correction bias, which counts in the choice alone.
    """
    chosen_TK = choose(original_TE, spec, bias_E)
    p_TK, q_TK = (_log_weights_TK(logits_TE, chosen_TK, spec) for logits_TE in (original_TE, edited_TE))
    weights_T = F.kl_div(q_TK, p_TK, log_target=True, reduction="none").sum(-1)
    return weights_T + _choice_divergence_T(original_TE, edited_TE, spec, bias_E)
