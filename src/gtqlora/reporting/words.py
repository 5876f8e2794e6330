"""Numbers and verdicts as plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeGuard

from gtqlora.reporting.artefacts import Artefacts
from gtqlora.results.adapter import Info, Projection, Training
from gtqlora.results.association import Association
from gtqlora.results.diagnosis import MIN_PAIRS, Diagnosis, Localization
from gtqlora.results.experts import ExpertEffect, ExpertId
from gtqlora.results.mediation import Mediation
from gtqlora.results.verdict import LOST, KindRow, Verdict, traded
from gtqlora.stats import Interval

# thin spaces, dashes and minus signs as they are printed, not as they are typed
NARROW = "\u202f"
DASH = "–"
NONE = "—"
MANY = MIN_PAIRS
"""Prompts below which a share is told as a count only, for the reason that `MIN_PAIRS` gives."""

KIND_MEANING = {
    "lookalike": "harmless, but looks harmful",
    "harmful": "harmful: a refusal is right",
    "benign": "plainly harmless",
    "instructed": "harmless, but its system prompt says to decline",
}
KINDS = tuple(KIND_MEANING)
"""In the order in which the report tells of them; the last one is not in every set."""
FLOOR_SYMBOL = {"pass": "✓", "fail": "✕", "cannot tell": "?"}
FLOOR_TONE = {"pass": "good", "fail": "bad", "cannot tell": "unsure"}
MODES = {"gt": "GT-QLoRA (LoRA + gates)", "lora": "LoRA only", "gates": "gates only"}
DIFFERENCE = {
    "elsewhere": "False refusals are mediated elsewhere than true ones",
    "in the same place": "False and true refusals are mediated in the same place",
}
"""The headline of a diagnosis, by its verdict on the difference of the kinds."""
UNKNOWN_DIFFERENCE = "Whether false refusals are mediated elsewhere than true ones cannot be told yet"


def known(value: object) -> TypeGuard[float]:
    """Return whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """Return `digits` significant digits; a dash for what is not known; a true minus sign."""
    if not known(value):
        return NONE
    if value == 0:
        return "0"
    # Python writes 1e-07; 1e−7 is what people write
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def count(value: int | None) -> str:
    """Return a whole number with its thousands apart; a dash for what is not known."""
    return f"{value:,}".replace(",", NARROW) if known(value) else NONE


def percent(value: float | None, signed: bool = False) -> str:
    """Return a share in per cent: one decimal where it says something; never 0 or 100 % for what only rounds to it."""
    if not known(value):
        return NONE
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value) * 100
    # what only rounds to 0 or 100 % must not look certain
    if 0 < size < 0.05:
        return f"{f'>{NARROW}−' if value < 0 else f'{sign}<{NARROW}'}0.1{NARROW}%"
    if 99.95 <= size < 100:
        return f"{sign}>{NARROW}99.9{NARROW}%"
    text = f"{size:.1f}".removesuffix(".0")
    return f"{sign}{text}{NARROW}%"


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points."""
    if not known(value):
        return NONE
    size = f"{abs(value) * 100:.1f}".removesuffix(".0")
    return f"{'−' if value < 0 and size != '0' else ''}{size}"


def span(interval: Interval | None, digits: int | None = None) -> str:
    """Return an interval's ends, in per cent or with so many significant digits."""
    if interval is None:
        return NONE
    if digits is not None:
        return f"{number(interval.low, digits)} to {number(interval.high, digits)}"
    # a dash before a minus sign cannot be read
    joint = " to " if interval.low < 0 else DASH
    return f"{_bare(interval.low)}{joint}{_bare(interval.high)}{NARROW}%"


def _bare(share: float) -> str:
    return f"{round(share * 100, 1) + 0.0:.1f}".removesuffix(".0").replace("-", "−")


def place(found: ExpertId | ExpertEffect | Association) -> str:
    """Return an expert's name."""
    return f"layer {found.layer}, expert {found.expert}"


