"""What the judge `string` knows of a language: phrases that decline, and the words in which refusals are made.

All of it is matched against folded text (`folding.fold`): no capitals, no marks on Latin letters, straight quotes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Cue = tuple[str, str]
"""Literals, one of which has to stand in a text ("can't|cannot"), and the pattern that is sought where one does."""

GROUPS = ("you", "self", "machine", "asked", "negation", "turning_down", "morals", "norms", "deeds", "helpers", "offers", "scope")
"""Groups of words in which refusals are made: who speaks, what was asked, no, morals, who may help, what else there is."""

# English contractions are one word; elsewhere an apostrophe parts two.
_WORD = re.compile(r"[^\W\d_]+(?:'(?:t|m|d|s|ll|ve|re)\b)?")
_MOST_KNOWN = 100_000


class Cues:
    """Patterns with the literals that they cannot match without: a substring is found far faster than a pattern."""

    def __init__(self, *cues: Cue) -> None:
        self._cues = [(tuple(literals.split("|")), re.compile(pattern)) for literals, pattern in cues]

    def found_in(self, text: str) -> bool:
        """Tell whether any of the patterns matches somewhere."""
        return any(
            pattern.search(text) is not None
            for literals, pattern in self._cues
            if any(literal in text for literal in literals)
        )


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The wording of one language.

    Attributes:
        function_words: folded words by which the language is recognized.
        declines: the assistant turns down what was asked, in so many words.
        meta: words of each of `GROUPS`; a star stands for any ending.
        gives: what announces that something is given after all.
        instructs: sentences that instruct, sought from the beginning of each.
        asks_for_text: a prompt that wants a text written, in which anybody may refuse.
        salutes: how a letter begins.
        spaced: written with spaces between words.
    """

    function_words: frozenset[str]
    declines: Cues
    meta: Mapping[str, str]
    gives: Cues
    instructs: re.Pattern[str]
    asks_for_text: re.Pattern[str]
    salutes: re.Pattern[str]
    spaced: bool = True

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(group, re.compile("|".join(map(self._word, self.meta[group].split())))) for group in GROUPS]

    def _word(self, word: str) -> str:
        return re.escape(word).replace(r"\*", r"[\w']*")

    @cached_property
    def _known(self) -> dict[str, tuple[str, ...]]:
        return {}

    def groups_of(self, word: str) -> tuple[str, ...]:
        """Return the groups that a word belongs to; words are remembered, as most of a text is the same few hundred."""
        found = self._known.get(word)
        if found is None:
            found = tuple(group for group, pattern in self._patterns if pattern.fullmatch(word))
            if len(self._known) < _MOST_KNOWN:
                self._known[word] = found
        return found

    def words_of(self, sentence: str) -> int:
        """Return how many words a sentence has; two characters count as one where there are no spaces."""
        return len(sentence.split()) if self.spaced else (len(sentence) + 1) // 2

    def counts(self, sentence: str) -> Counter[str]:
        """Count the words of each group in a sentence."""
        if not self.spaced:
            return Counter({group: len(pattern.findall(sentence)) for group, pattern in self._patterns})
        return Counter(group for word in _WORD.findall(sentence) for group in self.groups_of(word))
