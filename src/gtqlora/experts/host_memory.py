"""Memory of the host in which layers of frozen experts wait: page-locked, so that a GPU reads it by itself, or a file.

torch's own `pin_memory` takes up to twice what is asked of it, as it rounds up to powers of two; here a layer takes its
bytes and no more. Files have no name, so that nothing is left of them however the program ends.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.planning.cards import in_binary
from gtqlora.planning.memory import spaced
from gtqlora.ranks import ranks

_SPARE = 0.1
"""Share of the memory that is free which stays so, for whatever else runs here."""
_PORTABLE = 1
"""Locked for every GPU of this process."""
_CGROUP = Path("/sys/fs/cgroup")
_WAYS_OUT = "raise expert_memory, set expert_disk = FOLDER for what does not fit, or use a host with more memory"


class _Locked(mmap.mmap):
    """Memory that is unlocked before it is freed."""

    cudart: Any = None
    address = 0

    def __del__(self) -> None:
        if self.address and not sys.is_finalizing():  # when all ends, the driver has let go of it
            torch.cuda.synchronize()  # a copy of what nobody asked for yet may be on its way
            self.cudart.cudaHostUnregister(self.address)


def in_memory(size: int, device: torch.device) -> Tensor:
    """Return exactly so many bytes (uint8) of host memory, page-locked where the device is a GPU.

    Raises:
        ModelError: the driver does not lock them.
    """
    memory = _Locked(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a 512th of the pages to lock
    found = torch.frombuffer(memory, dtype=torch.uint8)
    if device.type == "cuda":
        cudart: Any = torch.cuda.cudart()
        with torch.cuda.device(device):
            code = int(cudart.cudaHostRegister(found.data_ptr(), size, _PORTABLE))
        if code:
            raise ModelError(f"the driver does not lock {in_binary(size)} of host memory (CUDA error {code})")
        memory.cudart, memory.address = cudart, found.data_ptr()
    return found


def in_file(size: int, folder: Path) -> Tensor:
    """Return so many bytes (uint8) of a nameless file in a folder, as they are mapped into memory.

    Raises:
        ModelError: no such folder, or it has no room.
    """
    try:
        with TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and later would kill the process
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ModelError(
            f"expert_disk = {folder}: {in_binary(size)} cannot be kept there ({error.strerror})"
        ) from error
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        memory.madvise(mmap.MADV_SEQUENTIAL)
    return torch.frombuffer(memory, dtype=torch.uint8)


def available() -> int:
    """Return the bytes of host memory that may be taken, 0 where the system does not say.

    That is what is free here, within what this program's control group may have.
    """
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0
    try:
        most, now = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, most - now + int(cached["inactive_file"]))
    except (OSError, KeyError, ValueError):  # no such group, or one without a limit
        return free


def homes(sizes: Sequence[int], device: torch.device, disk: Path | None) -> list[Tensor]:
    """Return the memory for layers of these sizes: page-locked, and a folder's files for those that do not fit.

    Raises:
        ModelError: there is too little memory and no folder, or as `in_file`.
    """
    room, total = int((1 - _SPARE) * available()) // ranks().here, sum(sizes)
    if total > room and disk is None:
        raise ModelError(
            f"{len(sizes)} layers of experts would wait in {in_binary(total)} of host memory, of which "
            f"{in_binary(room)} can be had; {_WAYS_OUT}"
        )
    on_disk = set[int]() if disk is None else spaced(len(sizes), _beyond(sizes, room))
    found: list[Tensor] = []
    for index, size in enumerate(sizes):
        try:
            found.append(in_file(size, disk) if index in on_disk and disk is not None else in_memory(size, device))
        except (ModelError, OSError, ValueError) as error:
            if index in on_disk:
                raise
            locked = sum(size for index, size in enumerate(sizes[: len(found)]) if index not in on_disk)
            raise ModelError(
                f"{in_binary(locked)} of host memory could be had of the {in_binary(total)} in which {len(sizes)} "
                f"layers of experts are to wait ({error}); {_WAYS_OUT}"
            ) from error
    return found


def _beyond(sizes: Sequence[int], room: int) -> int:
    """Return how many layers do not fit."""
    layer = max(sizes, default=1)
    return max(0, len(sizes) - room // layer)
