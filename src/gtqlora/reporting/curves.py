"""Line plots: experts ablated, residual directions and load per layer, training over its steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

from gtqlora.reporting.figures import (
    BLUE,
    GREY,
    MAX_POINTS,
    ORANGE,
    PURPLE,
    Plot,
    Series,
    Spec,
    Style,
    estimates,
    level_line,
    line_plot,
    rounded,
    thinned,
)
from gtqlora.reporting.tables import ablation_curves
from gtqlora.reporting.words import KINDS
from gtqlora.results.ablation import AblationStudy
from gtqlora.results.diagnosis import Depth, LayerHealth
from gtqlora.results.directions import LayerDirections
from gtqlora.results.experts import Curve
from gtqlora.results.metrics import LOGITS_BY_GATES, LOGITS_BY_LORA, Metrics
from gtqlora.stats import Interval

_SHARE = {"tickformat": ".0%", "range": [-0.03, 1.05]}
_AUROC = {"tickformat": ".1f", "range": [0.25, 1.03]}
_UP = {"rangemode": "tozero"}
_KIND_STYLE = {
    "lookalike": Style(colour="var(--kind-lookalike)"),
    "harmful": Style(colour="var(--kind-harmful)", dash="dash", symbol="diamond"),
    "benign": Style(colour="var(--kind-benign)", dash="dot", symbol="triangle-up"),
    "instructed": Style(colour="var(--kind-instructed)", dash="dash", symbol="square-open"),
}


# --- experts ablated


def _counts(title: str, found: Iterable[int]) -> Spec:
    """Return an axis of numbers of experts, evenly spaced though they double."""
    return {"title": title, "type": "category", "categoryarray": [str(m) for m in sorted(set(found))]}


def effect_plots(kind: str, curves: Sequence[Curve]) -> list[Plot]:
    """Draw the refusal of one kind of flagged prompts, and its log-odds, against the number of experts ablated."""
    axis = _counts("experts ablated", (point.ablated for curve in curves for point in curve.points))
    # controls are grey, whatever their number; the orders are told apart by colour and dash
    orders = [curve for curve in curves if not curve.control]
    styles = dict(zip((curve.name for curve in orders), (BLUE, ORANGE, PURPLE), strict=False))
    mark = f"-{kind}" if kind else ""

    def plot(what: str, name: str, y: Spec) -> Plot:
        series = [
            estimates(
                curve.name,
                styles.get(curve.name, GREY),
                [str(point.ablated) for point in curve.points],
                list(map(attrgetter(what), curve.points)),
            )
            for curve in curves
        ]
        id = f"effect-{what.replace('_', '-')}{mark}"
        return line_plot(id, name, series, x=axis, y=y, what="experts ablated")

    plots = [plot("refusal", "Refused", _SHARE)]
    if any(point.log_odds for curve in curves for point in curve.points):
        plots.append(plot("log_odds", "Log-odds of refusing", _UP))
    return plots


_ABLATION_STYLES = (GREY, BLUE, ORANGE)


def ablation_plots(study: AblationStudy) -> list[Plot]:
    """Draw the refusal of harmful prompts against the number of experts ablated: the ranked ones, and random ones."""
    curves = list(zip(ablation_curves(study), _ABLATION_STYLES, strict=True))
    axis = _counts("experts ablated", (point.ablated for (_, points), _ in curves for point in points))
    return [
        line_plot(
            f"ablation-{which}",
            title,
            [
                estimates(name, style, [str(p.ablated) for p in points], list(map(attrgetter(which), points)))
                for (name, points), style in curves
            ],
            x=axis,
            y=_SHARE,
            what="experts ablated",
        )
        for which, title in (("targeted", "Refused, likeliest experts first"), ("random", "Refused, random experts"))
    ]


# --- per layer


def depth_plots(kind: str, depth: Depth) -> list[Plot]:
    """Draw what goes with the twin's routing in the layers up to one, and in those after it, over the layers."""
    ends = {None: "none<br>(as it is)", depth.points[-1].last: f"{depth.points[-1].last}<br>(all of them)"}
    x = [ends.get(point.last, str(point.last)) for point in depth.points]
    axis: Spec = {"title": "MoE layers up to", "type": "category", "categoryarray": x}

    def plot(what: str, title: str) -> Plot:
        parts = (("in the layers up to it", BLUE, "up_to"), ("in the layers after it only", ORANGE, "after"))
        series = [
            estimates(n, style, x, [getattr(getattr(p, part), what) for p in depth.points]) for n, style, part in parts
        ]
        return line_plot(f"depth-{what.replace('_', '-')}-{kind}", title, series, x=axis, y=_SHARE, what="MoE layers")

    plots = [plot("log_odds", "Part of the gap in log-odds"), plot("as_twin", "Does as the twin")]
    return [found for found in plots if found.spec["data"]]


