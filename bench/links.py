"""What several GPUs can send: tokens to one another, as experts that are split want it, and weights from host memory.

    python bench/links.py                       # all GPUs of this machine
    python bench/links.py --megabytes 8 25 88 --json out.json
    python bench/links.py --device cpu --gpus 2      # does it run?

Each rank brings so many megabytes to an all-gather, and gets so many of a reduce-scatter: "GB/s" are those that come to
one GPU from the others, times are medians. "recorded" is the same inside a CUDA graph. The last line is a copy of a
gigabyte from page-locked memory to every GPU at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# a script that is loaded by its path has no folder to find its neighbour in
sys.path.insert(0, str(Path(__file__).parent))
import torch
from ranked import ran

from gtqlora.experts.exchange import gathered, scattered
from gtqlora.ranks import all_of, end_process, joined, ranks

CALLS, ROUNDS = 20, 5
Figures = dict[str, dict[str, float]]


def timed(run: Callable[[], object], calls: int) -> float:
    """Seconds of one of so many calls that `run` makes."""
    times = []
    run()
    for _ in range(ROUNDS):
        all_of(0)
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def recorded(call: Callable[[], object]) -> Callable[[], None]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    return graph.replay


def measured(megabytes: list[int], device: torch.device) -> Figures:
    """Milliseconds and GB/s of every exchange, and of copies from the host."""
    group, count, found = ranks().machine, ranks().count, Figures()
    for size in megabytes:
        mine = torch.ones(size * 10**6 // 2, dtype=torch.bfloat16, device=device)
        whole = torch.ones(count * len(mine), dtype=torch.bfloat16, device=device)
        for name, call in {
            "all-gather": lambda mine=mine: gathered(mine, group),
            "reduce-scatter": lambda whole=whole: scattered(whole, group),
        }.items():
            ways = {name: repeated(call)} | ({f"{name}, recorded": recorded(call)} if device.type == "cuda" else {})
            for way, run in ways.items():
                seconds = timed(run, CALLS)
                found[f"{way}, {size} MB"] = {"ms": 1e3 * seconds, "gb_s": (count - 1) * mine.nbytes / seconds / 1e9}
    if device.type == "cuda":
        home, there = (
            torch.ones(2**30, dtype=torch.uint8).pin_memory(),
            torch.empty(2**30, dtype=torch.uint8, device=device),
        )
        seconds = timed(lambda: there.copy_(home, non_blocking=True), 1)
        found["from the host, all at once"] = {"ms": 1e3 * seconds, "gb_s": 2**30 / seconds / 1e9}
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 8, 25, 88])
    parser.add_argument("--gpus", type=int, help="all by default")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.worker:
        with joined():
            found = measured(args.megabytes, torch.device(args.device))
            if ranks().leads:
                args.worker.write_text(json.dumps(found))
        end_process(0)
        return 0
    count = args.gpus or torch.cuda.device_count()
    given = [f"--device={args.device}", "--megabytes", *map(str, args.megabytes)]
    found: Figures = ran(__file__, count, given)
    for way, figures in found.items():
        print(f"{way:36}{figures['ms']:10.3f} ms {figures['gb_s']:9.1f} GB/s")
    card = f"{count} x {torch.cuda.get_device_name()}" if args.device == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"device": card, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
