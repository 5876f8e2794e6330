"""`python -m gtqlora.organisms build KIND --seed S --out DIR`: make a fresh organism."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gtqlora.errors import GtqloraError
from gtqlora.organisms.build import build
from gtqlora.organisms.embedded import VERDICTS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gtqlora.organisms", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("build", help="train one organism and write it in hub layout")
    verb.add_argument("kind", choices=sorted(VERDICTS))
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--architecture", choices=("deepseek_v3", "qwen3_moe"), default="deepseek_v3")
    args = parser.parse_args()
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:

        def progress(stage: str):
            bar = bars.add_task(stage)
            return lambda step, steps, loss: bars.update(
                bar, total=steps, completed=step, description=f"{stage} (loss {loss:.3f})"
            )

        try:
            truth = build(args.kind, args.out, seed=args.seed, architecture=args.architecture, progress=progress)
        except GtqloraError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    planted = ", ".join(f"layer {layer} expert {expert}" for layer, expert in truth.planted) or "none"
    seconds = time.monotonic() - started
    print(f"{args.out}: {truth.kind} ({truth.architecture}), planted experts: {planted}, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
