"""A whole DPO step on one GPU and on several, the experts split among them: tokens a second, memory, how near to ideal.

    python bench/scale.py                                      # Qwen3-30B-A3B, weak scaling on 1 and all GPUs
    python bench/scale.py --shape k2.5 --layers 3 --gpus 1 2
    python bench/scale.py --strong --pairs 16                    # the same batch on all, not one for each
    python bench/scale.py --shape qwen3-235b-a22b --gpus 2 --pairs 2 --tokens 1024 --steps 18 --format int4-g128
    python bench/scale.py --device cpu --tiny --gpus 1 2         # does it run?

Random weights and tokens as in `bench/step.py`, whose trainer, batches and bound these are. `--pairs` is for each GPU,
or for all together with `--strong`. "to ideal" is tokens a second to those of one GPU times their number. Every run
trains on one repeated batch: losses of its first and last step, how far gates and LoRA moved (root mean square), and
the experts' bits before and after are checked and printed. "between GPUs" is what messages, copies and waits for
another GPU take in one profiled step, and "alone" how much of it no other kernel ran beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# a script that is loaded by its path has no folder to find its neighbour in
sys.path.insert(0, str(Path(__file__).parent))
import step
import torch
import transformers
from ranked import ran

from gtqlora.edits.frozen import assert_experts_frozen, frozen_state
from gtqlora.edits.wrapping import routers_of, trainable
from gtqlora.experts.exchange import exchange_of
from gtqlora.ranks import all_of, end_process, joined, ranks

WARMUP, BETWEEN = step.WARMUP, step.BETWEEN


class Overlap(transformers.TrainerCallback):
    """Milliseconds of kernels by kind in one counted step, and those between GPUs that nothing else hid."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARMUP + 1 and torch.cuda.is_available():
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != WARMUP + 2 or not torch.cuda.is_available():
            return
        torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        kernels = [e for e in self._profile.events() or [] if str(e.device_type).endswith("CUDA")]
        self.spent = step.by_kind(kernels)
        sent, others = (
            [(e.time_range.start, e.time_range.end) for e in kernels if (step.kind_of(e) == BETWEEN) == between]
            for between in (True, False)
        )
        self.spent["alone"] = (_covered([*sent, *others]) - _covered(others)) / 1e3


def _covered(spans: list[tuple[float, float]]) -> float:
    """Microseconds that at least one of these spans covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Build, train, and return what this group of ranks measured."""
    device = step.prepared("cuda" if args.device == "cuda" else "cpu")
    started = time.perf_counter()
    model, anatomy = step.build(args, args.format, device, args.expert_memory)
    before, losses = frozen_state(model), []
    exchange = exchange_of(model)
    if exchange is not None:
        exchange.direct = not args.nccl
    clock, overlap = step.Clock(device), Overlap()
    with TemporaryDirectory() as folder:
        trainer = step.trainer_of(args, args.format, model, anatomy, Path(folder), clock)
        trainer.remove_callback(transformers.PrinterCallback)
        if args.profile:
            trainer.add_callback(overlap)
        plain = trainer.training_step

        def noted(*arguments: Any, **more: Any) -> Any:
            loss = plain(*arguments, **more)
            losses.append(loss.detach())
            return loss

        trainer.training_step = noted
        built = time.perf_counter() - started
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    assert_experts_frozen(trainer.model, before)
    read_by_others = 0 if exchange is None else exchange.nbytes / 2**30  # which torch's allocator does not count
    found = {
        "experts_gib": step._bytes(step._expert_tensors(model, anatomy)),
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 + read_by_others if device.type == "cuda" else 0.0,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 + read_by_others if device.type == "cuda" else 0.0,
        "losses": [float(loss) for loss in losses],
    }
    each = all_of(found)
    counted = clock.steps[WARMUP:]
    if args.profile:
        counted = [*counted[:1], *counted[2:]] if len(counted) > 2 else counted  # the profiled one is slower
    gates = [
        wrapper.modules_to_save["default"].weight - wrapper.original_module.weight
        for wrapper in routers_of(trainer.model).values()
    ]
    lora = [p for name, p in trainable(trainer.model).items() if "lora_B" in name]
    return {
        "gpus": ranks().count,
        "pairs": args.pairs,
        "tokens": 2 * args.pairs * args.tokens,
        "steps": counted,
        "built_seconds": built,
        "experts_gib": [one["experts_gib"] for one in each],
        "peak_gib": [one["peak_gib"] for one in each],
        "allocated_gib": [one["allocated_gib"] for one in each],
        "losses": [sum(values) / len(values) for values in zip(*(one["losses"] for one in each), strict=True)],
        "gates_moved": _rms(gates),
        "lora_moved": _rms(lora),
        "kept_layers": getattr(getattr(trainer._stack, "recomputation", None), "kept", None),
        "graphs": sum(found is not None for found in trainer._stack._graphs.values()) if trainer._stack else 0,
        "milliseconds": overlap.spent,
        "experts_unchanged": True,
    }


