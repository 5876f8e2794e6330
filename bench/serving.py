"""What variants on one resident base cost: a layer on the CPU, and decoding steps at Qwen3-30B's attention on a GPU.

    python bench/serving.py                          # the CPU layer: 4096 x 4096, bf16, one thread
    python bench/serving.py --gpu --json serving.json    # 48 layers, 16 sequences, every one with a variant of its own

CPU: `total` is the layer with one one-bit variant over the base's linear alone, `delta` what is added over it.

GPU: one decoding step is what attention does in all 48 layers (norms, four projections, rotary positions, attention
over the context, the sum), in one CUDA graph, each layer with weights of its own so that no cache holds them. Batches
have 16 sequences: all of one variant, each of its own (one-bit, LoRA, half of each), and the base alone. Beside
them: what one would do without such layers, a dense weight for every variant, run sequence by sequence.
Minima of interleaved rounds. Every kernel is compared with exact products first; the program fails if one is off.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora.bitdelta.layers import Batch, Tiles, VariantLinear
from gtqlora.bitdelta.onebit import OneBit, decode
from gtqlora.edits.merging import LowRank

HIDDEN, HEADS, SHARED_HEADS, WIDTH, LAYERS = 2048, 32, 4, 128, 48
"""Qwen3-30B-A3B: hidden size, heads of queries, of keys and values, a head's width, layers."""
VARIANTS, RANK = 16, 32


