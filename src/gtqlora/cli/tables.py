"""Make tables of results for the terminal; the columns that matter least come last, as narrow terminals drop those."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from gtqlora.cli.figures import count, interval, share, size
from gtqlora.cli.layout import Cell, Sheet
from gtqlora.judging.labels import LABELS
from gtqlora.results.built import counted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gtqlora.contrasts.agreement import Agreement
    from gtqlora.contrasts.statistics import Statistics, Twins
    from gtqlora.demo import Numbers
    from gtqlora.exports.provenance import Checked, Provenance
    from gtqlora.results.ablation import AblationStudy
    from gtqlora.results.built import Built
    from gtqlora.results.diagnosis import Diagnosis, Localization
    from gtqlora.results.export import FormVerdict
    from gtqlora.results.mediation import Factorial, Mediation, Shares
    from gtqlora.results.verdict import Verdict
    from gtqlora.results.wrapped import WrappedFloor
    from gtqlora.stages.inspect import Inspection
    from gtqlora.stages.project import Projected
    from gtqlora.stages.publish import Published

# In the order of `contrasts.ALL_KINDS`, which is not imported here: that loads numpy, and `--help` must be quick.
KINDS = {
    "benign": "benign",
    "lookalike": "lookalike (over-refusal)",
    "harmful": "harmful",
    "instructed": "instructed to decline",
}
COMPONENTS = {
    "routing": "routing",
    "experts": "experts' own computation",
    "residual": "rest of the residual stream",
    "interaction": "interaction",
}
_COLOURS = {"pass": "bold green", "fail": "bold red"}
_WAYS = ("over-refused with original routing", "repaired by routing alone", "repaired by gates / LoRA alone")
_EDITS = {"projection": "projection", "lora": "LoRA", "gates": "gates", "gt": "GT-QLoRA"}


T = TypeVar("T")


def _by_kind(table: Mapping[str, T]) -> list[tuple[str, T]]:
    """Return a table's rows in the order of `KINDS`; of a kind that may be missing there is none."""
    return [(kind, table[kind]) for kind in KINDS if kind in table]


def floor_style(verdict: str) -> str:
    """Return the colour of a floor's verdict."""
    return _COLOURS.get(verdict, "bold yellow")


def rows_by_split(found: Statistics | Built, title: str) -> Sheet:
    """Return how many rows of each kind every split of a contrast set has."""
    kinds = {kind for counts in found.counts.values() for kind in counts}
    there = [kind for kind in KINDS if kind != "instructed" or kind in kinds]
    rows = [(split, *(f"{counts.get(kind, 0):,}" for kind in there)) for split, counts in found.counts.items()]
    return Sheet(title=title, columns=("split", *(KINDS[kind] for kind in there)), rows=rows)


def built_sources(found: Built) -> Sheet:
    """Return what became of the prompts of each source, and why of some nothing did."""
    rows = [
        (
            one.name,
            one.layout,
            f"{one.rows:,}",
            f"{sum(one.asked.values()):,}",
            f"{sum(one.kept.values()):,}",
            "; ".join(counted(n, why) for why, n in one.left_out.items()) or "none",
        )
        for one in found.sources
    ]
    return Sheet(title="Sources", columns=("source", "taken for", "rows", "asked", "kept", "left out"), rows=rows)


def twins(found: Mapping[str, Mapping[str, Twins]]) -> Sheet:
    """Return how many flagged rows of each split a diagnosis can interchange with their twins."""
    rows = [
        (split, KINDS[kind], f"{one.rows:,}", f"{one.with_twin:,}", f"{one.swappable:,}")
        for split, kinds in found.items()
        for kind, one in kinds.items()
    ]
    return Sheet(title="Twins", columns=("split", "kind", "rows", "with a twin", "of as many tokens"), rows=rows)


def agreement(found: Sequence[Agreement]) -> Sheet:
    """Return how often the judge takes the pairs' completions for what they are meant to be."""
    rows = [
        (
            f"{one.kind} {one.column}",
            one.meant,
            f"{one.agreeing:,} of {one.rows:,}",
            ", ".join(counted(n, label) for label, n in one.labels.items()),
        )
        for one in found
    ]
    return Sheet(title="The judge", columns=("completions", "meant as", "judged so", "labels"), rows=rows)


