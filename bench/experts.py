"""One layer of routed experts on one GPU, forward + input gradient: ours in 4 bits beside the alternatives.

    python bench/experts.py                                   # Kimi-K2.5 and Qwen3-30B-A3B layers, all ways
    python bench/experts.py --shapes k25 --tokens 1024 8192 --ways bf16 int4-g32 nf4
    python bench/experts.py --device cpu --shapes organism --ways bf16 "transformers bf16" nf4 int4-g32

    python bench/experts.py --decode --ways bf16 int4-g32 nf4  # forward only, few tokens, beside the bytes' time

Every way runs in this process on the same hidden states and random routing; weights are random. Milliseconds are
medians of CUDA-event times after warm-up, forward + backward to the hidden states and the routing weights; ratios are
to bf16. "floor" is arithmetic at 790 TFLOP/s, or the 4-bit bytes read twice at 4.3 TB/s if that is more.
`--decode` has each way's forward pass as it is called and replayed as a CUDA graph, and the time that the bytes of the
experts with rows take at the card's bandwidth (3.35 TB/s for an H100, 4.8 for an H200), as a share of the replay's.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora.experts import FORMATS, FrozenExperts, format_of

TFLOPS, TERABYTES = 790e12, 4.3e12
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes a second, by the vendor's datasheets."""


@dataclass(frozen=True)
class Shape:
    """A layer: hidden and intermediate size, experts, experts per token."""

    hidden: int
    inner: int
    experts: int
    top_k: int

    @property
    def weights(self) -> int:
        return 3 * self.experts * self.hidden * self.inner


DEVICE = "cuda"
SHAPES = {
    "k25": Shape(7168, 2048, 384, 8),
    "qwen3-30b": Shape(2048, 768, 128, 8),
    "organism": Shape(64, 32, 16, 2),
}
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_TD, index_TK, weights_TK) -> sums_TD."""


def frozen(shape: Shape, name: str, product: str) -> Layer:
    """Our module, filled with quantized random matrices; one matrix of each kind is made and used for all experts."""
    module = FrozenExperts(
        format=format_of(name),
        n_experts=shape.experts,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        act_fn=nn.SiLU(),
        device=DEVICE,
    )
    module.kernel = "auto" if product == "triton" else product
    for projection in ("gate", "up", "down"):
        matrix = torch.randn(module.sizes(projection), device=DEVICE, dtype=torch.bfloat16) * 0.02
        parts = module.format.quantize(matrix)
        for expert in range(shape.experts):
            module.put(expert, projection, parts)
    if product == "triton":
        from gtqlora.experts.kernels.fused import triton_multiply
        from gtqlora.experts.kernels.layer import run

        return lambda hidden_TD, index_TK, weights_TK: run(module, hidden_TD, index_TK, weights_TK, triton_multiply)
    return module


def bf16_weights(shape: Shape) -> tuple[Tensor, Tensor]:
    def randn(*sizes: int) -> Tensor:
        return torch.empty(sizes, device=DEVICE, dtype=torch.bfloat16).normal_(std=0.02)

    return randn(shape.experts, 2 * shape.inner, shape.hidden), randn(shape.experts, shape.hidden, shape.inner)


def bf16(shape: Shape) -> Layer:
    """bf16 weights resident, rows sorted by expert, `F.grouped_mm`: the plain way to write it."""
    gate_up, down = bf16_weights(shape)

    def layer(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ids, order = index_TK.reshape(-1).sort()
        ends = torch.histc(ids.float(), bins=shape.experts, min=0, max=shape.experts - 1).cumsum(0).int()
        gate, up = F.grouped_mm(hidden_TD[order // shape.top_k], gate_up.mT, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * weights_TK.reshape(-1)[order, None]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=DEVICE)
        return y[place].view(*index_TK.shape, -1).sum(1)

    return layer


def transformers_bf16(shape: Shape) -> Layer:
    """transformers' own `grouped_mm` experts of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts: Any = Qwen3MoeExperts(config)
    gate_up, down = bf16_weights(shape)
    experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    experts.down_proj = nn.Parameter(down, requires_grad=False)
    return experts


def bitsandbytes_loop(shape: Shape) -> Layer:
    """bitsandbytes NF4, one product per expert that was hit, as transformers' eager experts do it."""
    bnb: Any = importlib.import_module("bitsandbytes")

    sizes = ((shape.inner, shape.hidden), (shape.inner, shape.hidden), (shape.hidden, shape.inner))
    one = [
        bnb.functional.quantize_4bit(
            torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02, quant_type="nf4", compress_statistics=True
        )
        for n, k in sizes
    ]
    experts = [[(codes.clone(), state) for codes, state in one] for _ in range(shape.experts)]

    def layer(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_TD)
        with torch.no_grad():
            hit_EKT = F.one_hot(index_TK, shape.experts).permute(2, 1, 0)
            hit = hit_EKT.sum(dim=(-1, -2)).gt(0).nonzero().flatten().tolist()
        for expert in hit:
            choice, token = torch.where(hit_EKT[expert])
            (gate, gate_state), (up, up_state), (down, down_state) = experts[expert]
            x = hidden_TD[token]
            y = F.silu(bnb.matmul_4bit(x, gate.t(), gate_state)) * bnb.matmul_4bit(x, up.t(), up_state)
            y = bnb.matmul_4bit(y, down.t(), down_state) * weights_TK[token, choice, None]
            out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype))
        return out_TD

    return layer


