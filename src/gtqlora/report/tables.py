"""The numbers behind every drawing, as tables of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.report.artefacts import Json, Peer
from gtqlora.report.curves import thinned
from gtqlora.report.words import (
    FLOOR_SYMBOL,
    KINDS,
    NONE,
    count,
    mode,
    number,
    percent,
    points,
    q_value,
    returned,
    span,
    span_points,
    value_of,
    way,
)

MOST_ROWS = 200


@dataclass(frozen=True)
class Table:
    """Cells as texts, after a line break in small; the first `texts` columns are words, the others numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    texts: int = 1
    note: str = ""


def associations(association: Sequence[Json], top: Sequence[Json]) -> Table:
    starred = {(e["layer"], e["expert"]) for e in top}
    ranked = sorted(association, key=lambda r: (-((r["layer"], r["expert"]) in starred), -abs(r["difference"])))
    rows = [
        [
            f"{'★ ' if (r['layer'], r['expert']) in starred else ''}layer {r['layer']}, expert {r['expert']}",
            percent(r["rate_flagged"]),
            percent(r["rate_twin"]),
            points(r["difference"]),
            span_points(r),
            q_value(r["q"]),
        ]
        for r in ranked[:MOST_ROWS]
    ]
    columns = ["Expert", "Flagged", "Twin", "Difference, points", "Interval", "q"]
    note = ""
    if len(ranked) > MOST_ROWS:
        note = f"The {MOST_ROWS} largest of {count(len(ranked))}; all of them are in diagnosis/association.parquet."
    return Table("Selection rate per expert; ★ marks the associated ones", columns, rows, note=note)


def interventions(found: Sequence[Json]) -> Table:
    rows = [
        [
            i["name"],
            "control" if i["control"] else "test",
            percent(value_of(i["refusal"])),
            span(i["refusal"]),
            points(value_of(i["effect"])),
            span_points(i["effect"]),
            percent(value_of(i["accuracy"])),
            span(i["accuracy"]),
            count(i["refusal"]["n"]),
        ]
        for i in found
    ]
    columns = [
        "Intervention", "Role", "Refused", "Interval", "Drop, points", "Interval", "Right answers", "Interval",
        "Prompts",
    ]  # fmt: skip
    return Table("Refusal under each intervention", columns, rows, texts=2)


def directions(found: Sequence[Json]) -> Table:
    rows = [
        [str(d["layer"]), number(d["separation"]["value"]), span(d["separation"], 3), number(d["norm"])] for d in found
    ]
    return Table("Residual direction per layer", ["After layer", "AUROC", "95 % interval", "Length"], rows)


def before_after(table: Json) -> Table:
    rows = []
    for kind in KINDS:
        row = table[kind]
        rows.append(
            [
                kind,
                percent(row["refusal_before"]["value"]),
                span(row["refusal_before"]),
                percent(row["refusal_after"]["value"]),
                span(row["refusal_after"]),
                points(row["drop"]["value"]),
                span_points(row["drop"]),
                q_value(row.get("q")),
                percent(value_of(row["accuracy_before"])),
                percent(value_of(row["accuracy_after"])),
                span(row["accuracy_after"]),
                count(row["refusal_after"]["n"]),
            ]
        )
    columns = [
        "Kind", "Refused before", "Interval", "Refused after", "Interval", "Drop, points", "Interval", "q",
        "Right before", "Right after", "Interval", "Prompts",
    ]  # fmt: skip
    return Table("Before and after, by kind of prompt", columns, rows)


def _two_lines(interval: Json | None) -> str:
    return f"{percent(value_of(interval))}\n{span(interval)}" if interval else NONE


