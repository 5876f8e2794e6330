"""The card of exported weights: what was measured, by what, and how often; the base's licence goes with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gtqlora.certificate import Certificate
from gtqlora.edits.adapter_files import PROJECTION
from gtqlora.experts.loading import BF16
from gtqlora.families import quantization
from gtqlora.families.files import checked_file, small_files
from gtqlora.families.packed import OURS

_KEPT = ("license", "license_name", "license_link", "language", "extra_gated_prompt", "extra_gated_fields")
"""Of the base's card: what holds for every work made from it."""
_MOST = 2**20
_NEEDS_US = (
    "The experts are saved in 4 bits by gtqlora: `import gtqlora.experts` before `from_pretrained`, or transformers "
    "makes experts of random numbers."
)


def model_card(certificate: Certificate, tensors_changed: int) -> str:
    """A hub model card that states what was measured."""
    verdict, floor = certificate.verdict, certificate.floor
    ancestors = certificate.ancestry.names
    lines = [
        "---",
        yaml.safe_dump(_metadata(certificate), sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {inline(Path(verdict.model).name)}, edited with gtqlora ({verdict.kind})",
        "",
        f"Merged weights: {tensors_changed} tensors changed, routed experts "
        + ("projected." if verdict.kind == PROJECTION else "untouched."),
        *(["", f"Edited before: {', '.join(map(inline, ancestors))}."] if ancestors else []),
        *(["", _NEEDS_US] if quantization(verdict.model) == OURS else []),
        "",
        f"Safety floor: **{floor.verdict}** ({floor.reason}).",
        "",
        *_how_it_was_judged(certificate),
        "",
        "| prompts | n | refusal before | refusal after | task accuracy after |",
        "|---|---|---|---|---|",
    ]
    for kind, row in verdict.table.items():
        cells = (_percent(row["refusal_before"]), _percent(row["refusal_after"]), _percent(row["accuracy_after"]))
        lines.append(f"| {kind} | {row['refusal_before']['n']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Rates with 95 % intervals on held-out prompts, of the weights as they are here: merged, in the checkpoint's "
        "dtype, with its own experts" + (" (4 bits)." if verdict.expert_format != BF16 else "."),
        "",
    ]
    return "\n".join(lines)


def _how_it_was_judged(certificate: Certificate) -> list[str]:
    verdict, floor, history = certificate.verdict, certificate.floor, certificate.history
    failed = sorted({entry.verdict for entry in history} - {"pass"})
    return [
        f"- Judge: {inline(verdict.judge)}",
        f"- Prompts: {floor.prompts} harmful ones, of which the original refuses {floor.refused}, in {floor.groups} "
        f"groups, from {inline(public(verdict.prompts['source']))} (split {inline(verdict.prompts['split'])}, sha256 "
        f"{inline(verdict.prompts['fingerprint'])})",
        f"- Asked: {len(history)} verdict{'s' * (len(history) != 1)} on this edit"
        + (f", among them {' and '.join(failed)}" if failed else "")
        + f"; {certificate.tries} edit{'s' * (certificate.tries != 1)} judged on these prompts, so the level is "
        f"{floor.level:.4g}",
        f"- Of all refusals of the first original at most {certificate.spent:.2%} may be lost.",
    ]


def _metadata(certificate: Certificate) -> dict[str, Any]:
    base = certificate.adapter.info
    named = {"base_model": base.base} if base.revision is not None else {}
    return {
        **_base_metadata(certificate.verdict.model),
        **named,
        "library_name": "transformers",
        "tags": ["gtqlora", "mixture-of-experts"],
    }


def _base_metadata(model: str) -> dict[str, Any]:
    """What of the base's own card is carried over; nothing if it has none that can be read."""
    folder = small_files(model)
    if not (folder / "README.md").exists():
        return {}
    with checked_file(folder, "README.md").open(encoding="utf-8", errors="replace") as stream:
        head = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", stream.read(_MOST), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return {key: found[key] for key in _KEPT if key in found} if isinstance(found, dict) else {}


def public(name: str) -> str:
    """A model's or a set's name without the folders it lies in here, which are nobody else's business."""
    return Path(name).name if Path(name).is_absolute() else name


def inline(text: str) -> str:
    """Somebody else's text in a line of Markdown: one line, no markup."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", plain)


def _percent(interval: dict[str, Any] | None) -> str:
    if not interval or interval["value"] is None:
        return "not measured"
    return f"{interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"
