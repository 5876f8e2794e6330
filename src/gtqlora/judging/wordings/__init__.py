"""How each language words a refusal, a lecture and a gift: tables of patterns for the judge `string`."""

from __future__ import annotations

import re

from gtqlora.judging.wordings.chinese import CHINESE, JAPANESE
from gtqlora.judging.wordings.english import ENGLISH
from gtqlora.judging.wordings.french import FRENCH
from gtqlora.judging.wordings.german import GERMAN
from gtqlora.judging.wordings.italian import ITALIAN
from gtqlora.judging.wordings.portuguese import PORTUGUESE
from gtqlora.judging.wordings.spanish import SPANISH
from gtqlora.judging.wordings.wording import Wording

_SPACED = (ENGLISH, GERMAN, FRENCH, SPANISH, PORTUGUESE, ITALIAN)
_KANA = re.compile("[\u3041-\u30ff]")
_HAN = re.compile("[\u4e00-\u9fff]")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_LETTER = re.compile(r"[^\W\d_]")


def language_of(said: str, asked: str) -> Wording | None:
    """Return the wording of the language that a folded text is in; what it is too short to tell, its prompt tells."""
    han = len(_HAN.findall(said))
    kana = len(_KANA.findall(said))
    letters = len(_LETTER.findall(said))
    if (han + kana) * 3 > letters:
        return JAPANESE if kana * 5 > han else CHINESE
    words = _WORD.findall(said)
    counts = [sum(word in w.function_words for word in words) for w in _SPACED]
    best = max(counts)
    if best < 3 or sorted(counts)[-2] * 1.2 > best:
        prompt = _WORD.findall(asked)
        counts = [n + 0.7 * sum(word in w.function_words for word in prompt) for n, w in zip(counts, _SPACED, strict=True)]
    if not any(counts):
        return ENGLISH if len(words) < 6 else None
    return _SPACED[counts.index(max(counts))]
