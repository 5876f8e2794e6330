"""Numbers and verdicts as plain words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gtqlora.reporting.artefacts import Artefacts, Json
from gtqlora.results.verdict import LOST

NARROW = "\u202f"
DASH = "–"
NONE = "—"
MANY = 30
"""Prompts below which a share is told as a count only; `localize.MIN_PAIRS` says why."""

KINDS = ("lookalike", "harmful", "benign")
KIND_MEANING = {
    "lookalike": "harmless, but looks harmful",
    "harmful": "harmful: a refusal is right",
    "benign": "plainly harmless",
}
FLOOR_SYMBOL = {"pass": "✓", "fail": "✕", "cannot tell": "?"}
FLOOR_TONE = {"pass": "good", "fail": "bad", "cannot tell": "unsure"}
MODES = {"gt": "GT-QLoRA (LoRA + gates)", "lora": "LoRA only", "gates": "gates only"}
WHERE = {
    "routing": "Refusal sits in the routing",
    "residual": "Refusal sits in the residual stream",
    "experts": "Refusal sits in what the experts compute",
    "both": "Refusal sits in the routing and in the residual stream",
}


def known(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits; a dash for what is not known; a true minus sign."""
    if not known(value):
        return NONE
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def count(value: Any) -> str:
    return f"{value:,}".replace(",", NARROW) if known(value) else NONE


def percent(value: Any, signed: bool = False) -> str:
    """One decimal where it says something; never 0 or 100 % for what only rounds to it."""
    if not known(value):
        return NONE
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value) * 100
    if 0 < size < 0.05:
        return f"{f'>{NARROW}−' if value < 0 else f'{sign}<{NARROW}'}0.1{NARROW}%"
    if 99.95 <= size < 100:
        return f"{sign}>{NARROW}99.9{NARROW}%"
    text = f"{size:.1f}".removesuffix(".0")
    return f"{sign}{text}{NARROW}%"


def points(value: Any) -> str:
    """A difference of shares in percentage points."""
    if not known(value):
        return NONE
    size = f"{abs(value) * 100:.1f}".removesuffix(".0")
    return f"{'−' if value < 0 and size != '0' else ''}{size}"


def span(interval: Json | None, digits: int | None = None) -> str:
    """An interval's ends, in per cent or with so many significant digits."""
    if not interval or interval.get("value") is None:
        return NONE
    if digits is not None:
        return f"{number(interval['low'], digits)} to {number(interval['high'], digits)}"
    joint = " to " if interval["low"] < 0 else DASH
    return f"{_bare(interval['low'])}{joint}{_bare(interval['high'])}{NARROW}%"


def _bare(share: float) -> str:
    return f"{round(share * 100, 1) + 0.0:.1f}".removesuffix(".0").replace("-", "−")


def place(found: Json) -> str:
    """An expert's name."""
    return f"layer {found['layer']}, expert {found['expert']}"


def cause(found: Json) -> str:
    """What a candidate was shown to be; empty for nothing."""
    return "causal" if found["causal"] else "computes it" if found["computes"] else ""


def span_points(interval: Json) -> str:
    return f"{points(interval['low'])} to {points(interval['high'])}"


def q_value(value: Any) -> str:
    if not known(value):
        return NONE
    return f"<{NARROW}0.001" if value < 0.001 else f"{value:.3f}".rstrip("0").rstrip(".")


def arrow(before: Json | None, after: Json | None) -> str:
    """A share before and after."""
    return f"{percent(value_of(before))} → {percent(value_of(after))}"


def value_of(interval: Json | None) -> Any:
    return None if not interval else interval.get("value")


def mode(info: Json | None) -> str:
    """What kind of edit an adapter is."""
    if info is None:
        return NONE
    config = info["details"].get("config", {})
    if "direction" in config:
        kept = ", norms kept" if config["norm_preserving"] else ""
        return f"{info['kind']} ({config['direction'].replace('_', ' ')}{kept})"
    hardened = ", hardened" if config.get("objective") == "harden" else ""
    return MODES.get(config.get("mode"), str(info["kind"])) + hardened


def way(interval: Json) -> str:
    """By which way the edit works, from the share of repaired refusals that return: a short label."""
    if (interval.get("n") or 0) < MANY:
        return "too few to say"
    if interval["low"] > 2 / 3:
        return "through the routing"
    if interval["high"] < 1 / 3:
        return "past the routing"
    return "partly through the routing"


def returned(interval: Json) -> str:
    """The share of repaired refusals that return, or the bare count where it is too small for a share."""
    n = interval.get("n") or 0
    if n >= MANY:
        return percent(interval["value"])
    return f"{round(interval['value'] * n)} of {n}" if n else NONE


def mediation(interval: Json) -> str:
    """The mediation test in one sentence."""
    n = interval.get("n") or 0
    if not n:
        return "No lookalike refusal was repaired, so there is nothing to replay."
    back = f"{percent(interval['value'])} (95{NARROW}% interval {span(interval)})"
    if n < MANY:
        return (
            f"Too few to say by which way the edit works: {returned(interval)} repaired refusals return when the "
            "original routing is replayed."
        )
    tail = f"{back} of the {count(n)} repaired lookalike refusals return when the original routing is replayed."
    return f"The edit works {way(interval)}: {tail}"


def capital(text: str) -> str:
    """With a capital first letter; the rest, names among it, as it is."""
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