class _GroupedNf4(torch.autograd.Function):
    """The package grouped-nf4-gemm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        import nf4_grouped  # type: ignore[import-not-found]

        bounds = ends.tolist()
        rows = [b - a for a, b in zip([0, *bounds], bounds, strict=False)]
        ctx.ids, ctx.rows = [i for i, n in enumerate(rows) if n], [n for n in rows if n]
        ctx.save_for_backward(codes, scales)
        return nf4_grouped.gemm_4bit_grouped(x, codes, scales, ctx.rows, ctx.ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        import nf4_grouped  # type: ignore[import-not-found]

        codes, scales = ctx.saved_tensors
        return nf4_grouped.dgrad_4bit_grouped(grad.contiguous(), codes, scales, ctx.rows, ctx.ids), None, None, None


def grouped_nf4_gemm(shape: Shape) -> Layer:
    """The package grouped-nf4-gemm between the same sorting and combining as `bf16`."""
    import nf4_grouped  # type: ignore[import-not-found]  # noqa: F401

    def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 255, (shape.experts, n, k // 2), dtype=torch.uint8, device=DEVICE)
        return codes, torch.rand(shape.experts, n, k // 64, device=DEVICE) * 0.01

    gate_up, down = weights(2 * shape.inner, shape.hidden), weights(shape.hidden, shape.inner)

    def layer(hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        ids, order = index_TK.reshape(-1).sort()
        ends = torch.histc(ids.float(), bins=shape.experts, min=0, max=shape.experts - 1).cumsum(0).int()
        both: Any = _GroupedNf4.apply(hidden_TD[order // shape.top_k], *gate_up, ends)
        gate, up = both.chunk(2, -1)
        y: Any = _GroupedNf4.apply(F.silu(gate) * up, *down, ends)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=DEVICE)
        return (y * weights_TK.reshape(-1)[order, None])[place].view(*index_TK.shape, -1).sum(1)

    return layer


WAYS: dict[str, Callable[[Shape], Layer]] = {
    "bf16": bf16,
    "transformers bf16": transformers_bf16,
    **{name: lambda shape, name=name: frozen(shape, name, "auto") for name in FORMATS},
    "int4-g32 chunk": lambda shape: frozen(shape, "int4-g32", "chunk"),
    "nf4 chunk": lambda shape: frozen(shape, "nf4", "chunk"),
    "int4-g32 triton": lambda shape: frozen(shape, "int4-g32", "triton"),
    "nf4 triton": lambda shape: frozen(shape, "nf4", "triton"),
    "bitsandbytes loop": bitsandbytes_loop,
    "grouped-nf4-gemm": grouped_nf4_gemm,
}


def timed(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    for _ in range(2):
        run()
    if DEVICE == "cpu":
        return 1e3 * sorted(timeit.repeat(run, number=1, repeat=repeats))[repeats // 2]
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def inputs(shape: Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden_TD, index_TK, weights_TK and the gradient_TD of the result; the same for every way."""
    torch.manual_seed(tokens)
    hidden_TD = torch.randn(tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    index_TK = torch.rand(tokens, shape.experts, device=DEVICE).topk(shape.top_k).indices
    weights_TK = torch.rand(tokens, shape.top_k, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    return hidden_TD, index_TK, weights_TK, torch.randn(tokens, shape.hidden, device=DEVICE, dtype=torch.bfloat16)


def floor(shape: Shape, tokens: int, bits: float) -> float:
    """Milliseconds that no way can beat."""
    arithmetic = 2 * 2 * tokens * shape.top_k * shape.weights / shape.experts / TFLOPS
    return 1e3 * max(arithmetic, 2 * shape.weights * bits / 8 / TERABYTES)


def _peak() -> float:
    """GB at the peak since it was last asked; there is no such count on a CPU."""
    if DEVICE == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


@contextmanager
def memory_freed() -> Iterator[None]:
    try:
        yield
    finally:
        gc.collect()
        if DEVICE != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure(shape: Shape, way: str, tokens: list[int], repeats: int) -> dict[int, tuple[float, float] | str]:
    """(ms, peak GB) by number of tokens, or why there is none."""
    found: dict[int, tuple[float, float] | str] = {}
    with memory_freed():
        try:
            layer = WAYS[way](shape)
        except Exception as error:
            return dict.fromkeys(tokens, f"{type(error).__name__}: {error}"[:160])
        for count in tokens:
            hidden_TD, index_TK, weights_TK, grad_TD = inputs(shape, count)

            def step() -> None:
                layer(hidden_TD, index_TK, weights_TK).backward(grad_TD)  # noqa: B023
                hidden_TD.grad = weights_TK.grad = None  # noqa: B023

            try:
                slow = way in ("bitsandbytes loop", "grouped-nf4-gemm")
                found[count] = (timed(step, 3 if slow else repeats), _peak())
            except Exception as error:
                found[count] = f"{type(error).__name__}: {error}"[:160]
    return found


def replayed(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return timed(graph.replay, repeats)


def decode(shape: Shape, way: str, tokens: list[int], repeats: int) -> dict[int, dict[str, float] | str]:
    """Milliseconds of a forward pass as called and replayed, and of its bytes, by number of tokens."""
    found: dict[int, dict[str, float] | str] = {}
    bits = format_of(way).bits(shape.inner, shape.hidden) if way in FORMATS else 16
    bandwidth = next((rate for card, rate in BANDWIDTH.items() if card in torch.cuda.get_device_name()), float("nan"))
    with memory_freed(), torch.no_grad():
        try:
            layer = WAYS[way](shape)
        except Exception as error:
            return dict.fromkeys(tokens, f"{type(error).__name__}: {error}"[:160])
        for count in tokens:
            hidden_TD, index_TK, weights_TK, _ = inputs(shape, count)
            n_bytes = shape.weights * bits / 8 * len(index_TK.unique()) / shape.experts

            def run() -> None:
                layer(hidden_TD, index_TK, weights_TK)  # noqa: B023

            try:
                found[count] = {
                    "called": timed(run, repeats),
                    "replayed": replayed(run, repeats),
                    "bytes": 1e3 * n_bytes / bandwidth,
                }
            except Exception as error:
                found[count] = f"{type(error).__name__}: {error}"[:160]
    return found


def decode_table(name: str, tokens: list[int], results: dict[str, dict[int, dict[str, float] | str]]) -> str:
    """Milliseconds and the bytes' share of the replay for each number of tokens."""
    lines = [f"\n{name}: {SHAPES[name]}, forward, ms: called / replayed as a CUDA graph / bytes alone (share)"]
    lines.append(f"{'':20}" + "".join(f"{count:>22} tokens" for count in tokens))
    for way, by_tokens in results.items():
        row = ""
        for cell in by_tokens.values():
            if isinstance(cell, str):
                row += f"{'-':>29}"
                continue
            called, played, n_bytes = cell["called"], cell["replayed"], cell["bytes"]
            row += f"{called:9.3f} {played:6.3f} {n_bytes:6.3f} {n_bytes / played:4.0%} "
        lines.append(f"{way:20}{row}")
        lines += [f"{'':20}{why}" for why in {cell for cell in by_tokens.values() if isinstance(cell, str)}]
    return "\n".join(lines)


def table(name: str, tokens: list[int], results: dict[str, dict[int, tuple[float, float] | str]]) -> str:
    """Milliseconds and the ratio to bf16 for each number of tokens."""
    shape = SHAPES[name]
    lines = [f"\n{name}: {shape}, forward + input gradient, bf16 activations"]
    lines.append(f"{'':20}" + "".join(f"{count:>9} tokens      " for count in tokens) + " peak GB")
    if DEVICE == "cuda":
        row = "".join(f"{floor(shape, count, 4.5):9.2f} ms          " for count in tokens)
        lines.append(f"{'floor (4.5 bits)':20}{row}")
    for way, by_tokens in results.items():
        cells, peak = "", 0.0
        for count in tokens:
            cell, base = by_tokens[count], results.get("bf16", {}).get(count)
            if isinstance(cell, str):
                cells += f"{'-':>9}             "
                continue
            ratio = f"{cell[0] / base[0]:7.2f}x" if base and not isinstance(base, str) else ""
            cells, peak = cells + f"{cell[0]:9.2f} ms {ratio:8}  ", max(peak, cell[1])
        lines.append(f"{way:20}{cells} {peak:7.1f}")
        for why in {cell for cell in by_tokens.values() if isinstance(cell, str)}:
            lines.append(f"{'':20}{why}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["k25", "qwen3-30b"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, help="1024 to 16384, with --decode 1 to 256")
    parser.add_argument("--decode", action="store_true", help="forward only, as in generation; needs a GPU")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --device cpu --shapes organism works without one")
    if given.decode and given.device != "cuda":
        parser.error("--decode needs --device cuda")
    tokens = given.tokens or ([1, 16, 64, 256] if given.decode else [1024, 4096, 8192, 16384])
    global DEVICE
    DEVICE = given.device
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {platform.machine()}, {versions}")
    everything: dict[str, Any] = {}
    for name in given.shapes:
        measured: Any = decode if given.decode else measure
        results: dict[str, Any] = {}
        for way in given.ways:
            results[way] = measured(SHAPES[name], way, tokens, given.repeats)
            print(f"  {name} {way}: {results[way]}", flush=True)
        print((decode_table if given.decode else table)(name, tokens, results), flush=True)
        everything[name] = results
    if given.json:
        given.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
