"""The `project` stage: one refusal direction removed from all that writes the residual stream (Level 1 only)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gtqlora import contrasts
from gtqlora.adapters import INFO, PROJECTION, Info, read_info, save_projection
from gtqlora.capture import direction_removed, open_subject
from gtqlora.config import ProjectConfig
from gtqlora.directions import difference_of_means, last_token_states
from gtqlora.errors import ConfigError, ContrastError
from gtqlora.judging import judge_of
from gtqlora.localise import pairs_of
from gtqlora.run import Run, fingerprint, whole
from gtqlora.scoring import Score, score

ADAPTER = "adapter"


@dataclass(frozen=True)
class Projected:
    """The adapter folder and, per candidate layer, what its direction's removal did to lookalike prompts."""

    adapter: Path
    layer: int
    candidates: list[dict[str, Any]]


def project(config: ProjectConfig, run: Run, *, again: bool = False) -> Projected:
    """Take the direction of the layer whose removal leaves the fewest lookalike refusals on the training split.

    Raises:
        ContrastError: no twins, or no lookalike rows, to take the direction from.
        ConfigError: `layer` is not a layer of this model.
    """
    inputs = {"model": fingerprint(config.model), "contrast": fingerprint(config.contrast)}
    with run.stage("project", config, inputs, device=config.device, again=again) as stage:
        stage.outputs += [ADAPTER, contrasts.FILE]
        if stage.fresh:
            details = read_info(run / ADAPTER).details
            return Projected(run / ADAPTER, details["layer"], details["candidates"])
        judge = judge_of(config.judge)
        rows = contrasts.load(config.contrast, judge).split(config.split)
        subject = open_subject(config.model, dtype=config.dtype, device=config.device)
        pairs = pairs_of(rows, subject, config.max_pairs, config.seed)
        lookalike = rows.of_kind("lookalike")[: config.max_pairs // 4]
        if not pairs or not lookalike:
            raise ContrastError(f"{config.contrast}: projection needs lookalike rows with twins in split {config.split!r}")
        flagged = last_token_states(subject, [p.prompt for p in pairs], config.batch_size, "residual of flagged")
        twins = last_token_states(subject, [p.twin for p in pairs], config.batch_size, "residual of twins")
        direction_LD = difference_of_means(flagged, twins)
        layers = range(1, len(direction_LD)) if config.layer is None else [config.layer]
        if config.layer is not None and not 0 <= config.layer < len(direction_LD):
            raise ConfigError(f"layer = {config.layer}: this model has states 0 to {len(direction_LD) - 1}")
        candidates = []
        for layer in layers:
            with direction_removed(subject.model, direction_LD[layer].to(subject.device)):
                found = score(
                    subject,
                    lookalike,
                    judge,
                    batch_size=config.batch_size,
                    max_new_tokens=config.max_new_tokens,
                    label=f"without layer {layer}'s direction",
                )
            candidates.append({"layer": layer, **_rates(found)})
        best = min(candidates, key=lambda c: (c["refusal"], -c["accuracy"]))["layer"]
        contrasts.save(rows, run / contrasts.FILE)
        details = {"config": asdict(config), "layer": best, "candidates": candidates}
        with whole(run / ADAPTER) as staged:
            save_projection(
                direction_LD[best], staged, Info(PROJECTION, config.model, subject.anatomy.family.model_type, details)
            )
        return Projected(run / ADAPTER, best, candidates)


def _rates(scores: list[Score]) -> dict[str, float]:
    known = [s.correct for s in scores if s.correct is not None]
    accuracy = sum(known) / len(known) if known else 0.0
    return {"refusal": sum(s.refused for s in scores) / len(scores), "accuracy": accuracy}


__all__ = ["ADAPTER", "INFO", "Projected", "project"]
