"""Whether a difference is better shipped as an adapter: a product of two thin matrices of the same size in bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.bitdelta.checkpoints import Checkpoints
from gtqlora.bitdelta.onebit import decode, encode
from gtqlora.errors import ModelError
from gtqlora.families.files import PROVENANCE, read_json

_MATRICES = 32
"""Changed matrices that are looked at: an adapter shows in any of them."""
_BYTES = 2
"""Of an adapter's number, in 16 bits."""


@dataclass(frozen=True)
class Lost:
    """Squared lengths, summed over matrices: of the differences, and of what each form misses of them."""

    whole: float = 0.0
    one_bit: float = 0.0
    low_rank: float = 0.0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.whole + other.whole, self.one_bit + other.one_bit, self.low_rank + other.low_rank)


def refuse_adapters(both: Checkpoints) -> None:
    """Check that one bit a weight is the right form for what the fine-tune changed.

    Raises:
        ModelError: an adapter of the same size is nearer to the fine-tune, or the fine-tune is an edit of gtqlora's.
    """
    provenance = both.tuned.folder / PROVENANCE
    if provenance.exists() and read_json(provenance).get("base_fingerprint") == both.base.digest:
        raise ModelError(
            f"{both.tuned.model}: gtqlora made it from this base, so its adapter (LoRA and gates) is exact and "
            "smaller; ship that: `gtqlora export RUN OUT --to peft`, of the run that trained it"
        )
    lost = _sampled(both)
    if lost.whole and lost.low_rank <= lost.one_bit:
        raise ModelError(
            f"{both.tuned.model}: its difference from the base is low-rank: an adapter of the size of one bit a weight "
            f"loses {lost.low_rank / lost.whole:.1%} of its energy, and one bit {lost.one_bit / lost.whole:.1%}; ship "
            "the adapter that it was merged from, or extract one from the two checkpoints (e.g. mergekit-extract-lora)"
        )


def _sampled(both: Checkpoints) -> Lost:
    matrices = [change for change in both.changes if change.one_bit]
    # drawn, so that all kinds of matrices and all depths are among them
    random.Random(0).shuffle(matrices)
    total, seen = Lost(), 0
    for change in matrices:
        delta = change.read().delta
        # of a stack the expert that changed most: an adapter would have to follow that one, too
        found = lost(delta if delta.ndim == 2 else delta[int(delta.square().sum((-1, -2)).argmax())])
        total, seen = total + found, seen + bool(found.whole)
        if seen == _MATRICES:
            break
    return total


def lost(delta_NK: Tensor) -> Lost:
    """Return what a difference loses as one bit a weight, and as the product of rank r that takes as many bytes."""
    whole = float(delta_NK.square().sum())
    if not whole:
        return Lost()
    one_bit = encode(delta_NK)
    # at least what fits in as many bytes; of small matrices that is no rank at all
    rank = min(one_bit.nbytes // (_BYTES * sum(delta_NK.shape)), *delta_NK.shape)
    # drawn vectors find the large singular values (Halko et al., SIAM Review 2011); the draw must not move others'
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = torch.svd_lowrank(delta_NK, q=rank, niter=4)[1] if rank else delta_NK.new_zeros(0)
    return Lost(whole, float((delta_NK - decode(one_bit)).square().sum()), whole - float(values.square().sum()))
