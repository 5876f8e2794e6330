"""Which computations wait for the GPU: these cannot be captured as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Found = TypeVar("Found")

_WAITS = "synchronizing CUDA operation"


def watched(compute: Callable[[], Found]) -> tuple[Found, str | None]:
    """Compute, and return with it the line of code that waited for the GPU first, if any did."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = compute()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [warning for warning in heard if _WAITS in str(warning.message)]
    return found, f"{waits[0].filename}:{waits[0].lineno}" if waits else None
