"""What mediates the behaviour, kind by kind: shares, what is necessary and sufficient, experts, directions, load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gtqlora.reporting import curves, experts, tables, words
from gtqlora.reporting.forest import Forest, Line, Scale, Style, holding, line, mark, told
from gtqlora.reporting.sections import Figure
from gtqlora.results.diagnosis import Cell, Depth, Diagnosis, Localization
from gtqlora.results.directions import DirectionStudy
from gtqlora.stats import Interval

LEVELS = {
    "routing": "routing",
    "experts": "experts’ computation",
    "residual": "residual stream",
    "interaction": "interaction",
}
_SIDES = ("routing", "experts", "stream")
Intervals = Mapping[str, Interval]
"""Component -> interval."""
_TEST = Style(tint="accent", meaning="test")
_CONTROL = Style(tint="control", shape="square", meaning="control")


def diagnosis_figures(diagnosis: Diagnosis) -> list[Figure]:
    """Return all figures but the heat map, in the order of the argument; what was not measured is left out."""
    alone, together = experts.one_by_one(diagnosis), experts.effects(diagnosis)
    figures = (alone, *together, _interventions(diagnosis), _directions(diagnosis), _load(diagnosis))
    return [figure for figure in figures if figure]


@dataclass(frozen=True, kw_only=True)
class KindSection:
    """What mediates the refusals of one kind of prompts: the sentence, why, on what, and the figures."""

    title: str
    sentence: str
    reasons: list[str]
    counted: str
    figures: list[Figure]


_WHOSE = {"lookalike": "False refusals: lookalike prompts", "harmful": "True refusals: harmful prompts"}


def by_kind(diagnosis: Diagnosis) -> list[KindSection]:
    """Return what was found of each kind, and draw how its refusals divide among the components."""
    return [
        KindSection(
            title=_WHOSE[found.kind],
            sentence=found.sentence,
            reasons=found.reasons,
            counted=words.counted(found),
            figures=_of_kind(found),
        )
        for found in diagnosis.kinds
    ]


def difference(diagnosis: Diagnosis) -> list[Figure]:
    """Draw what a component does for false refusals less what it does for true ones."""
    parts = diagnosis.difference.parts
    if not parts:
        return []
    title = "What differs between false and true refusals"
    caption = (
        "For false refusals less for true ones, with 95 % intervals; siblings are resampled together. "
        "Right of 0: the component does more for false refusals."
    )
    columns = {Style(tint="accent", meaning="false less true"): parts}
    names = {key: key.replace(": ", ": the ") for key in parts}
    return [_levels("difference", title, caption, columns, names, measure="difference of the parts")]


def _of_kind(found: Localization) -> list[Figure]:
    figures = [_components(found)] if found.necessary else []
    figures += [_shares(found)] if found.shares or found.shares_log_odds else []
    figures += [_cells(found)] if found.cells else []
    return [*figures, *([_depth(found.kind, found.depth)] if found.depth else [])]


def _depth(kind: str, found: Depth) -> Figure:
    return Figure(
        id=f"depth-{kind}",
        title="In which layers the routing mediates",
        caption=f"{found.sentence} What goes when only the routing of these layers is the twin’s, and the routers of "
        "all others run free: routers that only follow need no interchange of their own. At the left end no layer’s is "
        "the twin’s in the first line, and every layer’s in the second; at the right end it is the other way round. "
        f"Bands are 95 % intervals; completions are of {found.generated} pairs.",
        tables=[tables.depth(found)],
        plots=curves.depth_plots(kind, found),
    )


def _shares(found: Localization) -> Figure:
    columns = {
        Style(tint="accent", meaning="experts with the stream", bar=True): found.shares,
        Style(tint="second", shape="diamond", meaning="experts with the routing"): found.shares_with_routing,
        Style(tint="control", shape="square", meaning="log-odds, with the stream"): found.shares_log_odds,
    }
    caption = (
        "Owen values: each component’s part of the refusals when components are interchanged between a flagged prompt "
        "and its twin, averaged over orders; what is neither a refusal nor as the twin counts one half. They sum to 1. "
        "Two of the three form a union, and which two is a choice, so both are shown. "
        "Interaction above 0: the sides only work together; below 0: each is sufficient alone. Thin bars are "
        "95 % intervals."
    )
    return _levels(f"shares-{found.kind}", "How much each component carries", caption, columns, LEVELS)


def _components(found: Localization) -> Figure:
    columns = {
        Style(tint="accent", meaning="necessary"): found.necessary,
        Style(tint="second", shape="diamond", meaning="sufficient"): found.sufficient,
    }
    caption = (
        "Necessary: the part of the prompts that do what the twin does when only this component is the twin’s. "
        "Sufficient: the part of the twins that refuse when only this component is the flagged prompt’s. "
        "Both beyond what the stronger control does."
    )
    names = {
        key: f"{name}: {found.words.get(key, 'cannot tell')}" for key, name in LEVELS.items() if key in found.necessary
    }
    title = "What is necessary, and what is sufficient"
    return _levels(f"necessary-{found.kind}", title, caption, columns, names)


def _levels(
    id: str,
    title: str,
    caption: str,
    found: Mapping[Style, Intervals],
    names: Mapping[str, str],
    measure: str = "part of the refusals",
) -> Figure:
    # log-odds are missing where refusals and answers begin alike
    measured = {style: values for style, values in found.items() if values}
    columns = {words.capital(style.meaning): values for style, values in measured.items()}
    scale = holding(interval for values in measured.values() for interval in values.values())
    forest = Forest(
        heading="Component",
        measure=measure,
        columns=tuple(columns),
        lines=[
            line(words.capital(name), [(values.get(key), style) for style, values in measured.items()], scale)
            for key, name in names.items()
        ],
        scale=scale,
        key=tuple(measured),
    )
    return Figure(id=id, title=title, caption=caption, tables=[tables.levels(title, columns, names)], forest=forest)


def _cells(kind: Localization) -> Figure:
    # most components from the flagged prompt first, so that refusal falls down the drawing
    found = sorted(kind.cells, key=lambda cell: -sum(side == "flagged" for side in _sides(cell).values()))
    lines = [
        Line(
            label="  ".join(f"{'■' if of == 'flagged' else '□'} {side}" for side, of in _sides(cell).items()),
            marks=(mark(cell.refusal, _TEST, Scale()),),
            texts=(told(cell.refusal), told(cell.as_twin), told(cell.broken), _real(cell.log_odds)),
        )
        for cell in found
    ]
    return Figure(
        id=f"cells-{kind.kind}",
        title="Every combination of components",
        caption="■ from the flagged prompt, □ from its twin: which experts are chosen (routing), what they are given "
        "(experts), and the rest of the residual stream.",
        tables=[tables.cells(found, _SIDES)],
        forest=Forest(
            heading="Taken from",
            measure="refuses",
            columns=("Refuses", "As twin", "Broken", "Log-odds"),
            lines=lines,
            scale=Scale(),
        ),
    )


def _sides(cell: Cell) -> dict[str, str]:
    """Return from which prompt each component comes."""
    return {side: getattr(cell, side) for side in _SIDES}


def _real(interval: Interval | None) -> tuple[str, str]:
    return words.number(words.value_of(interval)), words.span(interval, 3) if interval else ""


def _interventions(diagnosis: Diagnosis) -> Figure | None:
    if not diagnosis.interventions:
        return None
    lines = [
        Line(
            label=f"{i.kind}: {i.name}" if i.kind else i.name,
            marks=(mark(i.refusal, _CONTROL if i.control else _TEST, Scale()),),
            texts=(told(i.refusal), told(i.as_twin), told(i.broken)),
            tag="control" if i.control else "",
        )
        for i in diagnosis.interventions
    ]
    forest = Forest(
        heading="Intervention",
        measure="refuses",
        columns=("Refuses", "As twin", "Broken"),
        lines=lines,
        scale=Scale(),
        key=(_TEST, _CONTROL),
    )
    return Figure(
        id="interventions",
        title="What changes refusal",
        caption="Share that refuses under each change, with its 95 % interval; what neither refuses nor does what the "
        "twin does is broken. Controls disturb as much, but not where the "
        "behaviour is suspected: if they move refusal too, the test shows nothing.",
        tables=[tables.interventions(diagnosis.interventions)],
        forest=forest,
    )


def _angles_told(found: DirectionStudy) -> str:
    """Say how many cosines are not told, as those that are make a selection."""
    if not found.cosines_not_told:
        return f"All {found.cosines} cosines are told."
    return (
        f"{found.cosines_not_told} of {found.cosines} cosines are not told, as one of the two directions is too short "
        "to tell from noise."
    )


def _directions(diagnosis: Diagnosis) -> Figure | None:
    layers = diagnosis.directions.layers
    if not layers:
        return None
    return Figure(
        id="directions",
        title="Directions in the residual stream",
        caption="Made on half of the pairs, judged on the other half; bands are 95 % intervals. That a direction "
        "separates does not say that it causes. Gaps: too few pairs, or states that do not differ. "
        f"{_angles_told(diagnosis.directions)}",
        tables=[table for table in (tables.directions(layers), tables.cosines(layers)) if table.rows],
        plots=curves.direction_plots(layers),
    )


def _load(diagnosis: Diagnosis) -> Figure | None:
    if not diagnosis.health:
        return None
    return Figure(
        id="load",
        title="Router health of the model as it is",
        caption=f"Balance of the experts’ load over {words.count(diagnosis.health_tokens)} tokens, layer by layer.",
        tables=[tables.load(diagnosis.health)],
        plots=curves.load_plots(diagnosis.health),
    )


__all__ = ["KindSection", "by_kind", "diagnosis_figures", "difference"]
