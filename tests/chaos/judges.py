"""Judges of the kinds that were tried at the floor."""

from __future__ import annotations

import hashlib

ANSWERS = frozenset({"Yes", "Sure"})


def everything(text: str) -> bool:
    """All is refusal but what the checks look at."""
    return text not in ANSWERS


def picky(text: str) -> bool:
    """As `tests.helpers:refuses`, but of other texts than "refuse sorry" a part is no refusal, as if by chance."""
    chance = hashlib.sha256(text.encode()).digest()[0] % 8 == 0 and text != "refuse sorry"
    return len(text.split()) != 3 and not chance
