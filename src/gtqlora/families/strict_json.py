"""JSON from untrusted files: bounded, without duplicate keys, and only what JSON itself allows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import NoReturn

MAX_DIGITS = 60
"""Digits that one number may have: tokenizers write 10^30 for "no limit"; floats overflow above 308."""
MAX_DEPTH = 64
"""Levels of objects and lists inside each other: what copies or prints them later recurses."""


def parse(text: str) -> object:
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


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Of two equal keys readers differ in which they take, so that what is checked here need not be what another uses.
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


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _check(value: object) -> None:
    """Check depth and characters, level by level: recursion would end in an error of Python's at the wrong place."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        for text in _texts(level):
            _check_text(text)
        level = [child for parent in level for child in _children(parent)]
        depth += 1


def _children(value: object) -> Iterator[object]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (child for child in inner if isinstance(child, dict | list | str))


def _texts(level: list[object]) -> Iterator[str]:
    for value in level:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


def _check_text(text: str) -> None:
    # JSON may spell half of a character's two UTF-16 units, which no file and no tokenizer can take.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (a lone surrogate) in {text[:20]!r}") from error