def _rms(tensors: Sequence[torch.Tensor]) -> float:
    return (sum(float(t.detach().float().square().sum()) for t in tensors) / sum(t.numel() for t in tensors)) ** 0.5


def launched(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Run one group of ranks as `torchrun` starts it, and return what its leader wrote."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in _passed(args, count).items()]
    given += [
        f"--{name.replace('_', '-')}"
        for name in ("profile", "no_graphs", "tiny", "no_packing", "anchor", "nccl")
        if getattr(args, name)
    ]
    return ran(__file__, count, given)


def _passed(args: argparse.Namespace, count: int) -> dict[str, Any]:
    names = ("shape", "tokens", "steps", "format", "activation_memory", "device")
    sizes = {
        name: getattr(args, name) for name in ("layers", "experts", "expert_memory") if getattr(args, name) is not None
    }
    return {
        **{name: getattr(args, name) for name in names},
        **sizes,
        "pairs": args.pairs * (1 if args.strong else count),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=step.SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--pairs", type=int, default=8, help="for each GPU, or for all with --strong")
    parser.add_argument("--tokens", type=int, default=512, help="of every sequence, prompt and answer")
    parser.add_argument("--steps", type=int, default=5, help="steps that count, after two that do not")
    parser.add_argument("--format", choices=[*step.FORMATS, step.BF16], default="nf4")
    parser.add_argument("--gpus", type=int, nargs="+", help="1 and all by default")
    parser.add_argument("--strong", action="store_true", help="share one batch instead of one for each")
    parser.add_argument("--activation-memory", type=float, default=0.0)
    parser.add_argument("--expert-memory", type=float, help="GiB of each GPU for experts; others wait in host memory")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-packing", action="store_true")
    parser.add_argument("--anchor", action="store_true")
    parser.add_argument("--nccl", action="store_true", help="no GPU reads another's memory")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.no_checkpointing, args.curve = False, 0
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.worker:
        with joined():
            found = work(args)
            if ranks().leads:
                args.worker.write_text(json.dumps(found))
        end_process(0)
        return 0
    there = torch.cuda.device_count() if args.device == "cuda" else 2
    found = list[dict[str, Any]]()
    for count in args.gpus or sorted({1, there}):
        found.append(launched(args, count))
        show(found[-1], found[0], args)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}, transformers {transformers.__version__}")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
        args.json.write_text(json.dumps({"settings": settings, "device": card, "runs": found}, indent=1))
    return 0


def show(found: dict[str, Any], first: dict[str, Any], args: argparse.Namespace) -> None:
    """Print one run in three lines."""
    rate = found["tokens"] / statistics.median(found["steps"])
    base = first["tokens"] / statistics.median(first["steps"])
    beside = f"{rate / base:.2f} x one GPU ({rate / base / found['gpus']:.2f} to ideal); " if first["gpus"] == 1 else ""
    spent = {kind: round(ms) for kind, ms in found["milliseconds"].items() if round(ms)}
    print(
        f"{found['gpus']} GPU: {statistics.median(found['steps']):.3f} s a step, {rate:,.0f} tokens/s, "
        f"{beside}peak "
        f"{'/'.join(f'{p:.1f}' for p in found['peak_gib'])} GiB, experts "
        f"{'/'.join(f'{p:.1f}' for p in found['experts_gib'])} GiB; built in {found['built_seconds']:.0f} s\n"
        f"  loss {found['losses'][0]:.4f} -> {found['losses'][-1]:.4f} in {len(found['losses'])} steps; gates moved "
        f"{found['gates_moved']:.2e}, LoRA {found['lora_moved']:.2e}; experts' bits unchanged; layers with kept "
        f"activations: {found['kept_layers']}; CUDA graphs: {found['graphs']}"
        + (f"\n  one step, ms of kernels: {spent}" if spent else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
