"""Run prompts in batches: padded on the left, those of similar length together.

Padding goes to the left so that the last column holds every prompt's last token.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gtqlora.capture.subject import Subject


def left_padded(token_lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids_BS and attention mask_BS, padded on the left."""
    longest = max(map(len, token_lists))
    ids_BS = torch.tensor([[pad] * (longest - len(t)) + list(t) for t in token_lists], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in token_lists], device=device)
    return ids_BS, mask_BS


def by_length(token_lists: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return positions in the list, in batches of similar length, which need less padding."""
    order = sorted(range(len(token_lists)), key=lambda i: len(token_lists[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def positions(mask_BS: Tensor) -> Tensor:
    """Return position ids_BS of left-padded tokens: each row counts from its own first token; padding is at 0."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


def forward(subject: Subject, ids_BS: Tensor, mask_BS: Tensor, keep: int = 1) -> Tensor:
    """Run one pass over left-padded tokens without a cache; return logits_BSV of the last `keep` positions."""
    # Position ids by hand: without them a model counts from the padding. Only the last logits are kept, as those of all
    # positions would be the largest tensor by far (B * S * V).
    return subject.model(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        position_ids=positions(mask_BS),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
