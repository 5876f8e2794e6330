"""Print what `contrast check` found of pairs, and what a chat template does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gtqlora.cli import tables
from gtqlora.cli.console import open_console, say, say_whole
from gtqlora.cli.figures import many
from gtqlora.cli.layout import draw

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from gtqlora.contrasts.prompting import Prompting
    from gtqlora.contrasts.sources import Problem
    from gtqlora.contrasts.statistics import Statistics, Twins


def show_checked(found: Statistics, source: str, dropped: Sequence[Problem], out: Path | None) -> None:
    """Print what a set holds, what was left out, and what was written."""
    show_contrast(found, source)
    show_dropped(dropped)
    if out:
        show_written(out, found)


def show_contrast(found: Statistics, source: str) -> None:
    """Print what a contrast set that passed every check holds."""
    console = open_console()
    draw(console, tables.rows_by_split(found, f"{source}: {many(found.rows, 'row')}, {many(found.pairs, 'pair')}"))
    say(console, f"{many(found.with_twin, 'row')} with a twin, {many(found.unique_prompts, 'different prompt')}")
    for name, lengths in (("prompt", found.prompt_tokens), ("prompt and answer", found.full_tokens)):
        if lengths:
            span = f"{lengths.minimum:,} to {lengths.maximum:,}, median {lengths.median:,g}, 95 % {lengths.p95:,}"
            say(console, f"tokens, {name}: {span}")
    if found.max_length:
        say(console, f"tokens that prompt and answer may have: {found.max_length:,}")
    if found.template:
        show_prompting(console, found.template)
    if found.readout:
        behind = f" behind {found.begun!r}, with which all begin" if found.begun else ""
        say(console, f"refusals are told from answers by the token {' or '.join(map(repr, found.readout))}{behind}")
    if found.twins:
        draw(console, tables.twins(found.twins))
    if found.agreement:
        draw(console, tables.agreement(found.agreement))
    say(console, f"{many(found.duplicates, 'duplicate')}, {many(found.leaks, 'leak')} between splits")
    say(console, "the one-way rule holds in every row", "green")
    floors = (found.floor.note, found.instructed and found.instructed.note, found.repair.note)
    for lacking in filter(None, (*floors, _too_few(found.twins or {}), *_weak(found))):
        say(console, f"note: {lacking}", accent=("note:", "yellow"))


def show_prompting(console: Console, found: Prompting) -> None:
    """Print what a chat template can be told, and where it has answers begin."""
    say(console, f"chat template: {found.sentence}")
    if found.reads:
        say(console, f"variables that `template` can set: {', '.join(found.reads)}")


def _weak(found: Statistics) -> Iterator[str]:
    """Yield what the pairs do not show to a diagnosis, or to the judge."""
    if found.readout == []:
        yield (
            "refusals and answers begin with the same tokens, so that diagnose has no log-odds and names no single "
            "experts; give `rejected` and `chosen` openings that differ"
        )
    for one in found.agreement or ():
        if not one.enough:
            yield (
                f"the judge takes only {one.agreeing:,} of {one.rows:,} {one.kind} `{one.column}` for "
                f"{'an' if one.meant == 'answer' else 'a'} {one.meant}; mend them, or take a judge that knows how this "
                "model refuses"
            )


def _too_few(twins: Mapping[str, Mapping[str, Twins]]) -> str:
    """Say where a diagnosis would not find enough pairs to interchange; "" if it does."""
    from gtqlora.config import DiagnoseConfig
    from gtqlora.results.diagnosis import FLAGGED_KINDS, MIN_PAIRS

    def count(*splits: str) -> dict[str, int]:
        found = {
            kind: [twins[split][kind] for split in splits if kind in twins.get(split, {})] for kind in FLAGGED_KINDS
        }
        return {kind: sum(one.swappable for one in each) for kind, each in found.items() if kind in kinds}

    kinds = {kind for each in twins.values() for kind in each}
    few = {kind: n for kind, n in count(DiagnoseConfig.split).items() if n < MIN_PAIRS}
    if not few:
        return ""
    have = " and ".join(f"{n:,} {kind}" for kind, n in few.items())
    everywhere = count(*twins)
    more = " and ".join(f"{everywhere[kind]:,} {kind}" for kind in few)
    return (
        f"diagnose reads the {DiagnoseConfig.split} split, where {have} pairs can be interchanged; a verdict needs "
        f"{MIN_PAIRS} of a kind. All splits have {more} (--set split=all); a twin needs as many tokens as its prompt"
    )


def show_written(out: Path, found: Statistics) -> None:
    """Print what was written, with its rows by kind."""
    kinds = ", ".join(f"{found.kinds[kind]:,} {kind}" for kind in tables.KINDS if kind in found.kinds)
    say_whole(open_console(), f"wrote {out}: {many(found.rows, 'row')} ({kinds})")


def show_dropped(dropped: Sequence[Problem]) -> None:
    """Print which rows were left out of what was written, and why."""
    from gtqlora.contrasts.sources import grouped

    console = open_console()
    if dropped:
        say(console, f"left out: {len({row for one in dropped for row in one.excess}):,} rows", "yellow")
    for line in grouped([replace(one, rows=one.excess) for one in dropped]):
        say(console, f"  {line}")
