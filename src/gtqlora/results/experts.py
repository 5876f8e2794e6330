# pyright: strict
"""Records about routed experts: which one, what it does by itself, and refusal over the number of experts ablated."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.stats import Interval


# in order, so that lists of experts can be sorted and compared
@dataclass(frozen=True, order=True)
class ExpertId:
    """A routed expert: the index of its decoder layer, and its number in that layer."""

    layer: int
    expert: int


@dataclass(frozen=True)
class TokenChoice:
    """How often a token chooses an expert: the share of its occurrences, and that by the share of all tokens."""

    token: str
    rate: float
    lift: float


@dataclass(frozen=True, kw_only=True)
class ExpertEffect:
    """What one candidate does to the log-odds of refusing, as part of the gap between flagged prompts and twins.

    Attributes:
        kind: of the flagged prompts that it was measured on.
        layer, expert: which expert it is, as in `ExpertId`.
        ablate: the part of the gap that goes when it alone is ablated.
        restore: the part that returns when it alone is restored while all other candidates stay ablated.
        control: the larger of the two for a random expert of the same layer, chosen as often.
        q: that it is neither needed nor enough; controlled over candidates.
        causal: it acts (it is needed or enough, see `localize.masks.Effect`), is chosen more on flagged prompts, and
            routing as a whole carries something.
        computes: it acts otherwise.
        contributes: it brings a part back, but does not act: others do the same.
        tokens: those that choose it most often.
    """

    kind: str
    layer: int
    expert: int
    ablate: Interval
    restore: Interval
    control: Interval
    q: float
    causal: bool
    computes: bool
    contributes: bool = False
    tokens: list[TokenChoice]

    @property
    def cause(self) -> str:
        """Return what it was shown to be; empty for nothing."""
        said = {"causal": self.causal, "computes it": self.computes, "contributes": self.contributes}
        return next((word for word, holds in said.items() if holds), "")


@dataclass(frozen=True)
class CurvePoint:
    """The flagged prompts with so many experts ablated; `broken` ones neither refuse nor do what the twin does."""

    ablated: int
    refusal: Interval
    broken: Interval
    log_odds: Interval | None


@dataclass(frozen=True)
class Curve:
    """Refusal of flagged prompts of one kind over the number of ablated experts, in one order of experts."""

    name: str
    control: bool
    points: list[CurvePoint]
    kind: str = ""
