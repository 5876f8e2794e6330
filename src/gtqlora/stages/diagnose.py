"""The `diagnose` stage: association, cause, directions and a verdict.

Candidates are found on one half of the pairs and tested on the other: nothing is confirmed on what suggested it.

Shape letters: N pairs, L MoE layers, E experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from gtqlora import localize, routing
from gtqlora.capture import Observation, gradient_scores, observe, open_subject, top_tokens
from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import Contrast, load
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.errors import ContrastError
from gtqlora.families.identity import identify
from gtqlora.judging.judge import judge_of
from gtqlora.localize import Effect, Interchanges, Outcome, Trials
from gtqlora.localize.association import associate, top_experts
from gtqlora.localize.directions import MIN_GROUPS, Directions, study
from gtqlora.localize.trials import FLAGGED
from gtqlora.results.association import Association, write_associations
from gtqlora.results.diagnosis import (
    CANNOT_TELL,
    FOLDER,
    Diagnosis,
    Intervention,
    LayerHealth,
    Localization,
    read_diagnosis,
    write_diagnosis,
)
from gtqlora.results.experts import Curve, ExpertEffect, ExpertId, TokenChoice
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.scoring import Runner

NO_TWINS = (
    "No flagged prompt has a twin (a `twin` prompt, or a benign row with the same pair_id), so flagged prompts were "
    "compared with unrelated benign ones: what follows the topic looks like what follows the behaviour, routing cannot "
    "be swapped, and there is no verdict."
)


def diagnose(config: DiagnoseConfig, run: Run, *, again: bool = False) -> Diagnosis:
    """Find where the refusal of flagged prompts (lookalike and harmful) sits.

    Raises:
        ContrastError: the split has no flagged prompts, or nothing to compare them with.
        ModelError: the model cannot be loaded, or computes NaN.
    """
    model, judge = identify(config.model), judge_of(config.judge)
    inputs = {"model": model.digest, "contrast": fingerprint(config.contrast), "judge": judge.identity}
    with run.stage("diagnose", config, inputs, again=again, aside=PATHS) as stage:
        stage.outputs.append(FOLDER)
        if stage.fresh:
            return read_diagnosis(run.path)
        contrast = load(config.contrast, judge).split(config.split)
        _check(contrast, config)
        subject = open_subject(replace(config, model=model.model))
        model.check_unchanged()
        check_rendering(contrast, subject.tokenizer, subject.max_length, subject.vocabulary)
        pairs = localize.pairs_of(contrast, subject, config.max_pairs, config.seed)
        trials = Trials(Runner.of(subject, judge, config), pairs, localize.readout_tokens(subject, contrast.rows))
        study = _Study(config, trials)
        diagnosis = study.diagnosis()
        study.write(stage.renewed() / FOLDER, diagnosis)
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


class _Study:
    """The steps of one diagnosis, in order; what an earlier one found is there for the later ones."""

    def __init__(self, config: DiagnoseConfig, trials: Trials) -> None:
        self.config, self.trials, self.subject = config, trials, trials.subject
        self.layers = [layer.index for layer in self.subject.anatomy.moe]
        self.matched = all(pair.matched for pair in trials.pairs)
        discovery, confirmation = localize.halves(trials.pairs)
        self.found, self.kept = trials.of(discovery), trials.of(confirmation or discovery)
        self.seen = self._observe("flagged", trials.flagged, trials.own[0])
        self.seen_twins = self._observe("twins", trials.twins, trials.own[1])
        self.associations = self._associate()
        self.directions = self._directions()

    def _observe(self, name: str, prompts: Sequence[list[int]], outcomes: Sequence[Outcome]) -> Observation:
        return observe(
            self.subject,
            prompts,
            answers=[o.tokens for o in outcomes],
            since=[pair.common for pair in self.trials.pairs],
            batch_size=self.config.batch_size,
            label=f"routing of {name}",
        )

    def _associate(self) -> list[Association]:
        rows, config = self.trials.rows_of(self.found), self.config
        gradients = None
        if self.trials.readout:
            gradients = gradient_scores(
                self.subject,
                self.found.flagged,
                self.trials.readout,
                batch_size=config.batch_size,
                label="gradients of routing weights",
            )
        return associate(
            self.seen.of(rows),
            self.seen_twins.of(rows),
            self.layers,
            groups=self.found.groups,
            matched=self.matched,
            gradients=gradients,
            seed=config.seed,
            resamples=config.bootstrap,
            level=config.level,
        )

    def _directions(self) -> Directions:
        pairs = self.trials.pairs
        return study(
            self.seen.states_NSD,
            self.seen_twins.states_NSD,
            [pair.row.kind for pair in pairs],
            self.trials.groups,
            seed=self.config.seed,
            level=self.config.level,
        )

    # --- rankings of experts, as (position among the MoE layers, expert)

    def _places(self, associations: Sequence[Association]) -> list[localize.Expert]:
        return [(self.layers.index(a.layer), a.expert) for a in associations]

    def _by_difference(self) -> list[Association]:
        sure = [a for a in self.associations if a.q < 1 - self.config.level and a.low > 0]
        wide = [a for a in sure if a.difference >= self.config.min_difference]
        return sorted(wide, key=lambda a: -a.difference)[: self.config.max_experts]

    def _by_gradient(self) -> list[Association]:
        sure = [a for a in self.associations if a.gradient_low is not None and a.gradient_low > 0]
        return sorted(sure, key=lambda a: -(a.gradient or 0.0))[: self.config.max_experts]

    def _candidates(self) -> list[localize.Expert]:
        most = self.config.max_candidates
        first = [*self._by_difference()[:most], *self._by_gradient()[: most // 2]]
        return list(dict.fromkeys(self._places(first)))

    @property
    def _frequency_LE(self) -> NDArray[np.floating]:
        return (self.seen.prompt.rates_NLE.mean(0) + self.seen_twins.prompt.rates_NLE.mean(0)) / 2

    # --- cause

    def _interchanges(self) -> Interchanges | None:
        aligned = [pair for pair in self.trials.pairs if pair.aligned]
        paired = zip(aligned, localize.partners(aligned, self.config.seed), strict=True)
        usable = [(pair, partner) for pair, partner in paired if partner is not None]
        if not usable:
            return None
        return localize.run_interchanges(
            self.trials.of([pair for pair, _ in usable]), [partner for _, partner in usable]
        )

    def _curves(self) -> list[Curve]:
        rankings = {"most associated": self._by_difference(), "largest gradient": self._by_gradient()}
        known = {name: self._places(ranking) for name, ranking in rankings.items() if ranking}
        curves = [localize.curve(self.kept, name, ranking) for name, ranking in known.items()]
        if known and self.config.random_controls:
            first = next(iter(known.values()))
            draws, seed = self.config.random_controls, self.config.seed
            curves.append(localize.random_curve(self.kept, first, self._frequency_LE, draws, seed))
        return curves

    def _effects(self) -> list[Effect]:
        return localize.expert_effects(
            self.kept,
            self._candidates(),
            self._frequency_LE,
            min_effect=self.config.min_effect,
            level=self.config.level,
            seed=self.config.seed,
        )

    def _ablations(self) -> list[Intervention]:
        directions_LD = self.directions.tensors["direction"]
        layer = localize.strongest_layer(self.found, directions_LD)
        return [] if layer is None else localize.ablations(self.kept, directions_LD[layer], self.config.seed)

    def _masks(self, carriers: Sequence[localize.Expert]) -> list[Intervention]:
        """The experts that carry the behaviour, and those that are merely chosen more, masked together."""
        named = {"experts that carry it": carriers, "associated experts": self._places(self._top())}
        masks = []
        for name, experts in named.items():
            if experts:
                label = f"ablate the {len(experts)} {name}"
                ablatable = localize.ablatable(experts, self.subject.anatomy.spec)
                change = localize.ablating(self.kept, localize.ablated_of(ablatable))
                outcomes = self.kept.run(label, FLAGGED, change)
                masks.append(self.kept.intervention(label, outcomes, self.kept.own[0]))
        return masks

    def _top(self) -> list[Association]:
        config = self.config
        return top_experts(
            self.associations, level=config.level, min_difference=config.min_difference, limit=config.max_experts
        )

    # --- the whole

    def diagnosis(self) -> Diagnosis:
        interchanges, effects = self._interchanges(), self._effects()
        verdict, (flagged, twins) = localize.conclude(interchanges), self.trials.own
        experts = self._experts(effects, verdict.verdict)
        kind = "computes" if verdict.verdict == "experts" else "causal"
        carriers = [(e.position, e.expert) for e, row in zip(effects, experts, strict=True) if getattr(row, kind)]
        interventions = [
            self.trials.intervention("as it is", flagged, flagged),
            self.trials.intervention("twin as it is" if self.matched else "benign as it is", twins, twins),
            *(localize.interventions_of(interchanges) if interchanges else []),
            *self._ablations(),
            *self._masks(carriers),
        ]
        return Diagnosis(
            verdict=verdict.verdict,
            sentence=verdict.sentence,
            reasons=verdict.reasons,
            warnings=self._warnings(verdict),
            matched=self.matched,
            n_pairs=len(self.trials.pairs),
            n_aligned=len(interchanges.trials.pairs) if interchanges else 0,
            n_usable=verdict.n_usable,
            readout=[str(self.subject.tokenizer.convert_ids_to_tokens(token)) for token in self.trials.readout],
            shares=verdict.shares,
            shares_log_odds=verdict.shares_log_odds,
            necessary=verdict.necessary,
            sufficient=verdict.sufficient,
            cells=localize.cells_of(interchanges) if interchanges else [],
            interventions=interventions,
            curves=self._curves(),
            experts=experts,
            causal_experts=[self._name(*place) for place in carriers],
            top_experts=[ExpertId(a.layer, a.expert) for a in self._top()],
            directions=self.directions.study,
            **self._health(),
        )

    def _name(self, position: int, expert: int) -> ExpertId:
        return ExpertId(self.layers[position], expert)

    def _experts(self, effects: Sequence[Effect], verdict: str) -> list[ExpertEffect]:
        """What candidates do.

        Where all of the routing together carries nothing, no expert does by being chosen; without a verdict none is
        called anything.
        """
        chosen_more = self._places(self._by_difference()) if verdict in ("routing", "both") else []
        tokens = top_tokens(
            self.subject,
            [*self.trials.flagged, *self.trials.twins],
            [pair.common for pair in self.trials.pairs] * 2,
            [(e.position, e.expert) for e in effects],
            batch_size=self.config.batch_size,
        )
        return [
            ExpertEffect(
                layer=self.layers[effect.position],
                expert=effect.expert,
                ablate=effect.ablate,
                restore=effect.restore,
                control=effect.control,
                q=effect.q,
                causal=effect.acts and (effect.position, effect.expert) in chosen_more,
                computes=effect.acts and verdict != CANNOT_TELL and (effect.position, effect.expert) not in chosen_more,
                tokens=[TokenChoice(t.token, t.rate, t.lift) for t in rates],
            )
            for effect, rates in zip(effects, tokens, strict=True)
        ]

    def _health(self) -> dict[str, Any]:
        regions = [r for seen in (self.seen, self.seen_twins) for r in (seen.prompt, seen.answer) if r is not None]
        counts_LE = sum(region.counts_LE for region in regions)
        loads = [
            LayerHealth(layer=layer, **asdict(routing.load(torch.from_numpy(row))), dead=int((row == 0).sum()))
            for layer, row in zip(self.layers, np.asarray(counts_LE), strict=True)
        ]
        return {"health": loads, "health_tokens": sum(region.tokens for region in regions)}

    def _warnings(self, verdict: Localization) -> list[str]:
        found = [] if self.matched else [NO_TWINS]
        n = len(self.trials.pairs)
        if self.matched and (unaligned := sum(not pair.aligned for pair in self.trials.pairs)):
            found.append(
                f"{unaligned} of {n} twins have another token count than their flagged prompt and cannot be swapped."
            )
        if not self.trials.readout:
            found.append(
                "Refusals and answers begin with the same tokens, so there are no log-odds: no gradients, no effect of "
                "single experts, no direction chosen. Longer or more distinct openings in the pairs would mend it."
            )
        if (n_groups := len(set(self.trials.groups))) < MIN_GROUPS:
            found.append(
                f"Directions are judged on held-out pairs from {MIN_GROUPS} pair_ids on; there are {n_groups} here."
            )
        refused = self.trials.refusal(self.trials.own[0])
        if refused.value < 0.5:
            found.append(f"Only {refused.value:.0%} of the flagged prompts are refused; there is little to explain.")
        if (n_tested := len(set(self.kept.groups))) < localize.MIN_GROUPS:
            least = localize.MIN_GROUPS
            found.append(f"Single experts are tested on {least} pair_ids or more; there are {n_tested} here.")
        if verdict.verdict == CANNOT_TELL and verdict.n_usable < localize.MIN_PAIRS and self.matched:
            found.append(
                f"{verdict.n_usable} of {n} pairs can be used; a verdict needs {localize.MIN_PAIRS} whose flagged "
                "prompt refuses, whose twin does not, and whose token counts are equal."
            )
        return found

    def write(self, folder: Path, diagnosis: Diagnosis) -> None:
        folder.mkdir()
        write_associations(folder, self.associations)
        save_file(self.directions.tensors, folder / "directions.safetensors")
        counted = {"flagged": self.seen, "twin": self.seen_twins}
        tables = {f"coactivation_{side}": torch.from_numpy(seen.coactivation_LEE) for side, seen in counted.items()}
        save_file(tables, folder / "routing.safetensors")
        write_diagnosis(folder, diagnosis)
