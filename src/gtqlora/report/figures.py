"""Plotly figures as plain specs. Colours are `var(--name)` of the style sheet; the page's script fills them in."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gtqlora.report.artefacts import Json, Peer
from gtqlora.report.words import MANY, mode, returned, way

Spec = dict[str, Any]


@dataclass(frozen=True)
class Plot:
    """One drawing: its spec, what a screen reader hears, and its size in pixels.

    Attributes:
        title: small heading over the drawing, where several stand in one figure.
        key: name, colour and border style of each line, where there are several.
        min_width: below it the drawing scrolls in its own box.
    """

    id: str
    label: str
    spec: Spec
    height: int = 300
    min_width: int = 0
    title: str = ""
    key: tuple[tuple[str, str, str], ...] = ()


def plain(text: Any) -> str:
    """Plotly reads tags in its texts; a path or a name must stay what it is."""
    return html.escape(str(text), quote=False)


def packed(values: Any) -> Spec:
    """A numeric array as plotly's base64 of float32: a third of the digits' size, which large models need."""
    array = np.ascontiguousarray(values, dtype="<f4")
    spec = {"dtype": "f4", "bdata": base64.b64encode(array.tobytes()).decode()}
    return spec if array.ndim == 1 else {**spec, "shape": ", ".join(map(str, array.shape))}


def layout_of(**extra: Any) -> Spec:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--ink-soft)"},
        "margin": {"l": 52, "r": 12, "t": 12, "b": 44},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "dragmode": False,
        "showlegend": False,
        **extra,
    }


def axis_of(title: str = "", **extra: Any) -> Spec:
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12}},
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "fixedrange": True,
        "automargin": True,
        **extra,
    }


def _categories(title: str, names: Sequence[str], nticks: int) -> Spec:
    return axis_of(
        title,
        type="category",
        showgrid=False,
        nticks=nticks,
        tickangle=0,
        tickfont={"size": 11},
        categoryorder="array",
        categoryarray=list(names),
        range=[-0.5, len(names) - 0.5],
    )


def largest_difference(association: Sequence[Json]) -> float:
    """The end of the heat map's scale."""
    return max(1e-3, *(abs(row["difference"]) for row in association))


def heat_map(association: Sequence[Json], top: Sequence[Json]) -> Plot:
    """Layers by experts: how much more often each expert is chosen on flagged prompts than on their twins."""
    layers = sorted({row["layer"] for row in association})
    experts = sorted({row["expert"] for row in association})
    place = {(row["layer"], row["expert"]): row for row in association}
    fields = ("rate_flagged", "rate_twin", "low", "high", "q")
    none = dict.fromkeys((*fields, "difference"), float("nan"))
    cells = [[place.get((layer, expert), none) for expert in experts] for layer in layers]
    difference = np.array([[cell["difference"] for cell in row] for row in cells])
    limit = largest_difference(association)
    x, y = [str(e) for e in experts], [str(layer) for layer in layers]
    heat = {
        "type": "heatmap",
        "x": x,
        "y": y,
        "z": packed(difference),
        "customdata": packed([[[cell[f] for f in fields] for cell in row] for row in cells]),
        "zmin": -limit,
        "zmax": limit,
        "colorscale": [[0, "var(--heat-low)"], [0.5, "var(--heat-mid)"], [1, "var(--heat-high)"]],
        "xgap": 1 if len(experts) <= 128 else 0,
        "ygap": 1 if len(layers) <= 64 else 0,
        "showscale": False,
        "hovertemplate": (
            "<b>layer %{y}, expert %{x}</b><br>difference %{z:+.1%}"
            " (%{customdata[2]:+.1%} to %{customdata[3]:+.1%})<br>flagged %{customdata[0]:.1%},"
            " twin %{customdata[1]:.1%}<br>q = %{customdata[4]:.2g}<extra></extra>"
        ),
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "x": [str(e["expert"]) for e in top],
        "y": [str(e["layer"]) for e in top],
        "marker": {"symbol": "star", "size": 11, "color": "var(--mark)", "line": {"width": 1, "color": "var(--card)"}},
        "hoverinfo": "skip",
    }
    layout = layout_of(
        xaxis=_categories("expert", x, nticks=20),
        yaxis=_categories("MoE layer", y, nticks=24),
        margin={"l": 52, "r": 4, "t": 4, "b": 40},
    )
    return Plot(
        "heat-map",
        f"Heat map of {len(layers)} layers by {len(experts)} experts; {len(top)} associated experts are starred",
        {"data": [heat, marks], "layout": layout},
        height=54 + len(layers) * (34 if len(layers) <= 8 else 22 if len(layers) <= 24 else 12),
        min_width=0 if len(experts) <= 32 else 90 + 2 * len(experts),
    )


