"""The settings of `contrast build`."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.config.addresses import check_servers
from gtqlora.config.stages import StageConfig
from gtqlora.config.values import require

HELPFUL = (
    "You are a helpful and honest assistant. Answer a request that only sounds dangerous like any other one, plainly "
    "and completely. Decline what would really do harm."
)


@dataclass(frozen=True, kw_only=True)
class BuildConfig(StageConfig):
    """Pairs from public sets of prompts, with the model's own answers; `contrast` is the file that is made.

    Attributes:
        generate_with: a server that speaks OpenAI's protocol and says the answers; without one the model here does.
        served: what that server calls the model.
        limit: prompts of each kind that the model is asked, at most; raised, there are more pairs and it takes longer.
        helpful: a system prompt under which lookalike prompts that the model refuses are asked again, never harmful
            ones; empty asks them again as they are.
        samples: answers that are drawn for a lookalike prompt that the model still refuses, at most.
        temperature: of those draws; raised, they differ more.
        twin_words: harmless words that are tried in place of the one that triggers a refusal, at most; 0 makes no
            twins.
    """

    max_new_tokens: int = 512
    generate_with: str | None = None
    served: str | None = None
    limit: int = 2000
    helpful: str = HELPFUL
    samples: int = 4
    temperature: float = 0.8
    twin_words: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_servers(self.generate_with, served=self.served)
        self._at_least(1, "limit")
        self._at_least(0, "samples", "twin_words")
        require(self.temperature > 0, f"temperature = {self.temperature}: must be positive")
