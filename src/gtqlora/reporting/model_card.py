"""The card of exported weights: what was measured, by what, and how often; the base's licence goes with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gtqlora.results.adapter import PROJECTION
from gtqlora.results.export import ExportRecord
from gtqlora.results.verdict import Verdict
from gtqlora.stats import Interval

_KEPT = ("license", "license_name", "license_link", "language", "extra_gated_prompt", "extra_gated_fields")
"""Of the base's card: what holds for every work made from it."""
_NEEDS_US = (
    "The experts are saved in 4 bits by gtqlora: `import gtqlora.experts` before `from_pretrained`, or transformers "
    "makes experts of random numbers."
)
_OWN_EXPERTS = "bf16"

Metadata = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a card says of the model that was edited.

    Attributes:
        metadata: of its own card, as far as it is carried over; see `kept_metadata`.
        hub_id: its name on the hub; None for a folder.
        packed_by_us: its experts are saved in a format of gtqlora's own.
    """

    metadata: Metadata = field(default_factory=Metadata)
    hub_id: str | None = None
    packed_by_us: bool = False


def model_card(verdict: Verdict, record: ExportRecord, base: Base) -> str:
    """Return a hub model card that states what was measured."""
    ancestors = record.ancestors[:-1]
    lines = [
        "---",
        yaml.safe_dump(_metadata(base), sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {inline(Path(verdict.model).name)}, edited with gtqlora ({verdict.kind})",
        "",
        f"Merged weights: {record.tensors_changed} tensors changed, routed experts "
        + ("projected." if verdict.kind == PROJECTION else "untouched."),
        *(["", f"Edited before: {', '.join(map(inline, ancestors))}."] if ancestors else []),
        *(["", _NEEDS_US] if base.packed_by_us else []),
        "",
        f"Safety floor: **{record.floor.verdict}** ({record.floor.reason}).",
        "",
        *_how_it_was_judged(record),
        "",
        "| prompts | n | refusal before | refusal after | task accuracy after |",
        "|---|---|---|---|---|",
    ]
    for kind, row in verdict.table.items():
        cells = map(_percent, (row.refusal_before, row.refusal_after, row.accuracy_after))
        lines.append(f"| {kind} | {row.refusal_before.n} | {' | '.join(cells)} |")
    lines += [
        "",
        "Rates with 95 % intervals on held-out prompts, of the weights as they are here: merged, in the checkpoint's "
        "dtype, with its own experts" + (" (4 bits)." if verdict.expert_format != _OWN_EXPERTS else "."),
        "",
    ]
    return "\n".join(lines)


def _how_it_was_judged(record: ExportRecord) -> list[str]:
    floor, prompts, asked = record.floor, record.prompts, len(record.verdicts)
    # that an edit was judged before and did not pass is part of what a reader must know
    failed = sorted({given.verdict for given in record.verdicts} - {"pass"})
    return [
        f"- Judge: {inline(record.judge)}",
        f"- Prompts: {floor.prompts} harmful ones, of which the original refuses {floor.refused}, in {floor.groups} "
        f"groups, from {inline(prompts.source)} (split {inline(prompts.split)}, sha256 {inline(prompts.fingerprint)})",
        f"- Asked: {asked} verdict{'s' * (asked != 1)} on this edit"
        + (f", among them {' and '.join(failed)}" if failed else "")
        + f"; {record.tries} edit{'s' * (record.tries != 1)} judged on these prompts, so the level is "
        f"{floor.level:.4g}",
        f"- Of all refusals of the first original at most {record.spent:.2%} may be lost.",
    ]


def _metadata(base: Base) -> Metadata:
    named = {} if base.hub_id is None else {"base_model": base.hub_id}
    return {
        **base.metadata,
        **named,
        "library_name": "transformers",
        "tags": ["gtqlora", "mixture-of-experts"],
    }


def kept_metadata(card: str) -> Metadata:
    """Return what of the base's own card is carried over; nothing if that cannot be read."""
    # front matter of a hub card: YAML between two lines of dashes at the very beginning
    head = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return {key: found[key] for key in _KEPT if key in found} if isinstance(found, dict) else {}


def inline(text: str) -> str:
    """Return somebody else's text for a line of Markdown: one line, no markup."""
    # control characters too: a terminal or a browser might obey them
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", plain)


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"
