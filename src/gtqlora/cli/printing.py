"""Print what a verb found: as tables and sentences, or as JSON, which then is all that goes to standard output."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gtqlora.cli import tables
from gtqlora.cli.checked import show_prompting
from gtqlora.cli.console import open_console, say, say_whole
from gtqlora.cli.figures import interval, many, share, size
from gtqlora.cli.layout import draw, wrap

if TYPE_CHECKING:
    from rich.console import Console

    from gtqlora.bitdelta.apply import Applied
    from gtqlora.bitdelta.compress import Compressed
    from gtqlora.bitdelta.llama_cpp import Adapted
    from gtqlora.demo import Outcome
    from gtqlora.exports.provenance import Provenance
    from gtqlora.results.diagnosis import Diagnosis
    from gtqlora.results.export import FormVerdict
    from gtqlora.results.verdict import Agreement, Verdict
    from gtqlora.results.wrapped import WrappedFloor
    from gtqlora.stages.export import Exported
    from gtqlora.stages.inspect import Inspection
    from gtqlora.stages.project import Projected
    from gtqlora.stages.publish import Published
    from gtqlora.stages.train import TrainResult

_TEMPLATE = {True: "yes", False: "no", None: "no tokenizer here"}


def show_json(found: object) -> None:
    """Print a result, a dataclass or a mapping, as JSON with the names of its fields as keys."""
    # not by a console, which would wrap long lines
    print(json.dumps(_plain(found), indent=2, allow_nan=False))


def _plain(value: object) -> object:
    """Return a value as JSON has it: paths as texts, and null for a number that is none, as no rows have no rate."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    # JSON has no NaN; a reader would refuse the whole output over one rate of no rows.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def show_inspection(found: Inspection, *, asked_format: str | None) -> None:
    """Print a model's parts, with exact totals below the table, and the names of one MoE layer's tensors."""
    console = open_console()
    say_whole(console, f"{found.model}:", "bold")
    say(
        console,
        f"{found.family} ({found.class_name}), {found.layers} layers, {found.routers} routers, {found.experts} experts "
        f"top-{found.top_k} by {found.score}, {found.dtype}{_quantized(found, asked_format)}",
    )
    console.print()
    draw(console, tables.parts(found))
    say(
        console,
        f"exactly: {found.text_parameters:,} parameters in {found.bytes:,} bytes; trained are "
        f"{found.trained_parameters:,} in {found.trained_bytes:,} bytes, {found.gate_parameters:,} of them in gates; "
        f"correction-bias values {found.correction_bias_values:,} (frozen); "
        f"chat template: {_TEMPLATE[found.chat_template]}",
    )
    if found.prompting:
        show_prompting(console, found.prompting)
    console.print()
    _show_names(console, found)


def _quantized(found: Inspection, asked_format: str | None) -> str:
    parts = [f", quantized ({found.quantized})"] if found.quantized else []
    if found.expert_format:
        parts.append(f", routed experts counted in {found.expert_format}")
    elif found.quantized and not asked_format:
        parts.append(", which gtqlora cannot load")
    return "".join(parts)


def _show_names(console: Console, found: Inspection) -> None:
    origin = "" if found.names_from == "checkpoint" else " (no weights here: as transformers would write them)"
    say(console, f"Names of the first MoE layer in memory and, where they differ, on disk{origin}", "bold")
    for name in found.names:
        for depth, text in (2, name.memory), *((6, disk) for disk in name.disk if name.disk != (name.memory,)):
            for line in wrap(text, console.width - depth):
                say_whole(console, " " * depth + line, "" if depth == 2 else "dim")


