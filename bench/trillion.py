"""GT-QLoRA at a trillion parameters: Kimi-K2.5's full text architecture on four GPUs, real steps on random weights.

    python bench/trillion.py                                   # 4 x H200, int4-g128 experts, all of them resident
    python bench/trillion.py --pairs 4 --json out.json
    python bench/trillion.py --gpus 2 --expert-memory 60            # what does not fit waits in host memory
    python bench/trillion.py --gpus 1 --layers 4                    # as many layers as one GPU holds
    python bench/trillion.py --device cpu --tiny --gpus 2           # does it run?

61 layers of which the first is dense, 384 experts top-8 and one shared, MLA, vocabulary 163,840. Experts are made on
the GPUs and frozen in 4 bits, a range of each layer's on every GPU; dense weights and Adam's moments are split among
them; LoRA (rank 32) on attention and shared experts and all gates train in fp32, by DPO and SFT with stored reference
log-probabilities, every layer computed again. `--pairs` is for each GPU. Twenty steps on one repeated batch: what
`bench/scale.py` prints, the parameters by kind as counted, and beside the peak what `gtqlora plan` predicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

# a script that is loaded by its path has no folder to find its neighbours in
sys.path.insert(0, str(Path(__file__).parent))
import scale
import step
import torch
from plan import sizes_for

from gtqlora.planning.memory import CONTEXT, Placement, Step, as_loaded, memory_of

GIB = 2**30


def predicted(args: argparse.Namespace, gpus: int) -> tuple[dict[str, int], dict[str, float]]:
    """Parameters by kind, and GiB on each GPU by part as the planner tells them."""
    sizes, usable = sizes_for(args), torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 141 * 10**9
    settings = step.settings_of(args, torch.device("cpu"))
    planned = Step.of(settings, args.tokens, args.format, args.tokens // 2)
    planned = replace(planned, expert_memory=args.expert_memory)
    placed = Placement(gpus=gpus) if args.expert_memory is None else as_loaded(sizes, planned, gpus, usable)
    parts = memory_of(sizes, planned, placed, usable).parts
    return sizes.counts(), {name: size / GIB for name, size in parts.items() if name != CONTEXT}


def report(args: argparse.Namespace, found: dict[str, Any], gpus: int) -> dict[str, Any]:
    """Print what was measured beside what was predicted."""
    args.pairs *= gpus
    counts, parts = predicted(args, gpus)
    total, peak = sum(parts.values()), max(found["peak_gib"])
    print(f"{sum(counts.values()):,} parameters: " + ", ".join(f"{kind} {count:,}" for kind, count in counts.items()))
    print(
        f"predicted {total:.1f} GiB on each GPU: " + ", ".join(f"{k} {v:.2f}" for k, v in parts.items() if v >= 0.005)
    )
    if peak:
        error = 100 * (total / peak - 1)
        print(
            f"measured {peak:.1f} GiB ({peak * GIB / 1e9:.1f} GB) at the peak, prediction {error:+.1f} %; "
            f"{found['tokens'] / statistics.median(found['steps']):,.0f} tokens/s, {found['tokens']:,} a step"
        )
    return {"counts": counts, "predicted_gib": parts}


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    whole = ["--shape", "k2.5", "--layers", "61", "--format", "int4-g128", "--pairs", "3", "--steps", "18", "--profile"]
    args = scale.parse([*whole, *given])
    if args.tiny and "--layers" not in given:
        args.layers = 3
    gpus = (args.gpus or [4])[0]
    found = scale.launched(args, gpus)
    scale.show(found, found, args)
    told = report(args, found, gpus)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{gpus} x {card}; torch {torch.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"device": card, **found, **told}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
