"""A figure, and those of the edit, its making and its comparison with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from gtqlora.reporting import curves, tables, words
from gtqlora.reporting.artefacts import Artefacts, Peer
from gtqlora.reporting.comparison import trade_off
from gtqlora.reporting.figures import Plot
from gtqlora.reporting.forest import Forest, Line, Scale, Style, line, mark
from gtqlora.reporting.tables import Table
from gtqlora.results.adapter import Projection
from gtqlora.results.verdict import KindRow, Verdict

_PARTS = "Which part of the edit does it"
_BEFORE = Style(tint="control", shape="ring", meaning="before")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Drawings with their caption and the numbers behind them.

    Attributes:
        open: the tables are the figure, so they are not folded away.
    """

    id: str
    title: str
    caption: str
    tables: list[Table]
    forest: Forest | None = None
    plots: list[Plot] = field(default_factory=list)
    open: bool = False


# --- what the edit did


def before_after(table: Mapping[str, KindRow]) -> Figure:
    """Draw refusal and accuracy before and after, by kind of prompt."""
    lines = []
    for kind in (kind for kind in words.KINDS if kind in table):
        row, after = table[kind], Style(tint=kind, meaning="after")
        found = (row.refusal_before, _BEFORE), (row.refusal_after, after)
        lines.append(
            Line(
                label=words.capital(kind),
                note=words.KIND_MEANING[kind],
                marks=tuple(mark(interval, style, Scale()) for interval, style in found),
                texts=(
                    (
                        words.arrow(row.refusal_before, row.refusal_after),
                        f"drop {words.points(row.drop.value)} points, q\u00a0{words.q_value(row.q)}",
                    ),
                    (words.arrow(row.accuracy_before, row.accuracy_after), f"after: {words.span(row.accuracy_after)}")
                    if row.accuracy_before and row.accuracy_after
                    else (words.NONE, "no answer expected"),
                ),
            )
        )
    forest = Forest(
        heading="Prompts",
        measure="refused",
        columns=("Refused", "Right answers"),
        lines=lines,
        scale=Scale(),
        key=(_BEFORE, Style(tint="control", meaning="after")),
    )
    return Figure(
        id="before-after",
        title="Before and after, by kind of prompt",
        caption="Share refused; bars are 95 % intervals. q is McNemar’s p-value of the change, corrected for the "
        f"{'three' if len(table) == 3 else 'four'} kinds.",
        tables=[tables.before_after(table), tables.labels(table)],
        forest=forest,
    )


def served(verdict: Verdict) -> Figure:
    """Draw what a server's models say before and after, by kind of prompt."""
    return replace(before_after(verdict.table), id="served-before-after", title="Before and after, in a server’s words")


def mediation(verdict: Verdict) -> Figure:
    """Draw the mediation test: lookalike refusals before, after, and after with the original routing replayed."""
    row, style, found = verdict.table["lookalike"], Style(tint="lookalike"), verdict.mediation
    shown = {
        "Before": row.refusal_before,
        "After the edit": row.refusal_after,
        "After, original routing replayed": found.refusal_replayed,
    }
    lines = [line(label, [(interval, style)], Scale()) for label, interval in shown.items() if interval]
    forest = Forest(heading="Lookalike prompts", measure="refused", columns=("Refused",), lines=lines, scale=Scale())
    return Figure(
        id="mediation",
        title="By which way it works",
        caption=words.mediation(found),
        tables=[tables.ways(found)],
        forest=forest,
    )


def wrapped(verdict: Verdict) -> Figure | None:
    """Draw what is lost of the refusals of harmful prompts inside plain frames."""
    found, style = verdict.wrapped, Style(tint="harmful")
    if found is None or not found.wrappers:
        return None
    lines = [line(row.name, [(row.losses, style)], Scale()) for row in found.wrappers]
    repairs = found.repairs
    held = (
        f" Repaired lookalike prompts are answered there: {words.arrow(repairs.before, repairs.after)}."
        if repairs
        else ""
    )
    return Figure(
        id="wrapped",
        title=f"The same prompts inside plain frames: {found.verdict}",
        caption=f"{words.capital(found.reason)}.{held} Bars reach to bounds for all frames together.",
        tables=[tables.wrapped(found)],
        forest=Forest(heading="Frame", measure="lost", columns=("Refusals lost",), lines=lines, scale=Scale()),
    )


