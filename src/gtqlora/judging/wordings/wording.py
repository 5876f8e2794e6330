"""What the judge `string` knows of a language: cues, which are patterns sought only where a literal of theirs stands.

All patterns are matched against folded text (`folding.fold`): no capitals, no marks on Latin letters, straight quotes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Cue = tuple[str, str]
"""Literals, one of which has to stand in a text ("can't|cannot"), and the pattern that is sought where one does."""


class Cues:
    """Patterns with the literals that they cannot match without: a substring is found far faster than a pattern."""

    def __init__(self, *cues: Cue) -> None:
        self._cues = [(tuple(literals.split("|")), re.compile(pattern)) for literals, pattern in cues]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where the patterns match, in no order."""
        return [
            match.span()
            for literals, pattern in self._cues
            if any(literal in text for literal in literals)
            for match in pattern.finditer(text)
        ]


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The cues of one language.

    Attributes:
        function_words: folded words by which the language is recognized.
        declines: the assistant turns down what was asked, in so many words.
        lectures: morals, dangers and laws, as refusals hold them up; one alone says little.
        aside: offers of something else, helplines, closings: sentences that give nothing of what was asked.
        gives: what announces that something is given after all.
        instructs: sentences that instruct, sought from the beginning of each.
        asks_for_text: a prompt that wants a text written, in which anybody may refuse.
        salutes: how a letter begins.
        unspaced: written without spaces between words.
    """

    function_words: frozenset[str]
    declines: Cues
    lectures: Cues
    aside: Cues
    gives: Cues
    instructs: re.Pattern[str]
    asks_for_text: re.Pattern[str]
    salutes: re.Pattern[str]
    unspaced: bool = False
