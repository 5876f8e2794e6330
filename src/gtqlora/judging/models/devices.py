"""Where a judge that is a model runs, and what is said where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gtqlora.errors import JudgeError
from gtqlora.progress import note


def roomiest(name: str) -> str:
    """Return the GPU with the most free memory, or the CPU where there is none, and say that it is slow there."""
    if not torch.cuda.is_available():
        note(f"judge {name}: runs on the CPU, where billions of parameters take seconds an answer")
        return "cpu"
    # Beside the model under test, which may fill the first one.
    free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
    return f"cuda:{free.index(max(free))}"


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Say in one line what to do where a judge does not fit on its device.

    Raises:
        JudgeError: memory ran out in the `with` block.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise JudgeError(
            name,
            "does not fit on the GPU beside what else is there; as second_judge it is asked when the model under test "
            "is freed, or set CUDA_VISIBLE_DEVICES to a GPU more",
        ) from error
