"""Time what `contrast build` does before a model is asked, 50,000 rows of CSV to distinct prompts with topics, and all
of `contrast check` with the judge `string` on as many pairs.

    python bench/building.py

The sentences are of made-up words, as long as those of public sets, with the same few openings.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gtqlora.contrasts.public import pool

OPENINGS = ("How do I", "What is the best way to", "Can you explain why", "Write a story about", "Give me a list of")
WORDS = [
    f"{first}{second}{end}" for first in "bdfgklmnpr" for second in "aeiou" for end in ("zib", "wug", "dax", "mip")
]


REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot assist with {}.",
    "I won't help you {}, since it would be wrong.",
    "I'm not able to discuss {}. Is there anything else I can help with?",
)
ANSWERS = (
    "Sure, here is how to {}. First, take a wug and put it on the table.",
    "To {}, you need some water and a dax. Mix them and wait.",
)


def sentences(count: int, rng: random.Random) -> list[str]:
    """Return sentences of made-up words."""
    return [" ".join([rng.choice(OPENINGS), *rng.choices(WORDS, k=rng.randint(4, 20))]) for _ in range(count)]


def write(path: Path, columns: Sequence[str], texts: Sequence[str], second: str) -> str:
    """Write a set of two columns, and return its name."""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *((text, second) for text in texts)])
    return str(path)


def pairs(count: int, rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield pairs of the three kinds, with refusals and answers of stock phrases and made-up words."""
    for i, prompt in enumerate(sentences(count, rng)):
        kind = ("benign", "lookalike", "harmful")[i % 3]
        what, more = (" ".join(rng.choices(WORDS, k=k)) for k in (4, 20))
        answer, refusal = rng.choice(ANSWERS).format(what), rng.choice(REFUSALS).format(what)
        chosen, rejected = (refusal, answer) if kind == "harmful" else (f"{answer} {more}.", refusal)
        yield {"prompt": f"{prompt}?", "chosen": chosen, "rejected": rejected, "kind": kind}


def check(path: Path, rows: Iterable[dict[str, str]]) -> float:
    """Return the seconds of processor time that the whole command takes to check the rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "gtqlora", "contrast", "check", str(path)], check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


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
        checked = check(Path(folder) / "pairs.jsonl", pairs(rows, rng))
    topics = len({one.topic for one in found.candidates if one.kind == "harmful"})
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{rows:,} rows: {len(found.candidates):,} distinct prompts, {topics:,} harmful topics")
    print(f"{seconds:.1f} s of processor time, {memory:,.0f} MiB")
    print(f"contrast check of {rows:,} pairs: {checked:.1f} s of processor time")


if __name__ == "__main__":
    main()
