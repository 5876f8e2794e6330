"""Which of the processes that run one command this one is: what the environment says of it, as `torchrun` sets it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from gtqlora.errors import ConfigError

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is among those that run the command.

    Attributes:
        count: of all ranks, on `count / here` machines.
        place, here: this rank among those of its machine, and how many they are.
        machine: group of the ranks on this machine, for tensors of the model; None for one process alone.
        host: group of all, for what is in host memory.
        store: what all can read and write before they have groups, and after one of them has gone.
    """

    rank: int = 0
    count: int = 1
    place: int = 0
    here: int = 1
    machine: Any = None
    host: Any = None
    store: Any = None

    @property
    def several(self) -> bool:
        """Return whether there are others."""
        return self.count > 1

    @property
    def leads(self) -> bool:
        """Return whether this rank writes and speaks for all."""
        return self.rank == 0


ALONE = Ranks()
_now = ALONE


def ranks() -> Ranks:
    """Return who this process is."""
    return _now


def become(me: Ranks) -> Ranks:
    """Be this rank from now on, and return it."""
    global _now
    _now = me
    return me


def started() -> bool:
    """Tell whether a launcher such as `torchrun` started several processes, of which this is one."""
    return _number("WORLD_SIZE", 1) > 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{name} = {text!r} in the environment: must be a number; start ranks with torchrun")
    return int(text)


def from_environment() -> Ranks:
    """Return which of several ranks this process is.

    Raises:
        ConfigError: the environment does not say, or there is no such rank.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ and name != "LOCAL_WORLD_SIZE"]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not set; start ranks with torchrun"
        )
    rank, count, place, _ = (_number(name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    here = _number("LOCAL_WORLD_SIZE", count)
    if not (rank < count and place < here <= count and count % here == 0):
        raise ConfigError(
            f"RANK = {rank}, WORLD_SIZE = {count}, LOCAL_RANK = {place}, LOCAL_WORLD_SIZE = {here}: no such rank; "
            "every machine needs as many ranks as the others"
        )
    return Ranks(rank=rank, count=count, place=place, here=here)


def share(size: int, place: int, count: int) -> range:
    """Return which of so many things are of one of so many places; shares differ by one at most."""
    return range(place * size // count, (place + 1) * size // count)
