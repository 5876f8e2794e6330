"""The numbers behind every drawing, as tables of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from gtqlora.reporting.artefacts import Peer, Stages
from gtqlora.reporting.figures import thinned
from gtqlora.reporting.words import (
    ARM_NAMES,
    FLOOR_SYMBOL,
    KINDS,
    NONE,
    WAYS,
    capital,
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
)
from gtqlora.results.ablation import AblationPoint, AblationStudy
from gtqlora.results.adapter import Candidate
from gtqlora.results.diagnosis import Cell, Depth, Intervention, LayerHealth
from gtqlora.results.directions import LayerDirections
from gtqlora.results.mediation import FACTORIAL, Factorial, Mediation, Shares
from gtqlora.results.metrics import LOGITS_BY_GATES, LOGITS_BY_LORA, Metrics
from gtqlora.results.verdict import LABELS, Drift, KindRow
from gtqlora.results.wrapped import WrappedFloor
from gtqlora.stats import Interval

MOST_ROWS = 200


@dataclass(frozen=True)
class Table:
    """Cells as texts, after a line break in small; the first `texts` columns are words, the others numbers."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    texts: int = 1
    note: str = ""


def share(interval: Interval | None) -> str:
    """Return a share over its interval."""
    return f"{percent(value_of(interval))}\n{span(interval)}" if interval else NONE


def real(interval: Interval | None) -> str:
    """Return a number over its interval."""
    return f"{number(value_of(interval))}\n{span(interval, 3)}" if interval else NONE


def gap(interval: Interval) -> str:
    """Return a difference of shares in points, over its interval."""
    return f"{points(interval.value)}\n{span_points(interval)}"


def levels(caption: str, columns: Mapping[str, Mapping[str, Interval]], names: Mapping[str, str]) -> Table:
    """Return an interval of each column for each component."""
    rows = [[name, *(share(found.get(key)) for found in columns.values())] for key, name in names.items()]
    return Table(caption, ["Component", *columns], rows)


def cells(found: Sequence[Cell], sides: Sequence[str]) -> Table:
    """Return what prompts do with each component (a side) taken from the flagged prompt or from its twin."""
    rows = [
        [
            *(getattr(cell, side) for side in sides),
            share(cell.refusal),
            share(cell.as_twin),
            share(cell.broken),
            real(cell.log_odds),
        ]
        for cell in found
    ]
    columns = [*(capital(side) for side in sides), "Refuses", "As twin", "Broken", "Log-odds"]
    return Table("Every combination of components", columns, rows, texts=len(sides))


def depth(found: Depth) -> Table:
    """Return what goes with the twin's routing in the layers up to each one, and in those after it."""
    rows = [
        [
            NONE if point.last is None else str(point.last),
            *(share(part.log_odds) for part in (point.up_to, point.after)),
            *(share(part.as_twin) for part in (point.up_to, point.after)),
        ]
        for point in found.points
    ]
    columns = ["Layers up to", "Gap, up to it", "Gap, after it", "As twin, up to it", "As twin, after it"]
    return Table("The twin’s routing in some layers", columns, rows)


def interventions(found: Sequence[Intervention]) -> Table:
    """Return what the prompts do under each change."""
    rows = [
        [
            i.name,
            i.kind,
            "control" if i.control else "test",
            share(i.refusal),
            gap(i.effect),
            share(i.as_twin),
            share(i.broken),
            share(i.accuracy),
            real(i.log_odds),
            real(i.log_odds_effect),
            count(i.refusal.n),
        ]
        for i in found
    ]
    columns = [
        "Intervention", "Prompts", "Role", "Refuses", "Drop, points", "As twin", "Broken", "Right answers", "Log-odds",
        "Drop of log-odds", "Number",
    ]  # fmt: skip
    return Table("What prompts do under each intervention", columns, rows, texts=3)


def ablation_curves(study: AblationStudy) -> list[tuple[str, list[AblationPoint]]]:
    """Return each curve of the study under its name."""
    return [
        ("before the edit", study.before),
        ("after, the same experts", study.after),
        ("after, ranked anew", study.after_reranked),
    ]


def ablation(study: AblationStudy) -> Table:
    """Return refusal of harmful prompts over the number of ablated experts, before and after the edit."""
    rows = [
        [name, str(point.ablated), share(point.targeted), share(point.random), count(point.targeted.n)]
        for name, points in ablation_curves(study)
        for point in points
    ]
    columns = ["Model", "Ablated", "Likeliest first: refused", "Random: refused", "Prompts"]
    return Table("Refusal of harmful prompts with experts ablated", columns, rows)


