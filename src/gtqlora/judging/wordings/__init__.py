"""How each language words a refusal: phrases and words for the judge `string`, and which language a text is in."""

from __future__ import annotations

import re
from collections import Counter

from gtqlora.judging.wordings.chinese import CHINESE, JAPANESE
from gtqlora.judging.wordings.english import ENGLISH
from gtqlora.judging.wordings.french import FRENCH
from gtqlora.judging.wordings.german import GERMAN
from gtqlora.judging.wordings.italian import ITALIAN
from gtqlora.judging.wordings.portuguese import PORTUGUESE
from gtqlora.judging.wordings.spanish import SPANISH
from gtqlora.judging.wordings.wording import Wording

__all__ = ["CHINESE", "ENGLISH", "JAPANESE", "WORDINGS", "Wording", "language_of"]

_SPACED = (ENGLISH, GERMAN, FRENCH, SPANISH, PORTUGUESE, ITALIAN)
WORDINGS = (*_SPACED, CHINESE, JAPANESE)
_KANA = re.compile("[\u3041-\u30ff]")
_HAN = re.compile("[\u4e00-\u9fff]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_LETTER = re.compile(r"[^\W\d_]")
# A lead in votes that decides; votes a word below which it is none of these languages; too few words to tell.
_SURE, _LEAST, _FEW = 1.5, 0.1, 4
_SOON = 3
"""Words of one language alone that decide, where there is none of another, near its beginning."""


def _shares() -> dict[str, list[tuple[int, float]]]:
    """Return what a function word says for each language: less if several have it."""
    having = Counter(word for wording in _SPACED for word in wording.function_words.split())
    shares: dict[str, list[tuple[int, float]]] = {}
    for i, wording in enumerate(_SPACED):
        for word in wording.function_words.split():
            shares.setdefault(word, []).append((i, 1 / having[word]))
    return shares


_SHARES = _shares()
_ONLY_OF = {word: shares[0][0] for word, shares in _SHARES.items() if len(shares) == 1}


def language_of(said: str, asked: str) -> Wording | None:
    """Return the wording of the language of a folded text; its prompt helps where it is too short to tell.

    None: it is in none that is known.
    """
    if not said.isascii() and (found := _unspaced(said)):
        return found
    sure = [_ONLY_OF[word] for word in said[:160].split() if word in _ONLY_OF]
    if len(sure) >= _SOON and len(set(sure)) == 1:
        return _SPACED[sure[0]]
    words = _WORD.findall(said[:300])
    votes = _votes(words)
    first, second = sorted(votes)[-1:-3:-1]
    if first - second < _SURE:
        votes = [vote + 0.5 * more for vote, more in zip(votes, _votes(_WORD.findall(asked)), strict=True)]
        votes = [vote + _known(words, wording) for vote, wording in zip(votes, _SPACED, strict=True)]
    if max(votes) <= _LEAST * len(words):
        return ENGLISH if len(words) < _FEW or "'''" in said else None
    return _SPACED[votes.index(max(votes))]


def _unspaced(said: str) -> Wording | None:
    han, kana = len(_HAN.findall(said)), len(_KANA.findall(said))
    if not han + kana or 3 * (han + kana) <= len(_LETTER.findall(said)):
        return None
    return JAPANESE if 5 * kana > han else CHINESE


def _votes(words: list[str]) -> list[float]:
    votes = [0.0] * len(_SPACED)
    for word in words:
        for i, share in _SHARES.get(word, ()):
            votes[i] += share
    return votes


def _known(words: list[str], wording: Wording) -> float:
    return 0.5 * sum(len(word) > 3 and bool(wording.groups_of(word)) for word in words)
