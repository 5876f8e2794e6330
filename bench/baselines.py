"""Published ways to name experts and directions, each with its own causal check, beside the diagnosis.

    python bench/baselines.py                                     # the organisms that ship with the package
    python bench/baselines.py MODEL:CONTRAST [MODEL:CONTRAST...]  # folders that `organisms build` wrote

- *SteerMoE* (arXiv 2509.09660) ranks experts by risk difference: how much more often they are chosen on prompts that
  show a behaviour than on paired ones that do not; it deactivates the first.
- *SAFEx* (arXiv 2506.17368) takes experts that are among the most chosen ones on harmful prompts in nearly all
  resamples; it disables them.
- *Single direction* (arXiv 2410.03415) ablates the direction of false refusals, made orthogonal to that of true ones,
  from all that writes the stream. That is `project --direction false_refusal_orthogonal`, so it is held to our floor.

Both rankings are calibrated here: flagged prompts and twins are exchanged group by group, and an expert is named only
if its statistic is above nearly all of the largest ones that such exchanges give (Westfall & Young, Resampling-Based
Multiple Testing, 1993). Both are checked by their own mask: the named experts are masked together on the other half of
the pairs. They "act" where that takes more refusals away than masking random experts of the same layers that are chosen
as often.
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

from gtqlora.localize.masks import Expert, ablatable, ablated_of, ablating, random_like
from gtqlora.localize.steps import Observed, observe_pairs
from gtqlora.localize.trials import FLAGGED
from gtqlora.stats import Interval, group_means, paired_difference, resampled

EXCHANGES, RESAMPLES, MOST = 200, 50, 16
"""Exchanges of labels, resamples of SAFEx for each, and experts that are masked at most."""
DIRECTIONS = ("refusal", "false_refusal", "false_refusal_orthogonal")

Array = NDArray[np.floating]
Statistic = Callable[[Array, Array], Array]
"""A function of the rates_GX of flagged prompts and of twins, for all experts X of all layers -> statistic_X."""


@dataclass(frozen=True)
class Baseline:
    """What a method names, and what its mask does.

    Attributes:
        experts: (position among the MoE layers, expert), the strongest first.
        lost: share of flagged prompts that stop refusing under the mask, less that under the control's; None if no
            expert is named.
    """

    name: str
    experts: list[Expert]
    lost: Interval | None

    @property
    def acts(self) -> bool:
        return self.lost is not None and self.lost.low > 0


def baselines(observed: Observed, *, seed: int, level: float = 0.95) -> list[Baseline]:
    """Name experts on the discovering half of the pairs, and mask them on the confirming half."""
    found, trials = observed.discovery, observed.trials
    rows = trials.rows_of(found)
    flagged_GLE, twins_GLE = (
        group_means(side.prompt.rates_NLE[rows].astype(float), found.groups)
        for side in (observed.flagged, observed.twins)
    )
    groups, _, experts = flagged_GLE.shape
    flagged_GX, twins_GX = flagged_GLE.reshape(groups, -1), twins_GLE.reshape(groups, -1)
    rankings = {"SteerMoE": risk_difference, "SAFEx": stable_frequency}
    return [
        _checked(
            observed, name, [divmod(int(i), experts) for i in named(flagged_GX, twins_GX, statistic, seed, level)], seed
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


def named(flagged_GX: Array, twins_GX: Array, statistic: Statistic, seed: int, level: float) -> list[int]:
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


def _checked(observed: Observed, name: str, experts: Sequence[Expert], seed: int) -> Baseline:
    trials = observed.confirmation
    mask = ablated_of(ablatable(experts, trials.subject.anatomy.spec))
    if not mask:
        return Baseline(name, [], None)
    control = random_like(mask, observed.frequency_LE, random.Random(seed))
    kept = [[o.refused for o in trials.run(None, FLAGGED, ablating(trials, what))] for what in (control, mask)]
    return Baseline(name, list(experts), paired_difference(kept[0], kept[1], groups=trials.groups))


# --- on organisms


def observed_of(model: Path, contrast: Path) -> Observed:
    """Run an organism's pairs as they are, with the demo's settings."""
    from gtqlora import localize
    from gtqlora.capture import open_subject
    from gtqlora.config import DiagnoseConfig, build
    from gtqlora.contrasts import load
    from gtqlora.judging.judge import judge_of
    from gtqlora.organisms import embedded
    from gtqlora.scoring import Runner

    config = build(DiagnoseConfig, file=embedded.recipe(), model=str(model), contrast=str(contrast))
    judge, subject = judge_of(config.judge), open_subject(config)
    rows = load(config.contrast, judge).split(config.split)
    pairs = localize.pairs_of(rows, subject, config.max_pairs, config.seed)
    readout = localize.readout_tokens(subject, rows.rows)
    return observe_pairs(localize.Trials(Runner.of(subject, judge, config), pairs, readout))


def by_direction(model: Path, contrast: Path, direction: str, out: Path) -> str:
    """Ablate one direction, verify the edit as any other, and say what came of it."""
    from gtqlora.config import ProjectConfig, VerifyConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.project import project
    from gtqlora.stages.verify import verify

    given = {"file": embedded.recipe(), "model": str(model), "contrast": str(contrast)}
    with Run(out) as run:
        project(build(ProjectConfig, **given, overrides=(f"direction={direction}",)), run)
        verdict = verify(build(VerifyConfig, **given, overrides=("ablation=0",)), run)
    rates = "  ".join(f"{kind} {verdict.table[kind].refusal_after.value:.3f}" for kind in ("harmful", "lookalike"))
    return f"{rates}  floor {verdict.floor.verdict}"


def report(model: Path, contrast: Path, name: str, directions: Sequence[str]) -> None:
    observed = observed_of(model, contrast)
    for found in baselines(observed, seed=0):
        lost = (
            "" if found.lost is None else f"  lost {found.lost.value:.2f} [{found.lost.low:.2f}, {found.lost.high:.2f}]"
        )
        places = " ".join(f"{observed.layers[position]}/{expert}" for position, expert in found.experts)
        print(f"{name:14}{found.name:26}{'acts' if found.acts else 'nothing':9}{places or '-'}{lost}", flush=True)
    with TemporaryDirectory() as root:
        for direction in directions:
            print(
                f"{name:14}{direction:26}{by_direction(model, contrast, direction, Path(root) / direction)}", flush=True
            )


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
