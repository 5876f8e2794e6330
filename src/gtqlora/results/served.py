# pyright: strict
"""What is known of a served model: how it was held against the one that is here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind a server, and how far its answers to probes are those of ours.

    Attributes:
        server: its address.
        model: what it calls it.
        probes: prompts that both were asked.
        tokens: of the answers.
        same: share of them that our model says in their place, too.
    """

    server: str
    model: str
    probes: int
    tokens: int
    same: float

    @property
    def sentence(self) -> str:
        """Return what was found, without the address, which is nobody else's."""
        return (
            f"the answers are those of a server: of the {self.tokens:,} tokens that it said to {self.probes} probes "
            f"the model here says {self.same:.1%}, too"
        )


@dataclass(frozen=True, kw_only=True)
class ServedPair:
    """The original and the edited model behind a server, and how far their answers to probes are those of ours.

    Attributes:
        server: its address.
        before, after: what it calls the two.
        probes: harmless prompts that all were asked.
        tokens: of the answers of both.
        same_before, same_after: share of the tokens that our model says in their place, too.
        telling: tokens in whose place our two models say different things, and one says this.
        right: those of them that are said by the one of the two that it should be.
    """

    server: str
    before: str
    after: str
    probes: int
    tokens: int
    same_before: float
    same_after: float
    telling: int
    right: int

    @property
    def sentence(self) -> str:
        """Return all of that in words."""
        return (
            f"plain answers are those of {self.server}, of {self.before} (before) and {self.after} (after): of their "
            f"{self.tokens:,} tokens on {self.probes} probes the models here say {self.same_before:.1%} and "
            f"{self.same_after:.1%}, too, and of {self.telling} that tell these two apart {self.right} are right"
        )

    @property
    def standing(self) -> str:
        """Return what such a verdict is worth."""
        return (
            "for information: a server is known by probes only, so no certificate rests on its answers; `export` goes "
            "by `gtqlora verify` without --generate-with"
        )