def directions(found: Sequence[LayerDirections]) -> Table:
    """Return what is known of the directions after each layer."""
    rows = []
    for layer in found:
        parts, erased = layer.components, layer.erasure
        rows.append(
            [
                str(layer.layer),
                real(layer.separation),
                real(parts and parts.separation),
                share(parts and parts.share_mean),
                share(parts.shares[0] if parts and parts.shares else None),
                *map(real, (erased.before, erased.mean_removed, erased.leace) if erased else (None, None, None)),
                number(layer.norm),
            ]
        )
    columns = [
        "After layer", "AUROC, means", "AUROC, component", "Explained, means", "Explained, component",
        "Probe", "Probe, means removed", "Probe, LEACE", "Length",
    ]  # fmt: skip
    return Table("Residual directions per layer", columns, rows)


def cosines(found: Sequence[LayerDirections]) -> Table:
    """Return the cosines of all named directions; empty where there are none."""
    names = dict.fromkeys((c.first, c.second) for layer in found for c in layer.cosines)
    rows = [
        [
            str(layer.layer),
            *(real({(c.first, c.second): c.value for c in layer.cosines}.get(pair)) for pair in names),
        ]
        for layer in found
    ]
    columns = [f"{first} – {second}".replace("_", " ") for first, second in names]
    return Table("Cosines between the directions", ["After layer", *columns], rows if names else [])


def load(health: Sequence[LayerHealth]) -> Table:
    """Return the balance of the load over the experts, layer by layer."""
    rows = [[str(h.layer), number(h.cv), number(h.max_vio), number(h.entropy), count(h.dead)] for h in health]
    return Table("Balance of the load per layer", ["Layer", "CV", "MaxVio", "Entropy", "Never chosen"], rows)


def before_after(table: Mapping[str, KindRow]) -> Table:
    """Return refusal and accuracy before and after, by kind of prompt."""
    rows = [
        [
            kind,
            share(row.refusal_before),
            share(row.refusal_after),
            gap(row.drop),
            q_value(row.q),
            share(row.accuracy_before),
            share(row.accuracy_after),
            count(row.refusal_after.n),
        ]
        for kind, row in ((kind, table[kind]) for kind in KINDS if kind in table)
    ]
    columns = ["Kind", "Refused before", "Refused after", "Drop, points", "q", "Right before", "Right after", "Prompts"]
    return Table("Before and after, by kind of prompt", columns, rows)


def labels(table: Mapping[str, KindRow]) -> Table:
    """Return how many answers have each label, before and after, by kind of prompt."""
    rows = [
        [kind, *(f"{row.labels_before.get(label, 0):,} → {row.labels_after.get(label, 0):,}" for label in LABELS)]
        for kind, row in ((kind, table[kind]) for kind in KINDS if kind in table)
    ]
    return Table("What the answers are", ["Kind", *map(str.capitalize, LABELS)], rows)


def wrapped(found: WrappedFloor) -> Table:
    """Return what is lost inside each plain frame."""
    rows = [[row.name, count(row.asked), count(row.refused), share(row.losses), row.verdict] for row in found.wrappers]
    return Table("Inside each frame", ["Frame", "Asked", "Refused before", "Of these lost", "Verdict"], rows)


def ways(found: Mediation) -> Table:
    """Return what repaired prompts do with routing replayed, both ways and as a control."""
    replays = {"original_routing": found.direct, "edited_routing": found.indirect, "other_routing": found.control}
    known = {arm: shares for arm, shares in replays.items() if shares}
    return _arms("Repaired lookalike prompts, with routing replayed", known)


def _arms(caption: str, found: Mapping[str, Shares]) -> Table:
    rows = [
        [ARM_NAMES[arm], share(did.refuses), share(did.as_edited), share(did.broken), count(did.refuses.n)]
        for arm, did in found.items()
    ]
    return Table(caption, ["Model", "Refuses", "As edited", "Broken", "Prompts"], rows)


def factorial(found: Factorial) -> list[Table]:
    """Return what lookalike and harmful prompts do with gates alone, LoRA alone, neither and both."""
    lookalike = {arm: found.lookalike[arm] for arm in FACTORIAL}
    harmful = [[ARM_NAMES[arm], share(found.harmful[arm]), count(found.harmful[arm].n)] for arm in FACTORIAL]
    return [
        _arms("Lookalike prompts", lookalike),
        Table("Harmful prompts", ["Model", "Refuses", "Prompts"], harmful),
    ]


