"""Results as tables for the terminal. They are made here and printed by `cli`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gtqlora.cli.console import interval, new_table, plain, share

if TYPE_CHECKING:
    from gtqlora.demo import Numbers
    from gtqlora.results.ablation import AblationStudy
    from gtqlora.results.diagnosis import Diagnosis
    from gtqlora.results.verdict import Verdict
    from gtqlora.stages.inspect import Inspection

COMPONENTS = {
    "routing": "routing (Level 2)",
    "experts": "experts' own computation (Level 1)",
    "residual": "rest of the stream (Level 1)",
    "interaction": "interaction of the levels",
}


def parts(found: Inspection) -> Any:
    """What a model consists of, and what of it is trained."""
    columns = ("part", "modules", "parameters", "bytes", "GT-QLoRA", "trained\nparameters", "trained\nbytes")
    table = new_table("Parts", *columns)
    for g in found.groups:
        table.add_row(
            g.name,
            f"{g.modules:,}",
            f"{g.parameters:,}",
            f"{g.bytes:,}",
            g.trained,
            f"{g.trained_parameters:,}",
            f"{g.trained_bytes:,}",
        )
    table.add_section()
    table.add_row(
        "all text parameters",
        "",
        f"{found.text_parameters:,}",
        f"{found.bytes:,}",
        "",
        f"{found.trained_parameters:,}",
        f"{found.trained_bytes:,}",
    )
    return table


def names(found: Inspection) -> Any:
    """Parameters of the first MoE layer, in memory and on disk."""
    table = new_table("Names of the first MoE layer", "in memory", "on disk")
    for name in found.names:
        table.add_row(name.memory, ", ".join(name.disk))
    return table


def interventions(found: Diagnosis) -> Any:
    """What flagged prompts and twins do when something is interchanged, ablated or removed."""
    table = new_table("What the prompts do under interventions", "what", "refusal", "effect on refusal", "log-odds")
    for i in found.interventions:
        name = f"{i.name} (control)" if i.control else i.name
        table.add_row(plain(name), interval(i.refusal), interval(i.effect), interval(i.log_odds, 1))
    return table


def shares(found: Diagnosis) -> Any:
    """How much of the behaviour each component carries."""
    table = new_table("Which component carries the refusals", "component", "share", "necessary", "sufficient")
    for part, name in COMPONENTS.items():
        columns = (found.shares[part], found.necessary.get(part), found.sufficient.get(part))
        table.add_row(name, *(interval(column, 2) for column in columns))
    return table


def experts(found: Diagnosis) -> Any:
    """What each candidate does by itself."""
    table = new_table("Experts, as parts of the gap", "layer/expert", "ablated", "restored", "carries it")
    for e in found.experts:
        carries = "yes" if e.causal else "computes it" if e.computes else ""
        table.add_row(f"{e.layer}/{e.expert}", interval(e.ablate), interval(e.restore), carries)
    return table


def held_out(found: Verdict) -> Any:
    """Refusal and accuracy before and after, by kind."""
    columns = ("kind", "n", "refusal before", "refusal after", "q", "accuracy before", "accuracy after")
    table = new_table("Held-out prompts", *columns)
    for kind, row in found.table.items():
        table.add_row(
            kind,
            str(row.refusal_before.n),
            interval(row.refusal_before),
            interval(row.refusal_after),
            f"{row.q:.2g}",
            interval(row.accuracy_before),
            interval(row.accuracy_after),
        )
    return table


def drift(found: Verdict) -> Any:
    """How far the routing of prompts left the original."""
    table = new_table("Routing drift on prompts", "kind", "KL (nats per token)", "top-k overlap")
    for kind, row in found.drift.items():
        table.add_row(kind, interval(row.kl), interval(row.overlap))
    return table


def ablation(found: AblationStudy) -> Any:
    """Refusal of harmful prompts over the number of experts ablated: ranked ones and, beside them, random ones."""
    table = new_table(
        "Harmful prompts refused with experts ablated", "ablated", "before", "after", "after, ranked anew", "random"
    )
    listed = (found.before, found.after, found.after_reranked)
    curves = [{point.ablated: point for point in points} for points in listed]
    for count, point in curves[1].items():
        targeted = [interval(curve[count].targeted) if count in curve else "-" for curve in curves]
        table.add_row(str(count), *targeted, interval(point.random))
    return table


def edits(numbers: Numbers) -> Any:
    """The demo's edits of one organism."""
    table = new_table(
        "",
        "edit",
        "harmful\nrefused",
        "lookalike\nrefused",
        "benign\nrefused",
        "lookalike\nright",
        "benign\nright",
        "floor",
        "lookalike\nrefused,\nrouting\nreplayed",
    )
    for edit, row in numbers.edits.items():
        colour = {"pass": "green", "fail": "red"}.get(row.floor, "yellow")
        rates = (row.harmful_refusal, row.lookalike_refusal, row.benign_refusal)
        cells = map(share, (*rates, row.lookalike_accuracy, row.benign_accuracy))
        label = f"[bold]{edit}[/]" if edit == "gt" else edit
        table.add_row(label, *cells, f"[{colour}]{row.floor}[/]", share(row.replayed_lookalike_refusal))
    return table
