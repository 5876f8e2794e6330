"""What a reader of a variant's folder should know, as a model card."""

from __future__ import annotations

from pathlib import Path

import yaml

from gtqlora.bitdelta.container import Record
from gtqlora.families.files import checked_file, has
from gtqlora.reporting.model_card import inline, kept_metadata
from gtqlora.results.export import FormVerdict
from gtqlora.stats import Interval

_LONGEST = 2**20
"""Characters of the base's own card that are read."""


def card(record: Record, base: Path) -> str:
    """Return the card of a variant, or of the weights that were made from it; the base's licence goes with it."""
    # the base's licence and languages hold for every work that is made from it
    metadata = {**kept_metadata(_own(base)), "library_name": "gtqlora", "tags": ["gtqlora", "bitdelta"]}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
            "---",
            f"# {inline(record.name)}: one bit a weight on {inline(record.base)}",
            "",
            f"Differences of {inline(record.tuned)} from {inline(record.base)}: signs with a scale for every row and "
            f"column, {record.size.ratio:.1f} times smaller than in 16 bits; {record.energy_lost:.1%} of their energy "
            "is lost. Gates, norms and biases are whole.",
            "",
            f"- Use: `gtqlora bitdelta serve BASE THIS`, or `gtqlora bitdelta apply BASE THIS OUT` for dense weights; "
            f"only with the base whose files have the digest {record.base_fingerprint}.",
            f"- Judge: {inline(record.judge)}; prompts: {inline(record.prompts.source)} (split "
            f"{inline(record.prompts.split)}, sha256 {inline(record.prompts.fingerprint)}), try {record.tries}.",
            f"- Of all refusals of the first original at most {record.spent:.2%} may be lost.",
            "",
            *_table("the fine-tune", record.against_tuned),
            *_table("the base", record.against_base),
        ]
    )


def _own(folder: Path) -> str:
    if not has(folder, "README.md"):
        return ""
    with checked_file(folder, "README.md").open(encoding="utf-8", errors="replace") as stream:
        return stream.read(_LONGEST)


def _table(whom: str, verdict: FormVerdict) -> list[str]:
    rows = [
        f"| {kind} | {row.refusal_before.n} | {_shown(row.refusal_before)} | {_shown(row.refusal_after)} | "
        f"{_shown(row.accuracy_before)} | {_shown(row.accuracy_after)} |"
        for kind, row in verdict.table.items()
    ]
    return [
        f"Against {whom}, the safety floor's verdict is **{verdict.floor.verdict}** ({verdict.floor.reason}).",
        "",
        f"| prompts | n | refused by {whom} | by the variant | accuracy of {whom} | of the variant |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _shown(rate: Interval | None) -> str:
    return "not measured" if rate is None else f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"