def random_bits(outputs: int, inputs: int, dtype: torch.dtype, device: str = "cpu") -> OneBit:
    """A one-bit matrix with scales as of a small fine-tune."""
    return OneBit(
        signs_NB=torch.randint(0, 256, (outputs, inputs // 8), dtype=torch.uint8, device=device),
        row_N=(1e-3 * (0.5 + torch.rand(outputs, device=device))).to(dtype),
        column_K=(0.5 + torch.rand(inputs, device=device)).to(dtype),
    )


def random_lora(outputs: int, inputs: int, dtype: torch.dtype, device: str) -> LowRank:
    """A low-rank product as large as such a difference."""
    a = torch.randn(RANK, inputs, device=device) / inputs**0.5
    return LowRank(a.to(dtype), (1e-3 * torch.randn(outputs, RANK, device=device)).to(dtype))


# --- CPU -------------------------------------------------------------------------------------------------------------


def best(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the least milliseconds of this thread's own time of each way, run in turn."""
    found = [float("inf")] * len(ways)
    for turn in range(rounds + 1):
        for i, way in enumerate(ways):
            started = time.thread_time()
            way()
            if turn:
                found[i] = min(found[i], 1e3 * (time.thread_time() - started))
    return found


def cpu(size: int, rounds: int) -> dict[str, Any]:
    """A layer with one variant against the base's linear, for 1, 8 and 64 tokens; and for 16 variants at once."""
    torch.set_num_threads(1)
    dtype, device = torch.bfloat16, torch.device("cpu")
    base = nn.Linear(size, size, bias=False, dtype=dtype)
    batch, tiles = Batch(device, VARIANTS + 1), Tiles(dtype, device)
    layer = VariantLinear(base, batch, tiles, {v: random_bits(size, size, dtype) for v in range(1, VARIANTS + 1)}, {})
    table: dict[str, Any] = {}
    with torch.no_grad():
        for tokens, variants in ((1, [1]), (8, [1]), (64, [1]), (16, list(range(1, VARIANTS + 1)))):
            x = torch.randn(len(variants), tokens // len(variants), size, dtype=dtype)
            batch.begin(variants)
            plain, whole = best([lambda x=x: base(x), lambda x=x: layer(x)], rounds)
            row = {"base ms": plain, "layer ms": whole, "total": whole / plain, "delta": whole / plain - 1}
            table[f"{tokens} tokens of {len(variants)} variants"] = {
                name: round(value, 2) for name, value in row.items()
            }
    met = table["1 tokens of 1 variants"]["total"] <= 3.5 and table["64 tokens of 1 variants"]["total"] <= 1.7
    return {"size": size, "threads": 1, "layer": table, "at most 3.5 and 1.7": met}


# --- GPU -------------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Attention of Qwen3-MoE, for one token of each sequence over a cache that is full."""

    def __init__(self, linear: Callable[[int, int], nn.Module], batch: int, context: int, device: str) -> None:
        super().__init__()
        self.q, self.k = linear(HIDDEN, HEADS * WIDTH), linear(HIDDEN, SHARED_HEADS * WIDTH)
        self.v, self.o = linear(HIDDEN, SHARED_HEADS * WIDTH), linear(HEADS * WIDTH, HIDDEN)
        settings: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        self.keys, self.values = (torch.randn(batch, SHARED_HEADS, context, WIDTH, **settings) for _ in range(2))
        self.norms = [torch.ones(size, **settings) for size in (HIDDEN, WIDTH, WIDTH)]
        self.cos, self.sin = (torch.rand(WIDTH, **settings) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states = norm(x, self.norms[0])
        q, k, v = (part(states).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (rotated(norm(part, w), self.cos, self.sin) for part, w in ((q, self.norms[1]), (k, self.norms[2])))
        self.keys[:, :, -1:], self.values[:, :, -1:] = k, v
        mixed = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """Return a function that does the same from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def gpu_best(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least milliseconds of each way, in turn, by the GPU's own clock."""
    found = dict.fromkeys(ways, float("inf"))
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            way()
            end.record()
            torch.cuda.synchronize()
            if turn:
                found[name] = min(found[name], start.elapsed_time(end))
    return found


def check_kernels(device: str) -> dict[str, float]:
    """Compare the layers' products with exact ones; relative errors.

    Raises:
        SystemExit: one is further off than rounding to bf16 explains.
    """
    batch, tiles = Batch(torch.device(device), VARIANTS + 1), Tiles(torch.bfloat16, torch.device(device))
    errors: dict[str, float] = {}
    for outputs, inputs in ((4096, 2048), (512, 2048), (2048, 4096)):
        base = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=device)
        bits = {v: random_bits(outputs, inputs, torch.bfloat16, device) for v in range(1, 9)}
        lora = {v: random_lora(outputs, inputs, torch.bfloat16, device) for v in range(9, 17)}
        layer = VariantLinear(base, batch, tiles, bits, lora)
        for what, variants in (("each its own", list(range(17))), ("alike", [3] * 16), ("prompt", [5] * 200)):
            batch.begin(variants)
            x = torch.randn(len(variants), 1, inputs, dtype=torch.bfloat16, device=device)
            own = [delta_of(bits.get(v), lora.get(v), outputs, inputs, device) for v in range(17)]
            added = torch.stack([own[v] @ x[i, 0].double() for i, v in enumerate(variants)])
            alone = torch.zeros(len(variants), outputs, dtype=torch.bfloat16, device=device)
            for part in layer._parts:
                part.add(alone, x[:, 0], batch)
            errors[f"{outputs} x {inputs}, {what}"] = float((alone.double() - added).norm() / added.norm())
    if worst := {name: error for name, error in errors.items() if not error <= 1e-2}:
        raise SystemExit(f"kernels are off: {worst}")
    return errors


def delta_of(bits: OneBit | None, lora: LowRank | None, outputs: int, inputs: int, device: str) -> Tensor:
    if bits is not None:
        return decode(bits).double()
    if lora is not None:
        return lora.b_DR.double() @ lora.a_RI.double()
    return torch.zeros(outputs, inputs, dtype=torch.double, device=device)


def sweep(device: str, rounds: int) -> dict[str, Any]:
    """Try block sizes of the one-bit kernel on each linear: microseconds of 16 variants."""
    from gtqlora.bitdelta.kernels import Groups, Settings, Signs, add_one_bit, signs_of

    table: dict[str, Any] = {}
    copies, groups = 12, Groups.of(list(range(VARIANTS)), device)  # more than the L2 cache holds
    for outputs, inputs in ((4096, 2048), (512, 2048), (2048, 4096)):
        deltas = {v: random_bits(outputs, inputs, torch.bfloat16, device) for v in range(VARIANTS)}
        signs = [signs_of(deltas, VARIANTS, torch.bfloat16, device) for _ in range(copies)]
        x, y = (torch.randn(VARIANTS, n, dtype=torch.bfloat16, device=device) for n in (inputs, outputs))
        weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device) for _ in range(copies)]
        ways: dict[str, Callable[[], object]] = {
            "base": graphed(lambda w=weights, x=x: [F.linear(x, each) for each in w])
        }

        def added(settings: Settings, x: Tensor = x, y: Tensor = y, signs: list[Signs] = signs) -> None:
            for each in signs:
                add_one_bit(y, x, each, groups, settings)

        for sizes in (
            (32, 1, 3),
            (64, 1, 3),
            (64, 2, 2),
            (64, 2, 3),
            (64, 2, 4),
            (128, 2, 3),
            (128, 2, 4),
            (128, 4, 3),
        ):
            ways["/".join(map(str, sizes))] = graphed(partial(added, Settings(*sizes)))
        micro = {name: round(1e3 * ms / copies, 2) for name, ms in gpu_best(ways, rounds).items()}
        table[f"{outputs} x {inputs}"] = dict(sorted(micro.items(), key=lambda item: item[1]))
    return table


def make_linear(batch: Batch, tiles: Tiles, kind: str, device: str) -> Callable[[int, int], nn.Module]:
    """Return what makes a linear with 16 variants of a kind."""
    dtype = torch.bfloat16

    def make(inputs: int, outputs: int) -> nn.Module:
        base = nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device)
        if kind == "base":
            return base
        lora = {"one-bit": 0, "LoRA": VARIANTS, "half and half": VARIANTS // 2}[kind]
        return VariantLinear(
            base,
            batch,
            tiles,
            {v: random_bits(outputs, inputs, dtype, device) for v in range(lora + 1, VARIANTS + 1)},
            {v: random_lora(outputs, inputs, dtype, device) for v in range(1, lora + 1)},
        )

    return make


def steps(device: str, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of decoding steps with batches of one variant and of sixteen."""
    tiles = Tiles(torch.bfloat16, torch.device(device))
    x = torch.randn(VARIANTS, 1, HIDDEN, dtype=torch.bfloat16, device=device)
    ways: dict[str, Callable[[], object]] = {}
    kept: list[object] = []  # a graph reads memory that must not be given away

    def add(name: str, layers: nn.ModuleList, batch: Batch, variants: list[int], states: Tensor = x) -> None:
        batch.begin(variants)

        def run() -> None:
            out = states
            for layer in layers:
                out = layer(out)

        ways[name] = graphed(run)
        kept.append((layers, dict(batch._kernel_groups)))

    for kind in ("base", "one-bit", "LoRA", "half and half"):
        batch = Batch(torch.device(device), VARIANTS + 1)
        linear = make_linear(batch, tiles, kind, device)
        layers = nn.ModuleList(Attention(linear, VARIANTS, context, device) for _ in range(LAYERS))
        if kind == "base":
            add("base alone", layers, batch, [0] * VARIANTS)
            one = nn.ModuleList(Attention(linear, 1, context, device) for _ in range(LAYERS))
            add("base alone, 1 sequence (16 such steps: a dense model for each)", one, batch, [0], x[:1])
            continue
        add(f"{kind}, 1 variant", layers, batch, [VARIANTS] * VARIANTS)
        add(f"{kind}, 16 variants", layers, batch, list(range(1, VARIANTS + 1)))
    with torch.no_grad():
        found = gpu_best(ways, rounds)
    naive = VARIANTS * found["base alone, 1 sequence (16 such steps: a dense model for each)"]
    ratios = {kind: found[f"{kind}, 16 variants"] / found[f"{kind}, 1 variant"] for kind in ("one-bit", "LoRA")}
    ratios["half and half"] = found["half and half, 16 variants"] / found["half and half, 1 variant"]
    return {
        "milliseconds": {name: round(ms, 3) for name, ms in found.items()},
        "16 variants / 1 variant": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "16 variants / base alone": round(found["one-bit, 16 variants"] / found["base alone"], 3),
        "16 dense models one by one / 16 variants": round(naive / found["one-bit, 16 variants"], 2),
        "at most 1.5": all(ratio <= 1.5 for ratio in ratios.values()),
    }


@torch.no_grad()
def gpu(rounds: int, contexts: Sequence[int]) -> dict[str, Any]:
    """Check the kernels, sweep their settings, and time decoding steps."""
    import triton

    device = "cuda"
    torch.manual_seed(0)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, "cuda graph": True}
    found["errors"] = check_kernels(device)
    print(json.dumps(found["errors"], indent=1), flush=True)
    for context in contexts:
        found[f"context {context}"] = steps(device, context, rounds)
        print(json.dumps(found[f"context {context}"], indent=1), flush=True)
        torch.cuda.empty_cache()
    found["one-bit kernel, microseconds by outputs/warps/stages"] = sweep(device, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--size", type=int, default=4096, help="of the CPU layer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 1024], help="tokens in each sequence's cache")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found |= gpu(args.rounds, args.contexts) if args.gpu else cpu(args.size, args.rounds)
    print(json.dumps(found, indent=1))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
