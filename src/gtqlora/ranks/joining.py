"""How ranks come together, and how they part: one line that says why, from one of them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from threading import Event, Thread, current_thread, main_thread
from typing import TYPE_CHECKING, NoReturn

from gtqlora.errors import ConfigError, RankError
from gtqlora.progress import also_told
from gtqlora.ranks.who import ALONE, ENVIRONMENT, Ranks, become, from_environment, ranks, started

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_STEP_LIMIT = timedelta(minutes=10)
"""How long ranks wait for one another inside a model's pass; a rank that is slower hangs."""
_STILL, _STILL_AT_FIRST, _TIMES = 1800.0, 3600.0, 3.0
"""Seconds in which a rank has to get on, or times the longest that it took before; at first it may take more."""
_TURN = 1.0
"""Seconds after which it is looked whether it did."""
_PATIENCE = timedelta(days=7)
"""How long ranks wait while one of them works for all: a judge may take its time. One that dies is noticed at once."""
_GRACE = 5.0
"""Seconds in which a rank that was told to end does so in order."""
_COURTESY = 1.0
"""Seconds in which the leader may be the first to say why the command ends."""

_HEARING = 2.0
"""Seconds in which the others hear that one has said why."""

_ENDED, _SPOKEN, _HEARD = "gtqlora/ended", "gtqlora/spoken", "gtqlora/heard"

Speak = Callable[[str], None]


@contextmanager
def joined(speak: Speak = lambda _: None) -> Iterator[Ranks]:
    """Be one of the ranks that the environment tells of, as `torchrun` and `accelerate launch` set it.

    Args:
        speak: says why this rank ends where it cannot raise any more.

    Raises:
        ConfigError: the environment does not say who this rank is, or another process is this rank already.
        RankError: the others did not come, or one of them has gone.
    """
    if not started():
        for name in ENVIRONMENT:  # one process that was started by `torchrun` is one process
            os.environ.pop(name, None)
        yield ranks()
        return
    import torch.distributed as dist

    global _say, _claimed
    failed, _say, _claimed = True, speak, False
    try:
        become(_stored(from_environment()))
        with _told_to_end(speak), partings():
            yield become(_met(ranks()))
            dist.barrier(ranks().host)
        failed = False
    except BaseException:
        _claim()
        raise
    finally:
        _leave(failed=failed)


def _stored(me: Ranks) -> Ranks:
    """Return this rank with the store that all have."""
    from torch.distributed.rendezvous import rendezvous

    with _missing(me):
        store, _, _ = next(iter(rendezvous("env://", me.rank, me.count, timeout=_STEP_LIMIT)))
        if store.add(f"gtqlora/rank/{me.rank}", 1) > 1:
            raise ConfigError(f"rank {me.rank} was started twice; give every process a RANK of its own (torchrun does)")
    return replace(me, store=store)


@contextmanager
def _missing(me: Ranks) -> Iterator[None]:
    """Say which rank did not find the others."""
    import torch.distributed as dist

    try:
        yield
    except (dist.DistError, RuntimeError, TimeoutError, ValueError) as error:
        raise RankError(f"rank {me.rank} did not find the others ({_first(error)}); look at their messages") from error


