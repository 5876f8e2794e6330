"""Memory of the GPUs of one machine that each of them reads by itself: tokens travel without kernels of NCCL.

By torch's symmetric memory. Each rank lays down what others are to have, all meet, and each fetches: large tensors by
the GPU's copy engines, so that matrix products which run meanwhile keep all multiprocessors, and small ones by a kernel
that reads them, in half the time that a message of NCCL takes.

Shape letters: T tokens of a rank, N of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtqlora.experts.messages import Group
from gtqlora.experts.packed_memory import ALIGNED, aligned, starts_of, tensor_at
from gtqlora.progress import note
from gtqlora.ranks import all_of

_READ_BY_KERNELS = 2**21
"""Bytes of a rank's part, at most, that are read by a kernel: a copy engine takes longer to begin."""


@dataclass
class _Place:
    """Bytes (uint8) of every rank.

    Attributes:
        mine: this rank's.
        all: every rank's, as this one reads them.
        handle: of torch, by which ranks meet.
        recorded: whether passes that were recorded go on using it.
    """

    mine: Tensor
    all: tuple[Tensor, ...]
    handle: Any
    recorded: bool = False

    def meet(self) -> None:
        """Let this stream go on when that of every rank is here."""
        self.handle.barrier(channel=0)


class PeerMemory:
    """A `Way` over memory that all ranks of a group read.

    What lies in a place is read until all have met again. So no place is written twice without a meeting between: as a
    rule that of another place does, and else there is one more. All calls have to be of one stream, or follow another.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group, self._device = group, device
        self._places: dict[tuple[str, torch.dtype], _Place] = {}
        self._outgrown: list[_Place] = []
        self._last: tuple[str, torch.dtype] | None = None

    @property
    def nbytes(self) -> int:
        """As `Way`; torch's allocator does not count them."""
        return sum(len(place.mine) for place in (*self._places.values(), *self._outgrown))

    def forget(self) -> None:
        """As `Way`: nothing is known of which place was written last."""
        self._last = None

    def gathered(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """As `Way`."""
        place = self._laid("gathered", parts)
        starts = starts_of(part.nbytes for part in parts)[:-1]
        return tuple(self._joined(part, place, start) for part, start in zip(parts, starts, strict=True))

    def _joined(self, part: Tensor, place: _Place, start: int) -> Tensor:
        of_ranks = [_at(memory, start, part) for memory in place.all]
        if part.nbytes <= _READ_BY_KERNELS:
            return torch.cat(of_ranks)
        whole = part.new_empty(len(of_ranks), *part.shape)
        whole[self._rank].copy_(part)
        for rank in self._others:
            whole[rank].copy_(of_ranks[rank])
        return whole.flatten(0, 1)

    def scattered(self, values: Tensor) -> Tensor:
        """As `Way`; sums are rounded to the values' dtype after every rank."""
        of_ranks = values.contiguous().view(self._group.size(), -1, *values.shape[1:])
        place = self._laid("scattered", of_ranks.unbind(), but=self._rank)
        start = self._rank * aligned(of_ranks[0].nbytes)
        total = of_ranks[self._rank]
        for index, rank in enumerate(self._others):
            theirs = _at(place.all[rank], start, total)
            total = total.add_(theirs) if index else total + theirs
        return total

    @property
    def _rank(self) -> int:
        return self._group.rank()

    @property
    def _others(self) -> list[int]:
        """Return the other ranks, from the next one on, so that not all read the same one's memory at once."""
        return [(self._rank + step) % self._group.size() for step in range(1, self._group.size())]

    def _laid(self, name: str, parts: Sequence[Tensor], but: int | None = None) -> _Place:
        """Return the place where all ranks' parts lie, one after the other, without the one of the index `but`."""
        key, starts = (name, parts[0].dtype), starts_of(part.nbytes for part in parts)
        place = self._place(key, starts[-1])
        if self._last in (None, key):
            place.meet()
        for index, (part, start) in enumerate(zip(parts, starts[:-1], strict=True)):
            if index != but:
                _at(place.mine, start, part).copy_(part)
        place.meet()
        self._last = key
        return place

    def _place(self, key: tuple[str, torch.dtype], size: int) -> _Place:
        place = self._places.get(key)
        if place is None or len(place.mine) < size:
            if place is not None and place.recorded:
                self._outgrown.append(place)
            place = self._places[key] = _made(size, self._group, self._device)
        place.recorded |= torch.cuda.is_current_stream_capturing()
        return place


def are_readable(group: Group, device: torch.device) -> bool:
    """Tell whether all ranks of a group read one another's memory; the user is told why not."""
    try:
        _made(ALIGNED, group, device)
        objection = None
    except (ImportError, AttributeError, RuntimeError) as error:
        objection = " ".join(str(error).split())[:200]
    objection = next((said for said in all_of(objection) if said is not None), None)
    if objection is not None:
        note(f"these GPUs do not read one another's memory ({objection}): tokens travel through NCCL")
    return objection is None


def _made(size: int, group: Group, device: torch.device) -> _Place:
    # torch does not call it stable yet: without it there is NCCL
    import torch.distributed._symmetric_memory as symmetric_memory

    torch.cuda.empty_cache()  # this memory is none of torch's allocator, which may hold what is free
    mine = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    # torch clears the memory by which ranks meet in turn with this stream's work: no rank may meet another before
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(mine, group)
    torch.cuda.synchronize(device)
    others = (handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size()))
    return _Place(mine, tuple(others), handle)


def _at(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the bytes of a memory from one on, as a tensor like another."""
    return tensor_at(memory, start, like.shape, like.dtype)
