"""How each language words a refusal, a lecture and a gift: tables of patterns for the judge `string`."""

from gtqlora.judging.wordings.english import ENGLISH
from gtqlora.judging.wordings.wording import Wording


def language_of(said: str, asked: str) -> Wording | None:
    return ENGLISH
