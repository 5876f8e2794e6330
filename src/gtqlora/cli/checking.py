"""The verb `contrast check`: whether pairs can be trained on and judged by, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gtqlora.cli import checked, printing
from gtqlora.cli.console import stage_progress, starting
from gtqlora.cli.settings import (
    JUDGES,
    Json,
    Recipe,
    embedded_contrast,
    embedded_model,
    embedded_recipe,
    say_what_judges,
)
from gtqlora.config.stages import REPAIR, check_instructed_margin, check_repair
from gtqlora.config.values import require
from gtqlora.machine import uncollected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gtqlora.config import TrainConfig
    from gtqlora.contrasts import Contrast
    from gtqlora.contrasts.sources import Problem
    from gtqlora.contrasts.statistics import Statistics


def check(
    file: Annotated[
        str, Parameter(help="JSONL, JSON, CSV, Parquet, folder or hub dataset with the pairs; or organism.")
    ],
    *,
    model: Annotated[str | None, Parameter(help="Also count tokens after this model's chat template.")] = None,
    judge: Annotated[str | None, Parameter(help=JUDGES, show_default=False)] = None,
    config: Recipe = None,
    settings: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            help="Override one setting, e.g. --set template.enable_thinking=false or --set max_length=2048.",
            negative=(),
            consume_multiple=False,
        ),
    ] = None,
    instructed_margin: Annotated[
        float | None, Parameter(help="Also tell whether instructed rows can carry a floor with this margin.")
    ] = None,
    repair: Annotated[
        float, Parameter(help="Also tell whether a repair of this share of the lookalike prompts would be seen.")
    ] = REPAIR,
    out: Annotated[Path | None, Parameter(help="Write the checked rows as Parquet here.")] = None,
    drop: Annotated[bool, Parameter(help="Leave rows with problems out of --out, and list them.", negative="")] = False,
    as_json: Json = False,
) -> None:
    """Check a contrast set: schema, duplicates, leakage, lengths, the one-way rule, the judge, the chat template."""
    with starting():
        from gtqlora.contrasts.loading import save
        from gtqlora.contrasts.sources import ContrastProblems

    require(not drop or out is not None, "--drop leaves rows out of what --out writes; give --out clean.parquet, too")
    check_instructed_margin(instructed_margin)
    check_repair(repair)
    settled = _settled(file, model, judge, config, settings or ())
    say_what_judges(settled.judge)
    require(
        model is not None or settled.max_length is None,
        f"max_length = {settled.max_length}: is counted in tokens; give --model, too",
    )
    _check_files(settled.contrast, out)
    dropped: list[Problem] = []
    try:
        # rows have no cycles, and the collector would look for some in all of them again and again
        with stage_progress(), uncollected():
            rows, found = _checked(
                settled, dropped if drop else None, instructed_margin, repair, read=model is not None
            )
    except ContrastProblems as error:
        if as_json:
            printing.show_json({"problems": error.problems})
        raise
    # last of all checks come lengths, so nothing is written of a set that fails one
    if out:
        save(rows, out)
    if as_json:
        printing.show_json({**asdict(found), "dropped": dropped})
    else:
        checked.show_checked(found, settled.contrast, dropped, out)


def _check_files(source: str, out: Path | None) -> None:
    """Check what is read and written before torch and transformers are imported, which takes seconds."""
    from gtqlora.contrasts.loading import check_new
    from gtqlora.contrasts.sources import check_named

    check_named(source)
    if out:
        check_new(out)


def _settled(
    file: str, model: str | None, judge: str | None, config: Path | None, settings: Sequence[str]
) -> TrainConfig:
    """Return the settings with which `train` would read these pairs."""
    from gtqlora.config import TrainConfig, build
    from gtqlora.organisms import embedded

    # The organisms refuse in words of their own, which the default judge does not know.
    judge = embedded.JUDGE if file == "organism" and judge is None else judge
    return build(
        TrainConfig,
        file=embedded_recipe(config) if config else None,
        overrides=settings,
        # no model is loaded here, and without one only its tokens cannot be counted
        model=embedded_model(model or "none"),
        contrast=embedded_contrast(file),
        judge=judge,
    )


def _checked(
    settled: TrainConfig, dropped: list[Problem] | None, instructed_margin: float | None, repair: float, *, read: bool
) -> tuple[Contrast, Statistics]:
    """Return the rows and what they hold; rows with problems are left out and listed, if there is a list.

    Args:
        read: whether the model's tokenizer reads them.
    """
    from gtqlora.contrasts import load
    from gtqlora.judging.judge import Remembering, judge_of

    judge = Remembering(judge_of(settled.judge))
    rows = load(settled.contrast, judge, dropped=dropped)
    # A tokenizer takes seconds to load, so that the rows come first.
    reader = _reader(settled) if read else _Reader()
    from gtqlora.contrasts.statistics import statistics, without_misrendered

    if dropped is not None and reader.tokenizer is not None:
        rows = without_misrendered(rows, reader.tokenizer, reader.limit, dropped)
    return rows, statistics(rows, reader.tokenizer, reader.limit, reader.vocabulary, judge, instructed_margin, repair)


@dataclass(frozen=True)
class _Reader:
    """What reads the pairs: a tokenizer, the most tokens of a row, and the rows of the model's embedding."""

    tokenizer: PreTrainedTokenizerBase | None = None
    limit: int | None = None
    vocabulary: int | None = None


def _reader(settled: TrainConfig) -> _Reader:
    from gtqlora.families import load_config, load_tokenizer

    known = load_config(settled.model)[1]
    limit = min(known.max_position_embeddings, settled.max_length or known.max_position_embeddings)
    return _Reader(load_tokenizer(settled.model, settled.template), limit, known.vocab_size)
