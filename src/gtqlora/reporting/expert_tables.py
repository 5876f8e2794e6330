"""Tables of experts: how often each is chosen, what it does by itself, and refusal as several are ablated."""

from __future__ import annotations

from collections.abc import Sequence

from gtqlora.reporting.tables import MOST_ROWS, Table, real, share
from gtqlora.reporting.words import NONE, capital, count, number, percent, place, points, q_value
from gtqlora.results.association import EXPECTED_FALSE, STABLE, Association, first_of, of_kind
from gtqlora.results.diagnosis import Diagnosis
from gtqlora.results.experts import Curve, ExpertEffect, ExpertId, TokenChoice


def associations(association: Sequence[Association], diagnosis: Diagnosis, twin: str) -> Table:
    """Return the experts, those that stand out first, then by difference; `twin` heads the column of the twins."""
    marks = {_key(e): "★ " for e in diagnosis.top_experts}
    marks |= {_key(e): f"{marks.get(_key(e), '')}○ " for e in diagnosis.causal_experts}
    # marked ones first, wherever they stand by difference: they are what the text speaks of
    ranked = sorted(of_kind(association), key=lambda r: (_key(r) not in marks, -abs(r.difference)))
    rows = [
        [
            marks.get(_key(r), "") + place(r),
            percent(r.rate_flagged),
            percent(r.rate_twin),
            f"{points(r.difference)}\n{points(r.low)} to {points(r.high)}",
            q_value(r.q),
            percent(r.stability),
            f"{number(r.gradient)}\n{_ends(r.gradient_low, r.gradient_high)}",
        ]
        for r in ranked[:MOST_ROWS]
    ]
    columns = ["Expert", "Flagged", capital(twin), "Difference, points", "q", "Stability", "Gradient"]
    note = ["On all flagged prompts.", _stability_said(len(ranked))]
    if len(ranked) > MOST_ROWS:
        note.append(
            f"The {MOST_ROWS} largest of {count(len(ranked))}; all of them, and each kind’s, are in "
            "diagnosis/association.parquet."
        )
    return Table("Selection rate per expert; ★ associated, ○ carries it", columns, rows, note=" ".join(note))


def _stability_said(experts: int) -> str:
    """Say what stability is, with the bound that its number of first experts was chosen for."""
    return (
        f"Stability: the share of half-samples in which an expert is among the first {first_of(experts)} of "
        f"{count(experts)} by difference; of those with {percent(STABLE)} or more at most {EXPECTED_FALSE:g} is "
        "expected by chance."
    )


def _key(found: Association | ExpertId) -> tuple[int, int]:
    return found.layer, found.expert


def _ends(low: float | None, high: float | None) -> str:
    return NONE if low is None else f"{number(low)} to {number(high)}"


def tested(found: Sequence[ExpertEffect]) -> Table:
    """Return what each candidate does by itself."""
    rows = [
        [
            place(e),
            e.kind,
            e.cause or "not shown",
            share(e.ablate),
            share(e.restore),
            share(e.control),
            q_value(e.q),
            ", ".join(t.token for t in e.tokens[:5]) or NONE,
        ]
        for e in found
    ]
    columns = ["Expert", "Prompts", "Cause", "Ablated alone", "Restored alone", "Random alike, ablated", "q", "Tokens"]
    return Table("Effect of single experts, as part of the gap in log-odds", columns, rows, texts=3)


def tokens(found: Sequence[TokenChoice]) -> Table:
    """Return the tokens that choose an expert most."""
    rows = [[t.token, percent(t.rate), number(t.lift)] for t in found]
    return Table("Tokens that choose it most", ["Token", "Chosen by", "Times the usual rate"], rows)


def effects(curves: Sequence[Curve]) -> Table:
    """Return refusal over the number of ablated experts, in each order."""
    rows = [
        [
            curve.name,
            curve.kind or NONE,
            str(point.ablated),
            share(point.refusal),
            share(point.broken),
            real(point.log_odds),
        ]
        for curve in curves
        for point in curve.points
    ]
    columns = ["Order", "Prompts", "Ablated", "Refuses", "Broken", "Log-odds"]
    return Table("Effect of ablating experts", columns, rows, texts=2)
