"""Plotly figures as plain specs. Colours are `var(--name)` of the style sheet; the page's script fills them in."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gtqlora.reporting.words import known
from gtqlora.results.metrics import Metrics
from gtqlora.stats import Interval

Spec = dict[str, Any]
"""A part of a plotly figure: its keys are plotly's own, and what they hold is written as JSON."""
Place = int | float | str
"""Where a value stands along the horizontal axis: a number, or a category's name."""
# more points than pixels only make the page larger
MAX_POINTS = 400
_BORDER = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
_SIGN = {"circle": "●", "diamond": "◆", "square-open": "□", "triangle-up": "▲", "circle-open": "○"}


@dataclass(frozen=True, kw_only=True)
class Style:
    """Colour, dash and symbol of a line; two lines of one plot differ in more than colour."""

    colour: str
    dash: str = "solid"
    symbol: str = "circle"

    @property
    def border(self) -> str:
        """Return the dash in the style sheet's words."""
        return _BORDER[self.dash]

    @property
    def sign(self) -> str:
        """Return the symbol as a character."""
        return _SIGN[self.symbol]


BLUE = Style(colour="var(--accent)")
ORANGE = Style(colour="var(--second)", dash="dash", symbol="diamond")
PURPLE = Style(colour="var(--third)", dash="dot", symbol="triangle-up")
GREY = Style(colour="var(--ink-soft)", dash="dot", symbol="square-open")


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: places, values, and the intervals around them where there are any; None is a gap."""

    name: str
    style: Style
    x: Sequence[Place]
    y: Sequence[float | None]
    bounds: Sequence[tuple[float, float] | None] | None = None


@dataclass(frozen=True)
class Plot:
    """One drawing: its spec, what a screen reader hears, and its height in pixels.

    Attributes:
        title: small heading over the drawing, where several stand in one figure.
        key: name and style of each line, where there are several.
    """

    id: str
    label: str
    spec: Spec
    height: int = 240
    title: str = ""
    key: tuple[tuple[str, Style], ...] = ()


def plain(text: object) -> str:
    """Return a text in which plotly finds no tags: a path or a name must stay what it is."""
    return html.escape(str(text), quote=False)


def rounded(value: float | None) -> float | None:
    """Return four significant digits; None for what is not known."""
    return float(f"{value:.4g}") if known(value) else None


def thinned(rows: Sequence[Metrics], most: int) -> list[Metrics]:
    """Return at most so many rows, evenly, the last one among them."""
    if len(rows) <= most:
        return list(rows)
    # unique, as rounding may name a row twice
    kept = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
    return [rows[i] for i in kept]


def estimates(name: str, style: Style, x: Sequence[Place], found: Sequence[Interval | None]) -> Series:
    """Return a line through intervals."""
    return Series(
        name=name,
        style=style,
        x=x,
        y=[rounded(interval.value) if interval else None for interval in found],
        bounds=[(interval.low, interval.high) if interval else None for interval in found],
    )


def layout_of(**extra: object) -> Spec:
    """Return the layout that all drawings share, with what one of them adds."""
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--ink-soft)"},
        "margin": {"l": 52, "r": 12, "t": 12, "b": 44},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        # a page is scrolled by dragging; a drawing must not catch that
        "dragmode": False,
        "showlegend": False,
        **extra,
    }


def axis_of(title: str = "", **extra: object) -> Spec:
    """Return an axis in the style that all drawings share."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        # no zooming: all of it fits
        "fixedrange": True,
        "automargin": True,
        **extra,
    }


def line_plot(id: str, title: str, series: Sequence[Series], *, x: Spec, y: Spec, what: str, **layout: object) -> Plot:
    """Return lines with bands over `what`; empty lines are left out."""
    drawn = [line for line in series if any(value is not None for value in line.y)]
    # bands first: what is drawn later lies on top
    data = [*(_band(line) for line in drawn if line.bounds), *(_line(line, y.get("tickformat", "")) for line in drawn)]
    spec = {"data": data, "layout": layout_of(xaxis=axis_of(**x), yaxis=axis_of(**y), **layout)}
    key = tuple((line.name, line.style) for line in drawn) if len(drawn) > 1 else ()
    return Plot(id, f"{title} over {what}", spec, title=title, key=key)


def _line(line: Series, form: str) -> Spec:
    value = "%{y:" + (".1%" if form.endswith("%") else ".3g") + "}"
    ends = value.replace("y", "customdata[0]") + " to " + value.replace("y", "customdata[1]")
    return {
        "type": "scatter",
        # markers would merge into a thick line
        "mode": "lines+markers" if len(line.x) <= 100 else "lines",
        "name": plain(line.name),
        "x": list(line.x),
        "y": list(line.y),
        "customdata": [[rounded(end) for end in ends] if ends else [None, None] for ends in line.bounds or ()],
        "line": {"color": line.style.colour, "dash": line.style.dash, "width": 2},
        "marker": {"size": 7, "symbol": line.style.symbol},
        "hovertemplate": f"%{{x}}: {value}"
        + (f" ({ends})" if line.bounds else "")
        + f"<extra>{plain(line.name)}</extra>",
    }


def _band(line: Series) -> Spec:
    held = [(x, *ends) for x, ends in zip(line.x, line.bounds or (), strict=True) if ends]
    return {
        "type": "scatter",
        "mode": "lines",
        # there along the upper ends and back along the lower ones
        "x": [x for x, _, _ in held] + [x for x, _, _ in reversed(held)],
        "y": [rounded(high) for _, _, high in held] + [rounded(low) for _, low, _ in reversed(held)],
        "fill": "toself",
        "fillcolor": line.style.colour,
        "line": {"width": 0},
        "opacity": 0.16,
        "hoverinfo": "skip",
    }


def level_line(at: float, text: str) -> Spec:
    """Return the layout of a dotted line across the drawing, with its name."""
    return {
        "shapes": [
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": at, "y1": at,
                "line": {"color": "var(--ink-soft)", "dash": "dot", "width": 1},
            }
        ],
        "annotations": [
            {
                "text": text, "xref": "paper", "x": 1, "y": at, "xanchor": "right", "yanchor": "top",
                "showarrow": False,
            }
        ],
    }  # fmt: skip


def errors_of(intervals: Sequence[Interval]) -> Spec:
    """Return error bars."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(i.high - i.value, 0.0) for i in intervals],
        "arrayminus": [max(i.value - i.low, 0.0) for i in intervals],
        "thickness": 1.2,
        "width": 3,
        "color": "var(--ink-soft)",
    }