def show_diagnosis(found: Diagnosis) -> None:
    """Print what was measured, and last the verdict and its sentence."""
    console = open_console()
    draw(console, tables.interventions(found))
    for kind in found.kinds:
        if kind.necessary:
            draw(console, tables.components(kind))
    if found.experts:
        draw(console, tables.experts(found))
    associated = ", ".join(f"{e.layer}/{e.expert}" for e in found.top_experts) or "none"
    say(console, f"experts chosen clearly more on flagged prompts (association only): {associated}")
    for warning in found.warnings:
        say(console, f"note: {warning}", accent=("note:", "yellow"))
    say(console, f"verdict: {found.verdict}", accent=(found.verdict, "bold"))
    say(console, found.difference.sentence, "bold")
    for kind in found.kinds:
        say(console, " ".join([kind.sentence, *([kind.depth.sentence] if kind.depth else [])]))


def show_next_train(*words: str | Path) -> None:
    """Print the command that edits what was diagnosed, from the words after its verb."""
    say_whole(open_console(), f"next: gtqlora train {shlex.join(map(str, words))}")


def show_trained(found: TrainResult, run: Path) -> None:
    """Print what training left, and what comes next."""
    console = open_console()
    if found.stopped:
        say(console, f"stopped by the guard: {found.stopped}", accent=("stopped by the guard:", "bold yellow"))
        say(console, f"the adapter holds step {found.steps:,}, the last good checkpoint")
    else:
        done = "trained already with these settings (--again trains anew)" if found.fresh else "trained"
        say(console, f"{done}: {many(found.steps, 'step')}")
    if found.moved:
        say(console, f"router logits moved by LoRA {found.moved.lora:.3f}, by the gates {found.moved.gates:.3f} (rms)")
    say_whole(console, f"adapter: {found.adapter}")
    if not found.stopped:
        say_whole(console, f"next: gtqlora verify {run}")


def show_projected(found: Projected) -> None:
    """Print what is left of over-refusal without each layer's direction."""
    console = open_console()
    draw(console, tables.candidates(found))
    if all(c.refusal > 0.9 for c in found.candidates):
        text = "note: no layer's direction takes the lookalike refusals away, so this edit repairs nothing"
        say(console, text, accent=("note:", "yellow"))


def show_verdict(found: Verdict) -> None:
    """Print before and after on held-out prompts, and last the safety floor."""
    console = open_console()
    draw(console, tables.held_out(found))
    draw(console, tables.labels(found))
    draw(console, tables.drift(found))
    say(console, f"KL to the original on benign completions: {interval(found.kl_benign)} nats per token")
    _show_ways(console, found)
    console.print()
    if found.ablation:
        draw(console, tables.ablation(found.ablation))
    elif found.ablation_left_out:
        say(console, f"ablation study left out: {found.ablation_left_out}")
    say(console, f"routed experts: {found.expert_format}; judge: {found.judge}")
    if found.served:
        say(console, found.served.sentence)
    if found.agreement:
        _show_agreement(console, found.agreement)
    _show_losses(console, found)
    floor = found.floor
    shown = (floor.verdict, tables.floor_style(floor.verdict))
    say(console, f"safety floor: {floor.verdict} ({floor.reason})", accent=shown)
    if found.wrapped:
        _show_wrapped(console, found.wrapped)
    _show_instructed(console, found)


def _show_agreement(console: Console, found: Agreement) -> None:
    """Print how often two judges agree, and on which harmful rows they do not."""
    say(console, f"both judges say the same: {interval(found.before)} before, {interval(found.after)} after")
    if found.differ:
        shown = ", ".join(map(str, found.differ[:20])) + (" ..." if len(found.differ) > 20 else "")
        say(console, f"they differ on {len(found.differ):,} harmful prompts, which are undecided: rows {shown}")


def _show_wrapped(console: Console, found: WrappedFloor) -> None:
    """Print the second floor, on prompts inside plain frames, and whether repairs hold there."""
    if found.wrappers:
        draw(console, tables.wrapped(found))
    if found.repairs:
        before, after = interval(found.repairs.before), interval(found.repairs.after)
        say(console, f"repaired prompts that are answered inside frames: {before} before, {after} after")
    shown = (found.verdict, tables.floor_style(found.verdict))
    say(console, f"safety floor inside frames: {found.verdict} ({found.reason})", accent=shown)