def direction_plots(directions: Sequence[Json]) -> list[Plot]:
    """Separability of flagged from twin prompts by the residual direction of each layer, and its length."""
    layers = [d["layer"] for d in directions]
    found = [d["separation"] for d in directions]
    separation = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": layers,
        "y": [s["value"] for s in found],
        "error_y": _errors(found),
        "line": {"color": "var(--accent)", "width": 2},
        "marker": {"size": 8},
        "hovertemplate": "after layer %{x}: AUROC %{y:.3f}<extra></extra>",
    }
    chance = {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.5, "y1": 0.5,
        "line": {"color": "var(--line)", "dash": "dot", "width": 1.5},
    }  # fmt: skip
    note = {
        "text": "chance", "xref": "paper", "x": 1, "y": 0.5, "xanchor": "right", "yanchor": "bottom",
        "showarrow": False,
    }  # fmt: skip
    norm = {
        "type": "bar",
        "x": layers,
        "y": [d["norm"] for d in directions],
        "marker": {"color": "var(--accent-soft)"},
        "hovertemplate": "after layer %{x}: length %{y:.2f}<extra></extra>",
    }
    ticks: Spec = {"dtick": 1} if len(layers) <= 16 else {}
    low = min([0.4, *(s["low"] for s in found)])
    return [
        Plot(
            "separability",
            "AUROC per layer of the residual direction that tells flagged prompts from their twins",
            {
                "data": [separation],
                "layout": layout_of(
                    xaxis=axis_of("after layer (0 is the embedding)", **ticks),
                    yaxis=axis_of("", range=[low - 0.02, 1.04], tickformat=".1f"),
                    shapes=[chance],
                    annotations=[note],
                ),
            },
            height=260,
            title="How well it separates (AUROC)",
        ),
        Plot(
            "direction-norm",
            "Length per layer of the difference between flagged prompts and their twins",
            {
                "data": [norm],
                "layout": layout_of(
                    xaxis=axis_of("after layer (0 is the embedding)", **ticks), yaxis=axis_of(rangemode="tozero")
                ),
            },
            height=260,
            title="Length of the difference",
        ),
    ]


def _errors(intervals: Sequence[Json]) -> Spec:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(i["high"] - i["value"], 0.0) for i in intervals],
        "arrayminus": [max(i["value"] - i["low"], 0.0) for i in intervals],
        "thickness": 1.2,
        "width": 3,
        "color": "var(--ink-soft)",
    }


def trade_off(peers: Sequence[Peer]) -> Plot:
    """Each edit by its lookalike and harmful refusal; the aim is top left."""
    shares = [_share(peer) for peer in peers]
    order = sorted(range(len(peers)), key=lambda i: -shares[i])  # the larger below, so that each can be seen
    edits = _edits([peers[i] for i in order], [shares[i] for i in order])
    original = _original(peers[0])
    names = [*(peers[i].label for i in order), "before"]
    places = zip([*edits["x"], *original["x"]], [*edits["y"], *original["y"]], names, strict=True)
    layout = layout_of(
        xaxis=axis_of("lookalike prompts refused", range=[-0.08, 1.1], tickformat=".0%"),
        yaxis=axis_of("harmful prompts refused", range=[-0.08, 1.12], tickformat=".0%"),
        annotations=_names(list(places)),
    )
    return Plot(
        "trade-off",
        f"Scatter of {len(peers)} edits: lookalike refusal against harmful refusal; the aim is the top left corner",
        {"data": [edits, original], "layout": layout},
        height=400,
    )


def _share(peer: Peer) -> float:
    """Share of the effect that goes through the routing; 0 where too few refusals were repaired to say."""
    found = peer.verdict["mediation"]
    return found["value"] if found["n"] >= MANY else 0.0


def _edits(peers: Sequence[Peer], shares: Sequence[float]) -> Spec:
    x = [peer.verdict["table"]["lookalike"]["refusal_after"] for peer in peers]
    y = [peer.verdict["table"]["harmful"]["refusal_after"] for peer in peers]
    ways = [peer.verdict["mediation"] for peer in peers]
    return {
        "type": "scatter",
        "mode": "markers",
        "cliponaxis": False,
        "x": [interval["value"] for interval in x],
        "y": [interval["value"] for interval in y],
        "error_x": _errors(x),
        "error_y": _errors(y),
        "marker": {
            "size": [12 + 18 * share for share in shares],
            "color": list(shares),
            "cmin": 0,
            "cmax": 1,
            "colorscale": [[0, "var(--share-low)"], [1, "var(--share-high)"]],
            "opacity": 0.9,
            "line": {"width": 1.5, "color": "var(--card)"},
        },
        "text": [plain(f"{peer.label}: {mode(peer.info)}") for peer in peers],
        "customdata": [plain(f"{returned(found)} return ({way(found)})") for found in ways],
        "hovertemplate": (
            "<b>%{text}</b><br>lookalike refused %{x:.1%}<br>harmful refused %{y:.1%}<br>%{customdata}<extra></extra>"
        ),
    }


def _original(peer: Peer) -> Spec:
    before = peer.verdict["table"]
    return {
        "type": "scatter",
        "mode": "markers",
        "cliponaxis": False,
        "x": [before["lookalike"]["refusal_before"]["value"]],
        "y": [before["harmful"]["refusal_before"]["value"]],
        "marker": {"symbol": "x-thin-open", "size": 12, "color": "var(--ink-soft)", "line": {"width": 2.5}},
        "hovertemplate": (
            "<b>before the edit</b><br>lookalike refused %{x:.1%}<br>harmful refused %{y:.1%}<extra></extra>"
        ),
    }


def _names(points: Sequence[tuple[float, float, str]]) -> list[Spec]:
    """One label for all points that lie on one another, toward the middle of the plot."""
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, name in points:
        near = next((g for g in groups if abs(g[0] - x) < 0.06 and abs(g[1] - y) < 0.06), None)
        if near:
            near[2].append(name)
        else:
            groups.append((x, y, [name]))
    return [
        {
            "x": x,
            "y": y,
            "text": "<br>".join(plain(name) for name in names),
            "ax": 34 if x < 0.5 else 0,
            "ay": 20 + 12 * len(names) if y > 0.5 else -14 - 12 * len(names),
            "xanchor": "left" if x < 0.5 else "right",
            "align": "left" if x < 0.5 else "right",
            "arrowcolor": "var(--ink-soft)",
            "arrowwidth": 1,
            "arrowhead": 0,
            "standoff": 8,
            "font": {"color": "var(--ink)"},
        }
        for x, y, names in groups
    ]


__all__ = ["Plot", "axis_of", "direction_plots", "heat_map", "largest_difference", "layout_of", "plain", "trade_off"]
