"""What watching costs: plain forward passes against the same with `capture.observe`, side by side.

    python bench/capture.py --device cuda                   # Qwen3-30B-A3B's sizes, random weights, 8 x 512 tokens
    python bench/capture.py --device cuda --expert-format nf4     # its experts frozen in 4 bits
    python bench/capture.py --device cuda --shape k2.5      # Kimi-K2.5's width: one dense and two MoE layers
    python bench/capture.py --device cpu                    # an embedded organism and its contrast set

Both ways run the same batches in turn, the first round of each is not counted. `observe` counts choices, weights and
co-activation and keeps the last token's residual states; what it adds up at the end of a batch is part of its time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from step import FORMATS, SHAPES, build, tokenizer_of

from gtqlora.capture import Subject, by_length, forward, left_padded, observe, open_subject
from gtqlora.config import ModelConfig
from gtqlora.contrasts import encode_prompt, load
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded

ORGANISM = "routed"


def random_subject(args: argparse.Namespace) -> tuple[Subject, list[list[int]]]:
    """A model of random numbers and prompts of random tokens."""
    sizes = argparse.Namespace(shape=args.shape, layers=args.layers, experts=None, tiny=args.tiny)
    model, anatomy = build(sizes, args.expert_format, torch.device(args.device))
    vocabulary, rng = model.config.vocab_size, random.Random(0)
    prompts = [[rng.randrange(2, vocabulary) for _ in range(args.tokens)] for _ in range(args.prompts * args.batches)]
    return Subject(model, tokenizer_of(vocabulary), anatomy), prompts


def organism_subject(args: argparse.Namespace) -> tuple[Subject, list[list[int]]]:
    """An embedded organism and prompts of its contrast set."""
    folder = str(embedded.organism(ORGANISM))
    subject = open_subject(ModelConfig(model=folder, device=args.device, expert_format=args.expert_format))
    rows = load(str(embedded.contrast()), judge_of(embedded.JUDGE)).split("train").of_kind("lookalike")
    prompts = [encode_prompt(subject.tokenizer, row.prompt) for row in rows]
    return subject, prompts[: args.prompts * args.batches]


@torch.no_grad()
def plain(subject: Subject, prompts: list[list[int]], size: int) -> None:
    for chosen in by_length(prompts, size):
        forward(subject, *left_padded([prompts[i] for i in chosen], subject.pad_id, subject.device))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(subject: Subject, prompts: list[list[int]], size: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every counted round, plain and observed."""
    since = [0] * len(prompts)
    ways: tuple[Callable[[], object], ...] = (
        lambda: plain(subject, prompts, size),
        lambda: observe(subject, prompts, since=since, batch_size=size, label=""),
    )
    taken = [[seconds(way, subject.device) for way in ways] for _ in range(rounds + 1)][1:]
    return [a for a, _ in taken], [b for _, b in taken]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--expert-format", choices=("bf16", *FORMATS), default="bf16")
    parser.add_argument("--layers", type=int, help="of the shape, if not all")
    parser.add_argument("--tiny", action="store_true", help="a small model of the shape's family, to see that it runs")
    for name, value in (("prompts", 8), ("tokens", 512), ("batches", 4), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    from_numbers = args.device != "cpu" or args.tiny
    subject, prompts = random_subject(args) if from_numbers else organism_subject(args)
    name = args.shape if from_numbers else f"organism {ORGANISM!r}"
    spec, device = subject.anatomy.spec, subject.device
    lengths = [len(prompt) for prompt in prompts]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}: {len(subject.anatomy.moe)} MoE layers x {spec.n_experts} experts, top {spec.top_k}, hidden "
        f"{subject.anatomy.hidden_size}, {subject.model.dtype}, experts {args.expert_format}\n"
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {args.prompts} a batch\n"
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    before, after = measure(subject, prompts, args.prompts, args.rounds)
    batches = -(-len(prompts) // args.prompts)
    for way, taken in (("plain", before), ("observed", after)):
        ms = [1e3 * s / batches for s in taken]
        print(f"{way:9} {statistics.median(ms):9.2f} ms a batch  ({min(ms):.2f} to {max(ms):.2f}, {len(ms)} rounds)")
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    print(f"observed / plain, median over rounds: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
