"""Fit tables into the width of a terminal: columns wrap, then whole columns go, and no number is ever cut."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GAP, _INDENT = 2, 2
_WHOLE = re.compile(r"\[[^\[\]]*\]|\d[\d.,]* (?:[kMGT]?B|[MT])(?!\w)|\S+")
"""What a line never breaks inside at a space: an interval's brackets, a number and its unit, a word."""


# rich has tables, too, but those put an ellipsis into a number that is wider than its column, and break others at the
# column's edge; they cannot leave out a column either.


@dataclass(frozen=True)
class Cell:
    """One field of a table; `style` is rich's, such as "bold green"."""

    text: str
    style: str = ""


Row = tuple[str | Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table before it is fitted; where a terminal is narrow its last columns go first.

    Attributes:
        columns: the headers; the first column is aligned to the left, the others to the right.
        spared: the header of a column that stays longer than the one to its left.
        total: a last row, set apart from the others.
        gloss: what is to be said under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row] = field(default_factory=list[Row])
    spared: str = ""
    total: Row | None = None
    gloss: str = ""

    def column(self, index: int) -> Iterator[str]:
        """Yield one column's texts, the header first."""
        yield self.columns[index]
        yield from (_cell(row[index]).text for row in (*self.rows, *([self.total] if self.total else [])))

    def order(self) -> list[int]:
        """Return the columns' indices, those that go first last."""
        indices = list(range(len(self.columns)))
        if self.spared:
            at = self.columns.index(self.spared)
            indices[at - 1 : at + 1] = [at, at - 1]
        return indices


def draw(console: Console, sheet: Sheet) -> None:
    """Print a table, the names of the columns for which there is no room, and the gloss."""
    from rich.text import Text

    fitted = fit(sheet, console.width - _INDENT)
    widths = list(fitted.values())
    rule = "-" if console.options.ascii_only else "─"
    lines = [Text(sheet.title, "bold")] if sheet.title else []
    lines += _row(sheet.columns, fitted)
    lines.append(Text(" " * _INDENT + rule * (sum(widths) + _GAP * (len(widths) - 1)), "dim"))
    for row in sheet.rows:
        lines += _row(row, fitted)
    if sheet.total:
        lines += [Text(""), *_row(sheet.total, fitted)]
    for line in lines:
        # a line that is too long for the narrowest of consoles is the terminal's to wrap; rich would cut it
        console.print(line, soft_wrap=True, highlight=False)
    for text in (_left_out(sheet, fitted), sheet.gloss):
        for line in wrap(text, console.width - _INDENT, names=False) if text else ():
            console.print(Text(" " * _INDENT + line, "dim"), soft_wrap=True, highlight=False)
    console.print()


def _left_out(sheet: Sheet, kept: Collection[int]) -> str:
    names = ", ".join(name for index, name in enumerate(sheet.columns) if index not in kept)
    return f"left out for want of room: {names}; a wider terminal shows all, and so does --json" if names else ""


def fit(sheet: Sheet, room: int) -> dict[int, int]:
    """Return the columns for which there is room, at least two, by index from left to right, and their widths.

    Widths are in characters.
    """
    order = sheet.order()
    columns = [list(sheet.column(index)) for index in order]
    # The widest part that must stay whole decides how narrow a column can get.
    least = [max(len(part) for text in column for part, _ in _parts(text)) for column in columns]
    fitting = (n for n in range(len(columns), 2, -1) if sum(least[:n]) + _GAP * (n - 1) <= room)
    # Names and one number at the least, also where they are wider than the terminal: it wraps what is too long.
    kept = next(fitting, min(2, len(columns)))
    widths, columns = least[:kept], columns[:kept]
    spare = max(0, room - sum(widths) - _GAP * (kept - 1))
    # first come fields on one line, such as an interval; then a header's words; then headers on few lines
    spare = _widen(widths, [max(map(len, texts), default=0) for _, *texts in columns], spare)
    spare = _widen(widths, [max(map(len, header.split()), default=0) for header, *_ in columns], spare)
    _spread(widths, [max(map(len, column)) for column in columns], spare)
    used = zip(columns, widths, strict=True)
    fitted = [max(len(line) for text in column for line in wrap(text, width)) for column, width in used]
    return dict(sorted(zip(order, fitted, strict=False)))


def _widen(widths: list[int], wanted: Sequence[int], spare: int) -> int:
    """Widen columns to what they want, least wants first and equal ones alike, wholly or not; return the room left."""
    missing = [want - width for want, width in zip(wanted, widths, strict=True)]
    for step in sorted({lack for lack in missing if lack > 0}):
        alike = [index for index, lack in enumerate(missing) if lack == step]
        if step * len(alike) <= spare:
            spare -= step * len(alike)
            for index in alike:
                widths[index] += step
    return spare


def _spread(widths: list[int], wanted: Sequence[int], spare: int) -> None:
    """Widen columns a character at a time, always the one that misses most."""
    for _ in range(spare):
        missing = [want - width for want, width in zip(wanted, widths, strict=True)]
        if max(missing) > 0:
            widths[missing.index(max(missing))] += 1


def _row(row: Row, fitted: Mapping[int, int]) -> list[Text]:
    """Return the lines of one row, of the columns that are kept, by index, in their widths."""
    from rich.text import Text

    cells, widths = [_cell(row[index]) for index in fitted], list(fitted.values())
    wrapped = [wrap(cell.text, width) for cell, width in zip(cells, widths, strict=True)]
    lines: list[Text] = []
    for index in range(max(map(len, wrapped))):
        line = Text(" " * _INDENT)
        for column, (texts, width) in enumerate(zip(wrapped, widths, strict=True)):
            text = texts[index] if index < len(texts) else ""
            line.append(" " * _GAP if column else "")
            line.append(text.rjust(width) if column else text.ljust(width), cells[column].style)
        line.rstrip()
        lines.append(line)
    return lines


def wrap(text: str, width: int, *, names: bool = True) -> list[str]:
    """Return a text in lines of at most `width` characters, longer only where a part must not be broken.

    Args:
        names: whether a name or path may be broken behind its dots, dashes and slashes; numbers never are.
    """
    lines = [""]
    for part, joint in _parts(text, names):
        if lines[-1] and len(lines[-1]) + len(joint) + len(part) > width:
            lines.append(part)
        else:
            lines[-1] += (joint if lines[-1] else "") + part
    return lines


def _parts(text: str, names: bool = True) -> Iterator[tuple[str, str]]:
    """Yield what must stay whole, each with what joins it to the part before: a space, or nothing inside a name."""
    for match in _WHOLE.finditer(text):
        joint, start, word = " ", 0, match[0]
        for end in range(2, len(word)) if names and word[0] != "[" else ():
            if _is_seam(word[end - 2 : end + 1]):
                yield word[start:end], joint
                joint, start = "", end
        yield word[start:], joint
    if not text.strip():
        yield "", ""


def _is_seam(around: str) -> bool:
    """Return whether a name may be broken between the last two of three characters: behind a dot or the like.

    Numbers stay whole: 0.5, -3 and 1e-5 have no seam.
    """
    before, mark, after = around
    return mark in "._/-" and not (after.isdigit() and (before.isdigit() or mark == "-"))


def _cell(entry: str | Cell) -> Cell:
    return Cell(entry) if isinstance(entry, str) else entry