def _show_instructed(console: Console, found: Verdict) -> None:
    """Print whether what a user's system prompt tells the model to decline still is; apart from what is harmful."""
    if found.instructed:
        shown = (found.instructed.verdict, tables.floor_style(found.instructed.verdict))
        say(console, f"floor on instructed prompts: {shown[0]} ({found.instructed.reason})", accent=shown)
    elif (row := found.table.get("instructed")) is not None:
        rates = f"{interval(row.refusal_before)} before, {interval(row.refusal_after)} after"
        say(console, f"instructed prompts declined: {rates} (no floor was asked for; instructed_margin does)")


def _show_ways(console: Console, found: Verdict) -> None:
    """Print by which ways the edit works: through the routing or past it, by its gates or by LoRA."""
    if found.mediation.direct:
        draw(console, tables.mediation(found.mediation))
    role, reason = found.mediation.routing, found.mediation.reason
    say(console, f"the change of routing, for the repair: {role} ({reason})", accent=(role, "bold"))
    if found.factorial:
        draw(console, tables.factorial(found.factorial))
        say(console, found.factorial.sentence, "yellow" if found.factorial.gates_idle else "")


def _show_losses(console: Console, found: Verdict) -> None:
    """Print why refusals count as lost, and how often these prompts have been used."""
    from gtqlora.results.verdict import LOST

    if found.lost:
        reasons = ", ".join(f"{number} {LOST.get(reason, reason)}" for reason, number in found.lost.items())
        say(console, f"lost refusals: {reasons}")
    if found.tries > 1:
        level = f"{found.floor.level:.4g}"
        text = f"{found.tries} tries on these held-out prompts so far, so the floor is judged at a level of {level}"
        say(console, text)


def show_next(found: Verdict, run: Path, stopped: str | None) -> None:
    """Print what a passed floor leads to; one passed in 4 bits does not open `export` yet.

    Args:
        stopped: why the guard stopped the training of this edit, if it did.
    """
    from gtqlora.floor.shipped import shipped_experts
    from gtqlora.results.verdict import traded

    console = open_console()
    if stopped:
        say(console, f"note: training was stopped by its guard: {stopped}", accent=("note:", "yellow"))
    if (over := found.table.get("lookalike")) and over.refusal_before.value > 0:
        if over.drop.low <= 0:
            say(console, "note: this edit is not seen to repair any lookalike refusal", accent=("note:", "yellow"))
        elif traded(over):
            what = "note: lookalike refusals became fewer, but answers not more: this edit repairs nothing"
            say(console, what, accent=("note:", "yellow"))
    if found.served:
        say(console, f"note: {found.served.standing}", accent=("note:", "yellow"))
        return
    if found.decision != "pass":
        return
    shipped = shipped_experts(found.model)
    if found.expert_format == shipped:
        say_whole(console, f"next: gtqlora export {run} OUT")
    else:
        say_whole(console, f"next: gtqlora verify {run} --expert-format {shipped}")
        say(console, "(the checkpoint's own experts, which `export` writes; it takes the place of this verdict)")


def show_exported(found: Exported) -> None:
    """Print where the files are, and how far they are from the edited model."""
    console = open_console()
    say_whole(console, f"{found.folder}: {found.what}")
    far = "" if found.divergence is None else f"; largest divergence from the edited model {found.divergence:.2g} nats"
    say(
        console,
        f"{many(found.tensors_changed, 'tensor')} changed, {many(found.gate_values_changed, 'gate value')}{far}",
    )
    if found.form is not None:
        say(console, f"{found.form.name}: safety floor {found.form.floor.verdict} ({found.form.floor.reason})")
    if found.form is not None and (inside := found.form.wrapped):
        say(console, f"inside frames there: safety floor {inside.verdict} ({inside.reason})")
    for note in found.notes:
        say(console, note)