_NAMED = (
    ("false_refusal", "true_refusal", BLUE),
    ("false_refusal", "intent", ORANGE),
    ("true_refusal", "intent", PURPLE),
)


def direction_plots(rows: Sequence[LayerDirections]) -> list[Plot]:
    """Draw separability, variance explained, what erasing leaves, angles and lengths, over the layers."""
    layers = [row.layer for row in rows]
    components, erasures = [row.components for row in rows], [row.erasure for row in rows]

    def line(name: str, style: Style, found: Iterable[Interval | None]) -> Series:
        return estimates(name, style, layers, list(found))

    found: list[tuple[str, str, list[Series], Spec, Spec]] = [
        (
            "separability",
            "How well each direction separates (AUROC)",
            [
                line("difference of means", BLUE, (row.separation for row in rows)),
                line("first component", ORANGE, (c and c.separation for c in components)),
            ],
            _AUROC,
            level_line(0.5, "chance"),
        ),
        (
            "erasure",
            "What a probe finds after erasing (AUROC)",
            [
                line("nothing erased", BLUE, (e and e.before for e in erasures)),
                line("difference of means removed", ORANGE, (e and e.mean_removed for e in erasures)),
                line("LEACE", PURPLE, (e and e.leace for e in erasures)),
            ],
            _AUROC,
            level_line(0.5, "chance"),
        ),
        (
            "explained",
            "Share of the differences explained",
            [
                line("difference of means", BLUE, (c and c.share_mean for c in components)),
                line("first component", ORANGE, (c.shares[0] if c and c.shares else None for c in components)),
            ],
            _SHARE,
            {},
        ),
        ("cosines", "Cosine between directions", [*_cosines(layers, rows)], {"tickformat": ".1f"}, {}),
        (
            "lengths",
            "Length of the difference",
            [Series(name="refusal", style=BLUE, x=layers, y=[rounded(row.norm) for row in rows])],
            _UP,
            {},
        ),
    ]
    plots = [
        line_plot(id, title, lines, x=_layers(rows, "after layer (0: embedding)"), y=y, what="layers", **more)
        for id, title, lines, y, more in found
    ]
    # a drawing without a line is left out: nothing was measured there
    return [plot for plot in plots if plot.spec["data"]]


def _cosines(layers: Sequence[int], rows: Sequence[LayerDirections]) -> Iterable[Series]:
    for first, second, style in _NAMED:
        found = [next((c.value for c in row.cosines if {c.first, c.second} == {first, second}), None) for row in rows]
        yield estimates(f"{first} – {second}".replace("_", " "), style, layers, found)
    values = [rounded(row.components.cosine) if row.components else None for row in rows]
    yield Series(name="difference of means – first component", style=GREY, x=layers, y=values)


def _layers(rows: Sequence[object], title: str) -> Spec:
    return {"title": title, **({"dtick": 1} if len(rows) <= 16 else {})}


_LOAD = (
    ("cv", "Unevenness of the load (CV)"),
    ("max_vio", "Peak load over the mean (MaxVio)"),
    ("entropy", "Entropy of the load (1 is even)"),
    ("dead", "Experts never chosen"),
)


def load_plots(health: Sequence[LayerHealth]) -> list[Plot]:
    """Draw the balance of the original router's load over the layers."""
    return [
        line_plot(
            f"layer-{key.replace('_', '-')}",
            title,
            [Series(name=title, style=BLUE, x=[h.layer for h in health], y=[rounded(getattr(h, key)) for h in health])],
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
        "logits",
        "Change of router logits (rms)",
        [(LOGITS_BY_GATES, "by the gates", BLUE), (LOGITS_BY_LORA, "by LoRA", GREY)],
        _UP,
    ),
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
    metrics: Sequence[Metrics], wanted: Iterable[tuple[str, str, list[tuple[str, str, Style]], Spec]]
) -> list[Plot]:
    """Draw lines over the steps, of those keys that were logged."""
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


def learning_plots(metrics: Sequence[Metrics]) -> list[Plot]:
    """Draw loss, reward margin and anchor over the steps."""
    return _logged(metrics, _LEARNING)


def health_plots(metrics: Sequence[Metrics]) -> list[Plot]:
    """Draw the balance of the router's load, and how far the routing of each kind of prompt left the original's."""
    return _logged(metrics, _HEALTH)


__all__ = [
    "ablation_plots",
    "depth_plots",
    "direction_plots",
    "effect_plots",
    "health_plots",
    "learning_plots",
    "load_plots",
]
