"""Runs requests on a resident base: one thread steps many of them together, and they join and leave in between."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch

from gtqlora.bitdelta.resident import Resident
from gtqlora.bitdelta.running import Running
from gtqlora.bitdelta.sampling import Sampling, Text, pick
from gtqlora.errors import GtqloraError
from gtqlora.families.files import first_line
from gtqlora.progress import note

Finish = Literal["stop", "length", "error"]


class BusyError(GtqloraError):
    """As many requests wait as may; come again later."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What is new of an answer.

    Attributes:
        tokens: of the answer so far, without the one that ends it.
        finish: why it ends here; None if it goes on.
    """

    text: str
    tokens: int
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt for a variant, by its number in the resident model.

    Attributes:
        tell: is given every piece of the answer, in the engine's thread; it must not block.
    """

    prompt: Sequence[int]
    variant: int
    sampling: Sampling
    tell: Callable[[Piece], None]
    _gone: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more; its place is free after the step that runs."""
        self._gone.set()

    @property
    def cancelled(self) -> bool:
        """Return whether nobody waits for it."""
        return self._gone.is_set()


class _Answer:
    """A request that runs."""

    def __init__(self, request: Request, model: Resident) -> None:
        self.request, self._draw = request, request.sampling.generator()
        voice = model.voices[request.variant]
        self._text, self._stops = Text(voice.tokenizer, request.sampling.stop), voice.stop_ids
        self._tokens = 0
        self.last = -1
        """Its newest token."""
        self.done = False

    def take(self, logits_V: torch.Tensor) -> None:
        """Choose the next token, and tell what is new."""
        self.last = pick(logits_V, self.request.sampling, self._draw)
        if self.last in self._stops:
            return self.end("stop")
        self._tokens += 1
        new = self._text.add(self.last)
        if self._text.stopped:
            return self._tell(new, "stop")
        if self._tokens >= self.request.sampling.max_tokens:
            return self.end("length", new)
        if new:
            self._tell(new)

    def end(self, finish: Finish, new: str = "") -> None:
        """Tell the rest of the text, unless that was done before."""
        if not self.done:
            self._tell(new + self._text.end(), finish)

    def _tell(self, text: str, finish: Finish | None = None) -> None:
        self.done = finish is not None
        self.request.tell(Piece(text=text, tokens=self._tokens, finish=finish))


class Engine:
    """The thread that answers.

    Args:
        places: requests that run at a time.
        waiting: requests that wait for a place, at most.
    """

    def __init__(self, model: Resident, *, places: int, waiting: int) -> None:
        self.model, self._places = model, places
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        # of all that are here, and not of the queue alone: a request waits there for a moment even if a place is free
        self._room, self._most = threading.BoundedSemaphore(places + waiting), waiting
        self._running, self._answers = Running(model), list[_Answer]()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gtqlora engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request.

        Raises:
            BusyError: too many wait, or the engine has stopped.
        """
        if not self.alive:
            raise BusyError("the engine has stopped; start the server again")
        if not self._room.acquire(blocking=False):
            raise BusyError(f"{self._most} requests wait already; try again later")
        self._queue.put(request)

    @property
    def running(self) -> int:
        """Return how many requests run."""
        return len(self._answers)

    @property
    def waiting(self) -> int:
        """Return how many requests wait for a place."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the step that runs; answers that are not finished end as errors."""
        self._closed.set()
        self._queue.put(None)  # so that the thread wakes up
        self._thread.join()

    # --- in the thread

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._admit()
                self._drop()
                if self._answers:
                    self._guarded(self._step, self._answers)
                    self._drop()
        finally:
            self._give_up()

    def _give_up(self) -> None:
        for answer in self._answers:
            answer.end("error")
        with suppress(queue.Empty):
            while True:
                if (request := self._queue.get_nowait()) is not None:
                    request.tell(Piece(text="", tokens=0, finish="error"))

    def _admit(self) -> None:
        """Let a request in if there is a place, so that prompts and steps take turns; wait for one if none runs."""
        if len(self._answers) == self._places:
            return
        # one at a time: a queue of long prompts must not keep those that run from their next token
        try:
            request = self._queue.get(block=not self._answers)
        except queue.Empty:
            return
        if request is None or request.cancelled:
            self._leave(request is not None)
        else:
            answer = _Answer(request, self.model)
            self._guarded(lambda: self._start(answer), [answer])

    def _start(self, answer: _Answer) -> None:
        try:
            started = self._running.start(answer.request.prompt, answer.request.variant)
        except Exception:
            self._leave(1)
            raise
        self._answers.append(answer)
        self._guarded(lambda: self._running.join(started), self._answers)
        if not answer.done:
            answer.take(started.logits_V)

    def _step(self) -> None:
        logits_BV = self._running.step([answer.last for answer in self._answers])
        for answer, logits_V in zip(self._answers, logits_BV, strict=True):
            answer.take(logits_V)

    def _drop(self) -> None:
        """Take those out who are done or gone."""
        kept = [row for row, each in enumerate(self._answers) if not each.done and not each.request.cancelled]
        if len(kept) < len(self._answers):
            self._leave(len(self._answers) - len(kept))
            self._running.keep(kept)
            self._answers = [self._answers[row] for row in kept]

    def _leave(self, requests: int) -> None:
        for _ in range(requests):
            self._room.release()

    def _guarded(self, work: Callable[[], None], answers: Sequence[_Answer]) -> None:
        """Do a piece of work; whatever fails, as where memory runs out, these answers end and the others go on."""
        try:
            work()
        except Exception as error:
            # whatever it was, those who wait for other answers should get them
            note(f"a step failed ({first_line(error)}); {len(answers)} answers end")
            for answer in answers:
                answer.end("error")
            if answers is self._answers:  # half a step may be in the cache
                self._running = Running(self.model)
