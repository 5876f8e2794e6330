"""JSON from untrusted files: bounded, without duplicate keys, and only what JSON itself allows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

MAX_DIGITS = 60
"""Of one number: tokenizers write 10^30 for "no limit"; Python refuses above 4300, and floats overflow above 308."""
MAX_DEPTH = 64
"""Of objects and lists in each other; what copies or prints them later recurses."""


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: not JSON, or a key twice in one object, a number that is none or too long, deep nesting, or half
            a character.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    _check(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]}, which is too large")
    return value


def _constant(name: str) -> Any:
    raise ValueError(f"{name}, which is not JSON")


def _check(value: Any) -> None:
    """Depth and characters, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        for text in _texts(level):
            _check_text(text)
        level = [child for parent in level for child in _children(parent)]
        depth += 1


def _children(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in inner if isinstance(child, dict | list | str))


def _texts(level: list[Any]) -> Iterator[str]:
    for value in level:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (a lone surrogate) in {text[:20]!r}") from error
