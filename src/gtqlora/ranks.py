"""Processes that run one command together, a rank each, as `torchrun` starts them: who they are, what they agree on.

Every rank runs the same code over the same inputs. Rank 0, the leader, alone writes and speaks; what only one may do,
such as asking a judge, it does for all (`by_leader`). What would part the ranks is found by `agree` before it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from gtqlora import errors
from gtqlora.errors import ConfigError, GtqloraError, RankError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_STEP_LIMIT = timedelta(minutes=10)
"""How long ranks wait for one another inside a model's pass; a rank that is slower hangs."""
_PATIENCE = timedelta(days=7)
"""How long ranks wait while one of them works for all: a judge may take its time. One that dies is noticed at once."""

_SENT_AT_ONCE = 2**25
"""Numbers of an exchange, at most, beyond those of one tensor: 128 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Who this process is among those that run the command.

    Attributes:
        count: of all ranks, on `count / here` machines.
        place, here: this rank among those of its machine, and how many they are.
        machine: group of the ranks on this machine, for tensors of the model; None for one process alone.
        host: group of all, for what is in host memory.
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


_now = Ranks()


def ranks() -> Ranks:
    """Return who this process is."""
    return _now


def started() -> bool:
    """Tell whether a launcher such as `torchrun` started several processes, of which this is one."""
    return _number("WORLD_SIZE", 1) > 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r} in the environment: must be a number; start ranks with torchrun")
    return int(text)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Be one of the ranks that the environment tells of, as `torchrun` and `accelerate launch` set it.

    Raises:
        ConfigError: the environment does not say who this rank is, or another process is this rank already.
        RankError: the others did not come, or one of them has gone.
    """
    global _now
    if not started():
        for name in _ENVIRONMENT:  # one process that was started by `torchrun` is one process
            os.environ.pop(name, None)
        yield _now
        return
    import torch
    import torch.distributed as dist

    _now = _met(_checked())
    try:
        with _partings():
            yield _now
            dist.barrier(_now.host)
    finally:
        _now = Ranks()
        # with CUDA graphs that hold its work NCCL would wait for ever; it ends with the process
        if not torch.cuda.is_available():
            dist.destroy_process_group()


