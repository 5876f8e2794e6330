"""What was logged while training, as small line plots over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gtqlora.report.artefacts import Json
from gtqlora.report.figures import Plot, axis_of, layout_of
from gtqlora.report.words import KINDS

MAX_POINTS = 400
_BORDER = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
_KIND_STYLE = {
    "lookalike": ("var(--kind-lookalike)", "solid"),
    "harmful": ("var(--kind-harmful)", "dash"),
    "benign": ("var(--kind-benign)", "dot"),
}


def thinned(rows: Sequence[Json], most: int) -> list[Json]:
    """At most so many rows, evenly, the last one among them."""
    if len(rows) <= most:
        return list(rows)
    kept = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
    return [rows[i] for i in kept]


def _curve(
    id: str, title: str, metrics: Sequence[Json], lines: Sequence[tuple[str, str, str, str]], **y: Any
) -> Plot | None:
    """Lines of (key, name, colour, dash) over the steps, of those keys that were logged."""
    rows = thinned(metrics, MAX_POINTS)
    drawn = [line for line in lines if any(line[0] in row for row in rows)]
    if not drawn:
        return None
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(rows) <= 40 else "lines",
            "name": name,
            "x": [row["step"] for row in rows if key in row],
            "y": [float(f"{row[key]:.5g}") for row in rows if key in row],
            "line": {"color": colour, "dash": dash, "width": 2},
            "marker": {"size": 5},
            "hovertemplate": "step %{x}: %{y:.4g}" + f"<extra>{name}</extra>",
        }
        for key, name, colour, dash in drawn
    ]
    layout = layout_of(xaxis=axis_of("step"), yaxis=axis_of(**y), margin={"l": 46, "r": 10, "t": 8, "b": 40})
    key = tuple((name, colour, _BORDER[dash]) for _, name, colour, dash in drawn) if len(drawn) > 1 else ()
    label = f"{title} over the training steps"
    return Plot(id, label, {"data": data, "layout": layout}, height=220, title=title, key=key)


_EDITED, _ORIGINAL = ("var(--accent)", "solid"), ("var(--ink-soft)", "dot")
_LEARNING = (
    ("loss", "Loss", [("loss", "loss", *_EDITED)], {"rangemode": "tozero"}),
    ("margin", "Reward margin", [("rewards/margins", "margin", *_EDITED)], {}),
    ("anchor", "Routing anchor", [("loss/anchor", "anchor", *_EDITED)], {"rangemode": "tozero"}),
)


def _by_kind(what: str) -> list[tuple[str, str, str, str]]:
    return [(f"health/{what}_{kind}", kind, *_KIND_STYLE[kind]) for kind in KINDS]


_HEALTH = (
    (
        "load-cv",
        "Unevenness of the load (CV)",
        [("health/load_cv", "edited", *_EDITED), ("health/load_cv_original", "original", *_ORIGINAL)],
        {"rangemode": "tozero"},
    ),
    ("max-vio", "Peak load over the mean (MaxVio)", [("health/max_vio", "MaxVio", *_EDITED)], {"rangemode": "tozero"}),
    ("load-entropy", "Entropy of the load (1 is even)", [("health/load_entropy", "entropy", *_EDITED)], {}),
    ("overlap", "Experts shared with the original", _by_kind("overlap"), {"tickformat": ".0%", "range": [0, 1.05]}),
    ("kl", "Routing divergence (KL, nats)", _by_kind("kl"), {"rangemode": "tozero"}),
    ("dead", "Experts never chosen", [("health/dead_experts", "dead", *_EDITED)], {"rangemode": "tozero"}),
)


def learning_plots(metrics: Sequence[Json]) -> list[Plot]:
    """Loss, reward margin and anchor over the steps."""
    plots = [_curve(id, title, metrics, lines, **axis) for id, title, lines, axis in _LEARNING]
    return [plot for plot in plots if plot]


def health_plots(metrics: Sequence[Json]) -> list[Plot]:
    """Balance of the router's load, and how far the routing of each kind of prompt left the original's."""
    plots = [_curve(id, title, metrics, lines, **axis) for id, title, lines, axis in _HEALTH]
    return [plot for plot in plots if plot]


__all__ = ["MAX_POINTS", "health_plots", "learning_plots", "thinned"]
