"""Line plots: experts ablated, residual directions and load per layer, training over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gtqlora.reporting.artefacts import Json
from gtqlora.reporting.figures import (
    BLUE,
    GREY,
    MAX_POINTS,
    ORANGE,
    PURPLE,
    Plot,
    Series,
    Style,
    estimates,
    level_line,
    line_plot,
    rounded,
    thinned,
)
from gtqlora.reporting.words import KINDS

_SHARE = {"tickformat": ".0%", "range": [-0.03, 1.05]}
_AUROC = {"tickformat": ".1f", "range": [0.25, 1.03]}
_UP = {"rangemode": "tozero"}
_KIND_STYLE = {
    "lookalike": Style(colour="var(--kind-lookalike)"),
    "harmful": Style(colour="var(--kind-harmful)", dash="dash", symbol="diamond"),
    "benign": Style(colour="var(--kind-benign)", dash="dot", symbol="triangle-up"),
}


# --- experts ablated


def _counts(title: str, found: Iterable[int]) -> Json:
    """An axis of numbers of experts, evenly spaced though they double."""
    return {"title": title, "type": "category", "categoryarray": [str(m) for m in sorted(set(found))]}


def effect_plots(curves: Sequence[Json]) -> list[Plot]:
    """Refusal of flagged prompts, and its log-odds, against the number of experts ablated, in each order."""
    orders = [curve for curve in curves if not curve["control"]]
    styles = dict(zip((curve["name"] for curve in orders), (BLUE, ORANGE, PURPLE), strict=False))
    axis = _counts("experts ablated", (point["ablated"] for curve in curves for point in curve["points"]))

    def series(what: str) -> list[Series]:
        return [
            estimates(
                curve["name"],
                styles.get(curve["name"], GREY),
                [str(point["ablated"]) for point in curve["points"]],
                [point[what] for point in curve["points"]],
            )
            for curve in curves
        ]

    plots = [line_plot("effect-refusal", "Refused", series("refusal"), x=axis, y=_SHARE, what="experts ablated")]
    if any(point["log_odds"] for curve in curves for point in curve["points"]):
        plots.append(
            line_plot(
                "effect-log-odds", "Log-odds of refusing", series("log_odds"), x=axis, y=_UP, what="experts ablated"
            )
        )
    return plots


SILENCED = (
    ("before", "before the edit", GREY),
    ("after", "after, the same experts", BLUE),
    ("after_reranked", "after, ranked anew", ORANGE),
)
"""Key in the verdict, name and style of each curve."""


def ablation_plots(ablation: Json) -> list[Plot]:
    """Refusal of harmful prompts against the number of experts ablated: the ranked ones, and random ones."""
    curves = [(ablation[key], name, style) for key, name, style in SILENCED if ablation.get(key)]
    axis = _counts("experts ablated", (point["ablated"] for points, _, _ in curves for point in points))
    return [
        line_plot(
            f"ablation-{which}",
            title,
            [
                estimates(name, style, [str(p["ablated"]) for p in points], [p[which] for p in points])
                for points, name, style in curves
            ],
            x=axis,
            y=_SHARE,
            what="experts ablated",
        )
        for which, title in (("targeted", "Refused, likeliest experts first"), ("random", "Refused, random experts"))
    ]


# --- per layer

_NAMED = (
    ("false_refusal", "true_refusal", BLUE),
    ("false_refusal", "intent", ORANGE),
    ("true_refusal", "intent", PURPLE),
)


def _of(rows: Sequence[Json], *path: str) -> list[Any]:
    """What lies at a path of keys in each row; None where it ends early."""
    found: list[Any] = list(rows)
    for key in path:
        found = [row[key] if row else None for row in found]
    return found


def direction_plots(rows: Sequence[Json]) -> list[Plot]:
    """Separability, variance explained, what erasing leaves, angles and lengths, over the layers."""
    layers = [row["layer"] for row in rows]

    def at(name: str, style: Style, *path: str) -> Series:
        return estimates(name, style, layers, _of(rows, *path))

    first = [shares[0] if shares else None for shares in _of(rows, "components", "shares")]
    found: list[tuple[str, str, list[Series], Json, Json]] = [
        (
            "separability",
            "How well each direction separates (AUROC)",
            [
                at("difference of means", BLUE, "separation"),
                at("first component", ORANGE, "components", "separation"),
            ],
            _AUROC,
            level_line(0.5, "chance"),
        ),
        (
            "erasure",
            "What a probe finds after erasing (AUROC)",
            [
                at("nothing erased", BLUE, "erasure", "before"),
                at("difference of means removed", ORANGE, "erasure", "mean_removed"),
                at("LEACE", PURPLE, "erasure", "leace"),
            ],
            _AUROC,
            level_line(0.5, "chance"),
        ),
        (
            "explained",
            "Share of the differences explained",
            [
                at("difference of means", BLUE, "components", "share_mean"),
                estimates("first component", ORANGE, layers, first),
            ],
            _SHARE,
            {},
        ),
        ("cosines", "Cosine between directions", [*_cosines(layers, rows)], {"tickformat": ".1f"}, {}),
        (
            "lengths",
            "Length of the difference",
            [Series(name="refusal", style=BLUE, x=layers, y=[rounded(n) for n in _of(rows, "norm")])],
            _UP,
            {},
        ),
    ]
    plots = [
        line_plot(id, title, lines, x=_layers(rows, "after layer (0: embedding)"), y=y, what="layers", **more)
        for id, title, lines, y, more in found
    ]
    return [plot for plot in plots if plot.spec["data"]]


def _cosines(layers: Sequence[int], rows: Sequence[Json]) -> Iterable[Series]:
    for first, second, style in _NAMED:
        found = [
            next((c["value"] for c in row["cosines"] if {c["first"], c["second"]} == {first, second}), None)
            for row in rows
        ]
        yield estimates(f"{first} – {second}".replace("_", " "), style, layers, found)
    values = [rounded(value) for value in _of(rows, "components", "cosine")]
    yield Series(name="difference of means – first component", style=GREY, x=layers, y=values)


def _layers(rows: Sequence[Json], title: str) -> Json:
    return {"title": title, **({"dtick": 1} if len(rows) <= 16 else {})}


_LOAD = (
    ("cv", "Unevenness of the load (CV)"),
    ("max_vio", "Peak load over the mean (MaxVio)"),
    ("entropy", "Entropy of the load (1 is even)"),
    ("dead", "Experts never chosen"),
)


def load_plots(health: Sequence[Json]) -> list[Plot]:
    """Balance of the original router's load over the layers."""
    return [
        line_plot(
            f"layer-{key.replace('_', '-')}",
            title,
            [Series(name=title, style=BLUE, x=[h["layer"] for h in health], y=[rounded(h[key]) for h in health])],
            x=_layers(health, "MoE layer"),
            y=_UP,
            what="layers",
        )
        for key, title in _LOAD
    ]


