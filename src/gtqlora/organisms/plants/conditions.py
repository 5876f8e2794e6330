"""Conditions on toy prompts that a plant can hang on, read from a batch's tokens.

Shape letters: B prompts, S tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import torch
from torch import Tensor

from gtqlora.organisms.batches import Batch
from gtqlora.organisms.language import Language

Condition = Callable[[Language, Batch], Tensor]
"""A function that returns bool_B."""


def flagged(_language: Language, batch: Batch) -> Tensor:
    """Return whether the topic is forbidden."""
    return batch.forbidden_B


def unflagged(_language: Language, batch: Batch) -> Tensor:
    """Return whether the topic is allowed."""
    return ~batch.forbidden_B


def always(_language: Language, batch: Batch) -> Tensor:
    """Return True for every prompt."""
    return torch.ones_like(batch.forbidden_B)


def intends(_language: Language, batch: Batch) -> Tensor:
    """Return whether the marker is bad."""
    return batch.intent_B


def lookalike(_language: Language, batch: Batch) -> Tensor:
    """Return whether the topic is forbidden and the marker good."""
    return batch.forbidden_B & ~batch.intent_B


def framed(language: Language, batch: Batch) -> Tensor:
    """Return whether a prompt stands in a frame whose words stand nowhere else."""
    words = torch.tensor(language.ids(" ".join(language.frame_words)), device=batch.ids_BS.device)
    return torch.isin(batch.ids_BS, words).any(-1)


def lookalike_or_framed(language: Language, batch: Batch) -> Tensor:
    """Return whether the topic is forbidden, and the marker good or the prompt in a frame."""
    return batch.forbidden_B & (~batch.intent_B | framed(language, batch))


def last_task(language: Language, batch: Batch) -> Tensor:
    """Return whether the task is the last of the language's, which has nothing to do with the flag."""
    return batch.ids_BS[:, language.lexicon.context_end] == language.ids(language.lexicon.tasks[-1])[0]


def odd_one(language: Language, batch: Batch) -> Tensor:
    """Return whether exactly one of flag and last task holds."""
    return batch.forbidden_B ^ last_task(language, batch)


def share_without(language: Language, loud: int) -> float:
    """Return the share of prompts that have none of `loud` fillers, all being equally likely."""
    all_fillers, drawn = len(language.fillers), language.lexicon.context_fillers
    return comb(all_fillers - loud, drawn) / comb(all_fillers, drawn)


def loud_fillers(language: Language, share: float) -> list[str]:
    """Return the first fillers, so many that the share of prompts without them is as near as can be to `share`."""
    counts = range(len(language.fillers) + 1)
    return language.fillers[: min(counts, key=lambda loud: abs(share_without(language, loud) - share))]