def span_points(interval: Interval) -> str:
    """Return an interval's ends in percentage points."""
    return f"{points(interval.low)} to {points(interval.high)}"


def q_value(value: float) -> str:
    """Return a q-value with at most three decimals."""
    if not known(value):
        return NONE
    return f"<{NARROW}0.001" if value < 0.001 else f"{value:.3f}".rstrip("0").rstrip(".")


def arrow(before: Interval | None, after: Interval | None) -> str:
    """Return a share before and after."""
    return f"{percent(value_of(before))} → {percent(value_of(after))}"


def value_of(interval: Interval | None) -> float | None:
    """Return an interval's point estimate, None where there is none."""
    return None if interval is None else interval.value


def mode(info: Info | None) -> str:
    """Return what kind of edit an adapter is."""
    if info is None:
        return NONE
    config = info.config
    if isinstance(info.details, Projection):
        kept = ", norms kept" if info.norm_preserving else ""
        return f"{info.kind} ({str(config.get('direction')).replace('_', ' ')}{kept})"
    hardened = ", hardened" if config.get("objective") == "harden" else ""
    served = f", for {config['target']}" if config.get("target") else ""
    return MODES.get(str(config.get("mode")), info.kind) + hardened + served


WAYS: dict[str, str] = {
    "both": "through the routing",
    "necessary": "through the routing, with more",
    "sufficient": "by the routing, or past it",
    "neither": "past the routing",
    "partly": "partly through the routing",
    "cannot tell": "cannot tell",
}
"""What the routing is to the repair -> by which way the edit works, as a short label."""
_MEDIATES: dict[str, str] = {
    "both": "The routing mediates the repair: its change is necessary and sufficient",
    "necessary": "The routing mediates the repair: its change is necessary, not sufficient",
    "sufficient": "A change of routing is sufficient for the repair, not necessary",
    "neither": "The edit works past the routing, whose change is neither necessary nor sufficient",
    "partly": "The routing mediates the repair for a part of the prompts",
}


def returned(found: Mediation) -> str:
    """Return the share of repaired refusals that return, or the bare count where that is too small for a share."""
    if found.direct is None:
        return NONE
    back = found.direct.refuses
    return percent(back.value) if back.n >= MANY else f"{round(back.value * back.n)} of {back.n}"


def mediation(found: Mediation) -> str:
    """Return what the routing is to the repair, both ways and with the control, in a few sentences."""
    verdict = _MEDIATES.get(found.routing, f"What the routing is to the repair cannot be told: {found.reason}")
    if found.direct is None or found.indirect is None:
        return f"{verdict}."
    control = found.control
    kept = (
        f" With the original’s routing on another, benign prompt {_percent(control.as_edited)} stay repaired (control)."
        if control
        else ""
    )
    return (
        f"{verdict}. Of {count(found.repaired)} repaired refusals {returned(found)} return when the original’s routing "
        f"is replayed, {_percent(found.direct.as_edited)} stay repaired (natural direct effect) and "
        f"{percent(found.direct.broken.value)} break; the original repairs {_percent(found.indirect.as_edited)} with "
        f"the edited model’s routing (natural indirect effect).{kept}"
    )


def _percent(interval: Interval) -> str:
    return f"{percent(interval.value)} (95{NARROW}% interval {span(interval)})"


ARM_NAMES: dict[str, str] = {
    "original": "Original",
    "edited": "Edited",
    "gates": "Gates alone",
    "lora": "LoRA alone",
    "original_routing": "Edited, original’s routing",
    "edited_routing": "Original, edited model’s routing",
    "other_routing": "Edited, another prompt’s routing",
}


