"""What layers that are computed again were given, kept in host memory between a forward and a backward pass.

Copies run beside the layers: each leaves while the next layer computes, and comes back while the one after it, in the
order of the backward pass, is computed again. All memory stays where it is, so that passes can be recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_LEAST = 2**20
"""Bytes from which on a tensor is worth a copy."""
_LEAVING = 2
"""Tensors on their way to the host, at most."""


@dataclass(frozen=True)
class _Away:
    """A tensor that is in host memory: the number of its place there."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


class HostInputs:
    """Host memory for the large tensors that a forward pass saves, inside `kept`; and two on the GPU to come back to.

    Args:
        longest: bytes of the largest one that is expected; larger ones make room anew.
    """

    def __init__(self, device: torch.device, *, longest: int) -> None:
        self._device, self._longest = device, longest
        self._side = torch.cuda.Stream(device)
        self._host: list[Tensor] = []
        self._here: list[tuple[int | None, Tensor]] = []
        self._outgrown: list[object] = []
        self._leaving: list[tuple[Tensor, torch.cuda.Event]] = []
        self._count, self._forked = 0, False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep in host memory what is saved for the backward pass, where that is large."""
        self._count, self._here = 0, list[tuple[int | None, Tensor]]((None, memory) for _, memory in self._here)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield
        self._wait_for_leaving(0)

    def settle(self) -> None:
        """Let this stream wait for copies that nobody has asked for."""
        if self._forked:  # a recording may wait for nothing that it did not begin
            torch.cuda.current_stream(self._device).wait_stream(self._side)
        self._forked = False

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Give work to the stream of copies, after all that this stream was given so far."""
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        self._forked = True
        with torch.cuda.stream(self._side):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        if not tensor.is_cuda or tensor.nbytes < _LEAST or isinstance(tensor, nn.Parameter):
            return tensor
        away = _Away(self._count, tensor.shape, tensor.dtype)
        self._count += 1
        with self._beside():
            self._at(away).copy_(tensor, non_blocking=True)
        # it must stay until it is copied, and is not held longer than that
        copied = torch.cuda.Event()
        copied.record(self._side)
        self._leaving.append((tensor, copied))
        self._wait_for_leaving(_LEAVING)
        return away

    def _wait_for_leaving(self, most: int) -> None:
        while len(self._leaving) > most:
            torch.cuda.current_stream(self._device).wait_event(self._leaving.pop(0)[1])

    def _at(self, away: _Away) -> Tensor:
        """Return the host memory of a tensor."""
        size = away.shape.numel() * away.dtype.itemsize
        if away.index == len(self._host):
            self._host.append(self._pinned(size))
        if len(self._host[away.index]) < size:
            self._outgrown.append(self._host[away.index])  # a recorded pass may go on using it
            self._host[away.index] = self._pinned(size)
        return self._host[away.index][:size].view(away.dtype).view(away.shape)

    def _pinned(self, size: int) -> Tensor:
        return torch.empty(max(size, self._longest), dtype=torch.uint8, pin_memory=True)

    def _unpack(self, away: Tensor | _Away) -> Tensor:
        if isinstance(away, Tensor):
            return away
        self._bring(away)
        torch.cuda.current_stream(self._device).wait_stream(self._side)
        before = _Away(away.index - 1, away.shape, away.dtype)
        if before.index >= 0 and len(self._host[before.index]) >= before.shape.numel() * before.dtype.itemsize:
            self._bring(before)  # of nearly all passes it is the one that is wanted next, and as large
        return self._memory(away)

    def _memory(self, away: _Away) -> Tensor:
        size = away.shape.numel() * away.dtype.itemsize
        return self._here[away.index % 2][1][:size].view(away.dtype).view(away.shape)

    def _bring(self, away: _Away) -> None:
        size, place = away.shape.numel() * away.dtype.itemsize, away.index % 2
        if not self._here or len(self._here[place][1]) < size:
            self._outgrown.append(self._here)
            room = max(size, self._longest)
            memory = [torch.empty(room, dtype=torch.uint8, device=self._device) for _ in range(2)]
            self._here = list[tuple[int | None, Tensor]]((None, each) for each in memory)
        holds, memory = self._here[place]
        if holds == away.index:
            return
        self._here[place] = away.index, memory
        with self._beside():
            self._memory(away).copy_(self._at(away), non_blocking=True)
