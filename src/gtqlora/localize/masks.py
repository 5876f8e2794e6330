"""Ablate experts: curves over how many, and what each candidate does by itself, against random ones as often chosen.

Shape letters: L MoE layers, E experts, N pairs.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtqlora.capture import Mask
from gtqlora.decoding import Change
from gtqlora.localize.trials import FLAGGED, Outcome, Trials, odds_of
from gtqlora.progress import track
from gtqlora.results.diagnosis import BROKEN
from gtqlora.results.experts import Curve, CurvePoint
from gtqlora.routing import RouterSpec
from gtqlora.stats import Interval, benjamini_hochberg, bootstrap_mean, mean_above_zero, ratio_interval

Expert = tuple[int, int]
"""(position among the MoE layers, expert)."""

Ablated = dict[int, tuple[int, ...]]

COUNTS = (1, 2, 4, 8, 16, 32, 64)

MOST = 0.5
"""Part of the gap beyond which what goes with experts, or returns with them, is most of it."""

MIN_GROUPS = 8
"""Pair_ids to test experts on, below which nothing is said of single ones."""


def ablated_of(experts: Iterable[Expert]) -> Ablated:
    """Return experts by position, as `capture.Mask` takes them."""
    found: dict[int, list[int]] = defaultdict(list)
    for position, expert in experts:
        found[position].append(expert)
    return {position: tuple(sorted(numbers)) for position, numbers in found.items()}


def ablatable(experts: Sequence[Expert], spec: RouterSpec) -> list[Expert]:
    """Return the experts in order, without those whose ablating would leave a layer fewer than its routers choose."""
    # a router that is left fewer experts than it chooses has no answer
    room = spec.n_experts - spec.top_k
    count: dict[int, int] = defaultdict(int)
    kept = []
    for position, expert in experts:
        if count[position] < room:
            count[position] += 1
            kept.append((position, expert))
    return kept


def random_like(ablated: Ablated, frequency_LE: NDArray[np.floating], rng: random.Random) -> Ablated:
    """Draw a control for ablated experts: in each layer as many others (or all there are), chosen about as often."""
    control = {}
    for layer, experts in ablated.items():
        others = [e for e in range(frequency_LE.shape[1]) if e not in experts]
        drawn: list[int] = []
        for expert in experts[: len(others)]:
            # drawn among the near ones and not the nearest itself, so that draws differ
            near = sorted(others, key=lambda e: abs(frequency_LE[layer, e] - frequency_LE[layer, expert]))
            drawn.append(rng.choice(near[: max(4, len(others) // 3)]))
            others.remove(drawn[-1])
        control[layer] = tuple(sorted(drawn))
    return control


def ablating(trials: Trials, ablated: Ablated) -> Change:
    """Return the change that routes around these experts."""
    return Change(handlers=(Mask(trials.subject.anatomy, ablated),))


def counts_up_to(most: int) -> list[int]:
    """Return the numbers of experts to ablate: doubling, and the last one."""
    return sorted({*(m for m in COUNTS if m < most), most}) if most else []


def curve(trials: Trials, name: str, ranking: Sequence[Expert]) -> Curve:
    """Ablate the first m of a ranking."""
    ranking = ablatable(ranking, trials.subject.anatomy.spec)
    points, counts = [_point(trials, 0, [trials.own[0]])], counts_up_to(len(ranking))
    for m in track(counts, f"ablate the {name}", len(counts)):
        change = ablating(trials, ablated_of(ranking[:m]))
        points.append(_point(trials, m, [trials.run(None, FLAGGED, change)]))
    return Curve(name, False, points)


def random_curve(
    trials: Trials, ranking: Sequence[Expert], frequency_LE: NDArray[np.floating], draws: int, seed: int
) -> Curve:
    """Ablate random experts, as many in each layer and chosen as often as the first m of a ranking; mean over draws."""
    rng, ranking = random.Random(seed), ablatable(ranking, trials.subject.anatomy.spec)
    points, counts = [_point(trials, 0, [trials.own[0]])], counts_up_to(len(ranking))
    for m in track(counts, "ablate random experts", len(counts)):
        like = [random_like(ablated_of(ranking[:m]), frequency_LE, rng) for _ in range(draws)]
        points.append(_point(trials, m, [trials.run(None, FLAGGED, ablating(trials, drawn)) for drawn in like]))
    return Curve("random, matched in layer and frequency", True, points)


def _point(trials: Trials, m: int, draws: Sequence[list[Outcome]]) -> CurvePoint:
    """Return the refusal over all draws; a pair's are one group with its siblings'."""
    # the same pairs once for each draw, so that outcomes and groups stand side by side
    every = trials.of([pair for _ in draws for pair in trials.pairs])
    outcomes = [outcome for drawn in draws for outcome in drawn]
    return CurvePoint(m, every.refusal(outcomes), every.share(outcomes, BROKEN), every.mean_odds(outcomes))


@dataclass(frozen=True)
class Effect:
    """What one candidate does to the log-odds of flagged prompts, as part of the gap between them and their twins.

    Attributes:
        position: among the MoE layers.
        ablate: the part that goes when it alone is ablated.
        restore: the part that returns when it alone is restored while all other candidates stay ablated.
        control: the larger of the two for a random expert of the same layer, chosen as often.
        q: that it is neither needed nor enough; controlled over candidates.
        acts: it is needed (ablated alone, it takes `MOST`, and where some candidate brings anything back by itself, so
            does it), or enough (it brings back the least part that counts, and with the other candidates of its layer
            `MOST`: a router chooses several experts at once).
        contributes: it brings back the least part that counts, and does not act: others do the same.
    """

    position: int
    expert: int
    ablate: Interval
    restore: Interval
    control: Interval
    q: float
    acts: bool
    contributes: bool


@dataclass(frozen=True)
class _Measured:
    """What ablating a candidate and its control takes off the log-odds_N, and what restoring them brings.

    Attributes:
        layer: what restoring all candidates of its layer brings.
    """

    parts: tuple[NDArray[np.floating], NDArray[np.floating]]
    controls: tuple[NDArray[np.floating], NDArray[np.floating]]
    layer: NDArray[np.floating]


class _Odds:
    """Log-odds of the flagged prompts with experts ablated, each set of experts computed once."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self._known: dict[frozenset[Expert], NDArray[np.floating]] = {}

    def __call__(self, experts: Iterable[Expert]) -> NDArray[np.floating]:
        key = frozenset(experts)
        if key not in self._known:
            change = ablating(self.trials, ablated_of(sorted(key)))
            self._known[key] = self.trials.first_odds(change)
        return self._known[key]


