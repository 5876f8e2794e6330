"""Experts that wait in host memory: a stack of MoE layers against all of them on the GPU, and accelerate's offload.

    python bench/offload.py                                  # six layers of Kimi-K2.5's width, 16,384 tokens
    python bench/offload.py --layers 4 --tokens 8192 32768 --json out.json
    python bench/offload.py --disk /tmp                      # beside these, layers that wait in files
    python bench/offload.py --device cpu --tiny              # does it run?

A step is a forward pass, and a backward pass in which every layer is computed again, down to the gradient of the first
layer's input: of routed experts alone, so that there is less work to hide copies under than in a whole model. None,
half and all of the layers wait on the host; outputs and gradients are compared bit by bit with those of the first.
Times are medians of three steps after one, and accelerate's is of one.

"GB" are those that really cross in a step; "link" is the time that a plain copy of as many takes from the same memory,
measured beside; "hidden" is the share of it that does not show, 1 - (step - resident) / link; "over" is how much longer
a step takes than its bound, the longer one of link and resident.

accelerate (`cpu_offload`, with `preload_module_classes` so that what a layer's backward pass reads is still there) is
given the same modules in the same order of tiles. It copies from ordinary memory, as it comes, and from page-locked.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gtqlora.experts import FORMATS, FrozenExperts, format_of
from gtqlora.experts.streaming import Streaming, bytes_of
from gtqlora.planning.memory import spaced

COUNTED = 3
Found = TypeVar("Found")
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, list[Tensor], Tensor, Tensor]
"""hidden_TD, index_TK for every layer, weights_TK and the gradient_TD of the result."""
Results = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Milliseconds of one way; gigabytes that crossed in a step, and what follows from them where it is known."""

    way: str
    tokens: int
    waiting: int
    milliseconds: float
    gigabytes: float | None = None
    link: float | None = None
    hidden: float | None = None
    over_bound: float | None = None
    same_bits: bool | None = None
    peak_gib: float | None = None


class Bench:
    """One size of layers on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        self.setup: dict[str, float] = {}

    def layer(self, number: int) -> FrozenExperts:
        """Experts of random bits, the same for the same number."""
        args = self.args
        made = FrozenExperts(
            format=format_of(args.format),
            n_experts=args.experts,
            hidden_size=args.hidden,
            intermediate_size=args.inner,
            act_fn=nn.SiLU(),
            device=self.device,
        )
        drawn = torch.Generator(self.device).manual_seed(number)
        for name, buffer in made.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(2e-4, 8e-4, generator=drawn)  # small, so that sums stay finite
            else:
                whole = torch.iinfo(buffer.dtype)
                buffer.random_(whole.min, whole.max, generator=drawn)
            if name.endswith("absmax_offset"):
                buffer.fill_(0.01)
        return made

    def stack(self, waiting: int, disk: Path | None = None) -> tuple[list[FrozenExperts], Streaming | None]:
        """All layers, some of which wait on the host."""
        layers = [self.layer(number) for number in range(self.args.layers)]
        places = spaced(self.args.layers, waiting)
        self.sync()
        start = time.perf_counter()
        streaming = Streaming([layers[i] for i in sorted(places)], self.device, disk) if places else None
        self.setup[f"{waiting} layers to {'disk' if disk else 'host'}, seconds"] = time.perf_counter() - start
        return layers, streaming

    def inputs(self, tokens: int) -> Inputs:
        torch.manual_seed(tokens)
        args, kind = self.args, torch.bfloat16 if self.on_gpu else torch.float32
        hidden_TD = torch.randn(tokens, args.hidden, device=self.device, dtype=kind, requires_grad=True)
        indices = [
            torch.rand(tokens, args.experts, device=self.device).topk(args.top_k).indices for _ in range(args.layers)
        ]
        weights_TK = torch.rand(tokens, args.top_k, device=self.device, dtype=kind)
        return hidden_TD, indices, weights_TK, torch.randn(tokens, args.hidden, device=self.device, dtype=kind)

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, run: Callable[[], Found]) -> tuple[float, Found]:
        """Median milliseconds after a warm-up, and what was found in the end."""
        found, times = run(), list[float]()
        for _ in range(COUNTED):
            self.sync()
            start = time.perf_counter()
            found = run()
            self.sync()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), found

    def link(self, streaming: Streaming) -> float:
        """Milliseconds that a gigabyte takes from the memory in which layers wait."""
        home = streaming.homes[0]
        target = torch.empty_like(home, device=self.device)
        return self.timed(lambda: target.copy_(home, non_blocking=True))[0] / len(home) * 1e9

    def peak(self) -> float | None:
        """GiB at the peak since it was last asked."""
        if not self.on_gpu:
            return None
        found = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return found


def step(layers: list[FrozenExperts], inputs: Inputs) -> Results:
    """Return the stack's output and the gradient of its input."""
    hidden_TD, indices, weights_TK, grad_TD = inputs
    out_TD, hidden_TD.grad = hidden_TD, None
    for layer, index_TK in zip(layers, indices, strict=True):
        out_TD = out_TD + _again(layer, out_TD, index_TK, weights_TK)
    out_TD.backward(grad_TD)
    assert hidden_TD.grad is not None
    return out_TD.detach(), hidden_TD.grad


