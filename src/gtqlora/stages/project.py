"""The `project` stage: one residual direction removed from all that writes the residual stream (Level 1 only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from gtqlora import contrasts
from gtqlora.capture import Subject, observe, open_subject
from gtqlora.config import ProjectConfig
from gtqlora.contrasts import Contrast, Row
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.edits.adapters import save_projection
from gtqlora.edits.edited import removal
from gtqlora.errors import ConfigError, ContrastError, RunError
from gtqlora.families.identity import identify
from gtqlora.judging.judge import judge_of
from gtqlora.localize import pairs_of
from gtqlora.localize.directions import named_directions
from gtqlora.localize.directions.named import ORTHOGONAL
from gtqlora.results.adapter import Candidate, Projection, info_of, read_info
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.scoring import Runner

ADAPTER = "adapter"


@dataclass(frozen=True)
class Projected:
    """The adapter folder and, per candidate layer, what its direction's removal did to lookalike prompts."""

    adapter: Path
    layer: int
    candidates: list[Candidate]


def project(config: ProjectConfig, run: Run, *, again: bool = False) -> Projected:
    """Take the direction of the layer whose removal leaves the fewest lookalike refusals on the training split.

    Raises:
        ContrastError: no twins, or no rows of a kind, to take the direction from, or it is 0.
        ConfigError: `layer` is not a layer of this model, or weights are to be rescaled that are frozen.
        ModelError: the model's states are not finite.
    """
    judge, model = judge_of(config.judge), identify(config.model)  # a misspelt judge before gigabytes are hashed
    inputs = {"model": model.digest, "contrast": fingerprint(config.contrast), "judge": judge.identity}
    with run.stage("project", config, inputs, again=again, aside=PATHS) as stage:
        stage.outputs += [ADAPTER, contrasts.FILE]
        if stage.fresh:
            return _projected_before(run / ADAPTER)
        rows = contrasts.load(config.contrast, judge).split(config.split)
        contrasts.check_kinds(rows.rows, f"{config.contrast}, split {config.split!r}")
        subject = open_subject(replace(config, model=model.model))
        model.check_unchanged()
        check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
        direction_LD = _directions(config, rows, subject)
        layers = _layers(config, direction_LD)
        # every layer is tried on them, so a quarter must do
        lookalike = rows.of_kind("lookalike")[: max(1, config.max_pairs // 4)]
        runner = Runner.of(subject, judge, config)
        candidates = [_tried(config, runner, layer, direction_LD[layer], lookalike) for layer in layers]
        # fewest refusals first, then most accuracy; of equals the earliest layer
        best = min(candidates, key=lambda c: (c.refusal, -c.accuracy)).layer
        made = Projection(asdict(config), best, candidates)
        info = info_of(model.model, subject.anatomy.family.model_type, made)
        new = stage.renewed()
        contrasts.save(rows, new / contrasts.FILE)
        save_projection(direction_LD[best], new / ADAPTER, info)
        return Projected(run / ADAPTER, best, candidates)


def _projected_before(adapter: Path) -> Projected:
    made = read_info(adapter).details
    if not isinstance(made, Projection) or made.layer is None:
        raise RunError(f"{adapter}: its layers are not on record; run `gtqlora project --again`")
    return Projected(adapter, made.layer, made.candidates)


def _layers(config: ProjectConfig, direction_LD: Tensor) -> list[int]:
    """States to try; 0, the embedding, is left out: flagged prompts and twins end with the same token."""
    last = len(direction_LD) - 1
    if config.layer is not None and not 1 <= config.layer <= last:
        raise ConfigError(f"layer = {config.layer}: this model has layers 1 to {last}")
    wanted = range(1, last + 1) if config.layer is None else [config.layer]
    layers = [layer for layer in wanted if direction_LD[layer].any()]
    if not layers:
        raise ContrastError(f"{config.contrast}: the {config.direction} direction is 0; choose another `direction`")
    return layers


def _directions(config: ProjectConfig, rows: Contrast, subject: Subject) -> Tensor:
    pairs = pairs_of(rows, subject, config.max_pairs, config.seed)
    kinds = [pair.row.kind for pair in pairs]
    needed = ("lookalike", "harmful") if config.direction == ORTHOGONAL else ("lookalike",)
    if missing := [kind for kind in needed if kind not in kinds]:
        raise ContrastError(
            f"{config.contrast}: projection of {config.direction} needs {' and '.join(missing)} rows with twins in "
            f"split {config.split!r}"
        )

    def states_NLD(prompts: list[list[int]], label: str) -> Tensor:
        # all positions: only the states at the last token are used
        since = [0] * len(prompts)
        return observe(subject, prompts, since=since, batch_size=config.batch_size, label=label).states_NSD

    flagged_NLD = states_NLD([pair.prompt for pair in pairs], "residual of flagged")
    twins_NLD = states_NLD([pair.twin for pair in pairs], "residual of twins")
    return named_directions(flagged_NLD, twins_NLD, kinds, [pair.row.pair_id for pair in pairs])[config.direction]


def _tried(
    config: ProjectConfig, runner: Runner, layer: int, direction_D: Tensor, lookalike: Sequence[Row]
) -> Candidate:
    """Return what is left of the lookalike refusals, and of the task, without this layer's direction."""
    subject = runner.model
    with removal(subject, direction_D.to(subject.device), norm_preserving=config.norm_preserving):
        found = runner.answers(lookalike, label=f"without layer {layer}'s direction")
    known = [s.correct for s in found if s.correct is not None]
    accuracy = sum(known) / len(known) if known else 0.0
    return Candidate(layer, sum(s.refused for s in found) / len(found), accuracy)