def _met(me: Ranks) -> Ranks:
    """Return this rank with the groups of those that have come."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if me.here > torch.cuda.device_count():
            raise ConfigError(
                f"{me.here} ranks on this machine, but {torch.cuda.device_count()} GPUs; start as many ranks as GPUs"
            )
        torch.cuda.set_device(me.place)
    with _missing(me):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=me.store,
            rank=me.rank,
            world_size=me.count,
            timeout=_STEP_LIMIT,
            device_id=torch.device("cuda", me.place) if on_gpu else None,
        )
        machines = [range(start, start + me.here) for start in range(0, me.count, me.here)]
        groups = [dist.new_group(machine, timeout=_STEP_LIMIT) for machine in machines]
        host = dist.new_group(backend="gloo", timeout=_PATIENCE)
    if not me.leads and _keeps_store():
        Thread(target=_hear, args=(me.store.clone(),), daemon=True).start()
    return replace(me, machine=groups[me.rank // me.here], host=host)


def _keeps_store() -> bool:
    """Tell whether the store ends with the leader; torchrun keeps its own."""
    return "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _leave(*, failed: bool) -> None:
    """Be one process again."""
    import torch
    import torch.distributed as dist

    me = ranks()
    become(ALONE)
    global _by_nccl
    _by_nccl = dist.is_initialized() and torch.cuda.is_available()
    if dist.is_initialized() and not _by_nccl:
        dist.destroy_process_group()
    if failed and me.leads and me.store is not None and _keeps_store():
        _await(me, _HEARD, me.count - 1, _HEARING)  # without the store others would speak, too


_by_nccl = False


def end_process(code: int) -> None:
    """End a process that was one of several ranks with GPUs; others end as always.

    NCCL would wait for ever, when Python ends, for CUDA graphs that hold its work.
    """
    if _by_nccl:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


# --- why ranks part


_speaker: int | None = 0
_spoken = False
_claimed = False
_say: Speak = print
_remedies: list[Callable[[], str]] = [lambda: "Run the same command again"]


class _Told(BaseException):
    """Somebody asked this process to end."""


def speaker() -> int | None:
    """Return which rank this one was, if it is the one to say why the command ended; None if another one is."""
    return _speaker


def _claim() -> None:
    """Be the one that says why the command ends, if no other is."""
    global _speaker, _claimed
    _claimed = True
    _deaf()
    me = ranks()
    _speaker = me.rank
    if me.store is None:  # it never met the others
        return
    try:
        if not me.leads:  # what all raise alike the leader says
            _await(me, _ENDED, 1, _COURTESY)
        if first := me.store.add(_ENDED, 1) == 1:
            me.store.set(_SPOKEN, "")
    except RuntimeError:  # the leader kept the store and has gone
        first = me.rank == 1 and not _spoken
    _speaker = me.rank if first else None


def _hear(store: Store) -> None:
    """Wait until some rank says why the command ends, and let the leader know that it was heard."""
    global _spoken
    with suppress(RuntimeError):  # the leader has gone
        store.wait([_SPOKEN], _PATIENCE)
        _spoken = True
        store.add(_HEARD, 1)


def _await(me: Ranks, what: str, count: int, seconds: float) -> None:
    """Wait until so many ranks have done something, but not for long."""
    until = time.monotonic() + seconds
    while me.store.add(what, 0) < count and time.monotonic() < until:
        time.sleep(0.02)


def _deaf() -> None:
    """Do not be told to end again: this process does."""
    if current_thread() is main_thread() and ranks().several:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def partings(remedy: Callable[[], str] | None = None) -> Iterator[None]:
    """Say in one line why ranks stop when one of them has gone, or was told to end.

    Args:
        remedy: says what to do then.
    """
    _remedies.extend([remedy] if remedy else [])
    try:
        yield
    except (RuntimeError, _Told) as error:
        if not _is_parting(error):
            raise
        _deaf()
        raise RankError(_parted()) from error
    finally:
        del _remedies[len(_remedies) - bool(remedy) :]


def _parted() -> str:
    return (
        "another rank of this command has gone or does not answer, or all were told to end; if no message above says "
        f"why, it was killed. {_remedies[-1]()}"
    )


def _is_parting(error: BaseException) -> bool:
    import torch.distributed as dist

    if not ranks().several:
        return False
    words = str(error).lower()
    known = isinstance(error, dist.DistError | _Told)
    return known or any(word in words for word in ("gloo", "nccl", "connection", "socket"))


@contextmanager
def _told_to_end(speak: Speak) -> Iterator[None]:
    """End in order when a launcher says so, which it does when another rank has gone."""
    if current_thread() is not main_thread():
        yield
        return
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    before = signal.signal(signal.SIGTERM, _raise)
    signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    Thread(target=_end_late, args=(ears, speak, ranks()), daemon=True).start()
    try:
        yield
        signal.signal(signal.SIGTERM, before)
    finally:
        signal.set_wakeup_fd(-1)
        mouth.close()


def _raise(*_: object) -> NoReturn:
    raise _Told


def _end_late(ears: socket.socket, speak: Speak, me: Ranks) -> None:
    """End a process that waits for a GPU, where nothing can be raised."""
    while (signals := ears.recv(16)) and signal.SIGTERM not in signals:
        pass
    if not signals:
        return
    time.sleep(_GRACE)
    if ranks() is not ALONE:  # else it has left by itself
        _end_from_beside(speak)


def _end_from_beside(speak: Speak) -> NoReturn:
    """End this process, whose main thread does not."""
    me = ranks()
    if _claimed:
        time.sleep(_GRACE)  # the main thread came so far after all, and is saying it
    else:
        _claim()
        if speaker() is not None:
            speak(_parted())
    if me.leads and _keeps_store():
        _await(me, _HEARD, me.count - 1, _HEARING)  # without the store others would speak, too
    os._exit(RankError.exit_code)


@contextmanager
def progressing() -> Iterator[None]:
    """End the command in one line when this rank reports no progress, as one does that waits for another in vain.

    What waits on a GPU for another one's memory, or for a kernel of NCCL in a recorded pass, has no limit of its own.
    """
    if not ranks().several:
        yield
        return
    watch = _Watch()
    Thread(target=watch.run, args=(_say,), daemon=True).start()
    try:
        with also_told(watch.got_on):
            yield
    finally:
        watch.over.set()


class _Watch:
    """Looks now and then whether this rank got on."""

    def __init__(self) -> None:
        self.over, self._still, self._longest, self._begun = Event(), 0.0, 0.0, False

    def got_on(self) -> None:
        self._longest, self._still, self._begun = max(self._longest, self._still), 0.0, True

    def run(self, speak: Speak) -> None:
        last = time.monotonic()
        while not self.over.wait(_TURN):
            now = time.monotonic()
            self._still += min(now - last, 2 * _TURN)  # whoever was suspended did not hang
            last = now
            if self._still > (max(_STILL, _TIMES * self._longest) if self._begun else _STILL_AT_FIRST):
                _end_from_beside(speak)
