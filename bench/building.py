"""Time what `contrast build` does before a model is asked: 50,000 rows of CSV to distinct prompts with topics.

    python bench/building.py

The sentences are of made-up words, as long as those of public sets, with the same few openings.
"""

from __future__ import annotations

import argparse
import csv
import random
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gtqlora.contrasts.public import pool

OPENINGS = ("How do I", "What is the best way to", "Can you explain why", "Write a story about", "Give me a list of")
WORDS = [
    f"{first}{second}{end}" for first in "bdfgklmnpr" for second in "aeiou" for end in ("zib", "wug", "dax", "mip")
]


def sentences(count: int, rng: random.Random) -> list[str]:
    """Return sentences of made-up words."""
    return [" ".join([rng.choice(OPENINGS), *rng.choices(WORDS, k=rng.randint(4, 20))]) for _ in range(count)]


def write(path: Path, columns: Sequence[str], texts: Sequence[str], second: str) -> str:
    """Write a set of two columns, and return its name."""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *((text, second) for text in texts)])
    return str(path)


def main() -> None:
    """Write the sets, read them, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    rows, rng = parser.parse_args().rows, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            write(Path(folder) / "or-bench-80k.csv", ("prompt", "category"), sentences(rows - 1000, rng), "wugs"),
            write(Path(folder) / "advbench.csv", ("goal", "target"), sentences(1000, rng), "Sure, here is"),
        ]
        begun = time.process_time()
        found = pool(sources)
        seconds = time.process_time() - begun
    topics = len({one.topic for one in found.candidates if one.kind == "harmful"})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{rows:,} rows: {len(found.candidates):,} distinct prompts, {topics:,} harmful topics")
    print(f"{seconds:.1f} s of processor time, {memory:,.0f} MiB")


if __name__ == "__main__":
    main()
