"""The `diagnose` stage: association, cause, directions and what mediates the behaviour, in four steps.

`observe_pairs`, `rank_experts` and `intervene` of `localize` each leave a record; `_conclude` makes the diagnosis
of the three.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gtqlora import localize, routing
from gtqlora.capture import open_subject
from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import Contrast, load
from gtqlora.contrasts.readout import find_readout
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.errors import ContrastError
from gtqlora.families.identity import identify
from gtqlora.judging.judge import judge_of
from gtqlora.localize import Trials
from gtqlora.localize.directions import MIN_GROUPS
from gtqlora.localize.observed import Observed, observe_pairs
from gtqlora.localize.ranking import Ranked, rank_experts
from gtqlora.localize.sample_size import sample_sizes
from gtqlora.localize.steps import Intervened, intervene
from gtqlora.localize.trials import CUT_OFF
from gtqlora.results.association import write_associations
from gtqlora.results.diagnosis import (
    FOLDER,
    Diagnosis,
    LayerHealth,
    Localization,
    read_diagnosis,
    write_diagnosis,
)
from gtqlora.results.experts import ExpertId
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.scoring import Runner

NO_TWINS = (
    "No flagged prompt has a twin (a `twin` prompt, or a benign row with the same pair_id), so flagged prompts were "
    "compared with unrelated benign ones: what follows the topic looks like what follows the behaviour, routing cannot "
    "be interchanged, and there is no verdict."
)


def diagnose(config: DiagnoseConfig, run: Run, *, again: bool = False) -> Diagnosis:
    """Find what mediates the refusals of flagged prompts, lookalike and harmful ones apart.

    Raises:
        ContrastError: the split has no flagged prompts, or nothing to compare them with.
        ModelError: the model cannot be loaded, or computes NaN.
    """
    judge, model = judge_of(config.judge), identify(config.model)  # a misspelt judge before gigabytes are hashed
    inputs = {"model": model.digest, "contrast": fingerprint(config.contrast), "judge": judge.identity}
    with run.stage("diagnose", config, inputs, again=again, aside=PATHS) as stage:
        stage.outputs.append(FOLDER)
        if stage.fresh:
            return read_diagnosis(run.path)
        contrast = load(config.contrast, judge).split(config.split)
        _check(contrast, config)
        subject = open_subject(replace(config, model=model.model))
        # between hashing and loading somebody may have written to the model
        model.check_unchanged()
        check_rendering(contrast, subject.tokenizer, subject.max_length, subject.vocabulary)
        runner, pairs = (
            Runner.of(subject, judge, config),
            localize.pairs_of(contrast, subject, config.max_pairs, config.seed),
        )
        readout = localize.readable(runner, pairs, find_readout(subject.tokenizer, contrast.rows))
        observed = observe_pairs(Trials(runner, [pair.answered_with(readout.begun) for pair in pairs], readout))
        ranked = rank_experts(config, observed)
        diagnosis = _conclude(observed, ranked, intervene(config, observed, ranked))
        _write(stage.renewed() / FOLDER, diagnosis, observed, ranked)
        return diagnosis


def _check(contrast: Contrast, config: DiagnoseConfig) -> None:
    flagged = [*contrast.of_kind("lookalike"), *contrast.of_kind("harmful")]
    where = f"{config.contrast}: split {config.split!r}"
    if not flagged:
        raise ContrastError(f"{where} has no lookalike and no harmful rows, so no behaviour to find; choose another")
    if not contrast.of_kind("benign") and not any(contrast.twin_of(row) for row in flagged):
        raise ContrastError(
            f"{where} has neither twins (a `twin` prompt, or a benign row with the same pair_id) nor benign rows to "
            "compare flagged prompts with; add twins"
        )


def _conclude(observed: Observed, ranked: Ranked, intervened: Intervened) -> Diagnosis:
    """Return the diagnosis that the three steps before lead to."""
    trials, kinds = observed.trials, intervened.localizations
    health, health_tokens = _health(observed)
    return Diagnosis(
        verdict=kinds[0].verdict,
        sentence=" ".join([intervened.difference.sentence, *(kind.sentence for kind in kinds)]),
        difference=intervened.difference,
        kinds=kinds,
        warnings=_warnings(observed, kinds),
        matched=observed.matched,
        n_pairs=len(trials.pairs),
        n_aligned=intervened.n_aligned,
        readout=[str(trials.subject.tokenizer.convert_ids_to_tokens(token)) for token in trials.readout],
        interventions=intervened.interventions,
        curves=intervened.curves,
        experts=intervened.effects,
        causal_experts=[ExpertId(observed.layers[position], expert) for position, expert in intervened.carriers],
        top_experts=[ExpertId(observed.layers[position], expert) for position, expert in ranked.top],
        directions=ranked.directions.study,
        health=health,
        health_tokens=health_tokens,
    )


def _health(observed: Observed) -> tuple[list[LayerHealth], int]:
    """Return the balance of each layer's load over all prompts and answers, and how many tokens these have."""
    seen = (observed.flagged, observed.twins)
    regions = [region for side in seen for region in (side.prompt, side.answer) if region is not None]
    # answers count as well: what the model writes loads its experts, too
    counts_LE = np.asarray(sum(region.counts_LE for region in regions))
    loads = [
        LayerHealth(layer=layer, **asdict(routing.load(torch.from_numpy(row))), dead=int((row == 0).sum()))
        for layer, row in zip(observed.layers, counts_LE, strict=True)
    ]
    return loads, sum(region.tokens for region in regions)