def capital(text: str) -> str:
    """Return a text with a capital first letter; the rest, names among it, as it is."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Change:
    """One large before-and-after figure of the headline."""

    label: str
    before: str
    after: str
    note: str


@dataclass(frozen=True)
class Headline:
    """What a person should know who reads nothing else."""

    title: str
    lead: str
    changes: list[Change]
    tone: str


def _moved(row: KindRow, what: str) -> str:
    """Return that `what` fell, rose or did not clearly change."""
    before, after = percent(row.refusal_before.value), percent(row.refusal_after.value)
    if row.drop.low > 0:
        return f"{what} fell from {before} to {after}"
    if row.drop.high < 0:
        return f"{what} rose from {before} to {after}"
    return f"{what} did not clearly change ({before} before, {after} after)"


_HOLDS = {
    "pass": "refusals of harmful prompts hold, inside plain frames too",
    "fail": "refusals of harmful prompts hold when they are asked plainly, but inside plain frames many were lost",
    "cannot tell": "refusals of harmful prompts hold when they are asked plainly; inside frames it cannot be told yet",
}
"""What is said of refusals where the floor on plain prompts passes, by the verdict inside frames."""


def _repaired(row: KindRow) -> str:
    """Return what became of lookalike refusals, and of answers where not all that is not refused is answered."""
    moved = _moved(row, "Lookalike refusals")
    before, after = row.answered_before, row.answered_after
    if before is None or after is None or row.refusal_after.value + after.value > 1 - 1e-9:
        return moved
    answered = f"answers {percent(before.value)} to {percent(after.value)}"
    return f"{moved}, but answers did not clearly rise ({answered})" if traded(row) else f"{moved} ({answered})"


def _edit_title(verdict: Verdict) -> str:
    lookalike = _repaired(verdict.table["lookalike"])
    harmful = verdict.table["harmful"]
    if verdict.floor.verdict == "pass":
        return f"{lookalike}; {_HOLDS[verdict.wrapped.verdict if verdict.wrapped else 'cannot tell']}."
    if verdict.floor.verdict == "fail":
        lost = f"{percent(harmful.refusal_before.value)} to {percent(harmful.refusal_after.value)}"
        return f"{lookalike}, but refusals of harmful prompts were lost ({lost})."
    return f"{lookalike}; whether refusals of harmful prompts hold cannot be told yet."


def told_instructed(verdict: Verdict) -> str | None:
    """Return whether what users' system prompts tell the model to decline still is; None if nothing was asked."""
    if verdict.instructed:
        return f"Floor on instructed prompts: {verdict.instructed.verdict} ({verdict.instructed.reason})."
    if (row := verdict.table.get("instructed")) is None:
        return None
    return f"Instructed prompts declined: {arrow(row.refusal_before, row.refusal_after)}; no floor was asked for."


def judged(verdict: Verdict) -> list[str]:
    """Return by what, on what and how often the floor was judged, and why refusals were lost."""
    prompts = verdict.prompts
    lines = [
        f"Judge: {verdict.judge}.",
        f"Prompts: {prompts.source}, split {prompts.split}, sha256 {prompts.fingerprint[:12]}.",
    ]
    if verdict.agreement:
        agreed = arrow(verdict.agreement.before, verdict.agreement.after)
        differ = count(len(verdict.agreement.differ))
        lines.append(
            f"Both judges say the same: {agreed}; they differ on {differ} harmful prompts, which are undecided."
        )
    if (instructed := told_instructed(verdict)) is not None:
        lines.append(instructed)
    if verdict.tries > 1:
        lines.append(f"{verdict.tries} tries on these prompts so far; the level is corrected for them.")
    if verdict.lost:
        lost = ", ".join(f"{n} {LOST.get(why, why)}" for why, n in verdict.lost.items())
        lines.append(f"Lost refusals: {lost}.")
    return lines


def _changes(verdict: Verdict) -> list[Change]:
    labels = {"lookalike": "Lookalike refusals", "harmful": "Harmful refusals", "benign": "Benign refusals"}
    wanted = {"lookalike": "fewer is better", "harmful": "must not fall", "benign": "should stay at none"}
    changes = []
    for kind, label in labels.items():
        before, after = verdict.table[kind].refusal_before, verdict.table[kind].refusal_after
        note = f"{wanted[kind]} · {count(after.n)} prompts"
        changes.append(Change(label, percent(before.value), percent(after.value), note))
    return changes


