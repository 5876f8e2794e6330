"""What `gtqlora plan` predicts of a GPU's memory against what a step takes there, over configurations of many kinds.

    python bench/plan.py                         # every case, one GPU; each is built in less than half a minute
    python bench/plan.py --cases 0 3 --json plan.json
    python bench/plan.py --device cpu --tiny     # does it run? There is no peak to measure on a CPU

Each case is a model of random weights with fewer layers, built and trained for a few steps as by `bench/step.py`. The
peak is what the allocator held, graphs and all; the prediction leaves out what the driver takes for itself. The GPU is
the one that is here: activations are kept up to what it has free. An error above 0 % means that more was predicted than
was taken; "weights" is the predicted share of the bytes that the model with its edit has.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

# a script that is loaded by its path has no folder to find its neighbour in
sys.path.insert(0, str(Path(__file__).parent))
import step
import torch
import transformers

from gtqlora.families.kinds import GATES
from gtqlora.families.sizes import Sizes, sizes_of
from gtqlora.planning.cards import parse_cards
from gtqlora.planning.memory import CONTEXT, EXPERTS, OTHERS, Placement, Step, memory_of

GIB = 2**30
QWEN, KIMI = ("--shape", "qwen3-30b-a3b"), ("--shape", "k2.5")
CASES: tuple[tuple[str, tuple[str, ...]], ...] = tuple(
    (way, (*shape, *words.split()))
    for way, shape, words in (
        ("nf4", QWEN, "--layers 12 --pairs 8 --tokens 512"),
        ("int4-g32", QWEN, "--layers 12 --pairs 2 --tokens 512"),
        ("bf16", QWEN, "--layers 8 --pairs 4 --tokens 512"),
        ("nf4", QWEN, "--layers 16 --pairs 8 --tokens 512 --activation-memory -1"),
        ("int4-g32", QWEN, "--layers 16 --pairs 8 --tokens 512 --activation-memory 6"),
        ("int4-g128", QWEN, "--layers 12 --pairs 4 --tokens 1024 --no-checkpointing"),
        ("nf4", QWEN, "--layers 12 --pairs 2 --tokens 4096 --anchor"),
        ("nf4", KIMI, "--layers 3 --pairs 8 --tokens 512"),
        ("int4-g32", KIMI, "--layers 4 --experts 128 --pairs 4 --tokens 512 --activation-memory -1"),
        ("int4-g32", KIMI, "--layers 3 --experts 256 --pairs 2 --tokens 1024 --no-checkpointing"),
        ("bf16", KIMI, "--layers 3 --experts 64 --pairs 4 --tokens 512"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A case with what was predicted, by part, and measured, in GiB; None on a CPU.

    Attributes:
        weights, weights_there: bytes of the model with its edit, predicted and as they are.
    """

    way: str
    settings: str
    weights: float
    weights_there: float
    predicted: float
    measured: float | None
    error: float | None
    kept: int
    parts: dict[str, float]
    build_seconds: float


def arguments_of(words: tuple[str, ...], options: argparse.Namespace) -> argparse.Namespace:
    """A case's settings as `bench/step.py` reads them; in miniature with few tokens and the miniature's own layers."""
    small = ("--tiny", "--pairs", "2", "--tokens", "16", "--layers", "2", "--experts", "8") if options.tiny else ()
    return step.parse([*words, *small, "--steps", str(options.steps), "--device", options.device])


def sizes_for(args: argparse.Namespace) -> Sizes:
    """What `gtqlora plan` reads of the config that the model is made from."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(step.config_of(args)[1].to_json_string(use_diff=False))
        return sizes_of(str(file))


def compare(way: str, words: tuple[str, ...], options: argparse.Namespace, device: torch.device) -> Compared:
    """Predict, build, train and measure one case."""
    args = arguments_of(words, options)
    on_gpu = device.type == "cuda"
    usable = torch.cuda.mem_get_info(device)[1] if on_gpu else parse_cards("80GB").bytes
    planned = Step.of(
        step.settings_of(args, torch.device("cpu")), args.tokens, way, 0 if args.no_packing else args.tokens // 2
    )
    sizes = sizes_for(args)
    memory = memory_of(sizes, planned, Placement(), usable)
    # routers lie there twice in fp32, the original and the one that trains, and LoRA once
    trained = 8 * sizes.counts()[GATES] + 4 * sizes.lora(planned.rank)
    predicted = (memory.total - memory.parts[CONTEXT]) / GIB
    found = step.measure(args, way, device)
    return Compared(
        way=way,
        settings=" ".join(words),
        weights=(memory.parts[EXPERTS] + memory.parts[OTHERS] + trained) / GIB,
        weights_there=found.model_gib,
        predicted=predicted,
        measured=found.peak_gib,
        error=None if found.peak_gib is None else 100 * (predicted / found.peak_gib - 1),
        kept=memory.kept,
        parts={part: size / GIB for part, size in memory.parts.items() if part != CONTEXT},
        build_seconds=found.build_seconds,
    )


def print_table(found: list[Compared]) -> None:
    """One line a case, and the largest error last."""
    print(f"\n{'way':10}{'predicted GiB':>15}{'measured GiB':>15}{'error %':>10}{'weights':>10}{'kept':>6}  settings")
    for one in found:
        measured = "-" if one.measured is None else f"{one.measured:.2f}"
        error = "-" if one.error is None else f"{one.error:+.1f}"
        numbers = f"{one.predicted:15.2f}{measured:>15}{error:>10}{one.weights / one.weights_there:10.3f}{one.kept:6}"
        print(f"{one.way:10}{numbers}  {one.settings}")
    errors = [abs(one.error) for one in found if one.error is not None]
    if errors:
        print(f"largest error {max(errors):.1f} %, mean {sum(errors) / len(errors):.1f} %")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", choices=range(len(CASES)), default=list(range(len(CASES))))
    parser.add_argument("--steps", type=int, default=2, help="steps after the two that warm up")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the shapes' architectures in miniature")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = step.prepared(options.device)
    found: list[Compared] = []
    errors: dict[str, str] = {}
    for case in options.cases:
        way, words = CASES[case]
        try:
            found.append(compare(way, words, options, device))
            print(f"case {case}: {found[-1].predicted:.2f} GiB predicted, {found[-1].measured} measured", flush=True)
        except Exception as error:  # the other cases are worth their time
            errors[str(case)] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            print(f"case {case}: {errors[str(case)]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print_table(found)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}, transformers {transformers.__version__}")
    if options.json:
        cases = [asdict(one) for one in found]
        options.json.write_text(json.dumps({"device": card, "errors": errors, "cases": cases}, indent=1))
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
