"""What "harden" ablates while it trains, so that refusal does not come to hang on a few experts."""

from __future__ import annotations

import random

from gtqlora.capture import Subject
from gtqlora.config import TrainConfig
from gtqlora.contrasts import Contrast
from gtqlora.errors import ContrastError
from gtqlora.families import Anatomy
from gtqlora.localize.expert_ablation import Ranking, rank
from gtqlora.localize.masks import Ablated

_RANKED = 200
"""Harmful prompts on which experts are ranked, at most."""


class AblationSampler:
    """What is ablated at each step of a training; it depends on the seed and the step only.

    Half of the draws take a random share of each layer's experts, up to `share`; the others take the ranking's first
    experts, as an adversary would, as many at most in all layers together, their number log-uniform.
    """

    def __init__(self, anatomy: Anatomy, ranking: Ranking, *, share: float, seed: int) -> None:
        self.n_experts, self.layers = anatomy.spec.n_experts, len(anatomy.moe)
        self.ranking, self.seed = ranking, seed
        self.most = min(max(1, round(share * self.n_experts)), self.n_experts - anatomy.spec.top_k)

    def experts(self, step: int) -> Ablated:
        """Return what is ablated at a step."""
        rng = random.Random(f"{self.seed} {step}")
        if rng.random() < 0.5:
            limit = min(self.most * self.layers, len(self.ranking.order))
            return self.ranking.first(round(limit ** rng.random()))
        layers = ((layer, rng.randint(0, self.most)) for layer in range(self.layers))
        return {layer: tuple(sorted(rng.sample(range(self.n_experts), count))) for layer, count in layers}

    def rows(self, step: int, count: int) -> list[bool]:
        """Draw the rows of a batch that run with ablated experts, by chance half of them."""
        rng = random.Random(f"{self.seed} {step} rows")
        return [rng.random() < 0.5 for _ in range(count)]


def sampler(config: TrainConfig, subject: Subject, rows: Contrast) -> AblationSampler | None:
    """Return what "harden" ablates, None for "edit"; experts are ranked in the model as it is before training.

    Raises:
        ContrastError: the rows cannot rank experts.
    """
    if config.objective == "edit":
        return None
    ranking = rank(subject, rows, prompts=_RANKED, batch_size=config.batch_size, seed=config.seed)
    if ranking is None:
        raise ContrastError(
            f"{config.contrast}: split {config.split!r} has no harmful rows with twins or benign rows to compare them "
            'with, so "harden" cannot tell which experts to ablate; add some'
        )
    return AblationSampler(subject.anatomy, ranking, share=config.ablation_share, seed=config.seed)
