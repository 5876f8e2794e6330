"""The card of exported weights: what was measured, by what, and how often; the base's licence goes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from gtqlora.reporting.loading import loading
from gtqlora.results.adapter import PROJECTION
from gtqlora.results.export import ExportRecord, FormVerdict
from gtqlora.results.verdict import KindRow, Verdict, by_kind
from gtqlora.stats import Interval

_KEPT = ("license", "license_name", "license_link", "language", "extra_gated_prompt", "extra_gated_fields")
"""Of the base's card: what holds for every work made from it."""
_NEEDS_US = (
    "The experts are saved in 4 bits by gtqlora: `import gtqlora.experts` before `from_pretrained`, or transformers "
    "makes experts of random numbers."
)
_WHOLE = "The program that it is for applies all of the edit; an adapter of which it would drop a part is not written."
_OWN_EXPERTS = "bf16"
_KINDS = {
    "safetensors": ("merged weights", "finetune", "transformers"),
    "peft": ("an adapter in PEFT's form", "adapter", "peft"),
    "gguf": ("merged weights in GGUF, for llama.cpp", "quantized", "gguf"),
    "gguf-adapter": ("an adapter in GGUF, for llama.cpp", "adapter", "gguf"),
}
"""Format -> what it is, and as what and of which library the hub lists it."""
_PROGRAMS = {"vllm": "vLLM", "sglang": "SGLang"}
"""Programs that an adapter in PEFT's form may be for, but PEFT itself."""
_LIMITS = """\
- The floor speaks of single-turn, greedy answers to prompts like those named above, by one judge. It does not speak of
  attacks, sampling, other languages or long conversations.
- It speaks of these files in the form named above. Quantized, merged or converted again they are something else, of
  which nothing was measured.
- `gtqlora export --check FOLDER` says whether the files are those that were certified: it compares them with
  `export.json`, which carries no signature."""

_FRONT = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
"""Front matter of a hub card: YAML between two lines of dashes at the very beginning."""
_CODE = re.compile(r"`(?! )([\w ./=:-]+)(?<! )`")
"""Code in a note, without anything that could be markup."""

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
    """Return a hub model card that states what was measured, how the files were made, and how to load them."""
    front = yaml.safe_dump(_metadata(record, base), sort_keys=False, allow_unicode=True).strip()
    sections = {
        "": _head(verdict, record, base),
        "## Safety floor": [
            f"Safety floor: **{record.floor.verdict}** ({record.floor.reason}).",
            "",
            *_how_it_was_judged(record),
        ],
        "## Before and after": _before_and_after(verdict, record),
        "## In the form that ships": _in_form(record),
        "## Good to know": [f"- {with_code(note)}" for note in record.notes],
        "## How to load it": loading(record, base.hub_id, needs_us=base.packed_by_us),
        "## How it was made": _how_it_was_made(record),
        "## Limits": [_LIMITS],
    }
    parts = ["\n\n".join(filter(None, [head, "\n".join(lines)])) for head, lines in sections.items() if lines]
    return f"---\n{front}\n---\n" + "\n\n".join(parts) + "\n"


def what_it_is(form: str, target: str | None) -> str:
    """Return in words what an export in this format holds, and for which program it is."""
    what = _KINDS[form][0]
    return what if target not in _PROGRAMS else f"{what}, for {_PROGRAMS[target]}"


def _head(verdict: Verdict, record: ExportRecord, base: Base) -> list[str]:
    _, relation, _ = _KINDS[record.format]
    what = what_it_is(record.format, record.target)
    experts = "projected" if verdict.kind == PROJECTION else "untouched"
    at = "" if record.revision is None else f", at revision {inline(record.revision)}"
    ancestors = record.ancestors[:-1]
    return [
        f"# {inline(Path(verdict.model).name)}, edited with gtqlora ({verdict.kind})",
        "",
        f"{what[0].upper()}{what[1:]}: {record.tensors_changed} tensors changed, routed experts {experts}.",
        "",
        f"Base: {inline(base.hub_id or record.base)}{at} (digest of its files {inline(record.base_fingerprint)}).",
        *(["", _WHOLE] if relation == "adapter" else []),
        *(["", f"Edited before: {', '.join(map(inline, ancestors))}."] if ancestors else []),
        *(["", _NEEDS_US] if base.packed_by_us else []),
    ]


def _before_and_after(verdict: Verdict, record: ExportRecord) -> list[str]:
    experts = " (4 bits)" if verdict.expert_format != _OWN_EXPERTS else ""
    which = "the weights as they are here" if record.form is None else "the merged weights that these were made from"
    return [
        *_table(verdict.table),
        "",
        f"Rates with 95 % intervals on held-out prompts, of {which}: merged, in the checkpoint's dtype, with its own "
        f"experts{experts}.",
    ]