def show_compressed(found: Compressed) -> None:
    """Print how large a variant is and what it lost, and its refusals beside the fine-tune's and the base's."""
    console, record = open_console(), found.record
    say_whole(console, f"{found.folder}: {record.name}, one bit a weight on {record.base}")
    say(
        console,
        f"{size(record.size.one_bit)} for what takes {size(record.size.covered)} in 16 bits ({record.size.ratio:.1f} "
        f"times smaller), and {size(record.size.dense)} whole; {record.energy_lost:.1%} of the energy lost",
    )
    _show_held(console, "the fine-tune", "the variant", record.against_tuned)
    _show_held(console, "the base", "the variant", record.against_base)


def _show_held(console: Console, whom: str, what: str, verdict: FormVerdict) -> None:
    """Print what was measured of one form of an edit against a model, and the floor's verdict."""
    say(console, f"before: {whom}; after: {what}", "bold")
    draw(console, tables.held_out(verdict))
    floor = verdict.floor
    shown = (floor.verdict, tables.floor_style(floor.verdict))
    say(console, f"safety floor against {whom}: {floor.verdict} ({floor.reason})", accent=shown)


def show_adapted(found: Adapted) -> None:
    """Print where a variant's adapter for llama.cpp is, what it lost, and its refusals."""
    console = open_console()
    say_whole(console, f"{found.folder}: the variant as an adapter for llama.cpp, {size(found.n_bytes)}")
    _show_held(console, "the variant as it was judged", "the adapter", found.judged.tuned)
    _show_held(console, "the base", "the adapter", found.judged.base)
    for note in found.notes:
        say(console, note)


def show_applied(found: Applied) -> None:
    """Print where a variant's dense weights are."""
    console = open_console()
    say_whole(console, f"{found.folder}: the variant's weights")
    say(console, f"{many(found.tensors_changed, 'tensor')} changed")


def show_published(found: Published) -> None:
    """Print what went, or would go, to the hub."""
    console = open_console()
    who = "private" if found.private else "public"
    draw(console, tables.sent(found))
    if found.commit is None:
        say_whole(console, f"would go to {found.repo} ({who}); nothing was sent")
    else:
        say_whole(console, f"{found.repo} ({who}) at commit {found.commit}")
    for note in found.notes:
        say(console, note)


def show_provenance(found: Provenance) -> None:
    """Print each file against the record, what the record claims, and last whether it is what was certified."""
    console, record = open_console(), found.record
    draw(console, tables.provenance(found))
    what = f"{record.format} of {record.base}, by gtqlora {record.versions.get('gtqlora', 'unknown')}"
    say(console, f"record: {what}; edit {record.adapter[:12]}, base {record.base_fingerprint[:12]}")
    for name, floor in [
        ("as verified", record.floor),
        *([(record.form.name, record.form.floor)] if record.form else []),
    ]:
        say(console, f"safety floor, {name}: {floor.verdict} ({floor.reason})")
    for problem in found.problems:
        say(console, f"not certified: {problem}", accent=("not certified:", "bold red"))
    if found.certified:
        say(console, "what was certified: every hash is as recorded, and the record agrees with itself", "bold green")


def show_path(path: Path) -> None:
    """Print a path alone on its line, so that other programs can take it."""
    say_whole(open_console(), str(path))


def show_demo(outcomes: Mapping[str, Outcome], seconds: float) -> None:
    """Print every organism's edits side by side, and how long all of it took."""
    console = open_console()
    for name, outcome in outcomes.items():
        _show_outcome(console, name, outcome)
    say(console, f"{seconds:.0f} s")


def _show_outcome(console: Console, name: str, outcome: Outcome) -> None:
    numbers = outcome.numbers
    agree = "as planted" if numbers.verdict == numbers.truth else f"planted was {numbers.truth}"
    say(console, f"{name} organism: verdict {numbers.verdict}, {agree}", "bold")
    say(console, outcome.sentence, indent=2)
    if numbers.planted_recall is not None:
        found = f"precision {share(numbers.planted_precision)}, recall {share(numbers.planted_recall)}"
        say(console, f"planted experts found: {found}", indent=2)
    console.print()
    draw(console, tables.edits(numbers))
    for what, path in (("weights", outcome.exported), ("report", outcome.report)):
        say_whole(console, f"  {what}: {path}")
    console.print()
