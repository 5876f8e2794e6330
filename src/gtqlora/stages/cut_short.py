"""What a training says that is cut short: which part ran out of memory and what takes less, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gtqlora.config import TrainConfig
from gtqlora.edits.checkpoint_files import usable
from gtqlora.errors import TrainingError
from gtqlora.experts.loading import BF16
from gtqlora.machine import ran_out_of_memory
from gtqlora.ranks import ranks
from gtqlora.storage.contents import first_line


def goes_on(checkpoints: Path) -> str:
    """Say where the same command goes on."""
    newest = next(iter(usable(checkpoints)), None)
    if newest is None:
        return "No checkpoint was whole yet: the same command begins anew"
    return f"The same command goes on from {newest.folder}"


@contextmanager
def enough_memory(config: TrainConfig, checkpoints: Path, when: Callable[[], str]) -> Iterator[None]:
    """Say what ran out of memory, and what takes less.

    Args:
        when: says what was being done.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory on {config.device} {when()} ({first_line(error)[:120]}). Less is taken, and checkpoints go "
            f"on, with {_as_exact(config)}; {_smaller(config)} begin anew (--again). {goes_on(checkpoints)}"
        ) from error


def _as_exact(config: TrainConfig) -> str:
    """Name settings under which the edit stays the same."""
    found = [] if config.gradient_checkpointing else ["gradient_checkpointing = true"]
    if config.device != "cpu":
        if config.gradient_checkpointing and config.activation_memory != 0:
            found.append("activation_memory = 0")
        if config.expert_format != BF16 and config.expert_memory is None:
            found.append("expert_memory (experts wait in host memory)")
    return " or ".join([*found, f"more ranks than {ranks().count} (torchrun), each on a GPU of its own"])


def _smaller(config: TrainConfig) -> str:
    """Name what makes another edit."""
    rows = config.batch_size // ranks().count
    fewer = [f"batch_size = {rows // 2 * ranks().count} with more accumulation"] if rows > 1 else []
    return " or ".join([*fewer, *(["expert_format = nf4"] if config.expert_format == BF16 else []), "shorter rows"])
