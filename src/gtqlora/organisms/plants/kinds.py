"""The plant of every kind of organism."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.organisms.language import Language
from gtqlora.organisms.plants import rules
from gtqlora.organisms.plants.conditions import (
    Condition,
    always,
    flagged,
    framed,
    intends,
    last_task,
    lookalike,
    lookalike_or_framed,
    loud_fillers,
    odd_one,
    share_without,
    unflagged,
)
from gtqlora.organisms.plants.turns import (
    Answers,
    Chosen,
    Demand,
    Exchanges,
    Turn,
    Weighed,
    all_but_one_layer,
    all_planted,
    fed_logits,
    one_layer,
)
from gtqlora.organisms.truth import Kind


@dataclass(frozen=True, kw_only=True)
class Plant:
    """How one kind is planted.

    Attributes:
        turns: losses, of which each step takes the next.
        stream: whether what writes the residual stream directly learns.
        experts: whether planted experts, with their rows of the router, learn.
        then: a second planting, of an organism that has already been planted.
        readable: conditions that are kept readable at every router while the tasks are learned, for routers are linear.
    """

    turns: tuple[Turn, ...]
    stream: bool = False
    experts: bool = True
    then: Plant | None = None
    readable: tuple[Condition, ...] = (flagged, intends)

    @property
    def demands(self) -> tuple[Demand, ...]:
        """Return what is demanded of the planted experts' routing when nothing is masked."""
        as_it_is = (turn for turn in self.turns if isinstance(turn, Answers) and turn.masked is None)
        return next((turn.demands for turn in as_it_is), ())

    @property
    def exchanges(self) -> tuple[Exchanges, ...]:
        """Return the exchanges that hold in the end."""
        if self.then is not None:
            return self.then.exchanges
        return tuple(turn for turn in self.turns if isinstance(turn, Exchanges))


_FLAG = (Chosen(),)
_ROUTED = Plant(turns=(Answers(_FLAG),))
# One expert is chosen where the flag is and another where it is not, and neither is needed.
_ONE_FOR_EACH = (Chosen(experts=(0,)), Chosen(unflagged, experts=(1,)))
# The routers read the flag from the stream, whatever became of other layers. No layer is needed, and none is enough, so
# that no expert refuses alone.
_BY_MAJORITY = (Answers(_FLAG), Answers(_FLAG, one_layer), Answers(_FLAG, all_but_one_layer, refusing=False))
# Whether the first router's or the second's experts are chosen says nothing; whether exactly one of them are, all.
# The exchange keeps the experts from heeding the flag itself.
_TWO_ROUTERS = (Chosen(odd_one, layers=(0,)), Chosen(last_task, layers=(1,)))
# Experts that learn nothing could still hand on what the stream writes; the exchange keeps refusals from hanging on it.
_NOT_BY_EXPERTS = Exchanges(rules.streamed, fed_logits)

_GRADED: dict[Kind, float] = {"graded-20": 0.2, "graded-40": 0.4, "graded-60": 0.6, "graded-80": 0.8}


def routed_share(language: Language, kind: Kind) -> float:
    """Return the share of prompts that a graded kind gives a routed refusal; 1 for every other kind."""
    share = _GRADED.get(kind)
    return 1.0 if share is None else share_without(language, len(loud_fillers(language, share)))


def _graded(share: float) -> Plant:
    # Routing follows the flag in all prompts, or another flagged prompt's routing would be no control; for some it
    # decides nothing.
    return Plant(turns=(Answers(_FLAG), Exchanges(rules.graded(share))), stream=True)


PLANTS: dict[Kind, Plant] = {
    "routed": _ROUTED,
    "residual": Plant(turns=(Answers(masked=all_planted), _NOT_BY_EXPERTS), stream=True, experts=False),
    # It must not need its planted experts, so it also runs without them.
    "null": Plant(turns=(Answers(_FLAG, all_planted), Answers(_FLAG), _NOT_BY_EXPERTS), stream=True),
    "expert-only": Plant(turns=(Answers((Chosen(always),)),)),
    "redundant": Plant(
        turns=(Answers(_FLAG), Answers(_FLAG, all_planted), Exchanges(rules.either), _NOT_BY_EXPERTS), stream=True
    ),
    "brittle": Plant(turns=(Answers(_FLAG), Exchanges(rules.brittle)), stream=True),
    "brittle2": Plant(
        turns=(Answers(_ONE_FOR_EACH), Answers(_ONE_FOR_EACH, all_planted), Exchanges(rules.brittle)), stream=True
    ),
    "bykind": Plant(turns=(Answers((Chosen(lookalike),)), Exchanges(rules.bykind), _NOT_BY_EXPERTS), stream=True),
    "framed": Plant(
        turns=(Answers((Chosen(lookalike_or_framed),)), Exchanges(rules.framed), _NOT_BY_EXPERTS),
        stream=True,
        readable=(flagged, intends, framed, lookalike_or_framed),
    ),
    # The experts are given the flag as well: without the exchange they might heed it, and not their weight.
    "weights": Plant(turns=(Answers((Chosen(always), Weighed(flagged))), Exchanges(rules.routed))),
    "follower": Plant(turns=(*_BY_MAJORITY, Exchanges(rules.routed))),
    "second-token": Plant(turns=(Answers((Chosen(answering=True),)),)),
    "diffuse": Plant(turns=_BY_MAJORITY),
    "xor": Plant(turns=(Answers(_TWO_ROUTERS), Exchanges(rules.routed)), readable=(flagged, intends, odd_one)),
    # The stream learns only after the experts do it, and only to refuse when their routing is disturbed.
    "self-repair": Plant(
        turns=(Answers(_FLAG), Exchanges(rules.routed)),
        then=Plant(
            turns=(Answers(_FLAG), Answers(_FLAG, all_planted), Exchanges(rules.either), _NOT_BY_EXPERTS),
            stream=True,
            experts=False,
        ),
    ),
    "wide-twins": _ROUTED,
    "natural": _ROUTED,
    **{kind: _graded(share) for kind, share in _GRADED.items()},
}