def _warnings(observed: Observed, kinds: Sequence[Localization]) -> list[str]:
    """Return what weakens the conclusions, and what would mend it."""
    trials, pairs = observed.trials, observed.trials.pairs
    unaligned = sum(not pair.aligned for pair in pairs)
    n_groups, n_tested = len(set(trials.groups)), len(set(observed.confirmation.groups))
    refused = trials.refusal(trials.own[0]).value
    cut_off = sum(kind.unusable.get(CUT_OFF, 0) for kind in kinds)
    said = [
        (not observed.matched, NO_TWINS),
        (
            observed.matched and unaligned > 0,
            f"{unaligned} of {len(pairs)} twins have another token count than their flagged prompt and cannot be "
            "interchanged.",
        ),
        (
            not trials.readout,
            "Refusals and answers begin with the same tokens, or with some that the model never says, so there are no "
            "log-odds: no gradients, no effect of single experts, no direction chosen. More distinct openings in the "
            "pairs, as the model has them, would mend it.",
        ),
        (
            n_groups < MIN_GROUPS,
            f"Directions are judged on held-out pairs from {MIN_GROUPS} pair_ids on; there are {n_groups} here.",
        ),
        (cut_off > 0, _cut_off_said(trials, cut_off) if cut_off else ""),
        (refused < 0.5, f"Only {refused:.0%} of the flagged prompts are refused; there is little to explain."),
        (
            n_tested < localize.MIN_GROUPS,
            f"Single experts are tested on {localize.MIN_GROUPS} pair_ids or more; there are {n_tested} here.",
        ),
    ]
    warnings = [text for holds, text in said if holds]
    # without twins there is no answer that more pairs would give
    return [*warnings, *(sample_sizes({kind.kind: kind.n_usable for kind in kinds}) if observed.matched else [])]


def _cut_off_said(trials: Trials, count: int) -> str:
    """Return how many pairs are lost to the limit of tokens, and a limit that is likely to be enough."""
    limit = trials.runner.max_new_tokens
    # what the rows hold as answers is as long as twins' may be; a model that was cut off may say more still
    answers = (pair.row.rejected if pair.row.kind == "harmful" else pair.row.chosen for pair in trials.pairs)
    longest = max(len(trials.subject.tokenizer.encode(text, add_special_tokens=False)) for text in answers)
    return (
        f"{count} pairs do not count, as their twin is cut off at `max_new_tokens` = {limit}: raise it to "
        f"{max(2 * limit, longest + 1)}, or take a judge with a `same` of its own, which may compare what is cut off."
    )


def _write(folder: Path, diagnosis: Diagnosis, observed: Observed, ranked: Ranked) -> None:
    folder.mkdir()
    write_associations(folder, ranked.associations)
    save_file(ranked.directions.tensors, folder / "directions.safetensors")
    counted = {"flagged": observed.flagged, "twin": observed.twins}
    tables = {f"coactivation_{side}": torch.from_numpy(seen.coactivation_LEE) for side, seen in counted.items()}
    save_file(tables, folder / "routing.safetensors")
    write_diagnosis(folder, diagnosis)
