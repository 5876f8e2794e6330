"""TRL's figures of a step, of all ranks: entropy, rewards, log-probabilities and the like.

TRL sends fifteen small tensors one after the other and waits for each, in every part of a batch. Here it works out what
this rank's rows give, and all figures travel with the loss, at once. Shape letters: B rows, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from gtqlora.ranks import all_of, ranks

_TOKENS = "num_tokens"
"""TRL counts these from the beginning of a training, and keeps no list of them."""
_OF_CHOSEN, _OF_REJECTED, _OF_BOTH = ("logits/chosen", "mean_token_accuracy"), ("logits/rejected",), ("entropy",)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one rank found of a part.

    Attributes:
        chosen, rejected: tokens of these completions.
        pairs, real: rows of either kind, and those of them that only fill up left out.
        of_trl: by name; means over rows, of which fillers give 0, but for some that are means over tokens.
    """

    loss: float
    anchor: float
    chosen: float
    rejected: float
    pairs: float
    real: float
    of_trl: dict[str, float]

    def counted(self, name: str) -> tuple[float, float]:
        """Return of how many rows or tokens a figure is the mean, and how many of these are real."""
        tokens = (self.chosen, _OF_CHOSEN), (self.rejected, _OF_REJECTED), (self.chosen + self.rejected, _OF_BOTH)
        return next(((count, count) for count, names in tokens if name in names), (self.pairs, self.real))


def figures_of(
    loss: Tensor, anchor: Tensor, real_B: Tensor, completion_mask_BS: Tensor, of_trl: Mapping[str, float]
) -> Figures:
    """Return the figures of a part of chosen rows, and then as many rejected ones; fillers are not real."""
    chosen, rejected = (tokens_B.sum() for tokens_B in completion_mask_BS[:, 1:].sum(-1).chunk(2))
    values = torch.stack([value.detach().float() for value in (loss, anchor, chosen, rejected, real_B.sum())]).tolist()
    numbers = dict(zip(("loss", "anchor", "chosen", "rejected", "real"), values, strict=True))
    return Figures(**numbers, pairs=len(real_B), of_trl=dict(of_trl))


def told(mine: Figures) -> list[Figures]:
    """Return the figures of every rank."""
    return [Figures(**found) for found in all_of(asdict(mine))]


def merge(metrics: MutableMapping[str, list[float]], found: Sequence[Figures]) -> None:
    """Add what all ranks' rows give to the figures that are logged next."""
    for name, value in found[0].of_trl.items():
        if name == _TOKENS:
            metrics[name] = [sum(one.of_trl[name] for one in found)]
        else:
            metrics[name].append(value if len(found) == 1 else _mean(name, found))


def _mean(name: str, found: Sequence[Figures]) -> float:
    counts = [one.counted(name) for one in found]
    summed = sum(count * one.of_trl[name] for one, (count, _) in zip(found, counts, strict=True))
    return summed / max(1.0, sum(real for _, real in counts))


@contextmanager
def of_this_rank(accelerator: Accelerator) -> Iterator[None]:
    """Let TRL find figures of this rank's rows alone."""
    if not ranks().several:
        yield
        return
    names = ("gather", "gather_for_metrics")
    own: dict[str, Any] = vars(accelerator)
    own |= dict.fromkeys(names, lambda value: value)
    try:
        yield
    finally:
        for name in names:
            del own[name]