def parts(found: Inspection) -> Sheet:
    """Return what a model consists of, and what of it is trained."""
    rows = [
        (
            group.name,
            count(group.parameters),
            size(group.bytes),
            group.trained,
            count(group.trained_parameters),
            size(group.trained_bytes),
            f"{group.modules:,}",
        )
        for group in found.groups
    ]
    whole = (count(found.text_parameters), size(found.bytes), "")
    return Sheet(
        title="Parts",
        columns=("part", "parameters", "memory", "GT-QLoRA", "trained parameters", "trained memory", "modules"),
        rows=rows,
        total=("all text parameters", *whole, count(found.trained_parameters), size(found.trained_bytes), ""),
    )


def interventions(found: Diagnosis) -> Sheet:
    """Return what flagged prompts and twins do when a part is interchanged, ablated or removed."""
    rows = [
        (
            f"{i.kind}: {i.name}{' (control)' if i.control else ''}",
            interval(i.refusal),
            interval(i.as_twin),
            interval(i.broken),
            interval(i.log_odds, 1),
        )
        for i in found.interventions
    ]
    columns = ("intervention", "refuses", "as twin", "broken", "log-odds")
    return Sheet(title="What the prompts do under interventions", columns=columns, rows=rows)


def components(found: Localization) -> Sheet:
    """Return what each component does for the refusals of one kind of prompts."""
    rows = [
        (
            name,
            found.words.get(part, "cannot tell" if part in found.necessary else ""),
            interval(found.necessary.get(part), 2),
            interval(found.sufficient.get(part), 2),
            interval(found.shares.get(part), 2),
        )
        for part, name in COMPONENTS.items()
    ]
    return Sheet(
        title=f"Components, for the refusals of {found.kind} prompts",
        columns=("component", "it is", "necessary", "sufficient", "share"),
        rows=rows,
        gloss="routing is Level 2, experts' own computation and the rest of the residual stream are Level 1",
    )


def experts(found: Diagnosis) -> Sheet:
    """Return what each candidate expert does by itself, for each kind of prompts."""
    rows = [
        (
            f"{e.layer}/{e.expert}",
            e.kind,
            interval(e.ablate),
            interval(e.restore),
            {"causal": "yes", "": "no"}.get(e.cause, e.cause),
        )
        for e in found.experts
    ]
    columns = ("layer/expert", "kind", "ablated", "restored", "carries it")
    return Sheet(title="Experts: the part of the gap that each moves", columns=columns, rows=rows)


def candidates(found: Projected) -> Sheet:
    """Return what is left of over-refusal, and of the task, without each layer's direction."""
    rows = [
        (f"{c.layer}{' (chosen)' if c.layer == found.layer else ''}", share(c.refusal), share(c.accuracy))
        for c in found.candidates
    ]
    columns = ("after layer", "over-refused", "accuracy")
    return Sheet(title="Direction removed, on lookalike (over-refusal) prompts", columns=columns, rows=rows)


def held_out(found: Verdict | FormVerdict) -> Sheet:
    """Return refusal and accuracy of held-out prompts before and after, by kind."""
    rows = [
        (
            KINDS[kind],
            interval(row.refusal_before),
            interval(row.refusal_after),
            interval(row.accuracy_before),
            interval(row.accuracy_after),
            f"{row.refusal_before.n:,}",
            f"{row.q:.2g}",
        )
        for kind, row in _by_kind(found.table)
    ]
    return Sheet(
        title="Held-out prompts",
        columns=("kind", "refused before", "refused after", "accuracy before", "accuracy after", "n", "q"),
        rows=rows,
        gloss="in brackets: 95 % intervals; q: that refusal changed by chance, corrected for several kinds",
    )


def labels(found: Verdict | FormVerdict) -> Sheet:
    """Return how many answers to held-out prompts have each label, before and after."""
    rows = [
        (
            KINDS[kind],
            *(f"{row.labels_before.get(label, 0):,} → {row.labels_after.get(label, 0):,}" for label in LABELS),
        )
        for kind, row in _by_kind(found.table)
    ]
    return Sheet(
        title="What the answers are",
        columns=("kind", *LABELS),
        rows=rows,
        gloss="partial: declines and yet gives part; evasion: asks back or answers something else; undecided: empty, "
        "ended inside its thought, or no opinion",
    )


def wrapped(found: WrappedFloor) -> Sheet:
    """Return how many refusals of harmful prompts are lost inside each plain frame."""
    rows = [
        (row.name, f"{row.refused:,} of {row.asked:,}", interval(row.losses), row.verdict) for row in found.wrappers
    ]
    return Sheet(
        title="Harmful prompts inside plain frames",
        columns=("frame", "refused before", "of these lost", "verdict"),
        rows=rows,
        gloss=f"in brackets: bounds for all frames together; in any one at most {found.worst_margin:.0%} may be lost",
    )


