"""The card beside a contrast set that was made of public ones: where its rows come from, and under which licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gtqlora.contrasts.rows import ALL_KINDS, kinds_of
from gtqlora.results.built import Built, BuiltSource


def card(built: Built) -> str:
    """Return the card as Markdown: counts, sources and licences, and no word of any prompt or answer."""
    kinds_there = kinds_of(kind for kinds in built.counts.values() for kind in kinds)
    parts = [
        f"# {built.file.name}",
        f"Contrast pairs for gtqlora, made by `gtqlora contrast build` with the answers of `{built.model}`, told from "
        f"refusals by the judge `{_plain(built.judge)}`.",
        _table(
            ("split", *kinds_there),
            [(split, *(f"{kinds.get(kind, 0):,}" for kind in kinds_there)) for split, kinds in built.counts.items()],
        ),
        " ".join(_sentences(built)),
        "## Sources",
        _table(
            ("source", "taken for", "licence", "rows", "asked", "kept"),
            [
                (one.name, _linked(one), one.licence, f"{one.rows:,}", by_kind(one.asked), by_kind(one.kept))
                for one in built.sources
            ],
        ),
        "A set made of others is used under the licences of all of them.",
        "## Left out",
        _table(
            ("source", "rows", "why"),
            [(one.name, f"{n:,}", why) for one in built.sources for why, n in one.left_out.items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _sentences(built: Built) -> list[str]:
    lookalike = sum(kinds.get("lookalike", 0) for kinds in built.counts.values())
    return [
        f"The model refuses {built.refused:,} of the {built.harmful:,} harmful prompts that it was asked.",
        *([f"{built.served.sentence.capitalize()}."] if built.served else []),
        *([f"{built.beyond_limit}."] if built.beyond_limit else []),
        "`chosen` of a harmful row is its own refusal, cut to 40 words, and `rejected` an opening phrase.",
        f"Of {lookalike:,} lookalike rows, which the model refuses, {built.own_answers:,} have an answer of its own, "
        f"the others their set's; {built.with_twin:,} have a twin that it answers.",
        f"Safety floor: {built.floor or 'the held-out harmful prompts can settle it'}.",
    ]


def by_kind(counts: Mapping[str, int]) -> str:
    """Return counts with their kinds, "none" if there are none."""
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in ALL_KINDS if counts.get(kind)) or "none"


def _linked(one: BuiltSource) -> str:
    return f"[{one.layout}]({one.url})" if one.url else one.layout


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A table without rows is no table in Markdown.
    lines = [columns, ["---"] * len(columns), *(rows or [["none"] + [""] * (len(columns) - 1)])]
    return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Return a text that neither ends a cell nor a line: names of files and judges are anything."""
    return " ".join(text.replace("|", "\\|").replace("`", "'").split())
