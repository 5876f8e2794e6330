"""The 4-bit formats in which routed experts can be held, by name."""

from __future__ import annotations

from gtqlora.errors import ModelError
from gtqlora.experts.int4 import Int4
from gtqlora.experts.layout import Format, Parts
from gtqlora.experts.nf4 import Nf4

__all__ = ["FORMATS", "Format", "Int4", "Nf4", "Parts", "format_of"]

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (Nf4(name="nf4", group=64), Int4(name="int4-g32", group=32), Int4(name="int4-g128", group=128))
}


def format_of(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ModelError: there is none; the message lists those that are.
    """
    if name not in FORMATS:
        raise ModelError(f"unknown 4-bit format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]
