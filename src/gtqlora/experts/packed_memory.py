"""Tensors that lie in one piece of memory (uint8), one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

ALIGNED = 512
"""Bytes at whose multiples tensors begin: what TMA and torch's own allocator want, and more."""


def aligned(size: int, to: int = ALIGNED) -> int:
    """Return the first multiple that is no less than a size."""
    return -(-size // to) * to


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Return the byte where each tensor of so many bytes begins, and where all end."""
    return list(accumulate(map(aligned, sizes), initial=0))


def size_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes of a tensor."""
    return prod(shape) * dtype.itemsize


def tensor_at(memory: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the bytes of a memory from one on, as a tensor."""
    return memory[start : start + size_of(shape, dtype)].view(dtype).view(torch.Size(shape))
