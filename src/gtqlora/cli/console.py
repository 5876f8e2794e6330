"""Make what the command line shows things with: consoles that outlive their readers, words on stderr, progress bars."""

from __future__ import annotations

import atexit
import errno
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from typing import TYPE_CHECKING, TextIO

from gtqlora.cli.layout import wrap
from gtqlora.machine import uncollected
from gtqlora.progress import shown_by

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task, TaskID


_ROOM = "; make room and run the same command again"
_REMEDIES = {
    **{errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM},
    **{errno.EFBIG: "; raise the limit of file sizes (ulimit -f) or choose a file system without"},
}


def quieten() -> None:
    """Switch off libraries' own bars and notes, which would run through ours; call it before they are imported."""
    warnings.filterwarnings("ignore")
    for name, value in {
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
    }.items():
        # What the user has set stays.
        os.environ.setdefault(name, value)


def show_anything() -> None:
    """Replace characters that a console or its encoding does not have, instead of ending the command."""
    # a name in another alphabet must not end hours of training with a UnicodeEncodeError
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _to_nowhere(stream: TextIO | None) -> None:
    """Let what is still to be written go nowhere: whoever read has left, or there is no room."""
    if stream is None:
        return
    # the descriptor is exchanged, not the object: Python flushes the latter when it ends, and would fail once more
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Silence:
    """Standard output and standard error that lead nowhere, from `begin` to `end`, whoever writes to them."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Say nothing any more."""
        if self._kept:
            return
        self._flush()
        self._kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream, _ in self._kept:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def end(self) -> None:
        """Be heard again."""
        self._flush()
        for stream, kept in self._kept:
            os.dup2(kept, stream)
            os.close(kept)
        self._kept = []

    @staticmethod
    def _flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()


def flushed() -> OSError | None:
    """Bring standard output to whoever reads it; return why that failed, if it did. A reader may leave."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
    except OSError as error:
        _to_nowhere(sys.stdout)
        return error
    return None


def trouble(error: OSError | UnicodeEncodeError, place: str) -> str:
    """Return an error of the system's as a line that says where and what to do."""
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 60) : error.end + 20]
        return (
            f"{near!a}: this name or text does not go into {error.encoding}; rename it, or set LANG=C.UTF-8 and "
            "PYTHONUTF8=1"
        )
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{error.filename or place}: {error.strerror or error}{remedy}"


def open_console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error, at the width of now."""
    from rich.console import Console

    class Patient(Console):
        """A console on which work goes on when nobody reads any more; rich would end the process."""

        def on_broken_pipe(self) -> None:
            """Say nothing more."""
            self.quiet = True
            _to_nowhere(sys.stderr if stderr else sys.stdout)

    return Patient(stderr=stderr)


def say(console: Console, text: str, style: str = "", *, accent: tuple[str, str] = ("", ""), indent: int = 0) -> None:
    """Print a paragraph that breaks at spaces only, so that names and numbers stay whole.

    Args:
        accent: words in it, and their own style.
        indent: spaces before each line.
    """
    from rich.text import Text

    words, colour = accent
    for line in wrap(text, console.width - indent, names=False):
        shown = Text(" " * indent + line, style)
        if words:
            shown.highlight_words([words], colour)
        console.print(shown, soft_wrap=True, highlight=False)


def say_whole(console: Console, text: str, style: str = "") -> None:
    """Print one unbroken line, such as one with a path that somebody will copy."""
    from rich.text import Text

    console.print(Text(text, style), soft_wrap=True, highlight=False)


def remark(text: str, style: str = "") -> None:
    """Say something on standard error, beside the results."""
    say_whole(open_console(stderr=True), text, style)


def say_error(text: str) -> None:
    """Print the one line of an error; where nothing can be written any more, nothing is."""
    from rich.text import Text

    line = Text.assemble(("error:", "bold red"), f" {text}")
    with suppress(OSError):
        open_console(stderr=True).print(line, soft_wrap=True, highlight=False)


@contextmanager
def starting() -> Iterator[None]:
    """Import libraries without the garbage collector's help; on a terminal, say that something is happening."""
    console = open_console(stderr=True)
    if console.is_terminal:
        console.print("starting ...", style="dim", highlight=False)
    # Imports make a million objects and hardly any garbage, which the collector looks for again and again: half a
    # second. When the process ends it would look once more, for a whole second, and nothing is left to be freed.
    _leave_at_once()
    with uncollected():
        yield


@cache
def _leave_at_once() -> None:
    atexit.register(gc.freeze)


_COUNTS, _TIME, _LEFT = 13, 7, 4
"""Characters of `12345/1234567`, of `0:00:00`, and of the word behind the time left."""
_NARROW = 80
"""Terminals below this width have no room for a bar and the time that has passed."""


@contextmanager
def _bars() -> Iterator[Progress]:
    """Show bars with counts, elapsed time and time left, on stderr; what is being done is cut, its numbers never."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    console = open_console(stderr=True)
    counts, left = MofNCompleteColumn(), (TimeRemainingColumn(), TextColumn("left"))
    if console.width < _NARROW:
        room, columns = console.width - _COUNTS - _TIME - _LEFT - 3, (counts, *left)
    else:
        bar = min(24, console.width - _NARROW + 10)
        room = console.width - bar - _COUNTS - 2 * _TIME - _LEFT - 5
        columns = (BarColumn(bar_width=bar), counts, TimeElapsedColumn(), *left)

    class Description(TextColumn):
        """What is being done, as much of it as fits."""

        def render(self, task: Task) -> Text:
            """Return its first line."""
            first, *more = wrap(task.description, room - 2, names=False)
            return Text(f"{first} …" if more else first)

    bars = Progress(Description(""), *columns, console=console)
    try:
        yield bars
    finally:
        if bars.tasks:  # the end of bars that were never shown would be an empty line
            bars.stop()


def _new_bar(bars: Progress, what: str, total: int = 100) -> TaskID:
    """Add a bar; the first one starts the display."""
    bars.start()
    return bars.add_task(what, total=total)


@contextmanager
def stage_progress() -> Iterator[None]:
    """Show one bar per thing that a stage reports; whatever libraries print meanwhile goes to stderr, too."""
    # redirected first: the bars start later, put streams that print above them in the place of both, and end before
    with redirect_stdout(sys.stderr), _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def reporter(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = _new_bar(bars, what, total)
            # The total again: a stage may learn how much there is to do only while it works.
            bars.update(tasks[what], completed=done, total=total)

        with shown_by(reporter):
            yield


@contextmanager
def demo_progress() -> Iterator[Callable[[tuple[str, str, int, int]], None]]:
    """Show one bar per organism, with what it is doing now."""
    with _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def on_event(event: tuple[str, str, int, int]) -> None:
            organism, what, done, total = event
            if organism not in tasks:
                tasks[organism] = _new_bar(bars, organism)
            bars.update(tasks[organism], description=f"{organism}: {what}", completed=done, total=total)

        yield on_event
