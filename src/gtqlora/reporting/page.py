"""The page: artefacts laid out as sections, rendered offline and with nothing that can be run but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from gtqlora.reporting import diagnosis, experts, sections, tables, words
from gtqlora.reporting.artefacts import Artefacts
from gtqlora.reporting.forest import Mark, Scale, Style, mark
from gtqlora.reporting.heatmap import packed
from gtqlora.results.verdict import Outcome
from gtqlora.stats import Floor

_EXAMPLES, _EXAMPLE_LENGTH = 3, 400
_TEMPLATE = "report.html.j2"
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class FloorPicture:
    """The interval of the drop against the margin, on one track."""

    mark: Mark
    zero: float
    margin: float
    allowed: float
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


def floor_picture(floor: Floor) -> FloorPicture:
    """Return the lost refusals against the margin, as they are drawn."""
    lost, margin = floor.losses, floor.margin
    # the margin on both sides, so that the drawing does not jump with the sign of a loss
    low, high = min(lost.low, -margin), max(lost.high, margin)
    scale = Scale(low=low - 0.12 * (high - low), high=high + 0.12 * (high - low))
    return FloorPicture(
        mark=mark(lost, Style(tint=words.FLOOR_TONE.get(floor.verdict, "unsure")), scale),
        zero=scale.zero,
        margin=scale.at(margin),
        allowed=margin,
        verdict=floor.verdict,
        symbol=words.FLOOR_SYMBOL.get(floor.verdict, "?"),
        tone=words.FLOOR_TONE.get(floor.verdict, "unsure"),
        sentence=floor.reason,
        scale=f"Lost {words.points(lost.value)} points (interval {words.span_points(lost)}), "
        f"margin {words.points(margin)} points, {words.count(lost.n)} paired harmful prompts",
    )


def examples(scores: Sequence[Outcome]) -> list[Example]:
    """Return a few changed answers. Never a harmful row's text: were the refusal lost, the answer could do harm."""
    found = []
    for kind in words.KINDS:
        changed = [s for s in scores if s.kind == kind and s.refused_before != s.refused_after]
        for s in changed[:_EXAMPLES]:
            change = "refused before, answered after" if s.refused_before else "answered before, refused after"
            # the refusal may be lost, and what is said instead is nobody's to read here
            hidden = kind == "harmful"
            before, after = ("" if hidden else _shortened(text) for text in (s.text_before, s.text_after))
            found.append(Example(kind, s.pair_id, change, before, after, hidden))
    return found


def _shortened(text: str) -> str:
    text = text.strip() or "(nothing)"
    return text if len(text) <= _EXAMPLE_LENGTH else text[:_EXAMPLE_LENGTH] + " …"


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _plotly() -> tuple[str, str]:
    """Return its script, packed, and the hash by which the page's policy lets it run."""
    script = get_plotlyjs()
    return packed(script), _hash(script)


def coded(text: str) -> Markup:
    """Return a text as HTML, what stands between backticks as code."""
    # escaped first: a name in an artefact may hold tags
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def render(artefacts: Artefacts) -> str:
    """Return one HTML text. Its policy forbids every request, and every script but plotly and the page's own."""
    environment = Environment(
        loader=PackageLoader("gtqlora.reporting", "templates"),
        # every text of an artefact is untrusted
        autoescape=True,
        # a name that a template mistypes is an error, not an empty place
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=words.percent, count=words.count, capital=words.capital, coded=coded)
    script = _source(environment, "report.js")
    text = environment.get_template(_TEMPLATE).render(
        a=artefacts,
        name=PurePath(artefacts.model).name or artefacts.path.resolve().name,
        headline=words.headline(artefacts),
        edit_kind=words.mode(artefacts.info) if artefacts.info else "",
        standing=words.standing(artefacts.diagnosis) if artefacts.diagnosis else "",
        notices=words.notices(artefacts),
        style=_source(environment, "report.css"),
        script=script,
        plotly=_plotly()[0],
        # the policy allows exactly these two scripts, by their hashes; a text that got in as a script cannot run
        script_hashes=f"{_plotly()[1]} {_hash(script)}",
        stages=tables.stages(artefacts.stages),
        versions=tables.versions(artefacts.stages),
        configs={name: json.dumps(s, indent=2, sort_keys=True) for name, s in artefacts.stages.items()},
        **_sections(artefacts),
    )
    return text.lstrip()


def _sections(artefacts: Artefacts) -> dict[str, object]:
    """Return what each section shows; nothing where its artefact is missing."""
    found, verdict, served = artefacts.diagnosis, artefacts.verdict, artefacts.served
    return {
        "difference": diagnosis.difference(found) if found else [],
        "kinds": diagnosis.by_kind(found) if found else [],
        "atlas": experts.atlas(found, artefacts.association) if found else None,
        "diagnosis": diagnosis.diagnosis_figures(found) if found else [],
        "before_after": sections.before_after(verdict.table) if verdict else None,
        "floor": floor_picture(verdict.floor) if verdict else None,
        "served": sections.served(served) if served else None,
        "judged": words.judged(verdict) if verdict else [],
        "edit": sections.edit_figures(verdict) if verdict else [],
        "examples": examples(artefacts.scores),
        "comparison": sections.comparison(artefacts.peers),
        "making": sections.making(artefacts),
    }


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