def factorial(verdict: Verdict) -> Figure:
    """Tell what gates and LoRA do, each alone and together."""
    found = verdict.factorial
    if found is None:
        caption = "The edit has not both gates and LoRA, so there are no parts of it to try alone."
        return Figure(id="factorial", title=_PARTS, caption=caption, tables=[])
    caption = f"{words.capital(found.sentence)}."
    return Figure(id="factorial", title=_PARTS, caption=caption, tables=tables.factorial(found), open=True)


def ablation(verdict: Verdict) -> Figure | None:
    """Draw the ablation study, if there was one, or say why it was left out."""
    found, title = verdict.ablation, "On how few experts refusal of harmful prompts hangs"
    if found is None:
        caption = f"Left out: {verdict.ablation_left_out}."
        return Figure(id="ablation", title=title, caption=caption, tables=[]) if verdict.ablation_left_out else None
    return Figure(
        id="ablation",
        title=title,
        caption="Held-out harmful prompts with experts ablated, those first that are chosen most on harmful prompts "
        f"compared with {found.ranked_against}. A curve that falls early says that whoever can ablate a few "
        "experts can take the refusals away. It has no part in the floor’s verdict.",
        tables=[tables.ablation(found)],
        plots=curves.ablation_plots(found),
    )


def drift(verdict: Verdict) -> Figure:
    """Tell how far next tokens and routing left the original's."""
    moved = verdict.kl_benign
    return Figure(
        id="drift",
        title="What else moved",
        caption="On benign prompts the edited model’s next-token distribution is "
        f"{words.number(moved.value)} nats per token from the original’s (95 % interval {words.span(moved, 3)}). "
        "Routing drift, per kind of prompt:",
        tables=[tables.drift(verdict.drift)],
        open=True,
    )


def edit_figures(verdict: Verdict) -> list[Figure]:
    """Return all figures of the edit that come after the floor."""
    figures = (wrapped(verdict), mediation(verdict), factorial(verdict), ablation(verdict), drift(verdict))
    return [figure for figure in figures if figure]


# --- how it was made, and others beside it


def making(artefacts: Artefacts) -> list[Figure]:
    """Return how the edit was made: learning and router health, or the layers that a projection tried."""
    learning, health = curves.learning_plots(artefacts.metrics), curves.health_plots(artefacts.metrics)
    found = []
    if learning:
        caption = "The margin is how much more than the original the edit prefers the chosen answer."
        table = tables.learning(artefacts.metrics)
        found.append(Figure(id="learning", title="Learning", caption=caption, tables=[table], plots=learning))
    if health:
        caption = (
            "On the batches that were logged. Overlap and divergence compare with the original’s routing of the same "
            "tokens; lookalike is meant to move, harmful and benign are anchored. LoRA moves logits as it changes "
            "what routers are given; by gates is what the trained routers add."
        )
        table = tables.health(artefacts.metrics)
        found.append(Figure(id="health", title="Router health", caption=caption, tables=[table], plots=health))
    made = artefacts.info.details if artefacts.info else None
    # only a projection tries layers
    if isinstance(made, Projection) and made.candidates:
        table = tables.candidates(made.candidates, made.layer)
        caption = "Each layer’s direction was removed in turn; the one that leaves the fewest refusals was taken."
        found.append(Figure(id="layers", title="Which layer’s direction", caption=caption, tables=[table], open=True))
    return found


def comparison(peers: Sequence[Peer]) -> Figure | None:
    """Draw several edits side by side, if there are any to compare with."""
    if not peers:
        return None
    return Figure(
        id="side-by-side",
        title="Refusal after each edit",
        caption="Top left is the aim: lookalike prompts answered, harmful ones refused. Larger and stronger in "
        "colour: more of the repaired refusals return when the original routing is replayed, so the edit "
        "works through it.",
        tables=[tables.side_by_side(peers)],
        plots=[trade_off(peers)],
        open=True,
    )


__all__ = ["Figure", "before_after", "comparison", "edit_figures", "making"]
