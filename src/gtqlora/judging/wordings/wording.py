"""What the judge `string` knows of a language: phrases that decline, and the words in which refusals are made.

All of it is matched against folded text (`folding.fold`): no capitals, no marks on Latin letters, straight quotes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from gtqlora.judging.english import without_idioms
from gtqlora.judging.patterns import hoisted

Cue = tuple[str, str]
"""Literals ("can't| no "), one of which is in what the pattern finds, and the pattern; a space is a word's edge.

Without literals it is always tried.
"""

GROUPS = (
    "you",
    "abstract",
    "self",
    "machine",
    "asked",
    "negation",
    "turning_down",
    "morals",
    "norms",
    "deeds",
    "helpers",
    "offers",
    "scope",
)
"""Groups of words in which refusals are made: who speaks, what was asked, no, morals, who may help, what else."""
SELF, NEGATION = GROUPS.index("self"), GROUPS.index("negation")
_META_FROM = GROUPS.index("self")

# What stands in the place of a quotation, a short one, and an item of a list.
LONG_QUOTE, QUOTE, ITEM_MARK = "\u275d\u275d", "\u275d", "\u2022"
_MARKS = f" {ITEM_MARK}*_#"

# English contractions are one word; elsewhere an apostrophe parts two.
_WORD = re.compile(r"[^\W\d_]+(?:'(?:t|m|d|s|ll|ve|re)\b)?")
# Letters by which literals are looked up; none is shorter.
_SEEN = 2
_SIGN = re.compile(r"[^\w']")
_DIGIT = re.compile(r"\d")
_MOST_KNOWN, _LONGEST = 50_000, 24


class Cues:
    """Patterns with the literals that they cannot match without: most are never tried."""

    def __init__(self, *cues: Cue) -> None:
        self.patterns = [re.compile(hoisted(pattern)) for _, pattern in cues]
        self._always = sum(1 << i for i, (literals, _) in enumerate(cues) if not literals)
        pieces: dict[str, int] = {}
        for i, (literals, _) in enumerate(cues):
            for literal in literals.split("|") if literals else ():
                # of a literal of several words the longest is enough, as a cue tried in vain costs only time
                piece = max(re.findall(r" ?[^ ]+ ?", literal), key=len)
                pieces[piece] = pieces.get(piece, 0) | 1 << i
        self._beginning: dict[str, list[tuple[str, int]]] = {}
        for piece, bits in pieces.items():
            self._beginning.setdefault(piece[:_SEEN], []).append((piece, bits))

    @classmethod
    def always(cls, pattern: str) -> Cues:
        """Return one pattern that is always tried."""
        return cls(("", pattern))

    def tried_for(self, chunk: str) -> int:
        """Return which patterns what stands between two spaces is reason to try, as bits."""
        padded, tried = f" {chunk if chunk.isalpha() else _SIGN.sub(' ', chunk)} ", 0
        for i in range(len(padded)):
            for piece, bits in self._beginning.get(padded[i : i + _SEEN], ()):
                if padded.startswith(piece, i):
                    tried |= bits
        return tried

    def found_in(self, text: str, tried: int = -1) -> bool:
        """Tell whether any of the patterns that are tried matches somewhere."""
        left = (tried | self._always) & ((1 << len(self.patterns)) - 1)
        while left:
            if self.patterns[(left & -left).bit_length() - 1].search(text):
                return True
            left &= left - 1
        return False


class Sentence(NamedTuple):
    """What a sentence is by itself.

    Attributes:
        groups: words of each of `GROUPS`.
        plain: words without those of groups other than negation, and without two more for each of them.
        negates: the speaker negates.
        meta: three words in ten or more are of those groups, without the addressed and the abstract.
        declines: it turns down what was asked.
        announces: it says that something is given after all.
        redirects: it offers something else, or somebody else's help.
        refers: it names others who are to be asked, or who do it.
        asks: it is a question.
        item: it is an item of a list.
        hard: signs that it gives something: an item, an instruction, a number, quotations.
    """

    words: int
    groups: tuple[int, ...]
    plain: int
    negates: bool
    meta: bool
    declines: bool
    announces: bool
    redirects: bool
    refers: bool
    asks: bool
    item: bool
    hard: float


class Chunk(NamedTuple):
    """What stands between two spaces: the groups of its words, and the cues to try for it, as bits of all `Cues`."""

    groups: tuple[int, ...]
    tried: int


class _Chunks(dict[str, Chunk]):
    """Chunks as they are read; most of any text is the same few thousand words."""

    def __init__(self, read: Callable[[str], Chunk]) -> None:
        self._read = read

    def __missing__(self, chunk: str) -> Chunk:
        found = self._read(chunk)
        if len(self) < _MOST_KNOWN:
            self[chunk] = found
        return found


_META = 0.3


@dataclass(frozen=True, kw_only=True, eq=False)
class Wording:
    """The wording of one language.

    Attributes:
        function_words: folded words by which the language is recognized.
        declines: the assistant turns down what was asked, in so many words.
        meta: words of each of `GROUPS`; a star stands for any letters.
        gives: what announces that something is given after all.
        redirects: offers of something else, and of help from others, which give nothing of what was asked.
        refers: names others who are to be asked, or who do it.
        instructs: sentences that instruct, sought from the beginning of each.
        asks_for_text: a prompt that wants a text written, in which anybody may refuse.
        salutes: how a letter begins.
        spaced: written with spaces between words.
    """

    function_words: str
    declines: Cues
    meta: Mapping[str, str]
    gives: Cues
    redirects: Cues
    refers: Cues
    instructs: re.Pattern[str]
    asks_for_text: re.Pattern[str]
    salutes: re.Pattern[str]
    spaced: bool = True

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile("|".join(map(re.escape, self.meta[group].split()))) for group in GROUPS]

    @cached_property
    def _lexicon(self) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for i, group in enumerate(GROUPS):
            for word in self.meta[group].split():
                found.setdefault(word, set()).add(i)
        return found

    @cached_property
    def _known(self) -> _Chunks:
        return _Chunks(self._looked_up)

    @cached_property
    def _shifts(self) -> list[tuple[Cues, int]]:
        """Return all cues, and from which bit on those of each stand among the bits of a chunk."""
        each = (self.declines, self.gives, self.redirects, self.refers)
        return [(cues, sum(len(before.patterns) for before in each[:i])) for i, cues in enumerate(each)]

    @cached_property
    def _read(self) -> dict[str, Sentence]:
        return {}

    def groups_of(self, word: str) -> tuple[int, ...]:
        """Return the numbers of the groups that a word belongs to."""
        return self._known[word].groups

    def _looked_up(self, chunk: str) -> Chunk:
        words, groups = _WORD.findall(chunk), []
        for word in words:
            groups += set().union(*[self._lexicon[form] for form in _forms(word) if form in self._lexicon])
        return Chunk(tuple(groups), sum(cues.tried_for(chunk) << shift for cues, shift in self._shifts))

    def words_of(self, text: str) -> int:
        """Return how many words a text has; two characters count as one where there are no spaces."""
        return len(text.split()) if self.spaced else (len(text) + 1) // 2

    def count(self, group: str, text: str) -> int:
        """Return how many words of a group are in a text."""
        i = GROUPS.index(group)
        if not self.spaced:
            return len(self._patterns[i].findall(text))
        known = self._known
        return sum([known[chunk][0].count(i) for chunk in text.split()])

    def read(self, sentence: str) -> Sentence:
        """Read a sentence; sentences are remembered, as models repeat those they refuse with."""
        found = self._read.get(sentence)
        if found is None:
            found = self._analysed(sentence)
            if len(self._read) >= _MOST_KNOWN:
                self._read.clear()
            self._read[sentence] = found
        return found

    def _analysed(self, marked: str) -> Sentence:
        sentence = marked.lstrip(_MARKS)
        counts, tried = self._counted(sentence)
        words = self.words_of(sentence)
        (_, declining), (gives, giving), (redirects, redirecting), (refers, referring) = self._shifts
        return Sentence(
            words=words,
            groups=tuple(counts),
            plain=max(0, words - 3 * (sum(counts) - counts[NEGATION])),
            negates=bool(counts[SELF] and counts[NEGATION]),
            meta=sum(counts[_META_FROM:]) >= _META * words,
            declines=self.turns_down(sentence, tried >> declining),
            announces=gives.found_in(sentence, tried >> giving),
            redirects=redirects.found_in(sentence, tried >> redirecting),
            refers=refers.found_in(sentence, tried >> referring),
            asks=sentence.endswith("?"),
            item=marked.startswith(ITEM_MARK),
            hard=marked.startswith(ITEM_MARK) + self._given_in(marked, sentence, words),
        )

    def _given_in(self, marked: str, sentence: str, words: int) -> float:
        quotes = QUOTE in marked and (words <= 3 or LONG_QUOTE in marked)
        number = words >= 3 and _DIGIT.search(sentence) is not None
        return number + 2.0 * quotes + (self.instructs.match(sentence) is not None)

    def turns_down(self, sentence: str, tried: int = -1) -> bool:
        """Tell whether a sentence declines, and is no English idiom such as "I can't wait"."""
        if not self.declines.found_in(sentence, tried):
            return False
        rest = without_idioms(sentence)
        return rest == sentence or self.declines.found_in(rest)

    def _counted(self, text: str) -> tuple[list[int], int]:
        """Count the words of each group, and return them with the cues to try."""
        if not self.spaced:
            return [len(pattern.findall(text)) for pattern in self._patterns], -1
        counts, tried, known = [0] * len(GROUPS), 0, self._known
        for chunk in text.split():
            groups, cues = known[chunk]
            tried |= cues
            for group in groups:
                counts[group] += 1
        return counts, tried


def _forms(word: str) -> list[str]:
    """Return a word, and its beginnings and ends with a star, in which groups may list it."""
    sizes = range(1, min(len(word), _LONGEST) + 1)
    return [word, *[f"{word[:size]}*" for size in sizes], *[f"*{word[-size:]}" for size in sizes]]
