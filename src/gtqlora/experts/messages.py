"""What ranks send to all others, or add up over them: by NCCL, or by gloo where there is no GPU.

Shape letters: T tokens of a rank, N of all ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 calls them otherwise, and warns of the old names
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Group = dist.ProcessGroup


class Way(Protocol):
    """How tensors get from each rank to the others."""

    def gathered(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return, of each of this rank's parts [T, ...], those of all ranks [N, ...], in their order."""
        ...

    def scattered(self, values: Tensor) -> Tensor:
        """Return this rank's [T, ...] of the sums over all ranks [N, ...]."""
        ...

    def forget(self) -> None:
        """Take nothing for granted of what lies in memory that others read: recorded passes write there as well."""
        ...

    @property
    def nbytes(self) -> int:
        """Return the bytes of this rank's memory that others read."""
        ...


class Messages:
    """Messages of a group's own backend."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def gathered(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """As `Way`; several parts are one message, as they are so small that each would take as long."""
        if len(parts) == 1:
            return (gathered(parts[0], self._group),)
        bytes_NB = gathered(torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1), self._group)
        lengths = [part.shape[1] * part.element_size() for part in parts]
        return tuple(
            mine.contiguous().view(part.dtype) for mine, part in zip(bytes_NB.split(lengths, dim=1), parts, strict=True)
        )

    def scattered(self, values: Tensor) -> Tensor:
        """As `Way`."""
        return scattered(values, self._group)

    def forget(self) -> None:
        """As `Way`: no memory is read by others."""

    @property
    def nbytes(self) -> int:
        """As `Way`: no memory is read by others."""
        return 0


def gather_into(whole: Tensor, part: Tensor, group: Group) -> None:
    """Put the parts [T, ...] of all ranks into whole [N, ...], in their order."""
    _all_gather(whole, part, group=group)


def gathered(values: Tensor, group: Group) -> Tensor:
    """Return values [N, ...] of all ranks, in their order."""
    whole = values.new_empty(dist.get_world_size(group) * len(values), *values.shape[1:])
    gather_into(whole, values.contiguous(), group)
    return whole


def scattered(values: Tensor, group: Group) -> Tensor:
    """Return this rank's values [T, ...] of the sums over all ranks."""
    mine = values.new_empty(len(values) // dist.get_world_size(group), *values.shape[1:])
    _reduce_scatter(mine, values.contiguous(), group=group)
    return mine
