"""What changed between two runs of a benchmark beyond its noise: `bench/step.py`, `generate.py` or `experts.py --json`.

    python bench/step.py --json old.json; ...; python bench/step.py --json new.json
    python bench/compare.py old.json new.json

Every number at the same place of both files is compared. Where a benchmark gives the seconds of several steps, noise is
the range of their medians under resampling; of single numbers it is `--noise`, a share. Counts and sizes that should
not change at all are listed when they do. Exits with 1 if anything became worse.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Json = dict[str, "Json"] | list["Json"] | str | float | int | bool | None

_FASTER_IS_MORE = ("tokens_per_second", "share")
_SECONDS = ("seconds", "steps", "step_ms", "ms", "_gib", "milliseconds", "median")
_SETTINGS = ("settings", "versions")
_NAMES = ("way", "shape", "prompts", "engine", "tokens", "layer", "format")
_DRAWS = 500


@dataclass(frozen=True)
class Change:
    """One number in both files, with the range in which noise alone would put the new one."""

    place: str
    old: float
    new: float
    low: float
    high: float
    more_is_better: bool

    @property
    def verdict(self) -> str:
        if self.low <= self.new <= self.high:
            return "same"
        return "better" if (self.new > self.high) == self.more_is_better else "worse"


def numbers(found: Json, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], list[float]]]:
    """Yield every number, and every list of numbers, with the names that lead to it."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key not in _SETTINGS:
                yield from numbers(value, (*place, key))
    elif isinstance(found, list) and found and all(_is_number(value) for value in found):
        yield place, [float(value) for value in found]  # type: ignore[arg-type]
    elif isinstance(found, list):
        for index, value in enumerate(found):
            yield from numbers(value, (*place, _name(value) or str(index)))
    elif _is_number(found):
        yield place, [float(found)]  # type: ignore[arg-type]


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(value: Json) -> str:
    """What tells one of a list's entries from the others, wherever it stands in the list."""
    if not isinstance(value, dict):
        return ""
    return " ".join(str(value[key]) for key in _NAMES if isinstance(value.get(key), str | int))


def _range(values: list[float], noise: float) -> tuple[float, float]:
    middle = statistics.median(values)
    if len(values) < 3:
        return middle * (1 - noise), middle * (1 + noise)
    rng = random.Random(0)
    drawn = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(_DRAWS))
    # a median of few steps moves more between two runs than within one
    return min(drawn[0], middle * (1 - noise)), max(drawn[-1], middle * (1 + noise))


def changes(old: Json, new: Json, noise: float) -> list[Change]:
    """Compare what measures time, rate or memory, at the places that both have."""
    was = dict(numbers(old))
    found = []
    for place, values in numbers(new):
        more = any(word in place[-1] for word in _FASTER_IS_MORE)
        if place in was and (more or place[-1].endswith(_SECONDS)):
            low, high = _range(was[place], noise)
            ends = statistics.median(was[place]), statistics.median(values)
            found.append(Change(" / ".join(place), *ends, low, high, more))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--noise", type=float, default=0.03, help="share by which a number may differ (default: 0.03)")
    args = parser.parse_args(arguments)
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (args.old, args.new))
    if old.get("device") != new.get("device"):
        print(f"other devices: {old.get('device')} and {new.get('device')}; run both on one")
        return 2
    found = changes(old, new, args.noise)
    if not found:
        print("nothing in common to compare")
        return 2
    shown = [change for change in found if change.verdict != "same"]
    for change in sorted(shown, key=lambda change: change.verdict, reverse=True):
        print(
            f"{change.verdict:7}{change.new / change.old:6.2f}x  {change.old:,.4g} -> {change.new:,.4g}  {change.place}"
        )
    print(f"{len(found)} numbers compared, {len(found) - len(shown)} within noise ({args.noise:.0%})")
    return 1 if any(change.verdict == "worse" for change in shown) else 0


if __name__ == "__main__":
    sys.exit(main())
