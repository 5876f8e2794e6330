"""Lines of estimates with their intervals on one scale, drawn by the style sheet alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gtqlora.reporting.words import percent, span
from gtqlora.stats import Interval


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the two ends of a track stand for."""

    low: float = 0.0
    high: float = 1.0

    def at(self, value: float) -> float:
        """Return the place on the track in per cent of its width, within it."""
        # clipped: an interval that leaves the track ends at its edge
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)

    @property
    def zero(self) -> float:
        """Return where 0 lies on the track, in per cent of its width."""
        return self.at(0.0)


def holding(intervals: Iterable[Interval | None]) -> Scale:
    """Return a scale from 0 to 1, or as far as an interval reaches, in steps of a quarter."""
    ends = [end for interval in intervals if interval for end in (interval.low, interval.high)]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    # quarters, so that the ends of the scale are round numbers
    return Scale(low=math.floor(low * 4) / 4, high=math.ceil(high * 4) / 4)


@dataclass(frozen=True, kw_only=True)
class Style:
    """Colour, shape and meaning of a mark; the shape alone tells it from the others."""

    tint: str
    shape: str = "dot"
    meaning: str = ""
    bar: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value with its interval, in per cent of the track; `start` is where its bar begins, if it has one."""

    style: Style
    at: float
    low: float
    high: float
    start: float | None


def mark(interval: Interval, style: Style, scale: Scale) -> Mark:
    """Return an interval as it is drawn on a scale."""
    return Mark(
        style=style,
        at=scale.at(interval.value),
        low=scale.at(interval.low),
        high=scale.at(interval.high),
        start=scale.zero if style.bar else None,
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row: a label, marks on the track in lanes of their own, and (value, interval) for each column of texts.

    Attributes:
        note: small print after the label.
        opens: the (layer, expert) whose panel the label opens.
    """

    label: str
    marks: tuple[Mark, ...]
    texts: tuple[tuple[str, str], ...]
    tag: str = ""
    note: str = ""
    opens: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Forest:
    """Rows under one scale."""

    heading: str
    measure: str
    columns: tuple[str, ...]
    lines: list[Line]
    scale: Scale
    key: tuple[Style, ...] = ()

    @property
    def ends(self) -> tuple[str, str]:
        """Return what stands at the two ends of the scale."""
        return percent(self.scale.low), percent(self.scale.high)


def told(interval: Interval | None) -> tuple[str, str]:
    """Return a share and its interval as texts."""
    return percent(interval.value if interval else None), span(interval) if interval else ""


def line(label: str, found: Sequence[tuple[Interval | None, Style]], scale: Scale) -> Line:
    """Return a row with a mark and a column of texts for each interval."""
    return Line(
        label=label,
        marks=tuple(mark(i, style, scale) for i, style in found if i),
        texts=tuple(told(interval) for interval, _ in found),
    )


__all__ = ["Forest", "Line", "Mark", "Scale", "Style", "holding", "line", "mark", "told"]
