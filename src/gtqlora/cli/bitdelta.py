"""The verbs of `gtqlora bitdelta`: a fine-tune as one bit a weight on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from gtqlora.cli import printing
from gtqlora.cli.console import stage_progress, starting
from gtqlora.cli.serve import serve
from gtqlora.cli.settings import Json, Model, StageOptions, configured, embedded_model

HELP = """Ship a full fine-tune as one bit a weight on top of its base (BitDelta): signs, with a scale for each row and
column; gates, norms and biases whole. Some fifteen times smaller, and many share one resident base."""
_NO_OPTIONS = StageOptions()
Delta = Annotated[Path, Parameter(help="Folder that `bitdelta compress` wrote.")]


def compress(
    base: Model,
    tuned: Annotated[str, Parameter(help="The fine-tune: a folder or hub id of the same architecture.")],
    out: Annotated[Path, Parameter(help="New folder for the variant.")],
    *,
    name: Annotated[str | None, Parameter(help="What the variant is called; by default as the fine-tune.")] = None,
    distill: Annotated[
        bool, Parameter(negative="", help="Fit scales to what layers compute on the pairs' benign training prompts.")
    ] = False,
    options: StageOptions = _NO_OPTIONS,
) -> None:
    """Compress a fine-tune, and write it only if it keeps the refusals of harmful prompts."""
    with starting():
        from gtqlora.bitdelta.compress import compress as work
        from gtqlora.config import VerifyConfig

    config = configured(VerifyConfig, options, {"model": tuned})
    with stage_progress():
        found = work(embedded_model(base), out, config, name=name, distill=distill)
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_compressed(found)


def apply(
    base: Model,
    delta: Delta,
    out: Annotated[Path, Parameter(help="New folder for the weights.")],
    *,
    as_json: Json = False,
) -> None:
    """Write a variant as dense weights again, on the very base that it was made from."""
    with starting():
        from gtqlora.bitdelta.apply import apply as work

    with stage_progress():
        found = work(embedded_model(base), delta, out)
    if as_json:
        printing.show_json(found)
    else:
        printing.show_applied(found)


app = App(name="bitdelta", help=HELP)
for _verb in (compress, apply, serve):
    app.command(_verb)