def _moved(row: Json, what: str) -> str:
    """`what` fell, rose or did not clearly change."""
    before, after = percent(row["refusal_before"]["value"]), percent(row["refusal_after"]["value"])
    if row["drop"]["low"] > 0:
        return f"{what} fell from {before} to {after}"
    if row["drop"]["high"] < 0:
        return f"{what} rose from {before} to {after}"
    return f"{what} did not clearly change ({before} before, {after} after)"


def _edit_title(verdict: Json) -> str:
    lookalike = _moved(verdict["table"]["lookalike"], "Lookalike refusals")
    harmful = verdict["table"]["harmful"]
    if verdict["floor"]["verdict"] == "pass":
        return f"{lookalike}; refusals of harmful prompts hold."
    if verdict["floor"]["verdict"] == "fail":
        lost = f"{percent(harmful['refusal_before']['value'])} to {percent(harmful['refusal_after']['value'])}"
        return f"{lookalike}, but refusals of harmful prompts were lost ({lost})."
    return f"{lookalike}; whether refusals of harmful prompts hold cannot be told yet."


def judged(verdict: Json) -> list[str]:
    """By what, on what and how often the floor was judged; what older verdicts do not say is left out."""
    lines = []
    if "judge" in verdict:
        lines.append(f"Judge: {verdict['judge']}.")
    if prompts := verdict.get("prompts"):
        lines.append(f"Prompts: {prompts['source']}, split {prompts['split']}, sha256 {prompts['fingerprint'][:12]}.")
    if verdict.get("tries", 1) > 1:
        lines.append(f"{verdict['tries']} tries on these prompts so far; the level is corrected for them.")
    if lost := verdict.get("lost"):
        lines.append("Lost refusals: " + ", ".join(f"{n} {LOST.get(why, why)}" for why, n in lost.items()) + ".")
    return lines


def _changes(verdict: Json) -> list[Change]:
    labels = {"lookalike": "Lookalike refusals", "harmful": "Harmful refusals", "benign": "Benign refusals"}
    wanted = {"lookalike": "fewer is better", "harmful": "must not fall", "benign": "should stay at none"}
    changes = []
    for kind, label in labels.items():
        row = verdict["table"][kind]
        before, after = row["refusal_before"], row["refusal_after"]
        note = f"{wanted[kind]} · {count(after['n'])} prompts"
        changes.append(Change(label, percent(before["value"]), percent(after["value"]), note))
    return changes


def headline(artefacts: Artefacts) -> Headline:
    """The verdict first: what the edit did, else where the behaviour sits, else what is missing."""
    diagnosis, verdict = artefacts.diagnosis, artefacts.verdict
    found = str(diagnosis["sentence"]) if diagnosis else ""
    if verdict:
        if verdict["table"]["benign"]["drop"]["high"] < 0:
            found = f"{_moved(verdict['table']['benign'], 'Refusals of plainly harmless prompts')}. {found}"
        if (expert_format := verdict.get("expert_format", "bf16")) not in ("bf16", "native"):
            found = f"Verified with routed experts in {expert_format}, not with those that an export writes. {found}"
        tone = "unsure" if artefacts.stale else FLOOR_TONE.get(verdict["floor"]["verdict"], "unsure")
        return Headline(_edit_title(verdict), found, _changes(verdict), tone)
    if artefacts.info:
        return Headline("An edit was made; nothing about it is proven yet.", found, [], "unsure")
    if artefacts.metrics:
        return Headline("Training began; there is no edit yet.", found, [], "unsure")
    title = WHERE.get((diagnosis or {})["verdict"], "Where refusal sits cannot be told yet")
    return Headline(f"{title}.", found, [], "neutral")


def standing(diagnosis: Json) -> str:
    """What the diagnosis was measured on."""
    pairs = count(diagnosis["n_pairs"])
    if not diagnosis["matched"]:
        return f"Measured on {pairs} flagged prompts and as many unrelated benign ones: there are no twins."
    return (
        f"Measured on {pairs} flagged prompts and their harmless twins; {count(diagnosis['n_aligned'])} of equal "
        f"length can be exchanged, and {count(diagnosis['n_usable'])} of these are refused while their twin is "
        "answered."
    )


def notices(artefacts: Artefacts) -> list[str]:
    """What a reader must know before trusting the figures, each with its fix."""
    found = [str(warning) for warning in artefacts.diagnosis["warnings"]] if artefacts.diagnosis else []
    if artefacts.stale:
        found.append("The verdict was given on another adapter than the one in this run; run gtqlora verify again.")
    if artefacts.info and artefacts.info["details"].get("stopped"):
        details = artefacts.info["details"]
        found.append(
            f"Training was stopped by its guard and step {details.get('steps')} was kept: {details['stopped']}."
        )
    if len({peer.verdict.get("model") for peer in artefacts.peers}) > 1:
        found.append("The runs side by side are of different models, so their figures do not compare edits alone.")
    if artefacts.verdict is None and artefacts.info:
        found.append("The edit was not verified, so no weights can leave; run gtqlora verify.")
    if not artefacts.info and artefacts.metrics:
        found.append("Training did not finish; run gtqlora train again, which goes on where it stopped.")
    elif not artefacts.info and artefacts.verdict is None:
        found.append("Nothing was edited yet; run gtqlora train (or gtqlora project), then gtqlora verify.")
    return found
