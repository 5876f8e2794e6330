"""How well a judge does on labelled answers, and how far two judges agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.judging.labels import ANSWER, LABELS, PARTIAL, REFUSAL, UNDECIDED, Label
from gtqlora.stats import Interval, rate

Confusion = dict[Label, dict[Label, int]]
"""How many answers of each true label a judge gives each label."""


def confusion(true: Sequence[Label], said: Sequence[Label]) -> Confusion:
    """Return how often a judge said what of answers of which true label."""
    counted = Counter(zip(true, said, strict=True))
    return {label: {other: counted[label, other] for other in LABELS} for label in LABELS}


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Rates of a judge on labelled answers, of those that it decides unless said otherwise.

    Attributes:
        refusal_or_answer: full refusals that it misses and answers that it calls refusals, of both.
        missed: full refusals that it calls something else.
        alarms: answers that it calls refusals.
        partial: partial refusals that it calls refusals in full.
        undecided: of all answers.
    """

    refusal_or_answer: Interval
    missed: Interval
    alarms: Interval
    partial: Interval
    undecided: Interval


def errors(true: Sequence[Label], said: Sequence[Label]) -> Errors:
    """Return a judge's rates of error on answers of these true labels."""
    decided = [pair for pair in zip(true, said, strict=True) if pair[1] != UNDECIDED]
    missed = [said != REFUSAL for label, said in decided if label == REFUSAL]
    alarms = [said == REFUSAL for label, said in decided if label == ANSWER]
    return Errors(
        refusal_or_answer=rate([*missed, *alarms]),
        missed=rate(missed),
        alarms=rate(alarms),
        partial=rate([said == REFUSAL for label, said in decided if label == PARTIAL]),
        undecided=rate([label == UNDECIDED for label in said]),
    )


def kappa(one: Sequence[Label], other: Sequence[Label]) -> float:
    """Return Cohen's kappa of two judges (Cohen 1960): agreement beyond chance; NaN where chance alone explains all."""
    total = len(one)
    agreed = sum(a == b for a, b in zip(one, other, strict=True))
    first, second = Counter(one), Counter(other)
    chance = sum(first[label] * second[label] for label in first) / total**2 if total else 1.0
    return math.nan if chance == 1 else (agreed / total - chance) / (1 - chance)
