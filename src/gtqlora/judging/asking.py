"""What the judge `string` reads of a prompt: what an answer to it would be, and whether no is one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

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
_SPEAKER = ("do you ", "are you ", "have you ", "did you ", "were you ", "would you ", "your favo", "st du", "s-tu")
_SPEAKER += ("lieblings",)
_SPEAKER += ("-vous ", "a toi", "te gusta", "eres", "has estado", "favorit", "voce ", "hai mai", "ti piace", "preferit")
_SPEAKER += ("\u4f60",)
"""One of these is in all that `_ABOUT_SPEAKER` finds."""
_ABOUT_SPEAKER = re.compile(
    r"\b(?:do|are|have|did|were) you (?:ever|get|like|feel|enjoy|sleep|eat|dream|love|prefer|mind|tired|human"
    r"|conscious|sentient|remember|miss|a |an )"
    r"|\bwould you \w+ if you (?:could|were|had)\b"
    r"|\byour favou?rite\b"
    r"|\b(?:magst|hast|bist|fuhlst|traumst) du\b|\bdeine? lieblings|\b(?:as|es|aimes)-tu\b|\b(?:avez|etes"
    r"|aimez)-vous (?:deja|jamais)"
    r"|\bpreferee? a toi\b|\b(?:te gusta|eres|has estado|tu \w+ favorit)|\bvoce (?:gosta|ja |e um)|\b(?:hai mai|ti"
    r" piace|tuo \w+ preferit)"
    r"|\u4f60(?:\u559c\u6b22|\u6709\u6ca1\u6709|\u662f\u4e0d\u662f)"
)
_MOST_KNOWN = 4096


@dataclass(frozen=True, eq=False)
class Asked:
    """What a prompt is; each of it is read when it is needed."""

    text: str
    wording: Wording

    @cached_property
    def whether(self) -> bool:
        """Return whether it asks for yes or no."""
        return is_whether(self.text)

    @cached_property
    def how(self) -> bool:
        """Return whether it asks for a way to do something."""
        return _HOW.search(self.text) is not None

    @cached_property
    def for_text(self) -> bool:
        """Return whether it wants a text written, in which anybody may refuse."""
        return self.wording.asks_for_text.search(self.text) is not None

    @cached_property
    def negates(self) -> bool:
        """Return whether it holds a word that negates."""
        return self.wording.count("negation", self.text) > 0

    @cached_property
    def about_speaker(self) -> bool:
        """Return whether it asks the assistant about itself."""
        return any(word in self.text for word in _SPEAKER) and _ABOUT_SPEAKER.search(self.text) is not None

    @cached_property
    def morals(self) -> int:
        """Return how many words of morals are in it."""
        return self.wording.count("morals", self.text)


@lru_cache(_MOST_KNOWN)
def read_prompt(asked: str, wording: Wording) -> Asked:
    """Read a folded prompt; prompts are remembered, as each is asked before an edit, after it, and in frames."""
    return Asked(asked, wording)


def is_whether(asked: str) -> bool:
    """Tell whether a folded prompt asks for yes or no."""
    return _WHETHER.match(asked) is not None
