"""What several GPUs can send: tokens to one another, as experts that are split want it, and weights from host memory.

    python bench/links.py                       # all GPUs of this machine
    python bench/links.py --megabytes 8 25 88 --json out.json
    python bench/links.py --device cpu --gpus 2      # does it run?

Each rank brings so many megabytes to an all-gather, and gets so many of a reduce-scatter: "GB/s" are those that come to
one GPU from the others, times are medians. "recorded" is the same inside a CUDA graph, and "slows products by" how much
longer eight bf16 products (4096 x 4096 x 4096) take that run beside it. "peer memory" is without NCCL: GPUs read one
another's. The last line is a copy of a gigabyte from page-locked memory to every GPU at once.
"""

from __future__ import annotations

import argparse
import itertools
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

from gtqlora.experts.messages import Messages, Way
from gtqlora.experts.peer_memory import PeerMemory, are_readable
from gtqlora.ranks import all_of, end_process, joined, ranks

CALLS, ROUNDS, PRODUCTS = 20, 5, 8
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


def slowed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that matrix products take longer beside a call, which they last longer than."""
    left, right = (torch.randn(4096, 4096, dtype=torch.bfloat16, device=device) for _ in range(2))
    side = torch.cuda.Stream(device)

    def products(call: Callable[[], object] = lambda: None) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        for _ in range(PRODUCTS):
            torch.mm(left, right)
        torch.cuda.current_stream().wait_stream(side)

    alone, beside = (recorded(run) for run in (products, lambda: products(call)))
    return timed(beside, CALLS) - timed(alone, CALLS)


def measured(megabytes: list[int], device: torch.device) -> Figures:
    """Milliseconds and GB/s of every exchange, and of copies from the host."""
    count, found = ranks().count, Figures()
    ways: dict[str, Way] = {"": Messages(ranks().machine)}
    if device.type == "cuda" and are_readable(ranks().machine, device):
        ways |= {"peer memory: ": PeerMemory(ranks().machine, device)}
    for size, (of_way, way) in itertools.product(megabytes, ways.items()):
        mine = torch.ones(size * 10**6 // 2, dtype=torch.bfloat16, device=device)
        whole = torch.ones(count * len(mine), dtype=torch.bfloat16, device=device)
        for name, call in {
            "all-gather": lambda mine=mine, way=way: way.gathered(mine),
            "reduce-scatter": lambda whole=whole, way=way: way.scattered(whole),
        }.items():
            runs = {name: repeated(call)} | ({f"{name}, recorded": recorded(call)} if device.type == "cuda" else {})
            for done, run in runs.items():
                seconds = timed(run, CALLS)
                gb_s = (count - 1) * mine.nbytes / seconds / 1e9
                found[f"{of_way}{done}, {size} MB"] = {"ms": 1e3 * seconds, "gb_s": gb_s}
            if device.type == "cuda":
                found[f"{of_way}{name}, {size} MB, slows products by"] = {"ms": 1e3 * slowed(call, device), "gb_s": 0.0}
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
        print(f"{way:52}{figures['ms']:10.3f} ms " + (f"{rate:9.1f} GB/s" if (rate := figures["gb_s"]) else ""))
    card = f"{count} x {torch.cuda.get_device_name()}" if args.device == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"device": card, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
