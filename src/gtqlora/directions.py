"""Residual-stream directions: difference of means per layer, how well it separates, and its removal.

Shape letters: P prompts, L states (the embedding and every decoder layer), D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.capture import Subject
from gtqlora.progress import track
from gtqlora.scoring import left_padded
from gtqlora.stats import Interval, auroc


@dataclass(frozen=True)
class LayerDirection:
    """Separation of two prompt sets along one layer's difference of means, judged on pairs that did not make it."""

    layer: int
    norm: float
    separation: Interval


@torch.no_grad()
def last_token_states(subject: Subject, prompts: Sequence[Sequence[int]], batch_size: int, label: str) -> Tensor:
    """states_PLD of the last prompt token after the embedding and after each decoder layer, fp32 on the CPU."""
    parts = []
    starts = range(0, len(prompts), batch_size)
    for start in track(starts, label, len(starts)):
        ids_BS, mask_BS = left_padded(prompts[start : start + batch_size], subject.pad_id, subject.device)
        output = subject.model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        parts.append(torch.stack([h[:, -1] for h in output.hidden_states], dim=1).float().cpu())
    return torch.cat(parts)


def difference_of_means(states_PLD: Tensor, others_PLD: Tensor) -> Tensor:
    """direction_LD, unit length where it is not zero (Arditi et al., arXiv 2406.11717, section 2.3)."""
    difference_LD = states_PLD.mean(0) - others_PLD.mean(0)
    return difference_LD / difference_LD.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def separations(states_PLD: Tensor, others_PLD: Tensor) -> list[LayerDirection]:
    """Per layer: direction from the even pairs, AUROC on the odd ones; the norm is of the whole difference."""
    direction_LD = difference_of_means(states_PLD[::2], others_PLD[::2])
    norms_L = (states_PLD.mean(0) - others_PLD.mean(0)).norm(dim=-1)
    along = torch.einsum("pld,ld->lp", states_PLD[1::2], direction_LD)
    others = torch.einsum("pld,ld->lp", others_PLD[1::2], direction_LD)
    return [
        LayerDirection(layer, float(norms_L[layer]), auroc(along[layer].numpy(), others[layer].numpy()))
        for layer in range(len(direction_LD))
    ]
