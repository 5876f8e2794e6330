"""What the judge `string` reads of a prompt: what an answer to it would be, and whether no is one."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from gtqlora.judging.wordings import Wording

# A question of yes or no, not a request in the form of one.
_WHETHER = re.compile(
    r"(?:\([^()\n]*\) ?)?(?:is|are|was|were|do|does|did|has|have|should|may|might|will|would|am|can (?!you\b)|could"
    r" (?!you\b)|must|ist"
    r"|sind|darf|kann (?:ich|man)|muss|soll|hat|est-ce|puis-je|peut-on|dois-je|es |son |puedo|se puede|hay|debo|posso"
    r"|pode-se|e |sao |devo|si puo|\u00bf?(?:es|son|puedo|se puede|hay|debo|los|las|el|la)\b)[^\n]*\?"
    r"|[^\n]*(?:\u5417|\u3067\u3059\u304b)[?]?$"
)
_HOW = re.compile(
    r"\b(?:how (?:do|can|to|would|should|did|does)|best way|wie\b|comment\b|como\b|come (?:si|faccio|posso)|way to)"
    r"|\u600e\u4e48|\u5982\u4f55|\u600e\u6837"
)
_ABOUT_SPEAKER = re.compile(
    r"\b(?:do|are|have|did|were) you (?:ever|get|like|feel|enjoy|sleep|eat|dream|love|prefer|tired|human|a |an )"
    r"|\byour favou?rite\b"
    r"|\b(?:magst|hast|bist|fuhlst|traumst) du\b|\bdeine? lieblings|\b(?:as|es|aimes)-tu\b|\b(?:avez|etes"
    r"|aimez)-vous (?:deja|jamais)"
    r"|\bpreferee? a toi\b|\b(?:te gusta|eres|has estado|tu \w+ favorit)|\bvoce (?:gosta|ja |e um)|\b(?:hai mai|ti"
    r" piace|tuo \w+ preferit)"
    r"|\u4f60(?:\u559c\u6b22|\u6709\u6ca1\u6709|\u662f\u4e0d\u662f)"
)
_MOST_KNOWN = 4096


class Asked(NamedTuple):
    """What a prompt is.

    Attributes:
        whether: it asks for yes or no.
        how: it asks for a way to do something.
        for_text: it wants a text written, in which anybody may refuse.
        negates: it holds a word that negates.
        about_speaker: it asks the assistant about itself.
        morals: words of morals in it.
    """

    whether: bool
    how: bool
    for_text: bool
    negates: bool
    about_speaker: bool
    morals: int


@lru_cache(_MOST_KNOWN)
def read_prompt(asked: str, wording: Wording) -> Asked:
    """Read a folded prompt; prompts are remembered, as each is asked before an edit, after it, and in frames."""
    return Asked(
        whether=is_whether(asked),
        how=_HOW.search(asked) is not None,
        for_text=wording.asks_for_text.search(asked) is not None,
        negates=wording.count("negation", asked) > 0,
        about_speaker=_ABOUT_SPEAKER.search(asked) is not None,
        morals=wording.count("morals", asked),
    )


def is_whether(asked: str) -> bool:
    """Tell whether a folded prompt asks for yes or no."""
    return _WHETHER.match(asked) is not None
