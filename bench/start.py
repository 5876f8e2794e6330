"""Measure how long the command line takes to answer: `--help` of every verb, `inspect` and `plan` from a config alone.

    python bench/start.py [--repeats 5]

Prints medians of seconds by the clock and of processor seconds; the latter hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

KIMI = Path(__file__).parents[1] / "tests" / "data" / "kimi_k25_config.json"
VERBS = ("inspect", "plan", "contrast check", "diagnose", "train", "project", "verify", "export", "report", "demo")
COMMANDS = {
    "--help": ["--help"],
    **{f"{verb} --help": [*verb.split(), "--help"] for verb in VERBS},
    "inspect (1 T parameters, from config.json)": ["inspect", str(KIMI), "--json"],
    "plan (1 T parameters, from config.json)": [
        *("plan", str(KIMI), "--gpus", "8x141GB", "--seq-len", "512", "--pairs", "1", "--json"),
        *("--set", "gradient_checkpointing=true"),
    ],
}


def seconds(arguments: Sequence[str]) -> tuple[float, float]:
    """Return the time by the clock and on the processor of one call of the command line, in seconds."""
    before, started = os.times(), time.monotonic()
    subprocess.run([sys.executable, "-m", "gtqlora", *arguments], stdout=subprocess.DEVNULL, check=True)
    clock, after = time.monotonic() - started, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return clock, used


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    print(f"{'command':45} clock s  processor s   (medians of {repeats})")
    for name, arguments in COMMANDS.items():
        clock, used = zip(*(seconds(arguments) for _ in range(repeats)), strict=True)
        print(f"{name:45} {median(clock):7.2f}  {median(used):11.2f}")


if __name__ == "__main__":
    main()
