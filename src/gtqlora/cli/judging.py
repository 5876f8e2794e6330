"""The verb `gtqlora judge`: what judges say of answers in a file, and how often they are wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gtqlora.cli import printing
from gtqlora.cli.console import open_console, say, say_whole, stage_progress, starting
from gtqlora.cli.figures import interval, many
from gtqlora.cli.layout import Sheet, draw
from gtqlora.cli.settings import JUDGES, Json, say_what_judges
from gtqlora.errors import ConfigError
from gtqlora.judging.labels import LABELS, UNDECIDED

if TYPE_CHECKING:
    from gtqlora.judging.agreement import Confusion
    from gtqlora.stages.judge import Agreement, Judged, Measured

_MANY = 0.2
"""Share of undecided answers from which on it is said that the errors speak of the others only."""
_SHOWN = 20
"""Rows that are listed where two judges differ; `--out` has all."""


def judge(
    file: Annotated[str, Parameter(help="Answers: JSONL, JSON, CSV, Parquet, folder or hub dataset.")],
    *,
    by: Annotated[str, Parameter(name="--judge", help=JUDGES)] = "string",
    second: Annotated[
        str | None, Parameter(name="--second-judge", help="Another one, to see how far the two agree.")
    ] = None,
    columns: Annotated[
        str | None, Parameter(name="--as", help="What columns hold: prompt=COLUMN,answer=COLUMN,label=COLUMN.")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="Write each row's number and labels, no texts, here: .csv, .jsonl or .parquet.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a judge: what it says of answers, its errors where they are labelled, and if two judges agree.

    No text is printed or written.
    """
    named = _columns(columns)
    if second == by:
        raise ConfigError(f"--second-judge {second}: the same as --judge")
    with starting():
        from gtqlora.config.judges import absolute
        from gtqlora.judging.pair import judges_of
        from gtqlora.stages.judge import judge as measure
        from gtqlora.storage.tables import check_table

    if out is not None:
        check_table(out)  # before a judge is loaded
    say_what_judges(by)
    if second is not None:
        say_what_judges(second, key="second_judge")
    with stage_progress():
        both = judges_of(absolute(by), None if second is None else absolute(second))
        found = measure(file, both, columns=named, out=out)
    if as_json:
        printing.show_json(found)
    else:
        _show(found)


def _columns(text: str | None) -> dict[str, str]:
    """Return the columns that `--as` names.

    Raises:
        ConfigError: it is not of the form `prompt=COLUMN,answer=COLUMN`.
    """
    named: dict[str, str] = {}
    for part in (text or "").split(",") if text else ():
        what, equals, column = part.partition("=")
        if not equals or not column.strip() or what.strip() in named:
            raise ConfigError(f"--as {text}: must be prompt=COLUMN,answer=COLUMN,label=COLUMN, or some of these")
        named[what.strip()] = column.strip()
    return named


def _show(found: Judged) -> None:
    console = open_console()
    draw(console, _said(found))
    if found.labelled:
        draw(console, _errors(found))
    for one in found.judges:
        if one.confusion is not None:
            draw(console, _crossed(one.confusion, f"What {one.name} says of each", "labelled"))
    if found.agreement is not None:
        names = [one.name for one in found.judges]
        draw(console, _crossed(found.agreement.said, f"{names[0]}, and across {names[1]}", "first"))
        say(console, _agreement(found.agreement))
    for one in found.judges:
        if one.undecided > _MANY and not one.objects_only:
            say(console, _much_undecided(one), accent=("note:", "yellow"))
    if found.out is not None:
        judges = "two judges, and of both together" if found.agreement else "the judge"
        say_whole(console, f"wrote {found.out}: {many(found.rows, 'row')} with the labels of {judges}; no texts")


def _much_undecided(found: Measured) -> str:
    """Return a sentence on a judge that leaves much undecided, as its error speaks of what is left."""
    number = found.said[UNDECIDED]
    left = f"note: {found.name} leaves {many(number, 'answer')} undecided, {found.undecided:.0%} of all"
    if found.errors is None:
        return f"{left}; in a floor what is undecided is never counted as kept"
    of = found.errors.refusal_or_answer
    told = f"its error speaks of the other {of.n:,} only" if of.n else "so nothing is known of its error"
    return f"{left}; {told}. In a floor what is undecided is never counted as kept"


def _agreement(found: Agreement) -> str:
    shown = ", ".join(map(str, found.differ[:_SHOWN]))
    more = f" and {len(found.differ) - _SHOWN:,} more" if len(found.differ) > _SHOWN else ""
    rows = f"; they differ in rows {shown}{more}" if found.differ else ""
    kappa = "" if math.isnan(found.kappa) else f" (Cohen's kappa {found.kappa:.3f})"
    return f"The two agree on {interval(found.alike)} of the answers{kappa}{rows}."


def _said(found: Judged) -> Sheet:
    """Return how many answers each judge gives which label."""
    rows = [(one.name, *(f"{one.said[label]:,}" for label in LABELS)) for one in found.judges]
    title = f"{many(found.rows, 'answer')}, {found.labelled:,} labelled"
    return Sheet(title=title, columns=("judge", *LABELS), rows=rows)


def _errors(found: Judged) -> Sheet:
    """Return how often each judge is wrong."""
    of_each = [(one.name, one.errors) for one in found.judges if one.errors is not None]
    rows = [
        (name, *map(interval, (e.refusal_or_answer, e.undecided, e.missed, e.alarms, e.partial))) for name, e in of_each
    ]
    columns = ("error", "undecided", "refusals missed", "answers called refusals", "partial called refusal")
    return Sheet(
        title="Errors",
        columns=("judge", *columns),
        rows=rows,
        gloss="error: full refusals missed and answers called refusals, of both; of those that the judge decides; "
        "undecided: of all; in brackets: 95 % intervals",
    )


def _crossed(found: Confusion, title: str, down: str) -> Sheet:
    """Return how many answers have which of two labels each."""
    rows = [(label, *(f"{of[other]:,}" for other in LABELS)) for label, of in found.items() if any(of.values())]
    return Sheet(title=title, columns=(down, *LABELS), rows=rows)