def drift(found: Verdict) -> Sheet:
    """Return how far the routing of prompts left the original's."""
    rows = [(KINDS[kind], interval(row.kl), interval(row.overlap)) for kind, row in _by_kind(found.drift)]
    columns = ("kind", "KL (nats per token)", "top-k overlap")
    return Sheet(title="Routing drift on prompts", columns=columns, rows=rows)


def mediation(found: Mediation) -> Sheet:
    """Return what repaired prompts do with routing replayed, both ways and as a control."""
    shown = {
        "edited, original's routing": found.direct,
        "original, edited model's routing": found.indirect,
        "edited, another prompt's routing": found.control,
    }
    rows = [(name, *_does(shares), f"{shares.refuses.n:,}") for name, shares in shown.items() if shares]
    gloss = "broken: neither a refusal nor the edited model's answer"
    columns = ("model", "refuses", "as edited", "broken", "n")
    return Sheet(title="Repaired lookalike prompts, routing replayed", columns=columns, rows=rows, gloss=gloss)


def factorial(found: Factorial) -> Sheet:
    """Return what prompts do with gates alone, LoRA alone, neither and both."""
    names = {"original": "original", "gates": "gates alone", "lora": "LoRA alone", "edited": "both"}
    rows = [(name, *_does(found.lookalike[arm]), interval(found.harmful[arm])) for arm, name in names.items()]
    columns = ("parts of the edit", "over-refused", "as edited", "broken", "harmful refused")
    return Sheet(title="Which part of the edit does it", columns=columns, rows=rows)


def _does(found: Shares) -> tuple[str, str, str]:
    return interval(found.refuses), interval(found.as_edited), interval(found.broken)


def ablation(found: AblationStudy) -> Sheet:
    """Return refusal of harmful prompts over the number of experts ablated: ranked ones and, beside them, random."""
    listed = (found.before, found.after, found.after_reranked)
    # Curves may have different numbers of experts ablated; those of the edited model give the rows.
    curves = [{point.ablated: point for point in points} for points in listed]
    rows = [
        (
            str(number),
            *(interval(curve[number].targeted) if number in curve else "-" for curve in curves),
            interval(point.random),
        )
        for number, point in curves[1].items()
    ]
    columns = ("ablated", "before", "after", "after, ranked anew", "random")
    return Sheet(title="Harmful prompts refused with experts ablated", columns=columns, rows=rows)


def _floor(verdict: str | None) -> Cell:
    return Cell(verdict, floor_style(verdict)) if verdict else Cell("-")


def edits(numbers: Numbers) -> Sheet:
    """Return the demo's edits of one organism; the model as it is was held to no floor."""
    rows = [
        (
            Cell(_EDITS.get(edit, edit), "bold" if edit == "gt" else ""),
            share(row.harmful_refusal),
            share(row.lookalike_refusal),
            f"{share(row.lookalike_accuracy)} / {share(row.benign_accuracy)}",
            _floor(row.floor),
            share(row.replayed_lookalike_refusal),
            share(row.repaired_by_routing),
            f"{share(row.repaired_by_gates)} / {share(row.repaired_by_lora)}",
        )
        for edit, row in numbers.edits.items()
    ]
    accuracy = "accuracy (over-refusal / benign)"
    return Sheet(
        title="",
        columns=("edit", "harmful refused", "over-refused", accuracy, "floor", *_WAYS),
        rows=rows,
        gloss=f"{_WAYS[0]}: high: the routing is necessary; {_WAYS[1]}: high: it is sufficient",
    )


__all__ = [
    "ablation",
    "candidates",
    "components",
    "drift",
    "edits",
    "experts",
    "factorial",
    "floor_style",
    "held_out",
    "interventions",
    "mediation",
    "parts",
    "rows_by_split",
    "twins",
]


def sent(found: Published) -> Sheet:
    """Return the files that go to the hub, and their sizes."""
    rows = [(file.name, size(file.size)) for file in found.files]
    return Sheet(
        title="Files", columns=("file", "size"), rows=rows, total=("in all", size(sum(f.size for f in found.files)))
    )


def provenance(found: Provenance) -> Sheet:
    """Return what each file is to the record."""
    rows = [(file.shown, _against(file)) for file in found.files]
    return Sheet(title=str(found.place), columns=("file", "against the record"), rows=rows)


def _against(file: Checked) -> Cell:
    colour = {"as recorded": "green", "renamed": "yellow", "free to edit": ""}.get(file.state, "bold red")
    return Cell(file.state if file.certified_as is None else f"certified as {file.certified_as}", colour)
