"""The verbs of `gtqlora bitdelta`: a fine-tune as one bit a weight on its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from gtqlora.cli import printing
from gtqlora.cli.console import stage_progress, starting
from gtqlora.cli.serve import serve
from gtqlora.cli.settings import Model, StageOptions, configured, embedded_model
from gtqlora.errors import ConfigError

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
    to: Annotated[
        Literal["safetensors", "llama.cpp"],
        Parameter(help="Dense weights, or a LoRA adapter that llama.cpp switches for each request."),
    ] = "safetensors",
    gguf: Annotated[
        Path | None, Parameter(help="With --to llama.cpp: your own GGUF of the base, which it will be loaded on.")
    ] = None,
    options: StageOptions = _NO_OPTIONS,
) -> None:
    """Write a variant as dense weights again, on the very base that it was made from; or for llama.cpp."""
    if to == "llama.cpp":
        _adapt(base, delta, out, gguf, options)
        return
    with starting():
        from gtqlora.bitdelta.apply import apply as work

    if gguf is not None or replace(options, as_json=False) != _NO_OPTIONS:
        raise ConfigError("--gguf, --contrast and other settings go with --to llama.cpp; dense weights were judged")
    with stage_progress():
        found = work(embedded_model(base), delta, out)
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_applied(found)


def _adapt(base: str, delta: Path, out: Path, gguf: Path | None, options: StageOptions) -> None:
    with starting():
        from gtqlora.bitdelta.llama_cpp import adapt as work
        from gtqlora.config import VerifyConfig

    config = configured(VerifyConfig, options, {"model": embedded_model(base)})
    with stage_progress():
        found = work(config.model, delta, out, config, gguf=gguf)
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_adapted(found)


app = App(name="bitdelta", help=HELP)
for _verb in (compress, apply, serve):
    app.command(_verb)