def _in_form(record: ExportRecord) -> list[str]:
    """Return what was measured of the files as their program runs them; nothing where `verify` judged just these."""
    form = record.form
    if form is None:
        return []
    return [
        f"{inline(form.name)}: safety floor **{form.floor.verdict}** ({form.floor.reason}).",
        "",
        *_table(form.table),
        "",
        "Base and edit were asked the same prompts in this form: every harmful one, and some of the others.",
        *_in_form_inside_frames(form),
    ]


def _in_form_inside_frames(form: FormVerdict) -> list[str]:
    found = form.wrapped
    if found is None:
        return ["", "Inside plain frames nothing was asked in this form."]
    asked = max((row.asked for row in found.wrappers), default=0)
    return [
        "",
        f"Inside plain frames, {asked} harmful prompts in each of {len(found.wrappers)}: **{found.verdict}** "
        f"({inline(found.reason)}).",
    ]


def _table(rows: Mapping[str, KindRow]) -> list[str]:
    lines = ["| prompts | n | refusal before | refusal after | task accuracy after |", "|---|---|---|---|---|"]
    for kind, row in by_kind(rows):
        cells = map(_percent, (row.refusal_before, row.refusal_after, row.accuracy_after))
        lines.append(f"| {inline(kind)} | {row.refusal_before.n} | {' | '.join(cells)} |")
    return lines


def _how_it_was_made(record: ExportRecord) -> list[str]:
    packages = ", ".join(f"{inline(name)} {inline(version)}" for name, version in sorted(record.versions.items()))
    settings = ", ".join(f"{inline(key)} = {inline(json.dumps(value))}" for key, value in record.recipe.items())
    return [
        f"- Pairs that trained it: sha256 {inline(record.trained_on or 'not on record')}",
        f"- Pairs that verified it: sha256 {inline(record.prompts.fingerprint)}",
        f"- Edit: sha256 {inline(record.adapter)}",
        *([f"- Settings: {settings}"] if settings else []),
        *([f"- Versions: {packages}"] if packages else []),
    ]


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
        *_inside_frames(record),
        *_instructed(record),
        f"- Of all refusals of the first original at most {record.spent:.2%} may be lost.",
    ]


def _inside_frames(record: ExportRecord) -> list[str]:
    found = record.wrapped
    if found is None:
        return []
    told = (
        f"- Inside plain frames (a story, a role, another language, ...): **{found.verdict}** ({inline(found.reason)})"
    )
    return [told, *([f"- Frames of whoever verified it: sha256 {inline(record.wrappers)}"] if record.wrappers else [])]


def _instructed(record: ExportRecord) -> list[str]:
    found = record.instructed
    if found is None:
        return []
    return [f"- What a user's system prompt tells it to decline: **{found.verdict}** ({found.reason})"]


def _metadata(record: ExportRecord, base: Base) -> Metadata:
    return {
        **base.metadata,
        **({} if base.hub_id is None else _named(base.hub_id, record.format)),
        "library_name": _KINDS[record.format][2],
        "pipeline_tag": "text-generation",
        "tags": ["gtqlora", "mixture-of-experts"],
    }


def _named(hub_id: str, form: str) -> Metadata:
    return {"base_model": hub_id, "base_model_relation": _KINDS[form][1]}


def kept_metadata(card: str) -> Metadata:
    """Return what of the base's own card is carried over; nothing if that cannot be read."""
    found = _front(card)
    return {key: found[key] for key in _KEPT if key in found}


def names_base(card: str) -> bool:
    """Return whether a card's front matter has the name of the base, by which the hub lists it there."""
    return bool(_front(card).get("base_model"))


def with_base(card: str, hub_id: str, form: str) -> str:
    """Return a card that names no base with the base's name on the hub, and all else as it is.

    Args:
        form: the format of the export.
    """
    lines, head = yaml.safe_dump(_named(hub_id, form), sort_keys=False), _FRONT.match(card)
    return f"---\n{lines}---\n{card}" if head is None else card[: head.start(1)] + lines + card[head.start(1) :]


def _front(card: str) -> Metadata:
    head = _FRONT.match(card)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _printable(text: str) -> str:
    # control characters too: a terminal or a browser might obey them
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def inline(text: str) -> str:
    """Return somebody else's text for a line of Markdown: one line, no markup."""
    return _escaped(_printable(text))


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", text)


def with_code(note: str) -> str:
    """Return a note as `inline` does, but with its code as code."""
    parts = _CODE.split(_printable(note))
    return "".join(f"`{part}`" if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _percent(interval: Interval | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"