def headline(artefacts: Artefacts) -> Headline:
    """Return the verdict first: what the edit did, else what mediates the behaviour, else what is missing."""
    diagnosis, verdict = artefacts.diagnosis, artefacts.verdict
    found = diagnosis.difference.sentence if diagnosis else ""
    if verdict:
        # a loss among harmless prompts is told first: nobody looks for it
        if verdict.table["benign"].drop.high < 0:
            found = f"{_moved(verdict.table['benign'], 'Refusals of plainly harmless prompts')}. {found}"
        if (expert_format := verdict.expert_format) not in ("bf16", "native"):
            found = f"Verified with routed experts in {expert_format}, not with those that an export writes. {found}"
        tone = "unsure" if artefacts.stale else FLOOR_TONE.get(verdict.decision, "unsure")
        return Headline(_edit_title(verdict), found, _changes(verdict), tone)
    if artefacts.info:
        return Headline("An edit was made; nothing about it is proven yet.", found, [], "unsure")
    if artefacts.metrics:
        return Headline("Training began; there is no edit yet.", found, [], "unsure")
    title = DIFFERENCE.get(diagnosis.difference.verdict if diagnosis else "", UNKNOWN_DIFFERENCE)
    # the sentence begins as the title does; what follows says why
    return Headline(f"{title}.", capital(found.partition(": ")[2]), [], "neutral")


def standing(diagnosis: Diagnosis) -> str:
    """Return what the diagnosis was measured on."""
    pairs = count(diagnosis.n_pairs)
    if not diagnosis.matched:
        return f"Measured on {pairs} flagged prompts and as many unrelated benign ones: there are no twins."
    usable = ", ".join(f"{count(kind.n_usable)} {kind.kind}" for kind in diagnosis.kinds)
    return (
        f"Measured on {pairs} flagged prompts and their harmless twins; {count(diagnosis.n_aligned)} are of equal "
        f"length. These decide, as the prompt is refused while its twin is answered: {usable}."
    )


def counted(found: Localization) -> str:
    """Return which pairs were left out, what stood in for controls, and how near twin and controls are in routing."""
    said = [f"{count(n)} {reason}" for reason, n in found.unusable.items()]
    lines = [f"Left out: {', '.join(said)}."] if said else []
    if found.overlap:
        told = ", ".join(f"with {name} {percent(value)}" for name, value in found.overlap.items())
        lines.append(f"Experts in common, token by token: {told}.")
    if found.stood_in:
        lines.append("Controls: " + ", ".join(f"{name} for {count(n)}" for name, n in found.stood_in.items()) + ".")
    return " ".join(lines)


def notices(artefacts: Artefacts) -> list[str]:
    """Return what a reader must know before trusting the figures, each with its fix."""
    found = list(artefacts.diagnosis.warnings) if artefacts.diagnosis else []
    if artefacts.stale:
        found.append("The verdict was given on another adapter than the one in this run; run gtqlora verify again.")
    made = artefacts.info.details if artefacts.info else None
    if isinstance(made, Training) and made.stopped:
        found.append(f"Training was stopped by its guard and step {made.steps} was kept: {made.stopped}.")
    if len({peer.verdict.model for peer in artefacts.peers}) > 1:
        found.append("The runs side by side are of different models, so their figures do not compare edits alone.")
    if artefacts.verdict is None and artefacts.info:
        found.append("The edit was not verified, so no weights can leave; run gtqlora verify.")
    if not artefacts.info and artefacts.metrics:
        found.append("Training did not finish; run gtqlora train again, which goes on where it stopped.")
    elif not artefacts.info and artefacts.verdict is None:
        found.append("Nothing was edited yet; run gtqlora train (or gtqlora project), then gtqlora verify.")
    return found