def _again(layer: Layer, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    found: Any = checkpoint(layer, hidden_TD, index_TK, weights_TK, use_reentrant=False, preserve_rng_state=False)
    return found


# --- accelerate -------------------------------------------------------------------------------------------------------


class Pass(nn.Module):
    """Both passes of a layer in one module each time, whose weights accelerate brings before and drops afterwards."""

    def __init__(self, experts: FrozenExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, grad_TD: Tensor | None) -> Tensor:
        if grad_TD is None:
            with torch.no_grad():
                return hidden_TD + self.experts(hidden_TD, index_TK, weights_TK)
        again_TD = hidden_TD.detach().requires_grad_()
        (again_TD + self.experts(again_TD, index_TK, weights_TK)).backward(grad_TD)
        assert again_TD.grad is not None
        return again_TD.grad


def offloaded(layers: list[FrozenExperts], device: torch.device, maps: list[dict[str, Tensor]]) -> list[Pass]:
    found: list[Pass] = []
    for number, layer in enumerate(layers):
        weights = maps[number % len(maps)]
        found.append(one := Pass(layer))
        cpu_offload(one, device, offload_buffers=True, state_dict=weights, preload_module_classes=[Pass.__name__])
    return found


def accelerated(passes: list[Pass], inputs: Inputs) -> Results:
    """The same step."""
    hidden_TD, indices, weights_TK, grad_TD = inputs
    kept = [hidden_TD.detach()]
    for one, index_TK in zip(passes, indices, strict=True):
        kept.append(one(kept[-1], index_TK, weights_TK, None))
    for one, index_TK, before_TD in zip(passes[::-1], indices[::-1], kept[-2::-1], strict=True):
        grad_TD = one(before_TD, index_TK, weights_TK, grad_TD)
    return kept[-1], grad_TD


def of_accelerate(bench: Bench, layers: list[FrozenExperts], inputs: Inputs, expected: Results) -> Iterator[Measured]:
    """Accelerate's offload of all layers, from ordinary and from page-locked memory."""
    homes = [{f"experts.{name}": buffer for name, buffer in layer.named_buffers()} for layer in layers]
    # one layer's copy in ordinary memory serves all: what it costs is the same
    plain = [{name: buffer.clone() for name, buffer in homes[0].items()}]
    bare = [_bare(bench, layer) for layer in layers]
    for way, maps in (("accelerate", plain), ("accelerate, page-locked", homes)):
        passes = offloaded(bare, bench.device, maps)
        bench.peak()
        start = time.perf_counter()
        found = accelerated(passes, inputs)
        bench.sync()
        yield Measured(
            way=way,
            tokens=len(inputs[0]),
            waiting=len(layers),
            milliseconds=1e3 * (time.perf_counter() - start),
            gigabytes=2 * sum(map(bytes_of, layers)) / 1e9,
            same_bits=same(found, expected) if maps is homes else None,
            peak_gib=bench.peak(),
        )


def _bare(bench: Bench, layer: FrozenExperts) -> FrozenExperts:
    """Experts without weights, in the order that a layer's are in."""
    args = bench.args
    made = FrozenExperts(
        format=layer.format,
        n_experts=args.experts,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        act_fn=nn.SiLU(),
        device="meta",
    )
    made.tiled = layer.tiled
    return made


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(bench: Bench, tokens: list[int], disk: Path | None) -> Iterator[Measured]:
    count = bench.args.layers
    layers, _ = bench.stack(0)
    first: dict[int, tuple[float, Results]] = {}
    for number in tokens:
        bench.peak()
        first[number] = bench.timed(partial(step, layers, bench.inputs(number)))
        yield Measured(way="resident", tokens=number, waiting=0, milliseconds=first[number][0], peak_gib=bench.peak())
    for waiting, where in ((count // 2, None), (count, None), *([(count, disk)] if disk else [])):
        del layers
        gc.collect()
        layers, streaming = bench.stack(waiting, where)
        assert streaming is not None
        rate = bench.link(streaming)
        for number in tokens:
            yield streamed(bench, layers, streaming, number, rate, *first[number])
        if waiting == count and where is None and not bench.args.no_accelerate:
            yield from of_accelerate(bench, layers, bench.inputs(tokens[0]), first[tokens[0]][1])


def streamed(
    bench: Bench,
    layers: list[FrozenExperts],
    streaming: Streaming,
    tokens: int,
    rate: float,
    resident: float,
    expected: Results,
) -> Measured:
    inputs = bench.inputs(tokens)
    step(layers, inputs)  # the first step of all puts the weights into the kernel's order, once
    bench.peak()
    before = streaming.copied
    milliseconds, found = bench.timed(partial(step, layers, inputs))
    gigabytes = (streaming.copied - before) / (1 + COUNTED) / 1e9
    link = gigabytes * rate
    return Measured(
        way="streamed"
        if all(home.is_pinned() or not bench.on_gpu for home in streaming.homes)
        else "streamed from disk",
        tokens=tokens,
        waiting=len(streaming.homes),
        milliseconds=milliseconds,
        gigabytes=gigabytes,
        link=link,
        hidden=1 - (milliseconds - resident) / link if link else None,
        over_bound=milliseconds / max(link, resident) - 1,
        same_bits=same(found, expected),
        peak_gib=bench.peak(),
    )


def same(found: Results, expected: Results) -> bool:
    """Whether all bits are the same, and numbers."""
    return all(
        torch.equal(one, other) and bool(one.isfinite().all()) for one, other in zip(found, expected, strict=True)
    )


HEAD = ("tokens", 8), ("waiting", 9), ("ms", 10), ("GB", 8), ("link ms", 9), ("hidden", 8), ("over", 7), ("GiB", 7)


def row(one: Measured, layers: int) -> str:
    cells = (
        f"{one.way:26}{one.tokens:>8}{one.waiting:>6}/{layers:<2}{one.milliseconds:>10.1f}",
        f"{one.gigabytes:>8.1f}" if one.gigabytes is not None else f"{'':8}",
        f"{one.link:>9.1f}" if one.link is not None else f"{'':9}",
        f"{one.hidden:>8.0%}" if one.hidden is not None else f"{'':8}",
        f"{one.over_bound:>7.1%}" if one.over_bound is not None else f"{'':7}",
        f"{one.peak_gib:>7.1f}" if one.peak_gib is not None else f"{'':7}",
        {True: "  same", False: "  OTHER", None: ""}[one.same_bits],
    )
    return "".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--format", choices=FORMATS, default="int4-g128")
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--no-accelerate", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        args.hidden, args.inner, args.experts, args.top_k, args.tokens = 256, 128, 8, 2, [64]
    bench = Bench(args)
    card = torch.cuda.get_device_name() if bench.on_gpu else "CPU"
    print(f"{card}, torch {torch.__version__}, {args.format}, {args.experts} experts {args.hidden} x {args.inner}\n")
    print(f"{'way':26}" + "".join(f"{name:>{width}}" for name, width in HEAD) + "  bits")
    found: list[Measured] = []
    for one in measure(bench, args.tokens, args.disk):
        print(row(one, args.layers), flush=True)
        found.append(one)
        if args.json:
            sizes = {key: value for key, value in vars(args).items() if isinstance(value, int | str)}
            report = {"card": card, **sizes, "setup": bench.setup, "ways": [asdict(one) for one in found]}
            args.json.write_text(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
