"""Published ways to name experts and directions, each with its own causal check, beside the diagnosis.

    python bench/baselines.py                                     # the organisms that ship with the package
    python bench/baselines.py MODEL:CONTRAST [MODEL:CONTRAST...]  # folders that `organisms build` wrote

- *SteerMoE* (arXiv 2509.09660) ranks experts by risk difference: how much more often they are chosen on prompts that
  show a behaviour than on paired ones that do not; it deactivates the first.
- *SAFEx* (arXiv 2506.17368) takes experts that are among the most chosen ones on harmful prompts in nearly all
  resamples; it disables them.
- *Single direction* (arXiv 2410.03415) ablates the direction of false refusals, made orthogonal to that of true ones,
  from all that writes the stream. That is `project --direction false_refusal_orthogonal`, so it is held to our floor.

Both rankings are calibrated here, twice. Flagged prompts and twins are exchanged group by group, and an expert is
ranked only if its statistic is above nearly all of the largest ones that such exchanges give (Westfall & Young,
Resampling-Based Multiple Testing, 1993). That does not quiet them where routing follows the behaviour and causes
nothing, so both are held to their authors' own check: the ranked experts are masked together, on the other half of the
pairs. They are named only if that surely takes refusals away, and more of them than every one of as many masks of
random experts of the same layers that are chosen as often. What a mask breaks is printed beside what it turns into the
twin's answer. (Masks of what exchanged labels rank first are no control: experts that follow the behaviour vary most,
and come first under any labels.)
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from gtqlora.localize.masks import Ablated, Expert, ablatable, ablated_of, ablating, random_like
from gtqlora.localize.observed import Observed, observe_pairs
from gtqlora.localize.trials import FLAGGED, Outcome, Trials
from gtqlora.results.diagnosis import AS_TWIN, BROKEN, REFUSES
from gtqlora.stats import Interval, group_means, paired_difference, resampled

EXCHANGES, RESAMPLES, MOST = 200, 50, 16
"""Exchanges of labels, resamples of SAFEx for each, and experts that are masked at most."""
MASKS = 19
"""Random masks to compare with. By chance a mask takes away more than all of these in one case of twenty."""
DIRECTIONS = ("refusal", "false_refusal", "false_refusal_orthogonal")

Array = NDArray[np.floating]
Statistic = Callable[[Array, Array], Array]
"""A function of the rates_GX of flagged prompts and of twins, for all experts X of all layers -> statistic_X."""


@dataclass(frozen=True)
class Baseline:
    """What a method ranks first, what masking it does, and whether the experts are named.

    Attributes:
        ranked: (position among the MoE layers, expert), the strongest first.
        does: shares of flagged prompts that refuse, do as the twin and are broken under the mask, by kind of prompt.
        lost: share of flagged prompts that stop refusing under the mask; None if no expert is ranked.
        p: that a random mask takes as many refusals away; 1 where the mask takes none away for sure.
    """

    name: str
    ranked: list[Expert]
    does: dict[str, dict[str, float]]
    lost: Interval | None
    p: float

    @property
    def named(self) -> list[Expert]:
        """What is left of the ranking after the causal check."""
        return self.ranked if self.p <= 1 / (1 + MASKS) else []


def baselines(observed: Observed, *, seed: int, level: float = 0.95) -> list[Baseline]:
    """Rank experts on the discovering half of the pairs, and mask them on the confirming half."""
    found, trials = observed.discovery, observed.trials
    rows = trials.rows_of(found)
    flagged_GLE, twins_GLE = (
        group_means(side.prompt.rates_NLE[rows].astype(float), found.groups)
        for side in (observed.flagged, observed.twins)
    )
    sides = flagged_GLE.reshape(len(flagged_GLE), -1), twins_GLE.reshape(len(twins_GLE), -1)
    spec = trials.subject.anatomy.spec
    rankings = {"SteerMoE": risk_difference, "SAFEx": stable_frequency}
    return [
        _checked(
            observed,
            name,
            ablatable([divmod(i, spec.n_experts) for i in ranked(*sides, statistic, seed, level)], spec),
            seed,
        )
        for name, statistic in rankings.items()
    ]


def risk_difference(flagged_GX: Array, twins_GX: Array) -> Array:
    """How much more often each expert is chosen on flagged prompts."""
    return (flagged_GX - twins_GX).mean(0)


def stable_frequency(flagged_GX: Array, twins_GX: Array) -> Array:
    """In how many more resamples of the flagged prompts than of the twins an expert is among the most chosen ones."""
    counts_RG = resampled(len(flagged_GX), 0, RESAMPLES)
    first = max(1, flagged_GX.shape[1] // 8)

    def chosen(side_GX: Array) -> Array:
        sums_RX = counts_RG @ side_GX
        return (sums_RX >= np.partition(sums_RX, -first, axis=1)[:, -first, None]).mean(0)

    return chosen(flagged_GX) - chosen(twins_GX)


def ranked(flagged_GX: Array, twins_GX: Array, statistic: Statistic, seed: int, level: float) -> list[int]:
    """The experts whose statistic labels without meaning hardly ever give to any expert, the largest first."""
    rng = np.random.default_rng(seed)
    largest = []
    for _ in range(EXCHANGES):
        turned_G1 = rng.random((len(flagged_GX), 1)) < 0.5
        pair = np.where(turned_G1, twins_GX, flagged_GX), np.where(turned_G1, flagged_GX, twins_GX)
        largest.append(statistic(*pair).max())
    found_X = statistic(flagged_GX, twins_GX)
    above = np.flatnonzero(found_X > np.quantile(largest, level, method="higher"))
    return sorted(above.tolist(), key=lambda i: -found_X[i])[:MOST]


def _checked(observed: Observed, name: str, first: Sequence[Expert], seed: int) -> Baseline:
    """Mask the experts together, and compare that with random masks if it takes refusals away."""
    if not first:
        return Baseline(name, [], {}, None, 1.0)
    trials, mask = observed.confirmation, ablated_of(first)
    outcomes = _masked(trials, mask)
    kept = [o.refused for o in outcomes]
    lost = paired_difference([o.refused for o in trials.own[0]], kept, groups=trials.groups)
    p = 1.0
    if lost.low > 0:
        rng = random.Random(seed)
        controls = [_masked(trials, random_like(mask, observed.frequency_LE, rng)) for _ in range(MASKS)]
        # the mask that is tested is one of them (Phipson & Smyth, Stat. Appl. Genet. Mol. Biol. 9:39, 2010)
        p = (1 + sum(sum(o.refused for o in found) <= sum(kept) for found in controls)) / (1 + MASKS)
    return Baseline(name, list(first), _does(trials, outcomes), lost, p)


def _masked(trials: Trials, mask: Ablated) -> list[Outcome]:
    return trials.run(None, FLAGGED, ablating(trials, mask))


def _does(trials: Trials, outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """What the prompts of each kind do, as shares."""
    by_kind = {kind: [outcomes[i] for i in trials.rows_of(trials.of_kind(kind))] for kind in trials.kinds}
    return {
        kind: {does: sum(o.does == does for o in found) / len(found) for does in (REFUSES, AS_TWIN, BROKEN)}
        for kind, found in by_kind.items()
    }


# --- on organisms


def observed_of(model: Path, contrast: Path, *overrides: str) -> Observed:
    """Run an organism's pairs as they are, with the demo's settings but for these."""
    from gtqlora import localize
    from gtqlora.capture import open_subject
    from gtqlora.config import DiagnoseConfig, build
    from gtqlora.contrasts import load
    from gtqlora.contrasts.readout import find_readout
    from gtqlora.judging.judge import judge_of
    from gtqlora.organisms import embedded
    from gtqlora.scoring import Runner

    config = build(
        DiagnoseConfig, file=embedded.recipe(), model=str(model), contrast=str(contrast), overrides=overrides
    )
    judge, subject = judge_of(config.judge), open_subject(config)
    rows = load(config.contrast, judge).split(config.split)
    pairs = localize.pairs_of(rows, subject, config.max_pairs, config.seed)
    runner = Runner.of(subject, judge, config)
    readout = localize.readable(runner, pairs, find_readout(subject.tokenizer, rows.rows))
    return observe_pairs(localize.Trials(runner, [pair.answered_with(readout.begun) for pair in pairs], readout))


@dataclass(frozen=True)
class SingleDirection:
    """What an edit that ablates one direction does to held-out prompts: refusals left of each kind, and the floor."""

    harmful: float
    lookalike: float
    accuracy: float
    floor: str

    def __str__(self) -> str:
        rates = f"harmful {self.harmful:.3f}  lookalike {self.lookalike:.3f}, right {self.accuracy:.3f}"
        return f"{rates}  floor {self.floor}"


def by_direction(model: Path, contrast: Path, direction: str, out: Path) -> SingleDirection:
    """Ablate one direction, and verify the edit as any other."""
    from gtqlora.config import ProjectConfig, VerifyConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.project import project
    from gtqlora.stages.verify import verify

    given = {"file": embedded.recipe(), "model": str(model), "contrast": str(contrast)}
    with Run(out) as run:
        project(build(ProjectConfig, **given, overrides=(f"direction={direction}",)), run)
        verdict = verify(build(VerifyConfig, **given, overrides=("ablation=0",)), run)
    lookalike = verdict.table["lookalike"]
    return SingleDirection(
        harmful=verdict.table["harmful"].refusal_after.value,
        lookalike=lookalike.refusal_after.value,
        accuracy=lookalike.accuracy_after.value if lookalike.accuracy_after else float("nan"),
        floor=verdict.floor.verdict,
    )


def report(model: Path, contrast: Path, name: str, directions: Sequence[str]) -> None:
    observed = observed_of(model, contrast)
    for found in baselines(observed, seed=0):
        print(f"{name:14}{found.name:26}{'named' if found.named else 'nothing':9}{_said(found, observed)}", flush=True)
    with TemporaryDirectory() as root:
        for direction in directions:
            done = by_direction(model, contrast, direction, Path(root) / direction)
            print(f"{name:14}{direction:26}{done}", flush=True)


def _said(found: Baseline, observed: Observed) -> str:
    """The ranking and what its mask does, in one line."""
    if found.lost is None:
        return "-"
    places = " ".join(f"{observed.layers[position]}/{expert}" for position, expert in found.ranked)
    does = "; ".join(
        f"{kind} {', '.join(f'{what} {share:.2f}' for what, share in shares.items())}"
        for kind, shares in found.does.items()
    )
    lost = f"lost {found.lost.value:.2f} [{found.lost.low:.2f}, {found.lost.high:.2f}]"
    return f"{places}  masked: {does}  {lost}, p {found.p:.2f}"


def main() -> int:
    from gtqlora.organisms import embedded

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisms", nargs="*", help="MODEL:CONTRAST; without any, those that ship with the package")
    parser.add_argument("--no-directions", action="store_true", help="rankings alone")
    args = parser.parse_args()
    started = time.monotonic()
    given = [
        (Path(model), Path(contrast), Path(model).name)
        for model, _, contrast in (o.partition(":") for o in args.organisms)
    ]
    for model, contrast, name in given or [(embedded.organism(k), embedded.contrast(), k) for k in embedded.names()]:
        report(model, contrast, name, () if args.no_directions else DIRECTIONS)
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
