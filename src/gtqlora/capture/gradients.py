"""Measure how much each expert's routing weight pushes the first token of a completion, by one backward pass.

Shape letters: N prompts, L MoE layers, E experts, K experts per token, T tokens, B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gtqlora import routing
from gtqlora.capture.batches import by_length, forward, left_padded
from gtqlora.capture.hooks import Decision, router_hooks
from gtqlora.capture.subject import Subject
from gtqlora.errors import ModelError
from gtqlora.progress import track


def gradient_scores(
    subject: Subject, prompts: Sequence[Sequence[int]], readout_tokens: Sequence[int], *, batch_size: int, label: str
) -> np.ndarray:
    """Return scores_NLE: the sum over a prompt's tokens of w_te * d(log-odds)/d(w_te), in nats, fp32.

    w_te is the weight with which token t is routed to expert e, 0 where it is not. The log-odds are those of the first
    completion token being one of the readout tokens. To first order, a score is what the log-odds lose when the expert
    is left out while all choices and all other routing weights stay (attribution patching: Nanda 2023; Syed et al.
    2023, arXiv 2310.10348). The model's weights get no gradient.

    Raises:
        ModelError: the gradients hold NaN or infinity.
        ValueError: no readout tokens.
    """
    if not readout_tokens:
        raise ValueError("no readout tokens, so there are no log-odds")
    readout_R = torch.tensor(sorted(set(readout_tokens)), device=subject.device)
    scores_NLE = np.zeros((len(prompts), len(subject.anatomy.moe), subject.anatomy.spec.n_experts), np.float32)
    batches = by_length(prompts, batch_size)
    with _without_gradients(subject.model):
        for chosen in track(batches, label, len(batches)):
            scores_BLE = _scores(subject, [prompts[i] for i in chosen], readout_R)
            if not bool(scores_BLE.isfinite().all()):
                raise ModelError("gradients of the routing weights hold NaN or infinity; check the model's dtype")
            scores_NLE[chosen] = scores_BLE.cpu().numpy()
    return scores_NLE


def log_odds(logits_BV: Tensor, readout_R: Tensor) -> Tensor:
    """Return log-odds_B of the next token being one of the readout tokens, in nats."""
    logits_BV = logits_BV.float()
    # log(p / (1 - p)) from two sums of exponents: p itself would round to 1 for a sure model, and 1 - p to 0.
    others_BV = logits_BV.index_fill(-1, readout_R, float("-inf"))
    return logits_BV[:, readout_R].logsumexp(-1) - others_BV.logsumexp(-1)


@torch.enable_grad()
def _scores(subject: Subject, prompts: list[Sequence[int]], readout_R: Tensor) -> Tensor:
    """Return scores_BLE of one batch."""
    # Routing weights are cut from the graph and put back as leaves: then their gradient is that of the weights with
    # which experts' outputs are summed, and does not run on through the routers of earlier layers.
    leaves, indices = [], []

    def cut(_position: int, _module: nn.Module, decision: Decision) -> Decision:
        weights_TK = decision.weights_TK.detach().requires_grad_()
        leaves.append(weights_TK)
        indices.append(decision.indices_TK)
        return Decision(decision.logits_TE, weights_TK, decision.indices_TK)

    ids_BS, mask_BS = left_padded(prompts, subject.pad_id, subject.device)
    with router_hooks(subject.model, subject.anatomy, cut):
        logits_BV = forward(subject, ids_BS, mask_BS)[:, -1]
    # The sum over prompts: each prompt's log-odds depend on its own tokens only, so one pass serves the whole batch.
    gradients = torch.autograd.grad(log_odds(logits_BV, readout_R).sum(), leaves)
    weights_LTK, gradient_LTK = torch.stack(leaves).detach().float(), torch.stack(gradients).float()
    n_experts = subject.anatomy.spec.n_experts
    rows_T = torch.arange(len(prompts), device=subject.device).repeat_interleave(ids_BS.shape[1])
    sums = routing.per_expert(torch.stack(indices), weights_LTK * gradient_LTK, rows_T, len(prompts), n_experts)
    return sums[1].transpose(0, 1)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    # Only the leaves put into the routing need gradients; activations kept for those of weights would cost memory.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
