"""Layers by experts: every measure of the association, packed once; the page's script draws the one that is chosen."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from gtqlora.reporting.figures import Plot, Spec, axis_of, layout_of, rounded
from gtqlora.reporting.words import number, percent, points
from gtqlora.results.association import Association, of_kind
from gtqlora.results.diagnosis import FLAGGED_KINDS, Diagnosis
from gtqlora.results.experts import ExpertEffect, ExpertId

EFFECT = "effect"
MEASURES = tuple(f.name for f in fields(Association) if f.name not in ("kind", "layer", "expert"))
"""What is known of every expert; `EFFECT` only of those that were ablated one at a time."""
_APART = {kind: f"difference_{kind}" for kind in FLAGGED_KINDS}
"""The difference on the flagged prompts of each kind."""


def packed(text: str) -> str:
    """Return a text as base64 of gzip, which the browser unpacks: a large model's numbers, plotly's own script."""
    # mtime=0: the same text gives the same bytes, whenever it is packed
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@dataclass(frozen=True, kw_only=True)
class View:
    """One measure that the heat map can show.

    Attributes:
        limit: the end of its colour scale; the other end is its negative (`ramp` "heat") or 0 (`ramp` "share").
        low, high: both ends in words.
    """

    field: str
    name: str
    ramp: str
    limit: float
    low: str
    high: str


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The drawing, what it can show, and the numbers of all cells, packed; below `width` pixels it scrolls."""

    plot: Plot
    width: int
    views: list[View]
    grid: str


def heat_map(diagnosis: Diagnosis, association: Sequence[Association], twin: str) -> HeatMap:
    """Return the map of one row per layer and expert; `twin` is what flagged prompts are compared with."""
    layers = sorted({row.layer for row in association})
    experts = sorted({row.expert for row in association})
    values = _values(association, diagnosis.experts, layers, experts)
    views = [view for view in _views(values, twin) if view.limit]
    grid = {
        "layers": layers,
        "experts": experts,
        "fields": values,
        "views": [asdict(view) for view in views],
        "twin": twin,
    }
    # two pixels a cell at least, or single experts could not be seen
    width = 0 if len(experts) <= 32 else 90 + 2 * len(experts)
    plot = _plot(diagnosis, layers, experts)
    return HeatMap(plot=plot, width=width, views=views, grid=packed(json.dumps(grid)))


def _values(
    association: Sequence[Association], tested: Sequence[ExpertEffect], layers: Sequence[int], experts: Sequence[int]
) -> dict[str, list[float | None]]:
    """Return values_LE of each measure, layer after layer."""
    places = [(layer, expert) for layer in layers for expert in experts]
    # on prompts of two kinds, the larger effect
    effects: dict[tuple[int, int], float] = {}
    for t in tested:
        effects[t.layer, t.expert] = max(effects.get((t.layer, t.expert), 0.0), t.ablate.value, key=abs)

    def column(kind: str, name: str) -> list[float | None]:
        rows = {(row.layer, row.expert): row for row in of_kind(association, kind)}
        return [rounded(getattr(rows.get(place), name, None)) for place in places]

    return {
        **{name: column("", name) for name in MEASURES},
        **{name: column(kind, "difference") for kind, name in _APART.items()},
        EFFECT: [rounded(effects.get(place)) for place in places],
    }


def _views(values: dict[str, list[float | None]], twin: str) -> list[View]:
    def view(field: str, name: str, form: Callable[[float], str], low: str, high: str) -> View:
        limit = max((abs(value) for value in values[field] if value is not None), default=0.0)
        ends = {"low": low.format(form(-limit)), "high": high.format(form(limit))}
        return View(field=field, name=name, ramp="heat", limit=limit, **ends)

    ends = ("less often: {}", "more often on flagged: {} points")
    return [
        view("difference", f"difference to {twin}", points, *ends),
        *(view(name, f"the same, {kind}", points, *ends) for kind, name in _APART.items()),
        view("gradient", "gradient", number, "against refusing: {}", "toward it: {}"),
        View(field="stability", name="stability", ramp="share", limit=1.0, low=percent(0), high=percent(1)),
        view(EFFECT, "effect when ablated", percent, "{} of the gap", "{} of the gap"),
    ]  # fmt: skip


def _categories(title: str, names: Sequence[int], nticks: int) -> Spec:
    return axis_of(
        title,
        type="category",
        showgrid=False,
        nticks=nticks,
        tickangle=0,
        tickfont={"size": 11},
        categoryorder="array",
        categoryarray=[str(name) for name in names],
        range=[-0.5, len(names) - 0.5],
    )


def _marks(experts: Sequence[ExpertId], symbol: str, size: int) -> Spec:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [str(e.expert) for e in experts],
        "y": [str(e.layer) for e in experts],
        "marker": {
            "symbol": symbol,
            "size": size,
            "color": "var(--mark)",
            "line": {"width": 1, "color": "var(--card)"},
        },
        "hoverinfo": "skip",
    }


def _plot(diagnosis: Diagnosis, layers: Sequence[int], experts: Sequence[int]) -> Plot:
    top, causal = diagnosis.top_experts, diagnosis.causal_experts
    # the cells themselves are filled in by the page's script, from the packed numbers
    heat = {
        "type": "heatmap",
        "x": [str(e) for e in experts],
        "y": [str(layer) for layer in layers],
        # gaps would be wider than the cells
        "xgap": 1 if len(experts) <= 128 else 0,
        "ygap": 1 if len(layers) <= 64 else 0,
        "showscale": False,
        "hoverongaps": False,
        "hoverinfo": "text",
    }
    layout = layout_of(
        xaxis=_categories("expert", experts, nticks=20),
        yaxis=_categories("MoE layer", layers, nticks=24),
        margin={"l": 52, "r": 4, "t": 4, "b": 40},
    )
    return Plot(
        "heat-map",
        f"Heat map of {len(layers)} layers by {len(experts)} experts; {len(top)} associated experts are starred, "
        f"{len(causal)} that carry the behaviour are ringed",
        {"data": [heat, _marks(top, "star", 9), _marks(causal, "circle-open", 17)], "layout": layout},
        height=54 + len(layers) * (34 if len(layers) <= 8 else 22 if len(layers) <= 24 else 12),
    )


__all__ = ["EFFECT", "HeatMap", "View", "heat_map", "packed"]
