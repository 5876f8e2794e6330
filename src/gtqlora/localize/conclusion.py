"""Which component mediates the refusals of one kind of prompts, and in which words that is said.

The rule reads intervals against thirds. It is put to the rates of what is generated and to the log-odds; where these
name different components, or a component that was not named does it alone, nothing is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gtqlora.localize.controls import CONTROLS, MISSING
from gtqlora.localize.evidence import ALONE, COMPONENTS, WITHOUT, Evidence, from_odds, from_rates
from gtqlora.localize.interchange import Cell, Interchanges, cells_of
from gtqlora.localize.shares import LEVELS, WITH_ROUTING, odds_shares, shares
from gtqlora.localize.trials import Outcome
from gtqlora.results.diagnosis import BROKEN, CANNOT_TELL, MIN_PAIRS, Localization
from gtqlora.stats import Interval

WHOSE = {"lookalike": "false refusals", "harmful": "true refusals"}
"""What the refusals of each kind of flagged prompts are."""
NAMES = {"routing": "routing", "experts": "experts' computation", "residual": "residual stream"}
_MEANT = {"routing": {"routing"}, "experts": {"experts"}, "residual": {"residual"}, "both": {"routing", "residual"}}
MOST_BROKEN = 1 / 3
"""Share of broken outcomes above which a cell decides nothing."""


def conclude(kind: str, interchanges: Interchanges | None, unusable: Mapping[str, int] | None = None) -> Localization:
    """Return what mediates the refusals of one kind, from its usable pairs.

    Args:
        unusable: how many other pairs of the kind there are, by what is wrong with them.
    """
    n, counted = len(interchanges.pairs) if interchanges else 0, dict(unusable or {})
    # a share of few pairs has an interval that fits every answer
    if interchanges is None or n < MIN_PAIRS:
        reason = f"{n} usable pairs and {MIN_PAIRS} are needed" + _told(counted)
        said = _sentence(CANNOT_TELL, kind, reason)
        cells = cells_of(interchanges) if interchanges and n else []
        return Localization(
            kind=kind, verdict=CANNOT_TELL, sentence=said, reasons=[], n_usable=n, unusable=counted, cells=cells
        )
    rates, odds = from_rates(interchanges), from_odds(interchanges)
    by_rates = _decide(rates)
    by_odds = _decide(odds) if odds else None
    broken = {name: broken_share(interchanges.cells[cell]) for name, cell in _CELLS.items()}
    name, why = _checked(by_rates, by_odds, rates, broken)
    known = max(map(broken_share, interchanges.cells.values())) <= MOST_BROKEN
    return Localization(
        kind=kind,
        verdict=name,
        verdict_log_odds=by_odds.verdict if by_odds else "",
        sentence=_sentence(name, kind, why),
        reasons=_reasons(rates, by_rates, by_odds, broken),
        n_usable=n,
        unusable=counted,
        stood_in=_stood_in(interchanges),
        overlap=_overlap(interchanges),
        words=_words(rates),
        # where much is neither the one nor the other, shares would be of the rule that counts it as half
        shares=shares(interchanges, LEVELS) if known else {},
        shares_with_routing=shares(interchanges, WITH_ROUTING) if known else {},
        shares_log_odds=odds_shares(interchanges, LEVELS),
        shares_with_routing_log_odds=odds_shares(interchanges, WITH_ROUTING),
        necessary=rates.necessary,
        sufficient=rates.sufficient,
        necessary_log_odds=odds.necessary if odds else {},
        sufficient_log_odds=odds.sufficient if odds else {},
        cells=cells_of(interchanges),
    )


def _words(evidence: Evidence) -> dict[str, str]:
    """Return what each component is, by whether most refusals go without it and most come with it alone, if known."""
    found = {}
    for part in COMPONENTS:
        necessary, sufficient = evidence.necessary[part], evidence.sufficient[part]
        needed, enough = necessary.low > 0.5, sufficient.low > 0.5
        if needed or enough:
            found[part] = "both" if needed and enough else "necessary" if needed else "sufficient"
        elif max(necessary.high, sufficient.high) < 0.5:
            found[part] = "neither"
    return found


# --- the rule


@dataclass(frozen=True)
class _Decision:
    """A verdict, its reason, and the cells that it rests on."""

    verdict: str
    why: str
    cells: tuple[str, ...]


_MOVED, _MADE, _COMPUTED = (
    "the twin's routing",
    "the flagged prompt's routing alone",
    "the twin's inputs to the experts",
)
_CELLS: dict[str, Cell] = {_MOVED: WITHOUT["routing"], _MADE: ALONE["routing"], _COMPUTED: WITHOUT["experts"]}


def _decide(evidence: Evidence) -> _Decision:
    """By 95 % intervals against thirds: is the twin's routing enough to move the behaviour, the flagged one to make it?

    Experts and stream are told apart by which carries more than half of Level 1.
    """
    necessary, disturbed, share = evidence.necessary["routing"], evidence.disturbed["routing"], _moved(evidence)
    if disturbed > 1 / 3:
        said = CANNOT_TELL, f"another such prompt's routing does as much as the twin's in {disturbed:.0%}"
    elif necessary.low > 2 / 3:
        said = "routing", f"with its harmless twin's routing a prompt does what the twin does in {share}"
    elif necessary.low > 1 / 3 and necessary.high < 2 / 3:
        said = "both", f"with its harmless twin's routing a prompt does what the twin does in {share} only"
    elif necessary.high >= 1 / 3:
        said = CANNOT_TELL, f"the twin's routing moves {share}, which fits more than one answer; add pairs"
    else:
        return _without_routing(evidence)
    return _Decision(*said, (_MOVED,))


def _without_routing(evidence: Evidence) -> _Decision:
    """Decide where the routing is not necessary: is it sufficient, and if not, do the experts compute it?"""
    sufficient = evidence.sufficient["routing"]
    if sufficient.low > 2 / 3:
        why = (
            "each is sufficient: with its harmless twin's routing a prompt is still refused, and the flagged prompt's "
            f"routing alone makes {percent(sufficient)} of the twins refuse"
        )
        return _Decision("both", why, (_MOVED, _MADE))
    if sufficient.high >= 1 / 3:
        why = (
            f"routing is not necessary, but alone brings {percent(sufficient)} of the refusals, which fits more than "
            "one answer; add pairs"
        )
        return _Decision(CANNOT_TELL, why, (_MOVED, _MADE))
    return _Decision(*_within_level_1(evidence), (_MOVED, _MADE, _COMPUTED))


def _within_level_1(evidence: Evidence) -> tuple[str, str]:
    experts, disturbed, share = evidence.necessary["experts"], evidence.disturbed["experts"], _moved(evidence)
    if disturbed > 1 / 3 or experts.low <= 0.5 <= experts.high:
        return CANNOT_TELL, (
            f"it is not the routing ({share}), but whether the experts or the rest of the stream do it is open "
            f"(experts' inputs: {percent(experts)}, control {disturbed:.0%})"
        )
    if experts.low > 0.5:
        return "experts", (
            f"with the routing held, {percent(experts)} of the refusals go when the chosen experts compute on what "
            "they see in the harmless twin"
        )
    return "residual", f"with its harmless twin's routing a prompt is still refused; the routing moves {share}"


def _moved(evidence: Evidence) -> str:
    return percent(evidence.necessary["routing"])


def _checked(
    by_rates: _Decision, by_odds: _Decision | None, rates: Evidence, broken: Mapping[str, float]
) -> tuple[str, str]:
    """Return the verdict of the rates where nothing speaks against it, and why."""
    name, why = by_rates.verdict, by_rates.why
    often = ", ".join(f"{cell} {broken[cell]:.0%}" for cell in by_rates.cells if broken[cell] > MOST_BROKEN)
    if often:
        return CANNOT_TELL, (
            f"too many completions are broken, neither a refusal nor what the twin does ({often}); a judge with a "
            "`same` of its own finds answers alike that are worded differently"
        )
    if name == CANNOT_TELL:
        return name, why
    other = by_odds.verdict if by_odds else CANNOT_TELL
    if other != CANNOT_TELL and not _MEANT[name] & _MEANT[other]:
        return CANNOT_TELL, f"what is generated says {name}, and the log-odds of its first token say {other}"
    for part in COMPONENTS:
        if part not in _MEANT[name] and rates.sufficient[part].low > 0.5:
            return CANNOT_TELL, (
                f"{why}, but the flagged prompt's {NAMES[part]} alone brings {percent(rates.sufficient[part])} of them"
            )
    return name, why


def broken_share(outcomes: Sequence[Outcome]) -> float:
    """Return the share of outcomes that are neither a refusal nor what the twin does."""
    return float(np.mean([o.does == BROKEN for o in outcomes]))


# --- in words


def _sentence(verdict: str, kind: str, why: str) -> str:
    whose = WHOSE[kind]
    says = {
        "routing": f"The routing mediates the {whose}",
        "experts": f"What the experts compute mediates the {whose}",
        "residual": f"The residual stream mediates the {whose}",
        "both": f"Routing and residual stream both mediate the {whose}",
        CANNOT_TELL: f"What mediates the {whose} cannot be told",
    }
    return f"{says[verdict]}: {why}."


def percent(interval: Interval) -> str:
    """Return a share with its interval and its number of pairs."""
    return f"{interval.value:.0%} (95 % interval {interval.low:.0%} to {interval.high:.0%}, {interval.n} pairs)"


def _told(unusable: Mapping[str, int]) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in unusable.items() if count)
    return f" (others: {told})" if told else ""


def _reasons(
    evidence: Evidence, by_rates: _Decision, by_odds: _Decision | None, broken: Mapping[str, float]
) -> list[str]:
    necessary, sufficient, disturbed = evidence.necessary, evidence.sufficient, evidence.disturbed
    said = [
        f"Is the routing necessary? With the harmless twin's routing {percent(necessary['routing'])} of the prompts do "
        f"what the twin does, beyond what another such prompt's routing does ({disturbed['routing']:.0%}).",
        f"Is the routing sufficient? The flagged prompt's routing makes {percent(sufficient['routing'])} of the twins "
        "refuse.",
        f"Do the experts compute it? With the routing held, the twin's inputs to the experts move "
        f"{percent(necessary['experts'])} beyond what another such prompt's inputs move ({disturbed['experts']:.0%}).",
        f"Is the residual stream necessary? {percent(necessary['residual'])}. Is it sufficient? "
        f"{percent(sufficient['residual'])}.",
        "Neither refused nor as the twin: " + ", ".join(f"{cell} {share:.0%}" for cell, share in broken.items()) + ".",
    ]
    if by_odds and by_odds.verdict != by_rates.verdict:
        said.append(f"The log-odds of the first token alone would say {by_odds.verdict}: {by_odds.why}.")
    return said


def _stood_in(interchanges: Interchanges) -> dict[str, int]:
    """Return how many pairs had no control of the sort wanted."""
    drawn = [one.controls for one in interchanges.pairs]
    counts = {said: sum(not c[i].topic for c in drawn) for i, said in enumerate(MISSING)}
    counts["none of its kind"] = sum(not control.kind for both in drawn for control in both[:1])
    return {name: count for name, count in counts.items() if count}


def _overlap(interchanges: Interchanges) -> dict[str, float]:
    """Return the mean share of experts in common with the twin and with the controls."""
    pairs = interchanges.pairs
    found = {name: np.mean([one.controls[i].overlap for one in pairs]) for i, name in enumerate(CONTROLS)}
    return {"its twin": float(np.mean([one.overlap for one in pairs])), **{k: float(v) for k, v in found.items()}}