# --- training

_LEARNING = (
    ("loss", "Loss", [("loss", "loss", BLUE)], _UP),
    ("margin", "Reward margin", [("rewards/margins", "margin", BLUE)], {}),
    ("anchor", "Routing anchor", [("loss/anchor", "anchor", BLUE)], _UP),
)


def _by_kind(what: str) -> list[tuple[str, str, Style]]:
    return [(f"health/{what}_{kind}", kind, _KIND_STYLE[kind]) for kind in KINDS]


_HEALTH = (
    (
        "load-cv",
        _LOAD[0][1],
        [("health/load_cv", "edited", BLUE), ("health/load_cv_original", "original", GREY)],
        _UP,
    ),
    ("max-vio", _LOAD[1][1], [("health/max_vio", "MaxVio", BLUE)], _UP),
    ("load-entropy", _LOAD[2][1], [("health/load_entropy", "entropy", BLUE)], {}),
    ("overlap", "Experts shared with the original", _by_kind("overlap"), _SHARE),
    ("kl", "Routing divergence (KL, nats)", _by_kind("kl"), _UP),
    ("dead", _LOAD[3][1], [("health/dead_experts", "dead", BLUE)], _UP),
)


def _logged(
    metrics: Sequence[Json], wanted: Iterable[tuple[str, str, list[tuple[str, str, Style]], Json]]
) -> list[Plot]:
    """Lines over the steps, of those keys that were logged."""
    rows = thinned(metrics, MAX_POINTS)
    plots = []
    for id, title, lines, axis in wanted:
        series = [
            Series(
                name=name,
                style=style,
                x=[row["step"] for row in rows if key in row],
                y=[rounded(row[key]) for row in rows if key in row],
            )
            for key, name, style in lines
        ]
        plots.append(line_plot(id, title, series, x={"title": "step"}, y=axis, what="the training steps"))
    return [plot for plot in plots if plot.spec["data"]]


def learning_plots(metrics: Sequence[Json]) -> list[Plot]:
    """Loss, reward margin and anchor over the steps."""
    return _logged(metrics, _LEARNING)


def health_plots(metrics: Sequence[Json]) -> list[Plot]:
    """Balance of the router's load, and how far the routing of each kind of prompt left the original's."""
    return _logged(metrics, _HEALTH)


__all__ = [
    "SILENCED",
    "ablation_plots",
    "direction_plots",
    "effect_plots",
    "health_plots",
    "learning_plots",
    "load_plots",
]
