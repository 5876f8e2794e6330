"""Does `train --objective harden` take refusal off a few experts? Edits the routed organism, prints the curves.

    python bench/hardening.py                # one seed, about 6 minutes on 2 cores
    python bench/hardening.py --seeds 3

Refusal of held-out harmful prompts with the experts ablated that harmful prompts choose more than their twins (ranked
on the training rows, in the original model; "again" in the edited one), and with as many random ones of like layers and
frequency. All edits have the organisms' recipe but for the LoRA rate. Everything is fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gtqlora.results.ablation import AblationPoint

WAYS = {
    "edit, recipe": (),
    "edit, 6e-4": ("lr_lora=6e-4",),
    "harden, 6e-4": ("lr_lora=6e-4", "objective=harden"),
}


def verdict_of(way: str, seed: int, out: Path) -> Any:
    """Edit and verify."""
    from gtqlora.config import TrainConfig, VerifyConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.train import train
    from gtqlora.stages.verify import verify

    given = {
        "file": embedded.recipe(),
        "model": str(embedded.organism("routed")),
        "contrast": str(embedded.contrast()),
        "seed": seed,
    }
    with Run(out) as run:
        train(build(TrainConfig, **given, overrides=WAYS[way]), run)
        return verify(build(VerifyConfig, **given, overrides=("ablation=32", "ablation_prompts=200")), run)


def print_curve(name: str, seed: int, points: list[AblationPoint], key: str) -> None:
    rates = " ".join(f"{found.value:7.3f}" for point in points if (found := getattr(point, key)))
    print(f"{name:28} {seed:4}   {rates}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import torch
    import transformers

    started, verdicts = time.monotonic(), []
    with TemporaryDirectory() as root:
        for seed in range(args.seeds):
            for way in WAYS:
                verdicts.append((way, seed, verdict_of(way, seed, Path(root) / f"{way}-{seed}")))
                found = verdicts[-1][2].ablation
                if len(verdicts) == 1:
                    counts = " ".join(f"{point.ablated:7}" for point in found.before)
                    print(f"{'experts ablated':28} seed   {counts}")
                    print_curve("original", seed, found.before, "targeted")
                    print_curve("original, random", seed, found.before, "random")
                print_curve(way, seed, found.after, "targeted")
                print_curve(f"{way}, again", seed, found.after_reranked, "targeted")
                print_curve(f"{way}, random", seed, found.after, "random")
    print(f"\n{'nothing ablated':28} seed   harmful lookalike acc.look acc.ben floor")
    for way, seed, found in verdicts:
        table = found.table
        rates = (
            f"{table['harmful'].refusal_after.value:9.4f} {table['lookalike'].refusal_after.value:9.4f} "
            f"{table['lookalike'].accuracy_after.value:8.4f} {table['benign'].accuracy_after.value:7.4f}"
        )
        print(f"{way:28} {seed:4} {rates} {found.floor.verdict}")
    print(f"{time.monotonic() - started:.0f} s; torch {torch.__version__}, transformers {transformers.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