def _checked() -> Ranks:
    """Return who this process is, from the environment."""
    missing = [name for name in _ENVIRONMENT if name not in os.environ and not name.startswith("LOCAL_WORLD")]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
            "not set; start ranks with torchrun"
        )
    rank, count, place = (_number(name, 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    here = _number("LOCAL_WORLD_SIZE", count)
    if not (rank < count and place < here <= count and count % here == 0):
        raise ConfigError(
            f"RANK = {rank}, WORLD_SIZE = {count}, LOCAL_RANK = {place}, LOCAL_WORLD_SIZE = {here}: no such rank; "
            "every machine needs as many ranks as the others"
        )
    return Ranks(rank=rank, count=count, place=place, here=here)


def _met(me: Ranks) -> Ranks:
    """Return this rank with the groups of those that have come."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if me.here > torch.cuda.device_count():
            raise ConfigError(
                f"{me.here} ranks on this machine, but {torch.cuda.device_count()} GPUs; start as many ranks as GPUs"
            )
        torch.cuda.set_device(me.place)
    try:
        store, _, _ = next(iter(rendezvous("env://", me.rank, me.count, timeout=_STEP_LIMIT)))
        if store.add(f"gtqlora/rank/{me.rank}", 1) > 1:
            raise ConfigError(f"rank {me.rank} was started twice; give every process a RANK of its own (torchrun does)")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=me.rank,
            world_size=me.count,
            timeout=_STEP_LIMIT,
            device_id=torch.device("cuda", me.place) if on_gpu else None,
        )
    except (dist.DistError, RuntimeError, TimeoutError) as error:
        raise RankError(f"rank {me.rank} did not find the others ({_first(error)}); look at their messages") from error
    groups = [dist.new_group(range(start, start + me.here)) for start in range(0, me.count, me.here)]
    host = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Ranks(
        rank=me.rank,
        count=me.count,
        place=me.place,
        here=me.here,
        machine=groups[me.rank // me.here],
        host=host,
        store=store,
    )


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def _partings() -> Iterator[None]:
    """Say in one line, and once for all ranks, why they stop."""
    import torch.distributed as dist

    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if isinstance(error, GtqloraError) or not _is_parting(error):
            raise
        raise RankError(
            "another rank of this command has gone or does not answer; if no message above says why, it was killed. "
            "Run the same command to go on from the newest checkpoint"
        ) from error


def _is_parting(error: BaseException) -> bool:
    import torch.distributed as dist

    words = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in words for word in ("gloo", "nccl", "connection", "socket"))


def speaks_first() -> bool:
    """Tell whether this rank is the first to say why the command ends; the others say nothing."""
    if not _now.several:
        return True
    try:
        return _now.store.add("gtqlora/ended", 1) == 1
    except RuntimeError:  # whoever kept the store has gone
        return True


# --- what ranks tell one another --------------------------------------------------------------------------------------


def all_of(value: T) -> list[T]:
    """Return every rank's value, in their order; values are of what JSON has."""
    if not _now.several:
        return [value]
    import torch
    import torch.distributed as dist

    mine = _packed(value)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(_now.count)]
    dist.all_gather(sizes, torch.tensor([len(mine)]), group=_now.host)
    room = max(int(size) for size in sizes)
    texts = [torch.zeros(room, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.nn.functional.pad(mine, (0, room - len(mine))), group=_now.host)
    return [_read(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]


def _packed(value: object) -> Tensor:
    import torch

    # no pickle, not even between ranks
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _read(text: Tensor) -> Any:
    return json.loads(bytes(text.tolist()))


def by_leader(work: Callable[[], T]) -> T:
    """Let the leader work for all, and return to all what it found, which is of what JSON has.

    Raises:
        GtqloraError: what the leader raised, on all ranks.
    """
    if not _now.several:
        return work()
    told: dict[str, Any] = {}
    if _now.leads:
        try:
            told = {"found": work()}
        except GtqloraError as error:
            told = {"error": type(error).__name__, "said": str(error)}
    told = _from_leader(told)
    if "error" in told:
        raise _named(told["error"], told["said"])
    return told["found"]


def _from_leader(value: T) -> T:
    import torch
    import torch.distributed as dist

    text = _packed(value)
    size = torch.tensor([len(text)])
    dist.broadcast(size, src=0, group=_now.host)
    text = text if _now.leads else torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(text, src=0, group=_now.host)
    return _read(text)


def _named(name: str, said: str) -> GtqloraError:
    kind = getattr(errors, name, GtqloraError)
    error: GtqloraError = kind.__new__(kind)  # some take more than a message
    Exception.__init__(error, said)
    return error


@contextmanager
def leader_first() -> Iterator[None]:
    """Let the leader do something before the others, who then find in caches what it did.

    Raises:
        GtqloraError: what the leader raised, on all ranks.
    """
    if not _now.several:
        yield
        return
    failed: GtqloraError | None = None
    if not _now.leads:
        by_leader(lambda: None)
        yield
        return
    try:
        yield
    except GtqloraError as error:
        failed = error
        raise
    finally:
        by_leader(_raising(failed))


def _raising(error: GtqloraError | None) -> Callable[[], None]:
    def work() -> None:
        if error is not None:
            raise error

    return work


def agree(what: Mapping[str, object]) -> None:
    """Check that all ranks have the same.

    Raises:
        RankError: names the first rank that has not, and the first thing that is another there.
    """
    found = all_of(dict(what))
    for rank, theirs in enumerate(found):
        for name in sorted(found[0].keys() | theirs.keys()):
            if found[0].get(name) != theirs.get(name):
                raise RankError(
                    f"rank {rank} has {name} = {theirs.get(name)!r}, and rank 0 has {found[0].get(name)!r}; start all "
                    "ranks with the same command, files and versions"
                )


def summed(values: Tensor) -> Tensor:
    """Return the sum of a tensor in host memory over all ranks."""
    if not _now.several:
        return values
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total, group=_now.host)
    return total


def average(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all ranks in the place of each tensor."""
    if not _now.several:
        return
    import torch
    import torch.distributed as dist

    for some in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat)
        parts = flat.div_(_now.count).split([tensor.numel() for tensor in some])
        for tensor, part in zip(some, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors together that are sent at once."""
    some, size = list[Any](), 0
    for tensor in tensors:
        if some and size + tensor.numel() > _SENT_AT_ONCE:
            yield some
            some, size = [], 0
        some.append(tensor)
        size += tensor.numel()
    if some:
        yield some


def most(value: int) -> int:
    """Return the largest of the ranks' numbers."""
    return max(all_of(value))


def least(value: int) -> int:
    """Return the smallest of the ranks' numbers."""
    return min(all_of(value))


def share_here(size: int) -> range:
    """Return which of so many things this rank has among those of its machine; shares differ by one at most."""
    me = _now
    return range(me.place * size // me.here, (me.place + 1) * size // me.here)
