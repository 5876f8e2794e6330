"""Does an edit trained through 4-bit experts hold there, and on the checkpoint's own experts, which are what ships?

    python bench/quantized_verdicts.py                  # both embedded organisms; about 10 minutes on one core
    python bench/quantized_verdicts.py --workers 4 --json out.json

Trains GT-QLoRA with the demo's settings on fp32 experts and in each 4-bit format, and verifies each edit on the experts
it was trained with and on the checkpoint's own. fp32 on the CPU, one thread a worker. Held-out words; 840 harmful,
420 lookalike, 420 benign prompts. A verdict agrees with the one without quantization if the floor says the same and
the 95 % intervals of every rate in the table overlap.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

OWN = "bf16"
EXPERTS = (OWN, "nf4", "int4-g32", "int4-g128")
COLUMNS: dict[str, tuple[str, str]] = {
    "harmful": ("harmful", "refusal_after"),
    "lookalike": ("lookalike", "refusal_after"),
    "benign": ("benign", "refusal_after"),
    "acc.look": ("lookalike", "accuracy_after"),
    "acc.ben": ("benign", "accuracy_after"),
}
"""Column -> kind of prompt and rate in the verdict's table."""

Job = tuple[str, str, tuple[str, ...], str]
"""(organism, experts, settings, folder)."""


def work(job: Job) -> dict[str, Any]:
    """One training, verified on the experts it saw and on the checkpoint's own."""
    _quieten()
    import torch

    from gtqlora.config import TrainConfig, VerifyConfig, build
    from gtqlora.demo import BY_VERDICT
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.train import train
    from gtqlora.stages.verify import verify

    torch.set_num_threads(1)
    name, experts, settings, root = job
    model = embedded.organism(name)
    given: dict[str, Any] = {"file": embedded.recipe(), "model": str(model), "contrast": str(embedded.contrast())}
    rates = (*BY_VERDICT.get(embedded.read_truth(model).verdict, ()), *settings)
    started = time.monotonic()
    with Run(Path(root) / f"{name}-{experts}") as run:
        train(build(TrainConfig, **given, expert_format=experts, overrides=rates), run)
        trained = time.monotonic()
        verdicts = {}
        for on in dict.fromkeys((experts, OWN)):
            found = verify(build(VerifyConfig, **given, expert_format=on), run)
            rows = {column: asdict(getattr(found.table[kind], rate)) for column, (kind, rate) in COLUMNS.items()}
            assert found.mediation.refusal_replayed is not None
            rows["replayed"] = asdict(found.mediation.refusal_replayed)
            verdicts[on] = {"rates": rows, "floor": found.floor.verdict}
    seconds = {"train": round(trained - started), "verify": round(time.monotonic() - trained)}
    return {"organism": name, "experts": experts, "verdicts": verdicts, "seconds": seconds}


def _quieten() -> None:
    warnings.filterwarnings("ignore")
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def differences(found: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Where a verdict does not agree with another."""
    apart = [
        column
        for column, rate in found["rates"].items()
        if rate["low"] > reference["rates"][column]["high"] or reference["rates"][column]["low"] > rate["high"]
    ]
    return apart + ([] if found["floor"] == reference["floor"] else ["floor"])


def print_table(results: list[dict[str, Any]]) -> bool:
    """Whether all verdicts agree with those without quantization."""
    print(
        f"{'organism':9} {'trained on':10} {'verified on':11} "
        + " ".join(f"{c:>9}" for c in COLUMNS)
        + " floor  verdict"
    )
    reference = {found["organism"]: found["verdicts"][OWN] for found in results if found["experts"] == OWN}
    every = True
    for found in results:
        for on, verdict in found["verdicts"].items():
            rates = " ".join(f"{verdict['rates'][column]['value']:9.4f}" for column in COLUMNS)
            apart = differences(verdict, reference[found["organism"]])
            state = "DIFFERS: " + ", ".join(apart) if apart else "agrees" if found["experts"] != OWN else "reference"
            print(f"{found['organism']:9} {found['experts']:10} {on:11} {rates} {verdict['floor']:6} {state}")
            every &= not apart
    return every


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organisms", nargs="+", default=["routed", "residual"])
    parser.add_argument("--expert-format", nargs="+", default=list(EXPERTS[1:]), choices=EXPERTS[1:])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of training")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started, context = time.monotonic(), multiprocessing.get_context("spawn")
    with TemporaryDirectory() as root, context.Pool(args.workers) as pool:
        jobs: list[Job] = [
            (n, experts, tuple(args.set), root) for n in args.organisms for experts in (OWN, *args.expert_format)
        ]
        results: list[dict[str, Any]] = []
        for found in pool.imap(work, jobs, chunksize=1):
            results.append(found)
            print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    every = print_table(results)
    print("all verdicts agree with those without quantization" if every else "NOT all verdicts agree")
    import torch
    import transformers

    machine = f"{platform.processor() or platform.machine()}, {args.workers} workers"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{time.monotonic() - started:.0f} s on {machine}; {libraries}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
