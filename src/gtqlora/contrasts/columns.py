"""What a column holds, for messages."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

_SHOWN_VALUES, _LONGEST_VALUE = 8, 24


def told_values(values: Mapping[str, int]) -> str:
    """Return some values of a column, each with how many rows have it.

    A column of texts was named by mistake, perhaps: they may be harmful, and are not shown.
    """
    shown = (
        f"{repr(value) if len(value) <= _LONGEST_VALUE else f'a text of {len(value):,} characters'} ({count:,})"
        for value, count in islice(values.items(), _SHOWN_VALUES)
    )
    return ", ".join(shown) + (", ..." if len(values) > _SHOWN_VALUES else "")
