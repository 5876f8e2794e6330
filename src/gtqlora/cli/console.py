"""What the command line shows things with: consoles, tables, progress bars. It makes them; only `cli` prints."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from gtqlora.progress import shown_by

if TYPE_CHECKING:
    from rich.console import Console

    from gtqlora.results.verdict import Mediation
    from gtqlora.stats import Interval


_ROOM = "; make room and run the same command again"
_REMEDIES = {
    **{errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM},
    **{errno.EFBIG: "; raise the limit of file sizes (ulimit -f) or choose a file system without"},
}


def quieten() -> None:
    """Libraries' own bars and notes would run through ours; the variables must be set before they are imported."""
    warnings.filterwarnings("ignore")
    for name, value in {
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONWARNINGS": "ignore",
    }.items():
        os.environ.setdefault(name, value)


def show_anything() -> None:
    """Characters that a console or its encoding does not have are replaced, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def ablate(stream: TextIO | None) -> None:
    """Let what is still to be written go nowhere: whoever read has left, or there is no room."""
    if stream is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flushed() -> OSError | None:
    """Bring standard output to whoever reads it; why that failed, if it did. A reader who has left is no failure."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        ablate(sys.stdout)
    except OSError as error:
        ablate(sys.stdout)
        return error
    return None


def trouble(error: OSError | UnicodeEncodeError, place: str) -> str:
    """An error of the system's as a line that says where and what to do."""
    if isinstance(error, UnicodeEncodeError):
        near = error.object[max(0, error.start - 60) : error.end + 20]
        return (
            f"{near!a}: this name or text does not go into {error.encoding}; rename it, or set LANG=C.UTF-8 and "
            "PYTHONUTF8=1"
        )
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{error.filename or place}: {error.strerror or error}{remedy}"


def open_console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class Patient(Console):
        """Work goes on when nobody reads any more; rich would end the process."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            ablate(sys.stderr if stderr else sys.stdout)

    return Patient(stderr=stderr)


def plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def _bars(description: str) -> Iterator[Any]:
    """Bars with counts, elapsed time and time left, on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=open_console(stderr=True)) as bars:
        yield bars


@contextmanager
def stage_progress() -> Iterator[None]:
    """One bar per thing that a stage reports."""
    with _bars("{task.description}") as bars:
        tasks: dict[str, Any] = {}

        def reporter(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        with shown_by(reporter):
            yield


@contextmanager
def demo_progress() -> Iterator[Callable[[tuple[str, str, int, int]], None]]:
    """One bar per organism, with what it is doing now."""
    with _bars("{task.description:<48}") as bars:
        tasks: dict[str, Any] = {}

        def on_event(event: tuple[str, str, int, int]) -> None:
            organism, what, done, total = event
            if organism not in tasks:
                tasks[organism] = bars.add_task(organism)
            bars.update(tasks[organism], description=f"{organism}: {what}", completed=done, total=total)

        yield on_event


def new_table(title: str, *columns: str) -> Any:
    """First column left, the rest right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def interval(found: Interval | Mediation | None, digits: int = 3) -> str:
    if found is None or found.value is None:
        return "-"
    value, low, high = (f"{round(end, digits) + 0.0:.{digits}f}" for end in (found.value, found.low, found.high))
    return rf"{value} \[{low}, {high}]"
