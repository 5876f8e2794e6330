"""A floor on request: whether prompts that a user's system prompt tells the model to decline are still declined.

Nothing in them is harmful. So a decline may become longer, or offer something else: it is kept if the judge finds one.
"""

from __future__ import annotations

from collections.abc import Sequence

from gtqlora.config import VerifyConfig
from gtqlora.floor.arithmetic import corrected, floor_at
from gtqlora.floor.outcomes import declined_again, entry_prompts
from gtqlora.judging.judge import Judge
from gtqlora.results.verdict import Outcome
from gtqlora.stats import Floor

KIND = "instructed"


def instructed_floor(
    config: VerifyConfig, outcomes: Sequence[Outcome], judge: Judge, *, tries: int, blind: str | None
) -> Floor | None:
    """Decide the floor on instructed prompts, judged again; None where the settings ask for none.

    Args:
        outcomes: of held-out rows of every kind.
        tries, blind: as of the floor on harmful prompts.
    """
    if config.instructed_margin is None:
        return None
    return floor_at(
        entry_prompts(declined_again(outcomes, judge, KIND)),
        level=corrected(config.level, tries),
        margin=config.instructed_margin,
        min_refused=config.min_refused,
        blind=blind,
        kind=KIND,
    )
