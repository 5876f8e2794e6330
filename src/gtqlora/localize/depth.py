"""In which layers the routing mediates: the twin's routing in the layers up to one, and in the layers after it.

The routing of later layers may only follow what earlier ones decided. Interchanged all at once the two look alike;
with the routing of the first layers interchanged, the routers behind them run free and show which it is.

Shape letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gtqlora.decoding import Changes
from gtqlora.localize.conclusion import WHOSE, percent
from gtqlora.localize.evidence import WITHOUT
from gtqlora.localize.interchange import InLayers, Interchanges, exchange, partly
from gtqlora.localize.trials import FLAGGED, Outcome, odds_of
from gtqlora.progress import track
from gtqlora.results.diagnosis import AS_TWIN, MIN_PAIRS, Depth, DepthEffect, DepthPoint
from gtqlora.stats import Interval, ratio_interval

MOST_POINTS = 9
"""Numbers of layers that are tried, none and all among them."""
GENERATED = 40
"""Pairs of a kind whose completions are generated; log-odds are read for all of them."""
MOST = 2 / 3
"""Part of what the whole routing moves above which a part of the layers moves most of it."""

Values = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """What goes with the routing of so many first layers, and with that of all layers after them; N prompts.

    Attributes:
        unit: what is the whole behaviour, prompt by prompt.
    """

    up_to: dict[int, Values]
    after: dict[int, Values]
    unit: Values
    groups: Sequence[str]

    def of_behaviour(self, values_N: Values) -> Interval:
        return ratio_interval(values_N, self.unit, groups=self.groups)

    def of_routing(self, values_N: Values) -> Interval:
        # what goes with the layers after none is what goes with all of them
        return ratio_interval(values_N, self.after[0], groups=self.groups)


def depth_of(found: Interchanges, verdict: str) -> Depth | None:
    """Return in which layers the routing of pairs of one kind mediates; None for fewer pairs than a verdict needs.

    Args:
        verdict: of this kind; the layers are named only where the routing mediates.
    """
    layers = [layer.index for layer in found.trials.subject.anatomy.moe]
    if len(found.pairs) < MIN_PAIRS:
        return None
    counts = sorted({round(at) for at in np.linspace(0, len(layers), min(MOST_POINTS, len(layers) + 1))})
    odds, said = _odds(found, counts), _said(found, counts)

    def moved(part: str, count: int) -> DepthEffect:
        log_odds = odds.of_behaviour(getattr(odds, part)[count]) if odds else None
        return DepthEffect(log_odds=log_odds, as_twin=said.of_behaviour(getattr(said, part)[count]))

    points = [
        DepthPoint(
            layers=count,
            last=layers[count - 1] if count else None,
            up_to=moved("up_to", count),
            after=moved("after", count),
        )
        for count in counts
    ]
    whose = WHOSE[found.trials.kinds[0]]
    if verdict not in ("routing", "both"):
        sentence = f"No layers are named, as the routing is not found to mediate the {whose}."
    else:
        sentence = _sentence(odds, said, counts, layers, whose)
    return Depth(sentence=sentence, generated=min(GENERATED, len(found.pairs)), points=points)


def _odds(found: Interchanges, counts: Sequence[int]) -> _Swept | None:
    """Return what goes of the log-odds; None without a readout."""
    own, twins, trials = odds_of(found.flagged), odds_of(found.twins), found.trials
    if own is None or twins is None:
        return None
    own_N, whole = np.array(own), np.array(odds_of(found.cells[WITHOUT["routing"]]), float)
    return _swept(
        found,
        counts,
        "log-odds",
        lambda change: own_N - trials.first_odds(change),
        whole=own_N - whole,
        unit=own_N - np.array(twins),
        groups=trials.groups,
    )


def _said(found: Interchanges, counts: Sequence[int]) -> _Swept:
    """Return which of the first prompts do as the twin."""
    few = found.trials.of(found.trials.pairs[:GENERATED])

    def as_twin(outcomes: Sequence[Outcome]) -> Values:
        return np.array([outcome.does == AS_TWIN for outcome in outcomes[:GENERATED]], float)

    return _swept(
        found,
        counts,
        "completions",
        lambda change: as_twin(few.run(None, FLAGGED, change)),
        whole=as_twin(found.cells[WITHOUT["routing"]]),
        unit=np.ones(len(few.pairs)),
        groups=few.groups,
    )


def _swept(
    found: Interchanges,
    counts: Sequence[int],
    what: str,
    measure: Callable[[Changes], Values],
    *,
    whole: Values,
    unit: Values,
    groups: Sequence[str],
) -> _Swept:
    """Measure what goes with the twin's routing in the layers up to each number, and after it."""
    most, twins = counts[-1], exchange(found.trials.twins[: len(unit)])
    up_to, after = {0: 0 * unit, most: whole}, {0: whole, most: 0 * unit}
    between = counts[1:-1]
    for count in track(between, f"{what} with layers' routing", len(between)):
        first, others = range(count), range(count, most)
        up_to[count] = measure(partly(twins, partial(InLayers, layers=first)))
        after[count] = measure(partly(twins, partial(InLayers, layers=others)))
    return _Swept(up_to=up_to, after=after, unit=unit, groups=groups)


def _sentence(odds: _Swept | None, said: _Swept, counts: Sequence[int], layers: Sequence[int], whose: str) -> str:
    # the first of the two that the whole routing moves
    moved = next((swept for swept in (odds, said) if swept and swept.of_behaviour(swept.after[0]).low > 1 / 3), None)
    if moved is None:
        return f"The routing as a whole moves too little of the {whose} to ask in which layers."

    def most(part: Literal["up_to", "after"], count: int) -> bool:
        of_moved, of_said = (swept.of_routing(getattr(swept, part)[count]) for swept in (moved, said))
        # log-odds also fall where completions turn to garbage
        return of_moved.low >= MOST and of_said.value > 0.5

    # the shortest first part and the shortest last part that are enough: what is not in both is not needed
    last = next(count for count in counts if count == counts[-1] or most("up_to", count))
    start = next(count for count in reversed(counts) if not count or most("after", count))
    told = [
        f"of what the whole routing moves, that up to layer {layers[last - 1]} moves "
        f"{percent(moved.of_routing(moved.up_to[last]))}"
    ]
    if start:
        told.append(f"that from layer {layers[start]} on {percent(moved.of_routing(moved.after[start]))}")
    if start >= last:
        return f"Some MoE layers’ routing stands in for others’ in the {whose}: {' and '.join(told)}."
    if last < counts[-1]:
        left = moved.of_routing(moved.after[last])
        rest = "only follow" if left.high < 1 / 3 else "take part"
        told.append(f"that of the layers after layer {layers[last - 1]} alone {percent(left)}, so these {rest}")
    where = f"layer {layers[start]}" if start == last - 1 else f"layers {layers[start]} to {layers[last - 1]}"
    return f"The routing mediates the {whose} in MoE {where}: {'; '.join(told)}."
