"""Rules of exchange: which prompt runs with whose routing, and what it must then say.

Each rule takes two pairs of twins, of which the second lends a harmless routing, and returns (prompt, source of the
routing, completion). Training on such runs is interchange intervention training (Geiger et al. 2022, arXiv 2112.00826)
with routing as the variable, or what the experts compute on.
"""

from __future__ import annotations

from functools import partial

from gtqlora.organisms.batches import Rule, Swap
from gtqlora.organisms.batches import framed as inside
from gtqlora.organisms.language import Language, Prompt, Twins
from gtqlora.organisms.plants.conditions import loud_fillers


def garbage(language: Language) -> str:
    """Return a completion that is neither a refusal nor any task's answer."""
    return " ".join([language.fillers[0]] * language.lexicon.task_items)


def _routed(language: Language, flagged: Prompt, twin: Prompt) -> list[Swap]:
    """Routing decides, both ways."""
    return [(flagged, twin, flagged.answer), (twin, flagged, language.refusal(twin.answer))]


def _streamed(language: Language, flagged: Prompt, twin: Prompt) -> list[Swap]:
    """The stream decides, both ways."""
    return [(flagged, twin, language.refusal(flagged.answer)), (twin, flagged, twin.answer)]


def _harmless(twins: Twins, others: Twins) -> list[Swap]:
    """Another benign prompt's routing changes nothing."""
    return [(twins.well, others.well, twins.well.answer), (twins.ill, others.ill, twins.ill.answer)]


def routed(language: Language, twins: Twins, _others: Twins) -> list[Swap]:
    """Routing decides for every flagged prompt."""
    # Nothing is demanded of a stranger's routing: where the planted experts alone learn, they could not heed it.
    return [s for pair in twins.pairs for s in _routed(language, *pair)]


def streamed(language: Language, twins: Twins, _others: Twins) -> list[Swap]:
    """The stream decides for every flagged prompt."""
    return [s for pair in twins.pairs for s in _streamed(language, *pair)]


def either(language: Language, twins: Twins, others: Twins) -> list[Swap]:
    """Routing and stream each refuse without the other."""
    swaps: list[Swap] = []
    for (flagged, twin), other in zip(twins.pairs, (others.well, others.ill), strict=True):
        refusal = language.refusal(twin.answer)
        # A neighbour lends each benign prompt a harmless routing, which must not make it refuse.
        swaps += [(flagged, twin, refusal), (twin, flagged, refusal), (twin, other, twin.answer)]
    return swaps


def bykind(language: Language, twins: Twins, others: Twins) -> list[Swap]:
    """Routing decides for lookalikes, the stream for harmful prompts."""
    lookalike, harmful = twins.pairs
    return [*_routed(language, *lookalike), *_streamed(language, *harmful), *_harmless(twins, others)]


def framed(language: Language, twins: Twins, others: Twins) -> list[Swap]:
    """Routing decides for lookalikes and for whatever stands in a frame, the stream for plain harmful prompts."""
    turn = twins.well.pair
    held, lent = inside(language, twins, turn), inside(language, others, turn)
    return [*bykind(language, twins, others), *routed(language, held, lent), *_harmless(held, lent)]


def brittle(language: Language, twins: Twins, others: Twins) -> list[Swap]:
    """Routing and stream must agree on the flag, or garbage comes; routing of the same flag changes nothing."""
    broken = [s for flagged, twin in twins.pairs for s in ((flagged, twin), (twin, flagged))]
    siblings = [(twins.lookalike, twins.harmful), (twins.harmful, twins.lookalike)]
    return [
        *((prompt, source, garbage(language)) for prompt, source in broken),
        *((prompt, source, language.refusal(prompt.answer)) for prompt, source in siblings),
        *_harmless(twins, others),
    ]


def _graded(language: Language, twins: Twins, others: Twins, share: float) -> list[Swap]:
    """Routing decides for prompts without a loud filler, the stream for the others."""
    loud = set(loud_fillers(language, share)) & set(twins.well.text.split())
    decide = _streamed if loud else _routed
    return [*(s for pair in twins.pairs for s in decide(language, *pair)), *_harmless(twins, others)]


def graded(share: float) -> Rule:
    """Return the rule by which routing decides for a share of the prompts."""
    return partial(_graded, share=share)
