"""The page: artefacts laid out as sections, rendered offline and with nothing that can be run but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from gtqlora.report import curves, figures, tables, words
from gtqlora.report.artefacts import Artefacts, Json, Peer
from gtqlora.report.figures import Plot
from gtqlora.report.tables import Table

_EXAMPLES, _EXAMPLE_LENGTH = 3, 400
_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Ramp:
    """A colour scale's two ends in words; `name` is its class in the style sheet."""

    name: str
    low: str
    high: str


@dataclass(frozen=True)
class Figure:
    """Drawings with their caption and the numbers behind them."""

    id: str
    title: str
    caption: str
    table: Table
    plots: list[Plot] = field(default_factory=list)
    ramp: Ramp | None = None


@dataclass(frozen=True)
class Mark:
    """A value with its interval as per cents of a track's width."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class FloorPicture:
    """The interval of the drop against the margin, on one track."""

    mark: Mark
    zero: float
    margin: float
    verdict: str
    symbol: str
    tone: str
    sentence: str
    scale: str


@dataclass(frozen=True)
class Example:
    """One held-out prompt whose refusal changed, with both answers."""

    kind: str
    pair_id: str
    change: str
    before: str
    after: str
    hidden: bool


def mark(interval: Json, low: float = 0.0, high: float = 1.0) -> Mark:
    def place(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    return Mark(place(interval["value"]), place(interval["low"]), place(interval["high"]))


def floor_picture(floor: Json) -> FloorPicture:
    drop, margin = floor["drop"], floor["margin"]
    low, high = min(drop["low"], -margin), max(drop["high"], margin)
    low, high = low - 0.12 * (high - low), high + 0.12 * (high - low)
    scale = {"value": 0.0, "low": 0.0, "high": margin}
    return FloorPicture(
        mark=mark(drop, low, high),
        zero=mark(scale, low, high).at,
        margin=mark(scale, low, high).high,
        verdict=floor["verdict"],
        symbol=words.FLOOR_SYMBOL.get(floor["verdict"], "?"),
        tone=words.FLOOR_TONE.get(floor["verdict"], "unsure"),
        sentence=floor["reason"],
        scale=f"Drop {words.points(drop['value'])} points (interval {words.span_points(drop)}), "
        f"margin {words.points(margin)} points, {words.count(drop['n'])} paired harmful prompts",
    )


def diagnosis_figures(artefacts: Artefacts) -> dict[str, Figure]:
    found, diagnosis = {}, artefacts.diagnosis or {}
    if artefacts.association:
        top = diagnosis["top_experts"]
        end = words.points(figures.largest_difference(artefacts.association))
        found["experts"] = Figure(
            "experts",
            "Which experts are chosen more on flagged prompts",
            "Selection rate on flagged prompts less that on their harmless twins. This is association only; the next "
            "figure tests the cause.",
            tables.associations(artefacts.association, top),
            [figures.heat_map(artefacts.association, top)],
            Ramp("heat", f"less on flagged (−{end} points)", f"more (+{end} points)"),
        )
    if diagnosis.get("interventions"):
        found["interventions"] = Figure(
            "interventions",
            "What changes refusal",
            "Share refused under each change to the routing, with its 95 % interval. Controls disturb as much, but "
            "not where the behaviour is suspected: if they move refusal too, the test shows nothing.",
            tables.interventions(diagnosis["interventions"]),
        )
    if diagnosis.get("directions"):
        found["directions"] = Figure(
            "directions",
            "How well a residual direction tells the two apart",
            "Flagged prompts against their twins along each layer's difference of means, judged on pairs that did not "
            "make it. That a direction separates does not say that it causes.",
            tables.directions(diagnosis["directions"]),
            figures.direction_plots(diagnosis["directions"]),
        )
    return found


def training_figures(metrics: Sequence[Json]) -> list[Figure]:
    learning, health = curves.learning_plots(metrics), curves.health_plots(metrics)
    found = []
    if learning:
        caption = "The margin is how much more than the original the edit prefers the chosen answer."
        found.append(Figure("learning", "Learning", caption, tables.learning(metrics), learning))
    if health:
        caption = (
            "On the batches that were logged. Overlap and divergence compare with the original's routing of the same "
            "tokens; lookalike is meant to move, harmful and benign are anchored."
        )
        found.append(Figure("health", "Router health", caption, tables.health(metrics), health))
    return found


def comparison(peers: Sequence[Peer]) -> Figure | None:
    if not peers:
        return None
    caption = (
        "Top left is the aim: lookalike prompts answered, harmful ones refused. Large and strong in colour: the "
        "repaired refusals return when the original routing is replayed, so the edit works through the routing."
    )
    plots = [figures.trade_off(peers)]
    ramp = Ramp("share", "0 % through the routing", "100 %")
    return Figure("trade-off-figure", "Refusal after each edit", caption, tables.side_by_side(peers), plots, ramp)


def examples(scores: Sequence[Json]) -> list[Example]:
    """A few changed answers. Never a harmful row's text: were the refusal lost, the answer could do harm."""
    found = []
    for kind in words.KINDS:
        changed = [s for s in scores if s["kind"] == kind and s["refused_before"] != s["refused_after"]]
        for s in changed[:_EXAMPLES]:
            change = "refused before, answered after" if s["refused_before"] else "answered before, refused after"
            hidden = kind == "harmful"
            before, after = ("" if hidden else _shortened(s[key]) for key in ("text_before", "text_after"))
            found.append(Example(kind, str(s["pair_id"]), change, before, after, hidden))
    return found


def _shortened(text: Any) -> str:
    text = str(text or "").strip() or "(nothing)"
    return text if len(text) <= _EXAMPLE_LENGTH else text[:_EXAMPLE_LENGTH] + " …"


def projection(info: Json | None) -> Table | None:
    details = (info or {}).get("details", {})
    return tables.candidates(details["candidates"], details.get("layer", -1)) if details.get("candidates") else None


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def render(artefacts: Artefacts) -> str:
    """One HTML text. Its policy forbids every request, and every script but the two it brings."""
    environment = Environment(
        loader=PackageLoader("gtqlora", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        percent=words.percent, span=words.span, points=words.points, number=words.number, q=words.q_value,
        count=words.count, span_points=words.span_points, capital=words.capital,
    )  # fmt: skip
    environment.globals.update(mark=mark, words=words)
    script = _source(environment, "report.js")
    plots = get_plotlyjs()
    text = environment.get_template(_TEMPLATE).render(
        a=artefacts,
        name=PurePath(artefacts.model).name or artefacts.path.resolve().name,
        headline=words.headline(artefacts),
        notices=words.notices(artefacts),
        style=_source(environment, "report.css"),
        script=script,
        plotly=plots,
        script_hashes=f"{_hash(plots)} {_hash(script)}",
        diagnosis=diagnosis_figures(artefacts),
        floor=floor_picture(artefacts.verdict["floor"]) if artefacts.verdict else None,
        before_after=tables.before_after(artefacts.verdict["table"]) if artefacts.verdict else None,
        drift=tables.drift(artefacts.verdict["drift"]) if artefacts.verdict else None,
        training=training_figures(artefacts.metrics),
        projection=projection(artefacts.info),
        comparison=comparison(artefacts.peers),
        examples=examples(artefacts.scores),
        stages=tables.stages(artefacts.stages),
        versions=tables.versions(artefacts.stages),
        configs={name: json.dumps(s, indent=2, sort_keys=True) for name, s in artefacts.stages.items()},
    )
    return text.lstrip()


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
