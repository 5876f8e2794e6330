"""AdamW whose moments are split among ranks: each keeps those of its share of the weights, and tells
the others what it made of them.

After ZeRO, stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054). All ranks have the same weights and averaged gradients;
each updates its share and hands it on. A checkpoint holds the moments of all, so that any number of ranks can go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gtqlora.ranks import ranks

State = dict[str, Tensor]
Saved = dict[str, Any]


class OwnedAdamW(torch.optim.AdamW):
    """AdamW of which every rank holds its share; as many numbers as any other's, but for the largest weight."""

    def __init__(self, groups: list[Saved], *, weight_decay: float, fused: bool = False) -> None:
        super().__init__(groups, weight_decay=weight_decay, fused=fused)
        self._owners = _owners(list(self._weights()))
        self._told: dict[int, State] = {}

    def _weights(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update this rank's share, and take over the others'."""
        assert closure is None
        pairs = list(zip(self._weights(), self._owners, strict=True))
        for weight, owner in pairs:
            if owner != ranks().rank:
                weight.grad = None
        super().step()
        for weight, owner in pairs:
            dist.broadcast(weight.data, src=owner)

    def tell_leader(self) -> None:
        """Bring the moments of all ranks to the leader, who writes them; all ranks have to call it."""
        self._told = {}
        for index, (weight, owner) in enumerate(zip(self._weights(), self._owners, strict=True)):
            if owner == 0:
                continue
            mine = self.state.get(weight) if owner == ranks().rank else None
            names = ("step", "exp_avg", "exp_avg_sq")
            shapes = (torch.Size(()), weight.shape, weight.shape)
            found = [
                mine[name].float().cpu() if mine else torch.zeros(shape)
                for name, shape in zip(names, shapes, strict=True)
            ]
            for tensor in found:
                dist.broadcast(tensor, src=owner, group=ranks().host)
            if ranks().leads:
                self._told[index] = dict(zip(names, found, strict=True))

    def state_dict(self) -> Saved:
        """Return the state, with what other ranks told of theirs."""
        found = super().state_dict()
        found["state"] = dict(sorted({**found["state"], **self._told}.items()))
        return found

    def load_state_dict(self, state_dict: Saved) -> None:
        """Take this rank's share of a state that holds all."""
        super().load_state_dict(state_dict)
        for weight, owner in zip(self._weights(), self._owners, strict=True):
            if owner != ranks().rank:
                self.state.pop(weight, None)


def _owners(weights: list[nn.Parameter]) -> list[int]:
    """Return the rank that holds each weight's moments: in order, as many numbers on each as can be."""
    total, count, before = sum(weight.numel() for weight in weights), ranks().count, 0
    owners = []
    for weight in weights:
        owners.append(min(count - 1, (before + weight.numel() // 2) * count // total))
        before += weight.numel()
    return owners
