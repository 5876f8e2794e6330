"""What of a refusal may be kept: whole sentences, and of harmful prompts a refusal and no more."""

from __future__ import annotations

import re

from gtqlora.contrasts.one_way import REFUSAL_CHARACTERS, REFUSAL_WORDS
from gtqlora.judging.english import answers_after_refusing, assents_in_english

# Behind marks of full width there is no space in the scripts that have them, so such a text is one sentence.
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\s*\n+\s*")
_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")


def sentences(text: str) -> list[str]:
    """Return the sentences and lines of a text; a text without any is one."""
    return [part for part in _SENTENCE.split(text.strip()) if part] or [""]


def without_rest(text: str) -> str:
    """Return a text that was cut off without the sentence in which it was, unless that is all of it."""
    found = sentences(text)
    return " ".join(found[:-1]) if len(found) > 1 and not text.strip().endswith(_ENDS) else text


def refusal_only(text: str) -> str | None:
    """Return the longest beginning of a refusal, in whole sentences, that is one and no more by the one-way rule."""
    found, kept = sentences(text), None
    for end in range(1, len(found) + 1):
        start = " ".join(found[:end])
        if not start or len(start.split()) > REFUSAL_WORDS or len(start) > REFUSAL_CHARACTERS:
            break
        if answers_after_refusing(start) or assents_in_english(start):
            break
        kept = start
    return kept