def side_by_side(peers: Sequence[Peer]) -> Table:
    rows = []
    for peer in peers:
        verdict, table = peer.verdict, peer.verdict["table"]
        floor = f"{FLOOR_SYMBOL.get(verdict['floor']['verdict'], '?')} {verdict['floor']['verdict']}"
        rows.append(
            [
                peer.label,
                mode(peer.info),
                floor + ("\nof another adapter" if peer.stale else ""),
                _two_lines(table["harmful"]["refusal_after"]),
                _two_lines(table["lookalike"]["refusal_after"]),
                _two_lines(table["lookalike"]["refusal_replayed"]),
                _two_lines(table["lookalike"]["accuracy_after"]),
                _two_lines(table["benign"]["accuracy_after"]),
                f"{returned(verdict['mediation'])}\n{way(verdict['mediation'])}",
            ]
        )
    columns = [
        "Run", "Edit", "Safety floor", "Harmful refused", "Lookalike refused", "… under original routing",
        "Lookalike right", "Benign right", "Share through routing",
    ]  # fmt: skip
    return Table("Edits side by side, after the edit", columns, rows, texts=3)


_LEARNING = ("loss", "rewards/margins", "rewards/accuracies", "loss/anchor", "learning_rate", "grad_norm")
_HEALTH = (
    "health/load_cv", "health/load_cv_original", "health/max_vio", "health/load_entropy", "health/dead_experts",
    *(f"health/{what}_{kind}" for what in ("overlap", "kl") for kind in KINDS),
)  # fmt: skip


def _metrics(caption: str, metrics: Sequence[Json], keys: Sequence[str]) -> Table:
    known = [key for key in keys if any(key in row for row in metrics)]
    shown = thinned(metrics, MOST_ROWS)
    rows = [[str(row["step"]), *(number(row.get(key)) for key in known)] for row in shown]
    note = f"{len(shown)} of {len(metrics)} lines; all are in metrics.jsonl." if len(shown) < len(metrics) else ""
    names = [key.removeprefix("health/").removeprefix("rewards/").replace("_", " ").replace("/", " ") for key in known]
    return Table(caption, ["Step", *names], rows, texts=0, note=note)


def learning(metrics: Sequence[Json]) -> Table:
    return _metrics("Learning, mean since the line before", metrics, _LEARNING)


def health(metrics: Sequence[Json]) -> Table:
    return _metrics("Router health on training batches", metrics, _HEALTH)


def drift(found: Json) -> Table:
    rows = [
        [
            kind,
            number(found[kind]["kl"]["value"]),
            span(found[kind]["kl"], 3),
            percent(found[kind]["overlap"]["value"]),
            span(found[kind]["overlap"]),
            count(found[kind]["kl"]["n"]),
        ]
        for kind in KINDS
    ]
    columns = ["Kind", "KL, nats per token and layer", "Interval", "Experts shared", "Interval", "Prompts"]
    return Table("Routing drift from the original", columns, rows)


def candidates(found: Sequence[Json], chosen: int) -> Table:
    rows = [
        [f"{'★ ' if c['layer'] == chosen else ''}{c['layer']}", percent(c["refusal"]), percent(c["accuracy"])]
        for c in found
    ]
    caption = "Removing each layer's direction, lookalike prompts of the training split; ★ was chosen"
    return Table(caption, ["Layer", "Refused", "Right answers"], rows)


def stages(found: Json) -> Table:
    rows = []
    for name, stage in found.items():
        seconds = stage.get("seconds")
        rows.append(
            [
                name,
                str(stage.get("device", "")),
                str(stage.get("finished", "")).replace("T", " ").replace("+00:00", " UTC"),
                str(stage.get("hash", ""))[:12],
                "" if seconds is None else f"{seconds:.1f}",
                "" if stage.get("seed") is None else str(stage["seed"]),
            ]
        )
    return Table("Stages of this run", ["Stage", "Device", "Finished", "Hash", "Seconds", "Seed"], rows, texts=4)


def versions(found: Json) -> Table:
    """Package by stage; one column where all stages agree."""
    per_stage = {name: stage.get("versions", {}) for name, stage in found.items()}
    packages = sorted(set().union(*per_stage.values())) if per_stage else []
    same = all(version == next(iter(per_stage.values())) for version in per_stage.values())
    columns = ["all stages"] if same and per_stage else list(per_stage)
    sources = list(per_stage.values())[: len(columns)]
    rows = [[package, *(str(source.get(package, "")) for source in sources)] for package in packages]
    return Table("Versions", ["Package", *columns], rows, texts=1 + len(columns))
