"""Figures of experts: the map of all of them, candidates one at a time, and refusal as several are ablated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.reporting import curves, expert_tables, words
from gtqlora.reporting.forest import Forest, Line, Style, holding, line, mark, told
from gtqlora.reporting.heatmap import HeatMap, heat_map
from gtqlora.reporting.sections import Figure
from gtqlora.reporting.tables import Table
from gtqlora.results.association import Association
from gtqlora.results.diagnosis import Diagnosis
from gtqlora.results.experts import Curve, ExpertEffect
from gtqlora.stats import Interval

# more rows than this do not fit on a screen; the table below the drawing has all
_MOST_DRAWN = 12


@dataclass(frozen=True, kw_only=True)
class Tested:
    """What was measured of one expert alone: for each kind of prompts what it was shown to be, and its effects."""

    layer: int
    expert: int
    kinds: list[tuple[str, str, Forest]]
    tokens: Table


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """The heat map with what opens from it; `twin` heads the columns of what flagged prompts were compared with."""

    title: str
    caption: str
    map: HeatMap
    table: Table
    tested: list[Tested]
    twin: str
    others: str


def _others(diagnosis: Diagnosis) -> str:
    """Return what flagged prompts were compared with."""
    return "their harmless twins" if diagnosis.matched else "unrelated benign prompts"


def atlas(diagnosis: Diagnosis, association: Sequence[Association]) -> Atlas | None:
    """Return the heat map of all experts, if their association is there."""
    if not association:
        return None
    twin = "twin" if diagnosis.matched else "benign"
    return Atlas(
        title="Which experts are chosen more on flagged prompts",
        caption="Each cell is an expert: how much more often it is chosen on flagged prompts than on "
        f"{_others(diagnosis)}. That is association; whether it causes is tested below. "
        "Choose a cell for all that is known of that expert.",
        map=heat_map(diagnosis, association, twin),
        table=expert_tables.associations(association, diagnosis, twin),
        tested=_tested(diagnosis.experts),
        twin=twin,
        others=_others(diagnosis),
    )


_ABLATED = Style(tint="accent", meaning="ablated alone")
_RESTORED = Style(tint="second", shape="diamond", meaning="restored alone, all other candidates ablated")
_ALIKE = Style(tint="control", shape="square", meaning="control: random experts alike, ablated")


def _parts(found: ExpertEffect) -> list[tuple[Interval, Style]]:
    """Return the part of the gap that goes or returns with an expert, and that of its control."""
    return [(found.ablate, _ABLATED), (found.restore, _RESTORED), (found.control, _ALIKE)]


def _tested(effects: Sequence[ExpertEffect]) -> list[Tested]:
    """Return what was measured of each expert, on whatever kinds of prompts."""
    experts: dict[tuple[int, int], list[ExpertEffect]] = defaultdict(list)
    for effect in effects:
        experts[effect.layer, effect.expert].append(effect)
    return [
        Tested(
            layer=layer,
            expert=expert,
            kinds=[(e.kind, e.cause, _alone(e)) for e in found],
            tokens=expert_tables.tokens(found[0].tokens),
        )
        for (layer, expert), found in experts.items()
    ]


def _alone(found: ExpertEffect) -> Forest:
    parts = _parts(found)
    scale = holding(interval for interval, _ in parts)
    return Forest(
        heading="Change",
        measure="part of the gap",
        columns=("Effect",),
        lines=[line(words.capital(style.meaning), [(interval, style)], scale) for interval, style in parts],
        scale=scale,
    )


def one_by_one(diagnosis: Diagnosis) -> Figure | None:
    """Draw what each candidate does by itself, those that were shown to carry the behaviour first."""
    if not diagnosis.experts:
        return None
    # those that were shown to carry it come first; sorted is stable, so the ranking stays within
    found = sorted(diagnosis.experts, key=lambda e: not e.cause)[:_MOST_DRAWN]
    scale = holding(interval for e in found for interval, _ in _parts(e))
    lines = [
        Line(
            label=f"{words.capital(words.place(e))}, {e.kind}",
            marks=tuple(mark(interval, style, scale) for interval, style in _parts(e)),
            texts=(told(e.ablate), told(e.restore)),
            tag=e.cause,
            opens=(e.layer, e.expert),
        )
        for e in found
    ]
    forest = Forest(
        heading="Expert",
        measure="part of the gap",
        columns=("Ablated alone", "Restored alone"),
        lines=lines,
        scale=scale,
        key=(_ABLATED, _RESTORED, _ALIKE),
    )
    return Figure(
        id="one-by-one",
        title="Candidates, one expert at a time",
        caption="For each kind of prompts: effect on the log-odds of refusing, as part of the gap between flagged "
        f"prompts and {_others(diagnosis)}, beyond what controls do. Causal: most of the refusal goes when it alone is "
        "ablated, or returns with the candidates of its layer, a part with it alone; and it is chosen or weighed more "
        "on flagged prompts. Computes it: the same, and it is chosen alike. Contributes: it brings a part back, but is "
        "neither needed nor enough. "
        f"{len(found)} of {len(diagnosis.experts)} are drawn; the table has all.",
        tables=[expert_tables.tested(diagnosis.experts)],
        forest=forest,
    )


def effects(diagnosis: Diagnosis) -> list[Figure]:
    """Draw refusal over the number of experts ablated, for each kind of prompts."""
    kinds = dict.fromkeys(curve.kind for curve in diagnosis.curves)
    return [_effects(kind, [curve for curve in diagnosis.curves if curve.kind == kind]) for kind in kinds]


def _effects(kind: str, found: Sequence[Curve]) -> Figure:
    return Figure(
        id=f"effects-{kind}" if kind else "effects",
        title=f"How refusal of {kind or 'flagged'} prompts falls as experts are ablated",
        caption="The first m experts of each order ablated; bands are 95 % intervals. Random experts of like frequency "
        "in the same layers are the control: an order tells something where it leaves their band.",
        tables=[expert_tables.effects(found)],
        plots=curves.effect_plots(kind, found),
    )
