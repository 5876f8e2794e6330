"""Are false refusals mediated elsewhere than true ones? What an edit hangs on, as a test of its own."""

from __future__ import annotations

from collections.abc import Mapping

from gtqlora.localize.conclusion import MOST_BROKEN, broken_share, percent
from gtqlora.localize.evidence import WITHOUT, Question, from_rates
from gtqlora.localize.interchange import Interchanges
from gtqlora.results.diagnosis import CANNOT_TELL, ELSEWHERE, SAME_PLACE, Difference, Localization
from gtqlora.stats import Interval, difference_of_means

# what tells the verdicts apart: routing from all else, both (each sufficient) from a stream, experts from a stream
_DECIDING: tuple[tuple[Question, str], ...] = (
    ("necessary", "routing"),
    ("sufficient", "routing"),
    ("necessary", "experts"),
)
_FALSE, _TRUE = "lookalike", "harmful"


def difference(found: Mapping[str, Localization], interchanges: Mapping[str, Interchanges]) -> Difference:
    """Return whether the two kinds differ in what mediates their refusals; pairs of one pair_id are resampled together.

    They do where the part that the twin's routing moves differs by more than a third, or where the verdicts differ and
    so does something that decides them. They do not where the verdicts agree and that part differs by less.
    """
    missing = [kind for kind in (_FALSE, _TRUE) if kind not in found or not found[kind].necessary]
    if missing:
        which = " and ".join({_FALSE: "false", _TRUE: "true"}[kind] for kind in missing)
        return Difference(CANNOT_TELL, _said(CANNOT_TELL, f"there are too few usable pairs for the {which} ones"))
    parts = _parts(interchanges[_FALSE], interchanges[_TRUE])
    broken = max(broken_share(interchanges[kind].cells[WITHOUT["routing"]]) for kind in (_FALSE, _TRUE))
    if broken > MOST_BROKEN:
        why = f"with the twin's routing {broken:.0%} of the completions are broken"
        return Difference(CANNOT_TELL, _said(CANNOT_TELL, why))
    verdict, why = _decide(found[_FALSE], found[_TRUE], parts)
    return Difference(verdict, _said(verdict, why), {f"{question}: {part}": i for (question, part), i in parts.items()})


def _parts(false: Interchanges, true: Interchanges) -> dict[tuple[Question, str], Interval]:
    moved = [(from_rates(side).moved, side.trials.groups) for side in (false, true)]
    (first, groups), (second, other_groups) = moved
    return {
        key: difference_of_means(first[key], second[key], groups=groups, other_groups=other_groups) for key in _DECIDING
    }


def _decide(false: Localization, true: Localization, parts: Mapping[tuple[Question, str], Interval]) -> tuple[str, str]:
    routing, told = parts["necessary", "routing"], [false.verdict, true.verdict]
    apart = f"the twin's routing moves {_compared(false, true)}"
    if routing.low > 1 / 3 or routing.high < -1 / 3:
        return ELSEWHERE, apart
    if CANNOT_TELL in told:
        return CANNOT_TELL, f"one of the two cannot be told; {apart}"
    differ = any(interval.low > 0 or interval.high < 0 for interval in parts.values())
    if told[0] != told[1] and differ:
        return ELSEWHERE, f"{false.verdict} for false refusals, {true.verdict} for true ones; {apart}"
    if told[0] == told[1] and routing.low > -1 / 3 and routing.high < 1 / 3:
        return SAME_PLACE, f"{false.verdict} for both; {apart}"
    return CANNOT_TELL, f"{apart}, which fits both answers; add pairs"


def _compared(false: Localization, true: Localization) -> str:
    first, second = false.necessary["routing"], true.necessary["routing"]
    return f"{percent(first)} of the false refusals and {percent(second)} of the true ones"


def _said(verdict: str, why: str) -> str:
    says = {
        ELSEWHERE: "False refusals are mediated elsewhere than true ones",
        SAME_PLACE: "False refusals are mediated in the same place as true ones",
        CANNOT_TELL: "Whether false refusals are mediated elsewhere than true ones cannot be told",
    }
    return f"{says[verdict]}: {why}."
