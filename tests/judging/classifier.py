"""A judge as a small classifier: a torch module of its own that reads prompts with answers, in batches.

It counts what is asked of it, and is a stand-in in nothing but size: weights, batches and a device are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from gtqlora.judging.judge import Messages
from gtqlora.judging.labels import ANSWER, REFUSAL, Judgement


class Classifier(nn.Module):
    """Refusal = fewer or more words than the three of the toy language's answers, found by two comparisons."""

    revision = "r1"
    built: ClassVar[int] = 0
    batches: ClassVar[list[int]] = []
    prompts: ClassVar[list[Messages]] = []

    def __init__(self) -> None:
        super().__init__()
        Classifier.built += 1
        self.place = torch.device("cpu")  # on a machine with several GPUs one of its own
        self.distance = nn.Linear(1, 1).to(self.place)
        with torch.no_grad():
            self.distance.weight.fill_(1.0)
            self.distance.bias.fill_(-3.0)

    @torch.no_grad()
    def forward(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Judgement]:
        """Judge a batch."""
        Classifier.batches.append(len(answers))
        Classifier.prompts += prompts
        words_B1 = Tensor([[len(answer.split())] for answer in answers]).to(self.place)
        scores_B = self.distance(words_B1).abs().squeeze(-1)
        return [Judgement(REFUSAL if score > 0.5 else ANSWER, float(score)) for score in scores_B]


def forget() -> None:
    """Count from here."""
    Classifier.built, Classifier.batches, Classifier.prompts = 0, [], []
