"""Fit tables into the width of a terminal: columns wrap, then go below the others, and no number is ever cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GAP, _INDENT = 2, 2
_WHOLE = re.compile(r"\[[^\[\]]*\]|\d[\d.,]* (?:[kMGT]?B|[MT])(?!\w)|\S+")
"""What a line never breaks inside at a space: an interval's brackets, a number and its unit, a word."""


# rich has tables, too, but those put an ellipsis into a number that is wider than its column, and break others at the
# column's edge.


@dataclass(frozen=True)
class Cell:
    """One field of a table; `style` is rich's, such as "bold green"."""

    text: str
    style: str = ""


Row = tuple[str | Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table before it is fitted; where a terminal is narrow its last columns come below the others.

    Attributes:
        columns: the headers; the first column is aligned to the left, the others to the right.
        total: a last row, set apart from the others.
        gloss: what is to be said under the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Row] = field(default_factory=list[Row])
    total: Row | None = None
    gloss: str = ""

    def column(self, index: int) -> Iterator[str]:
        """Yield one column's texts, the header first."""
        yield self.columns[index]
        yield from (_cell(row[index]).text for row in (*self.rows, *([self.total] if self.total else [])))


def draw(console: Console, sheet: Sheet) -> None:
    """Print a table, columns for which there is no room below the others, and the gloss."""
    from rich.text import Text

    lines = [Text(sheet.title, "bold")] if sheet.title else []
    for number, block in enumerate(fit(sheet, console.width - _INDENT)):
        lines += [Text("")] if number else []
        lines += _block(sheet, block, "-" if console.options.ascii_only else "─")
    for line in lines:
        # a line that is too long for the narrowest of consoles is the terminal's to wrap; rich would cut it
        console.print(line, soft_wrap=True, highlight=False)
    for line in wrap(sheet.gloss, console.width - _INDENT, names=False) if sheet.gloss else ():
        console.print(Text(" " * _INDENT + line, "dim"), soft_wrap=True, highlight=False)
    console.print()


def _block(sheet: Sheet, block: Mapping[int, int], rule: str) -> list[Text]:
    """Return the lines of some columns, by index, in their widths."""
    from rich.text import Text

    lines = _row(sheet.columns, block)
    lines.append(Text(" " * _INDENT + rule * (sum(block.values()) + _GAP * (len(block) - 1)), "dim"))
    for row in sheet.rows:
        lines += _row(row, block)
    return [*lines, Text(""), *_row(sheet.total, block)] if sheet.total else lines


def fit(sheet: Sheet, room: int) -> list[dict[int, int]]:
    """Return blocks that come below one another: columns by index, the first in each, and widths in characters."""
    blocks, left = list[dict[int, int]](), list(range(1, len(sheet.columns)))
    while left or not blocks:
        blocks.append(_fitted(sheet, [0, *left], room))
        left = left[len(blocks[-1]) - 1 :]
    return blocks


def _fitted(sheet: Sheet, order: Sequence[int], room: int) -> dict[int, int]:
    """Return the first of some columns for which there is room, two at the least, and their widths."""
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
    return dict(zip(order, fitted, strict=False))


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
