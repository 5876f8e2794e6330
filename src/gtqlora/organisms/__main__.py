"""`python -m gtqlora.organisms build KIND --out DIR`: make a fresh organism, small or wide (CPU) or large (GPU)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from gtqlora.errors import GtqloraError
from gtqlora.organisms.build import build
from gtqlora.organisms.in_training import Progress
from gtqlora.organisms.scales import SCALES, Architecture
from gtqlora.organisms.truth import Kind


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gtqlora.organisms", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("build", help="train one organism and write it in hub layout")
    verb.add_argument("kind", choices=sorted(get_args(Kind)))
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--out", type=Path, required=True)
    verb.add_argument("--architecture", choices=get_args(Architecture), default="deepseek_v3")
    sizes = "wide: matrices in multiples of 256; large: 0.3 B parameters, wants a GPU"
    verb.add_argument("--size", choices=sorted(SCALES), default="small", help=sizes)
    verb.add_argument("--rounded", action="store_true", help="round weights to values that bf16 holds")
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--minutes", type=float, help="limit of all training steps together")
    verb.add_argument("--json", action="store_true", help="print progress as JSON lines")
    return parser.parse_args()


@contextmanager
def _bars() -> Iterator[Callable[[str], Progress]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns) as bars:

        def progress(stage: str) -> Progress:
            bar = bars.add_task(stage, total=None)
            return lambda step, steps, loss: bars.update(
                bar, total=steps, completed=step, description=f"{stage} (loss {loss:.3f})"
            )

        yield progress


@contextmanager
def _lines() -> Iterator[Callable[[str], Progress]]:
    started = time.monotonic()

    def line(**found: object) -> None:
        print(json.dumps({"seconds": round(time.monotonic() - started, 1), **found}), flush=True)

    def progress(stage: str) -> Progress:
        line(stage=stage)
        return lambda step, steps, loss: line(stage=stage, step=step, steps=steps, loss=round(loss, 4))

    yield progress


def main() -> int:
    """Build the organism that the command line asks for; return the exit code."""
    args = _arguments()
    started = time.monotonic()
    scale = SCALES[args.size]
    try:
        with (_lines if args.json else _bars)() as progress:
            truth = build(
                args.kind,
                args.out,
                seed=args.seed,
                architecture=args.architecture,
                scale=replace(scale, rounded=scale.rounded or args.rounded),
                device=args.device,
                minutes=args.minutes,
                progress=progress,
            )
    except GtqloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    planted = ", ".join(f"layer {layer} expert {expert}" for layer, expert in truth.planted) or "none"
    seconds = time.monotonic() - started
    print(f"{args.out}: {truth.kind} ({truth.architecture}), planted experts: {planted}, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
