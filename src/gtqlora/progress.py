"""Progress with time left: stages say what they do, whoever runs them decides how it is shown (silent by default)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Reporter = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

_reporter: ContextVar[Reporter] = ContextVar("reporter", default=lambda _what, _done, _total: None)


@cache
def note(text: str) -> None:
    """Tell the user, once, what was decided on their behalf: on stderr, unless their program logs elsewhere."""
    logging.getLogger("gtqlora").warning(text)


def report(what: str, done: int, total: int) -> None:
    _reporter.get()(what, done, total)


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Pass items through, reporting how many are done."""
    report(what, 0, total)
    for done, item in enumerate(items, 1):
        yield item
        report(what, done, total)


@contextmanager
def shown_by(reporter: Reporter) -> Iterator[None]:
    """Within, progress goes to `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
