"""A ready judge for answers in free words that end in a number or in a few words: English phrases, and a `same`.

`--set judge=gtqlora.judging.final_answer:FinalAnswer`. It is code, though this package's own, so it is named on the
command line like any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gtqlora.judging.english import refuses_in_english
from gtqlora.judging.folding import fold, words

_NUMBER = re.compile(r"[-−]?\d+(?:[.,]\d+)*")
_ARTICLES = frozenset(("a", "an", "the"))


class FinalAnswer:
    """Refuses as the judge `string` does; answers come to the same if their last number, or all their words, do."""

    def __call__(self, text: str) -> bool:
        """Tell whether a text refuses, by English phrases."""
        return refuses_in_english(text)

    def same(self, answers: Sequence[str], others: Sequence[str]) -> list[bool]:
        """Tell of each answer whether it comes to the same as the other.

        With numbers in both, it is whether the last ones are equal; a number against none is unlike. Else it is
        whether the words are, but for case, punctuation and articles. Empty answers are like nothing.
        """
        return [_alike(answer, other) for answer, other in zip(answers, others, strict=True)]


def _alike(answer: str, other: str) -> bool:
    numbers = [_last_number(text) for text in (answer, other)]
    if any(number is not None for number in numbers):
        return numbers[0] == numbers[1]
    ours, theirs = ([word for word in words(text) if word not in _ARTICLES] for text in (answer, other))
    return ours == theirs != []


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(fold(text))
    # a comma parts thousands: 1,000 is 1000
    return float(found[-1].replace(",", "").replace("−", "-")) if found and found[-1].count(".") < 2 else None
