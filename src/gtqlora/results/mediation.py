# pyright: strict
"""What `verify` finds out of the ways in which an edit works: through the routing or past it, by gates or by LoRA.

An *arm* is a model with some parts of the edit in place, and with its own routing or that of another run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gtqlora.results.files import read_rows
from gtqlora.stats import Interval

ARMS = "arms.parquet"

Arm = Literal["original", "edited", "gates", "lora", "original_routing", "edited_routing", "other_routing"]
"""The model before and after the edit; with its gates or its LoRA alone; edited with the routing that the original has
on the same prompt; original with the routing that the edited model has; edited with the routing that the original has
on another prompt, which it answers."""
FACTORIAL: tuple[Arm, ...] = ("original", "gates", "lora", "edited")
REPLAYS: tuple[Arm, ...] = ("original_routing", "edited_routing", "other_routing")

Does = Literal["refuses", "as edited", "broken"]
"""What a completion does: the judge finds a refusal; it is the edited model's, or the row's `answer`; neither."""

Role = Literal["necessary", "sufficient", "both", "neither", "partly", "cannot tell"]
"""What the change of routing is to the repair. "partly": for some prompts and not for others."""


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """What one drawn prompt does in one arm; a line of `arms.parquet`."""

    number: int
    kind: str
    arm: str
    text: str
    does: str


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How often prompts do each of the three things, in shares that sum to 1."""

    refuses: Interval
    as_edited: Interval
    broken: Interval


@dataclass(frozen=True, kw_only=True)
class Mediation:
    """Whether an edit repairs lookalike prompts through the routing.

    A prompt is repaired if the original refuses it and the edited model answers it, rightly where the row says how.
    `as_edited` of `direct` is the edit's natural direct effect among the repaired prompts, of `indirect` its natural
    indirect effect.

    Attributes:
        drawn, repaired: lookalike prompts that were asked, and those of them that are repaired.
        refusal_replayed: all drawn prompts by the edited model with the original's routing on them; None without any.
        direct: repaired prompts by the edited model with the original's routing; None if none is repaired.
        indirect: repaired prompts by the original with the edited model's routing.
        control: repaired prompts by the edited model with the original's routing on another prompt; None if none has
            one of as many tokens.
        routing: what the change of routing is to the repair, a `Role`.
        reason: why it cannot be told, else what it rests on.
    """

    drawn: int
    repaired: int
    refusal_replayed: Interval | None
    direct: Shares | None
    indirect: Shares | None
    control: Shares | None
    routing: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Factorial:
    """What gates and LoRA do alone and together, on drawn prompts.

    Attributes:
        lookalike: "original", "gates", "lora", "edited" -> what lookalike prompts do.
        harmful: the same -> refusal of harmful prompts.
        gates_repair, lora_repair: share of the repaired lookalike prompts that this part repairs alone; None if none
            is repaired.
        gates_idle: whether gates alone repair next to nothing; None if too little was repaired to say.
        sentence: all of that in words.
    """

    lookalike: dict[str, Shares]
    harmful: dict[str, Interval]
    gates_repair: Interval | None
    lora_repair: Interval | None
    gates_idle: bool | None
    sentence: str


def read_arms(run: Path) -> list[ArmOutcome]:
    """Return what every drawn prompt does in every arm.

    Raises:
        RunError: they are not there, or not what this version writes.
    """
    return read_rows(ArmOutcome, run, ARMS, "verify")