def side_by_side(peers: Sequence[Peer]) -> Table:
    """Return one row for each edit."""
    rows = []
    for peer in peers:
        found, way_of = peer.verdict.decision, peer.verdict.mediation
        harmful, lookalike, benign = (peer.verdict.table[kind] for kind in ("harmful", "lookalike", "benign"))
        floor = f"{FLOOR_SYMBOL.get(found, '?')} {found}"
        rows.append(
            [
                peer.label,
                mode(peer.info),
                floor + ("\nof another adapter" if peer.stale else ""),
                share(harmful.refusal_after),
                share(lookalike.refusal_after),
                share(way_of.refusal_replayed),
                share(lookalike.accuracy_after),
                share(benign.accuracy_after),
                f"{returned(way_of)}\n{WAYS.get(way_of.routing, NONE)}",
            ]
        )
    columns = [
        "Run", "Edit", "Safety floor", "Harmful refused", "Lookalike refused", "… under original routing",
        "Lookalike right", "Benign right", "Return with it",
    ]  # fmt: skip
    return Table("Edits side by side, after the edit", columns, rows, texts=3)


_LEARNING = ("loss", "rewards/margins", "rewards/accuracies", "loss/anchor", "learning_rate", "grad_norm")
_HEALTH = (
    LOGITS_BY_GATES, LOGITS_BY_LORA,
    "health/load_cv", "health/load_cv_original", "health/max_vio", "health/load_entropy", "health/dead_experts",
    *(f"health/{what}_{kind}" for what in ("overlap", "kl") for kind in KINDS),
)  # fmt: skip


def _metrics(caption: str, metrics: Sequence[Metrics], keys: Sequence[str]) -> Table:
    # health is logged on some lines only, and the anchor only where there is one
    known = [key for key in keys if any(key in row for row in metrics)]
    shown = thinned(metrics, MOST_ROWS)
    rows = [[str(row["step"]), *(number(row.get(key)) for key in known)] for row in shown]
    note = f"{len(shown)} of {len(metrics)} lines; all are in metrics.jsonl." if len(shown) < len(metrics) else ""
    names = [key.removeprefix("health/").removeprefix("rewards/").replace("_", " ").replace("/", " ") for key in known]
    return Table(caption, ["Step", *names], rows, texts=0, note=note)


def learning(metrics: Sequence[Metrics]) -> Table:
    """Return how training learned, line by line."""
    return _metrics("Learning, mean since the line before", metrics, _LEARNING)


def health(metrics: Sequence[Metrics]) -> Table:
    """Return how the routers fared in training, line by line."""
    return _metrics("Router health on training batches", metrics, _HEALTH)


def drift(found: Mapping[str, Drift]) -> Table:
    """Return how far the routing of each kind of prompts left the original's."""
    rows = [
        [kind, real(found[kind].kl), share(found[kind].overlap), count(found[kind].kl.n)]
        for kind in KINDS
        if kind in found
    ]
    columns = ["Kind", "KL, nats per token and layer", "Experts shared", "Prompts"]
    return Table("Routing drift from the original", columns, rows)


def candidates(found: Sequence[Candidate], chosen: int | None) -> Table:
    """Return what removing each layer's direction leaves; `chosen` is the layer that was taken."""
    rows = [[f"{'★ ' if c.layer == chosen else ''}{c.layer}", percent(c.refusal), percent(c.accuracy)] for c in found]
    caption = "Removing each layer's direction, lookalike prompts of the training split; ★ was chosen"
    return Table(caption, ["Layer", "Refused", "Right answers"], rows)


def stages(found: Stages) -> Table:
    """Return the record of each stage; what an older version did not record is left empty."""
    rows = []
    for name, stage in found.items():
        seconds = stage.get("seconds")
        rows.append(
            [
                name,
                str(stage.get("device", "")),
                str(stage.get("finished", "")).replace("T", " ").replace("+00:00", " UTC"),
                str(stage.get("hash", ""))[:12],
                f"{seconds:.1f}" if isinstance(seconds, int | float) else "",
                "" if stage.get("seed") is None else str(stage["seed"]),
            ]
        )
    return Table("Stages of this run", ["Stage", "Device", "Finished", "Hash", "Seconds", "Seed"], rows, texts=4)


def versions(found: Stages) -> Table:
    """Return package by stage; one column where all stages agree."""
    per_stage = {name: cast("dict[str, str]", stage.get("versions", {})) for name, stage in found.items()}
    packages = sorted({package for known in per_stage.values() for package in known})
    # mostly all stages ran in one environment; then a column says it all
    same = all(version == next(iter(per_stage.values())) for version in per_stage.values())
    columns = ["all stages"] if same and per_stage else list(per_stage)
    sources = list(per_stage.values())[: len(columns)]
    rows = [[package, *(source.get(package, "") for source in sources)] for package in packages]
    return Table("Versions", ["Package", *columns], rows, texts=1 + len(columns))
