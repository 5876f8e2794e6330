"""What makes two texts the same to a reader: no invisible characters, one case, look-alike letters as one."""

from __future__ import annotations

import re
import unicodedata

_APOSTROPHES = dict.fromkeys(
    "\u2018\u2019\u201a\u201b\u02bb\u02bc\u02bd\u02b9\u02c8\u02ca\u02cb\u2032\u2035\uff07\u00b4`", "'"
)
_QUOTES = dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u300c\u300d\uff02", '"')
_BLANKS = dict.fromkeys("\u115f\u1160\u2800\u3164\uffa0", " ")
_SIGNS = str.maketrans(_APOSTROPHES | _QUOTES | _BLANKS)

# Characters that are drawn as nothing, beyond Unicode's category Cf: grapheme joiner, Khmer inherent vowels, Mongolian
# and other variation selectors, the deprecated tags' plane, and controls that are no white space.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u034f\u17b4\u17b5\u180b-\u180f\u2065\ufe00-\ufe0f\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
# Marks on letters of the alphabets that are taken for Latin; those of other scripts make other letters.
_MARKED = re.compile(
    "([a-zA-Z\u00c0-\u052f\u1d00-\u1fff\u2c60-\u2c7f\ua720-\ua7ff])"
    "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+"
)

# Small letters (case is folded before) of other alphabets, and Latin ones with strokes or hooks, that pass for a-z.
_LOOK_ALIKE = {
    "a": "\u0430\u03b1\u0251\u1d00\u2c65\u0250\uab7a",  # Cyrillic, Greek, script a, small capital, ...
    "b": "\u0432\u03b2\u0253\u0299\u0180\u0183\u044c\u13cf",
    "c": "\u0441\u03f2\u1d04\u0188\u023c\u2184\u2ca5\uabaf",
    "d": "\u0501\u0256\u0257\u1d05\u0111\u018c\uab70",
    "e": "\u0435\u03b5\u1d07\u0454\u0247\u0259\u01dd\u025b\u04bd\uab7c\u212e",
    "f": "\u0192\ua730\u0584\u03dd\ua799",
    "g": "\u0261\u0262\u0260\u01e5\u0581\uab90",
    "h": "\u043d\u04bb\u029c\u0266\u0127\u0570\u2c68\uab8b\uab7f",
    "i": "\u0456\u03b9\u0131\u026a\u0268\u0269\u04cf\u1d7b\uab96\uab75\u0582",
    "j": "\u0458\u03f3\u1d0a\u0249\u0575\uab7b",
    "k": "\u043a\u03ba\u1d0b\u0199\u2c6a\uabb6",
    "l": "\u029f\u0142\u019a\u026b\u026d\u2c61\u01c0\u05d5\uabae",
    "m": "\u043c\u03fb\u1d0d\u0271\uab87",
    "n": "\u0274\u0272\u0273\u0578\u057c\u03b7\u043f\u019e",
    "o": "\u043e\u03bf\u1d0f\u00f8\u0585\u03c3\u0275\u2c9f\u0ce6\u0d20\ua74b\uab73",
    "p": "\u0440\u03c1\u1d18\u01a5\u1d7d\u2ca3\uabb2\u03f8",
    "q": "\u051b\u0563\u0566\u024b\u02a0",
    "r": "\u0433\u0280\u024d\u027d\u027e\uab81\u1d26\uaba2\uab71",
    "s": "\u0455\ua731\u0282\u023f\uabaa\uaba5\u054f",
    "t": "\u0442\u03c4\u1d1b\u0167\u0288\u01ad\u2c66\uab72",
    "u": "\u03c5\u1d1c\u057d\u028b\u0289\u1d7e",
    "v": "\u0475\u03bd\u1d20\u2c71\uaba9\u05d8",
    "w": "\u051d\u03c9\u1d21\u0461\u026f\uab83\u0561\u2c73",
    "x": "\u0445\u03c7\u1d8d\u2c9d\u04b3",
    "y": "\u0443\u03b3\u028f\u04af\u024f\u01b4\u1eff\uab8d",
    "z": "\u0290\u0291\u01b6\u1d22\u0240\u2c6c\uab93",
}
_LATIN = {char.casefold(): letter for letter, chars in _LOOK_ALIKE.items() for char in chars}
# Letters in black circles and squares, and the letters that flags are made of; Unicode does not fold these.
_LATIN |= {chr(base + i): chr(ord("a") + i) for base in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)}
_TO_LATIN = str.maketrans(_LATIN)

_WORD = re.compile(r"[^\W_]+")
_RUN = 5
_ASSENTS = frozenset(("sure", "certainly", "absolutely", "of", "course", "gladly", "yes", "yeah", "yep", "ok", "okay"))
_ASSENTS |= {"alright", "here", "is", "are", "s", "it", "the"}


def fold(text: str) -> str:
    """Return the text with look-alike letters as one, in one case, without what is not seen; white space stays.

    Both sides of a comparison must be folded: words of other scripts come out in mixed letters.
    """
    if not text.isascii():
        # after the normalization, too: a triple prime becomes three primes
        text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
        for char in {char for char in set(text) if not char.isascii() and unicodedata.category(char) == "Cf"}:
            text = text.replace(char, "")
        text = _MARKED.sub(r"\1", unicodedata.normalize("NFKD", text))
        text = unicodedata.normalize("NFC", text)
    if not (text.isascii() and text.replace("\n", "").isprintable()):
        text = _UNSEEN.sub("", text)
    text = text.casefold().replace("`", "'")
    return text if text.isascii() else _MARKED.sub(r"\1", text.translate(_TO_LATIN))


def flat(text: str) -> str:
    """Return the folded text with single spaces."""
    return " ".join(fold(text).split())


def words(text: str) -> list[str]:
    """Return the folded words without punctuation."""
    return _WORD.findall(fold(text))


def holds(text: str, part: str, asked: str = "") -> bool:
    """Tell whether a text tells `part`: all of it, or five of its words in a row that are not those that were asked.

    A bare assent, or a word of one or two letters, tells nothing.
    """
    sought = words(part)
    joined = "".join(sought)
    if set(sought) <= _ASSENTS or len(joined) < (3 if joined.isascii() else 2):
        return False
    said = words(text)
    if _has_run(said, sought) or (_without_spaces(joined) and joined in "".join(said)):
        return True
    runs = (sought[i : i + _RUN] for i in range(len(sought) - _RUN + 1))
    return any(_has_run(said, run) and not _has_run(words(asked), run) for run in runs)


def _without_spaces(joined: str) -> bool:
    """Tell whether it may be in the midst of what looks like one word: some scripts put no spaces between words."""
    return len(joined) >= 8 or (not joined.isascii() and len(joined) >= 4)


def _has_run(said: list[str], run: list[str]) -> bool:
    first, size = run[0], len(run)
    return first in said and any(word == first and said[i : i + size] == run for i, word in enumerate(said))
