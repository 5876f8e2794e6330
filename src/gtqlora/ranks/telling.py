"""What ranks tell one another: values that all get, errors that all raise, sums and means of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from gtqlora import errors
from gtqlora.errors import GtqloraError, RankError
from gtqlora.ranks.who import ranks

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_SHORT, _SIZE = 1024, 8
"""Bytes of a first message, of which the first ones say how many bytes a rank has: most values need no second one."""

_SENT_AT_ONCE = 2**25
"""Numbers of an exchange, at most, beyond those of one tensor: 128 MiB in fp32."""


def all_of(value: T) -> list[T]:
    """Return every rank's value, in their order; values are of what JSON has."""
    if not ranks().several:
        return [value]
    import torch

    mine = _packed(value)
    head = torch.zeros(_SHORT, dtype=torch.uint8)
    head[:_SIZE] = torch.frombuffer(bytearray(len(mine).to_bytes(_SIZE, "little")), dtype=torch.uint8)
    head[_SIZE : _SIZE + len(mine)] = mine[: _SHORT - _SIZE]
    heads = _from_all(head)
    sizes = [int.from_bytes(bytes(one[:_SIZE].tolist()), "little") for one in heads]
    texts = [one[_SIZE:] for one in heads]
    if (room := max(sizes)) > _SHORT - _SIZE:
        texts = _from_all(torch.nn.functional.pad(mine, (0, room - len(mine))))
    return [cast(T, _read(text[:size])) for text, size in zip(texts, sizes, strict=True)]


def _from_all(mine: Tensor) -> list[Tensor]:
    import torch
    import torch.distributed as dist

    found = [torch.zeros_like(mine) for _ in range(ranks().count)]
    dist.all_gather(found, mine, group=ranks().host)
    return found


def _packed(value: object) -> Tensor:
    import torch

    # no pickle, not even between ranks
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _read(text: Tensor) -> object:
    return json.loads(bytes(text.tolist()))


def by_leader(work: Callable[[], T]) -> T:
    """Let the leader work for all, and return to all what it found, which is of what JSON has.

    Raises:
        GtqloraError: what the leader raised, on all ranks.
    """
    if not ranks().several:
        return work()
    told: dict[str, Any] = {}
    if ranks().leads:
        try:
            told = {"found": work()}
        except GtqloraError as error:
            told = {"error": _kind(error), "said": str(error), "more": vars(error)}
    told = _from_leader(told)
    if "error" in told:
        raise _named(told["error"], told["said"], told["more"])
    return told["found"]


def _from_leader(value: T) -> T:
    import torch
    import torch.distributed as dist

    text = _packed(value)
    size = torch.tensor([len(text)])
    dist.broadcast(size, src=0, group=ranks().host)
    text = text if ranks().leads else torch.zeros(int(size), dtype=torch.uint8)
    dist.broadcast(text, src=0, group=ranks().host)
    return cast(T, _read(text))


def _kind(error: GtqloraError) -> str:
    """Return the name of the nearest of its classes that is in `errors`."""
    return next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)


def _named(name: str, said: str, more: Mapping[str, object]) -> GtqloraError:
    kind = getattr(errors, name)
    error: GtqloraError = kind.__new__(kind)  # some take more than a message
    Exception.__init__(error, said)
    vars(error).update(more)
    return error


@contextmanager
def leader_first() -> Iterator[None]:
    """Let the leader do something before the others, who then find in caches what it did.

    Raises:
        GtqloraError: what the leader raised, on all ranks.
    """
    if not ranks().several:
        yield
        return
    failed: GtqloraError | None = None
    if not ranks().leads:
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
    if not ranks().several:
        return values
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total, group=ranks().host)
    return total


def average(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all ranks in the place of each tensor."""
    if not ranks().several:
        return
    import torch
    import torch.distributed as dist

    for some in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat)
        parts = flat.div_(ranks().count).split([tensor.numel() for tensor in some])
        values = [part.view_as(tensor) for tensor, part in zip(some, parts, strict=True)]
        torch._foreach_copy_(some, values)  # type: ignore[attr-defined]


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