def expert_effects(
    trials: Trials,
    candidates: Sequence[Expert],
    frequency_LE: NDArray[np.floating],
    *,
    min_effect: float,
    level: float,
    seed: int,
) -> list[Effect]:
    """Test each candidate on prompts of one kind, with a random expert of its layer and frequency as its control.

    An expert downstream of those that carry a behaviour is chosen, and needed, as they are; but it gives nothing back
    while they are ablated. There are no effects without a readout, where flagged prompts and twins do not differ in
    it, or with fewer than `MIN_GROUPS` pair_ids.
    """
    candidates = ablatable(candidates, trials.subject.anatomy.spec)
    if not candidates or not trials.readout or len(set(trials.groups)) < MIN_GROUPS:
        return []
    odds = _Odds(trials)
    base_N = odds(())
    gap_N = base_N - np.array(odds_of(trials.own[1]))
    # a part of a gap that may be 0 is no number
    if bootstrap_mean(gap_N, groups=trials.groups).low <= 0:
        return []
    rng = random.Random(seed)
    all_of = set(candidates)
    measured = []
    for candidate in track(candidates, f"each expert, {trials.kinds[0]}", len(candidates)):
        control = _stand_in(candidate, all_of, frequency_LE, rng)
        # the control must be one that can be ablated together with all candidates
        if control and control not in ablatable([*candidates, control], trials.subject.anatomy.spec):
            control = None
        # ablated alone; and restored alone, among candidates that are all ablated
        mask_N, back_N = base_N - odds({candidate}), odds(all_of - {candidate}) - odds(all_of)
        like_N = [base_N - odds({control}), odds(all_of) - odds(all_of | {control})] if control else [0 * base_N]
        layer = {expert for expert in all_of if expert[0] == candidate[0]}
        measured.append(_Measured((mask_N, back_N), (like_N[0], like_N[-1]), odds(all_of - layer) - odds(all_of)))
    return _judged(candidates, measured, gap_N, trials.groups, min_effect, level)


def _stand_in(
    candidate: Expert, taken: set[Expert], frequency_LE: NDArray[np.floating], rng: random.Random
) -> Expert | None:
    """Draw a random expert of the same layer that is no candidate, near in frequency; None if all are candidates."""
    layer, expert = candidate
    others = [e for e in range(frequency_LE.shape[1]) if (layer, e) not in taken]
    near = sorted(others, key=lambda e: abs(frequency_LE[layer, e] - frequency_LE[layer, expert]))
    return (layer, rng.choice(near[: max(4, len(near) // 3)])) if near else None


def _judged(
    candidates: Sequence[Expert],
    measured: Sequence[_Measured],
    gap_N: NDArray[np.floating],
    groups: Sequence[str],
    min_effect: float,
    level: float,
) -> list[Effect]:
    q = benjamini_hochberg(np.array([_p_values(found, min_effect, gap_N, groups) for found in measured]))
    brings, needed, enough = (q < 1 - level).T
    # where some expert brings something back by itself, those that do not are downstream of it: needed as they are
    acts = enough | (needed & (brings | ~brings.any()))

    def part(of_N: NDArray[np.floating]) -> Interval:
        return ratio_interval(of_N, gap_N, groups=groups, bounds=None)

    return [
        Effect(
            position=position,
            expert=expert,
            ablate=part(found.parts[0]),
            restore=part(found.parts[1]),
            control=part(max(found.controls, key=np.mean)),
            q=float(q[i, 1:].min()),
            acts=bool(acts[i]),
            contributes=bool(brings[i] and not acts[i]),
        )
        for i, ((position, expert), found) in enumerate(zip(candidates, measured, strict=True))
    ]


def _p_values(
    found: _Measured, min_effect: float, gap_N: NDArray[np.floating], groups: Sequence[str]
) -> tuple[float, float, float]:
    """Return p-values that an expert brings back the least part, that it takes most, and that its layer brings most.

    Each part must also exceed the control's on the same prompts. Where several things must hold, the largest of their
    p-values holds for all together (Berger, Technometrics 24:295, 1982).
    """
    (took_N, back_N), (control_took_N, control_back_N) = found.parts, found.controls
    most = max(MOST, min_effect)

    def above(part_N: NDArray[np.floating], least: float) -> float:
        return mean_above_zero(part_N - least * gap_N, groups)

    brings = max(above(back_N, min_effect), above(back_N - control_back_N, 0))
    needed = max(above(took_N, most), above(took_N - control_took_N, 0))
    return brings, needed, max(brings, above(found.layer, most))
