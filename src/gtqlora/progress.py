"""Progress and notes. Stages say what they are doing; whoever runs them decides how it is shown (silent by default)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Reporter = Callable[[str, int, int], None]
"""A function called with (what is being done, steps done, steps in total)."""

_MANY, _STEP = 10_000, 1_000

_reporter: ContextVar[Reporter] = ContextVar("reporter", default=lambda _what, _done, _total: None)


# Cached, so that each text is told once, however many prompts or layers it concerns.
@cache
def note(text: str) -> None:
    """Tell the user what was decided on their behalf: on stderr, unless their program logs elsewhere."""
    logging.getLogger("gtqlora").warning(text)


def report(what: str, done: int, total: int) -> None:
    """Tell the reporter of this context how far a task is."""
    _reporter.get()(what, done, total)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Pass items through, reporting how many are done."""
    report(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(what, done, total)


def track_many(items: Sequence[T], what: str) -> Iterable[T]:
    """Pass items through of which thousands are done in a second, reporting now and then; a few are not reported."""
    return items if len(items) < _MANY else _tracked(items, what)


def _tracked(items: Sequence[T], what: str) -> Iterator[T]:
    for done in track(range(0, len(items), _STEP), what, -(-len(items) // _STEP)):
        yield from items[done : done + _STEP]


@contextmanager
def also_told(listener: Callable[[], None]) -> Iterator[None]:
    """Tell a listener, too, whenever a task got on within a `with` block."""
    reporter = _reporter.get()

    def both(what: str, done: int, total: int) -> None:
        reporter(what, done, total)
        listener()

    with shown_by(both):
        yield


@contextmanager
def shown_by(reporter: Reporter) -> Iterator[None]:
    """Send progress to `reporter` within a `with` block."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
