"""The verb `contrast build`: pairs are made of public sets of prompts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gtqlora.cli import printing, tables
from gtqlora.cli.console import open_console, say, say_whole, stage_progress, starting
from gtqlora.cli.layout import draw
from gtqlora.cli.settings import BuildOptions, build_config, same_template
from gtqlora.errors import ConfigError

if TYPE_CHECKING:
    from gtqlora.results.built import Built

NO_BUILD = BuildOptions()


def build(
    *sources: Annotated[
        str, Parameter(help="Public sets of prompts: files, dataset folders, or hub ids such as ID:CONFIG@SPLIT.")
    ],
    model: Annotated[str | None, Parameter(help="The model that answers: folder, hub id, or organism:NAME.")] = None,
    out: Annotated[Path | None, Parameter(help="New Parquet file for the pairs; a card comes beside it.")] = None,
    options: BuildOptions = NO_BUILD,
) -> None:
    """Make pairs of public sets of prompts, with the model's own answers; resumes if it was interrupted.

    Prompts and answers stay on this machine; neither the card nor what is shown holds any of them.
    """
    if not sources:
        raise ConfigError("SOURCE is missing. See gtqlora contrast build --help")
    if model is None:
        raise ConfigError("--model is missing: answers and refusals of the pairs come from the model that is edited")
    if out is None:
        raise ConfigError("--out is missing: the Parquet file that is made, such as pairs.parquet")
    with starting():
        # Before anything that takes seconds to import: what can be told without a model.
        from gtqlora.contrasts.layouts import described
        from gtqlora.contrasts.loading import check_new
        from gtqlora.contrasts.sources import check_named

        descriptions = [described(text) for text in options.described or ()]
        config = build_config(model, out, options)
        check_new(out)
        for source in sources:
            check_named(source)
        from gtqlora.stages.build import build as stage

    with stage_progress():
        found = stage(config, sources, descriptions, restart=options.restart)
    if options.as_json:
        printing.show_json(found)
    else:
        _show_built(found, options)


_NOTHING_TO_REPAIR = (
    "no lookalike row is left, so there is nothing to repair: the model answers these prompts, or no answer to them "
    "could be had; take other sets, or draw more answers (--set samples=8)"
)


def _show_built(found: Built, options: BuildOptions) -> None:
    """Print what was made of public sets, and what comes next."""
    console = open_console()
    draw(console, tables.rows_by_split(found, found.file.name))
    draw(console, tables.built_sources(found))
    if found.served:
        say(console, found.served.sentence)
    say(console, f"the model refuses {found.refused:,} of {found.harmful:,} harmful prompts, by judge {found.judge}")
    if found.beyond_limit:
        say(console, found.beyond_limit)
    lookalike = sum(kinds.get("lookalike", 0) for kinds in found.counts.values())
    own = f"{found.own_answers:,} of {lookalike:,} lookalike rows have an answer of the model's own"
    say(console, f"{own}, {found.with_twin:,} a twin")
    licences = dict.fromkeys(f"{one.layout}: {one.licence}" for one in found.sources)
    say(console, f"licences of the sources: {'; '.join(licences)}")
    if not lookalike:
        say(console, f"note: {_NOTHING_TO_REPAIR}", accent=("note:", "yellow"))
    if found.floor:
        say(console, f"note: {found.floor}", accent=("note:", "yellow"))
    say_whole(console, f"card: {found.card}")
    judged = ["--judge", found.judge] if found.judge != "string" else []
    recipe = ["--config", str(options.config)] if options.config else []
    again = [*judged, *recipe, *same_template(options.settings)]
    words = ["contrast", "check", str(found.file), "--model", found.model, *again]
    say_whole(console, f"next: gtqlora {shlex.join(words)}")
