# pyright: strict
"""What `verify` leaves of the ablation study: on how few experts the refusal of harmful prompts hangs."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.results.experts import ExpertId
from gtqlora.stats import Interval


@dataclass(frozen=True, kw_only=True)
class AblationPoint:
    """Refusal of harmful prompts with so many experts ablated, and with like ones drawn at random."""

    ablated: int
    targeted: Interval
    random: Interval | None


@dataclass(frozen=True, kw_only=True)
class AblationStudy:
    """Refusal of held-out harmful prompts over the number of experts ablated, before and after the edit.

    Attributes:
        ranked_against: what harmful prompts were compared with to rank experts, "twins" or "benign rows".
        ranked_prompts: harmful prompts of the training set on which experts were ranked.
        controls: random draws beside each point.
        experts: the ablated ones, in the order of the original model's ranking.
        before, after: the original and the edited model, the same experts ablated.
        after_reranked: the edited model, with the experts ablated that an adversary would rank first in it.
    """

    ranked_against: str
    ranked_prompts: int
    controls: int
    experts: list[ExpertId]
    before: list[AblationPoint]
    after: list[AblationPoint]
    after_reranked: list[AblationPoint]
