"""What a reader of a variant, or of the dense weights made from it, should know: a model card for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from gtqlora.bitdelta.container import Record
from gtqlora.families.files import checked_file, has
from gtqlora.reporting.loading import loading
from gtqlora.reporting.model_card import inline, kept_metadata, with_code
from gtqlora.results.export import ExportRecord, FormVerdict, asked_with
from gtqlora.results.verdict import by_kind
from gtqlora.stats import Interval

JUDGED = "the variant as it was judged"
"""What stands for the fine-tune where another form of a variant is held to it."""
_LONGEST = 2**20
"""Characters of the base's own card that are read."""
_SCOPE = (
    "The floor speaks of single-turn, greedy answers to prompts like those named above, by one judge. It does not "
    "speak of attacks, sampling, other languages or long conversations.",
    "It speaks of these values. Quantized, merged or converted they are something else, of which nothing was measured.",
)
_CHECKED_IN_USE = (
    "`serve` and `apply` compare the files with `bitdelta.json`, which carries no signature, before they use them. "
    "`gtqlora export --check` is for the dense weights that `apply` writes."
)
_CHECK = (
    "`gtqlora export --check FOLDER` says whether the files are those that were certified: it compares them with "
    "`export.json`, which carries no signature."
)


def variant_card(record: Record, base: Path) -> str:
    """Return the card of a variant, as `bitdelta compress` writes it; the base's licence goes with it."""
    what = (
        f"Differences of {inline(record.tuned)} from {inline(record.base)}: signs with a scale for every row and "
        f"column, {record.size.ratio:.1f} times smaller than in 16 bits; {record.energy_lost:.1%} of their energy is "
        "lost. Gates, norms and biases are whole."
    )
    use = (
        "`gtqlora bitdelta serve BASE THIS` answers with it, and `gtqlora bitdelta apply BASE THIS OUT` makes dense "
        "weights of it. THIS is this folder, and BASE the only model that it fits: the one whose files have the digest "
        f"{inline(record.base_fingerprint)}."
    )
    title = f"{inline(record.name)}: one bit a weight on {inline(record.base)}"
    front = {"library_name": "gtqlora"}
    load = [" ".join([use, *(with_code(f"{said} `serve` does.") for said in asked_with(record.template))])]
    return _card(record, base, front, title=title, what=what, load=load, limits=[*_SCOPE, _CHECKED_IN_USE])


def weights_card(record: Record, export: ExportRecord, base: Path) -> str:
    """Return the card of the dense weights that `bitdelta apply` made from a variant."""
    what = (
        f"Dense weights of {inline(record.base)} with the one-bit differences of {inline(record.tuned)} added, which "
        f"lose {record.energy_lost:.1%} of the energy of what the fine-tune changed: {export.tensors_changed} tensors "
        f"differ from the base (digest of its files {inline(record.base_fingerprint)}). Gates, norms and biases are "
        "the fine-tune's own."
    )
    title = f"{inline(record.name)}: weights from one-bit differences on {inline(record.base)}"
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    load = loading(export, None, needs_us=False)
    limits = [*map(with_code, asked_with(record.template)), *_SCOPE, _CHECK]
    return _card(record, base, front, title=title, what=what, load=load, limits=limits)


def adapter_card(record: Record, export: ExportRecord, base: Path) -> str:
    """Return the card of an adapter for llama.cpp that was made from a variant.

    Args:
        record: of the variant, with the verdicts on the adapter.
    """
    what = (
        f"Differences of {inline(record.tuned)} from {inline(record.base)} in one bit a weight, as a LoRA adapter for "
        f"llama.cpp (signs and diagonals): {export.tensors_changed} tensors differ from the base (digest of "
        f"its files {inline(record.base_fingerprint)})."
    )
    title = f"{inline(record.name)}: one bit a weight on {inline(record.base)}, for llama.cpp"
    front = {"library_name": "gguf", "pipeline_tag": "text-generation"}
    load, limits = loading(export, None, needs_us=False), [*map(with_code, export.notes), *_SCOPE, _CHECK]
    return _card(
        record, base, front, title=title, what=what, load=load, limits=limits, whom=JUDGED, ships="the adapter"
    )


def _card(
    record: Record,
    base: Path,
    front: Mapping[str, str],
    *,
    title: str,
    what: str,
    load: list[str],
    limits: list[str],
    whom: str = "the fine-tune",
    ships: str = "the variant",
) -> str:
    # the base's licence and languages hold for every work that is made from it
    metadata = {**kept_metadata(_own(base)), **front, "tags": ["gtqlora", "bitdelta"]}
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
            "---",
            *(f"# {title}", "", what, ""),
            *("## Safety floor", "", *_how_it_was_judged(record), ""),
            *_table(whom, ships, record.against_tuned),
            *_table("the base", ships, record.against_base),
            *("## How to load it", "", *load, ""),
            *("## Limits", "", *(f"- {limit}" for limit in limits), ""),
        ]
    )


def _how_it_was_judged(record: Record) -> list[str]:
    return [
        f"- Judge: {inline(record.judge)}",
        f"- Prompts: {inline(record.prompts.source)} (split {inline(record.prompts.split)}, sha256 "
        f"{inline(record.prompts.fingerprint)}), try {record.tries}",
        f"- Of all refusals of the first original at most {record.spent:.2%} may be lost.",
    ]


def _own(folder: Path) -> str:
    if not has(folder, "README.md"):
        return ""
    with checked_file(folder, "README.md").open(encoding="utf-8", errors="replace") as stream:
        return stream.read(_LONGEST)


def _table(whom: str, ships: str, verdict: FormVerdict) -> list[str]:
    rows = [
        f"| {inline(kind)} | {row.refusal_before.n} | {_shown(row.refusal_before)} | {_shown(row.refusal_after)} | "
        f"{_shown(row.accuracy_before)} | {_shown(row.accuracy_after)} |"
        for kind, row in by_kind(verdict.table)
    ]
    return [
        f"Against {whom}, the safety floor's verdict is **{verdict.floor.verdict}** ({verdict.floor.reason}).",
        "",
        f"| prompts | n | refused by {whom} | by {ships} | accuracy of {whom} | of {ships} |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def _shown(rate: Interval | None) -> str:
    return "not measured" if rate is None else f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"
