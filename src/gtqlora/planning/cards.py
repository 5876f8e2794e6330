"""GPUs and memory as a command line names them: `4x141GB`, `H100`, `512GB`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gtqlora.errors import ConfigError

GIB, _MIB = 2**30, 2**20
# MiB that the driver shows, by what the card is sold as. Any other card has as many bytes as its name says.
_SOLD = {24: 24_564, 40: 40_960, 48: 49_140, 80: 81_559, 96: 97_887, 141: 143_771}
_NAMES = {"h100": 80, "a100": 80, "h200": 141, "l40s": 48, "l4": 24}
_MEASURED = ("80GB", "141GB", "H100", "H200")
_CARDS = re.compile(r"(?:(\d+) *[x×] *)?([a-z]+\d+[a-z]?|[\d.]+ *g(?:b|ib)?)", re.IGNORECASE)
_BYTES = re.compile(r"([\d.]+)(gb|gib|tb|tib)", re.IGNORECASE)
_UNITS = {"gb": 10**9, "gib": GIB, "tb": 10**12, "tib": 2**40}
MOST_CARDS, MOST_HERE = 4096, 8
"""GPUs that are planned for, and those of one machine, at most."""


@dataclass(frozen=True)
class Cards:
    """GPUs of one kind: how many, what they are sold as, and the bytes that a program sees on each."""

    count: int
    name: str
    bytes: int

    @property
    def here(self) -> int:
        """Return how many are in a machine: as many as divide them evenly, eight at most."""
        return next(many for many in range(MOST_HERE, 0, -1) if self.count % many == 0)

    @property
    def measured(self) -> bool:
        """Whether rates were measured on such a card; one of 80 GB or 141 GB is taken to be an H100 or H200."""
        return self.name in _MEASURED


def parse_cards(text: str) -> Cards:
    """Return the GPUs that a text such as `4x141GB`, `2xH100` or `80GB` names.

    Raises:
        ConfigError: it names none.
    """
    found = _CARDS.fullmatch(text.strip())
    known = f"write 4x141GB, 80GB or 2xH100 (cards known by name: {', '.join(name.upper() for name in _NAMES)})"
    if found is None:
        raise ConfigError(f"--gpus {text}: no GPUs are written so; {known}")
    count, name = int(found[1] or 1), re.sub(r"^([\d.]+) *g(b|ib)?$", r"\1gb", found[2].lower())
    if not 1 <= count <= MOST_CARDS:
        raise ConfigError(f"--gpus {text}: from 1 to {MOST_CARDS} GPUs are planned for; {known}")
    if not name.endswith("gb") and name not in _NAMES:
        raise ConfigError(f"--gpus {text}: no card of that name is known; {known}")
    size = float(_NAMES[name]) if name in _NAMES else _number(name[:-2], f"--gpus {text}")
    usable = _SOLD[int(size)] * _MIB if size in _SOLD else round(size * 10**9)
    return Cards(count, name.upper(), usable)


def parse_bytes(text: str, option: str) -> int:
    """Return the bytes that a text such as `512GB` or `1.5TiB` names.

    Raises:
        ConfigError: it names none.
    """
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} {text}: no amount of memory is written so; write 512GB, 480GiB or 2TB")
    return round(_number(found[1], f"{option} {text}") * _UNITS[found[2].lower()])


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**6:
        raise ConfigError(f"{where}: {text} is no amount of memory; write a positive number, such as 80")
    return value


def in_binary(size: float) -> str:
    """Return bytes as GPUs' memory is told."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / _MIB:,.0f} MiB"
