"""Generation at Qwen3-30B-A3B's shape: gtqlora's decoding beside transformers' own, tokens a second and the bound.

    python bench/generate.py                                  # NF4 and INT4 experts, 16, 64 and 256 prompts at once
    python bench/generate.py --ways int4-g32 bf16 --prompts 64 --json out.json
    python bench/generate.py --ways int4-g32 --prompts 64 --profile    # which kernels a step's time goes to
    python bench/generate.py --device cpu --tiny              # does it run?

Random weights, random prompts of `--tokens` tokens, `--new` new ones for each; nothing ends early. All ways of a row
run on the same model:

    rows        `decode_by_row`: rows of a fixed cache, each step one captured graph
    replayed    the same with the routing of another run, which is decoded beside it, replayed at every step
    eager       the same steps uncaptured
    growing     a cache that grows, a step at a time: what runs on a CPU
    generate    transformers' generate
    batching    transformers' generate_batch (continuous batching), its start included
    refill      `decode_by_row` of four times the prompts, a quarter of the tokens each: rows begin anew

`--verify` times what `verify` decodes of 200 prompts: before and after an edit and with the routing replayed, 128
tokens each, 64 prompts at once, none of which ends early. It does so twice, of which the first is all that the process
has decoded so far, and loads kernels, too.

The bound is the time in which the weights that a step needs (routed experts by how many are expected to be hit) and
the cache can be read once, at the bandwidth of a large copy, measured first.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent))
import step

from gtqlora.capture import Recorder, Replay, Subject
from gtqlora.decoding import AS_IS, Change, SourceRun, completing, decode_by_row
from gtqlora.experts import FORMATS

ENGINES = ("rows", "replayed", "eager", "growing", "generate", "batching", "refill")
PARTS = {
    "experts": ("_product", "grouped", "moe", "_gather", "_combine", "_gated", "sort", "fused", "_dequantize"),
    "attention": ("fmha", "flash", "attention", "sdpa", "softmax"),
    "matrix products": ("gemm", "gemv", "cutlass", "nvjet", "splitK", "cublas"),
}


def replaying() -> Change:
    """The model's own routing, recorded in a run beside ours."""
    recorder = Recorder()
    return Change(source_runs=(SourceRun(handlers=(recorder,)),), handlers=(Replay(recorder),))


class Bench:
    """One model, and what each engine takes for some prompts."""

    def __init__(self, args: argparse.Namespace, way: str) -> None:
        self.args, self.way, self.device = args, way, torch.device(args.device)
        shape = argparse.Namespace(shape=args.shape, layers=args.layers, experts=None, tiny=args.tiny)
        self.model, anatomy = step.build(shape, way, self.device)
        self.vocabulary = self.model.config.vocab_size
        self.subject = Subject(self.model, step.tokenizer_of(self.vocabulary), anatomy)
        self.model.generation_config.eos_token_id = self.model.config.eos_token_id = None
        self.rng = random.Random(0)

    def prompts(self, count: int) -> list[list[int]]:
        return [[self.rng.randrange(2, self.vocabulary) for _ in range(self.args.tokens)] for _ in range(count)]

    def run(self, engine: str, prompts: list[list[int]], new: int) -> int:
        """Return how many tokens were made."""
        return getattr(self, f"_{engine}")(prompts, new)

    def _rows(self, prompts: list[list[int]], new: int, change: Change = AS_IS, capture: bool = True) -> int:
        capture = capture and self.device.type == "cuda"
        made = decode_by_row(self.subject, prompts, change, rows=len(prompts), max_new_tokens=new, capture=capture)
        return sum(map(len, made.tokens))

    def _replayed(self, prompts: list[list[int]], new: int) -> int:
        return self._rows(prompts, new, replaying())

    def _eager(self, prompts: list[list[int]], new: int) -> int:
        return self._rows(prompts, new, capture=False)

    @torch.no_grad()
    def _growing(self, prompts: list[list[int]], new: int) -> int:
        said = completing.grown(self.subject, prompts, AS_IS, new, completing.Odds([]))
        return sum(len(each.tokens) for each in said)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], new: int) -> int:
        ids = torch.tensor(prompts, device=self.device)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return made[:, ids.shape[1] :].numel()

    def _batching(self, prompts: list[list[int]], new: int) -> int:
        settings = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        made = self.model.generate_batch(prompts, generation_config=settings, progress_bar=False)
        return sum(len(each.generated_tokens) for each in made.values())

    def _refill(self, prompts: list[list[int]], new: int) -> int:
        quarter, rows = max(2, new // 4), len(prompts)
        asked = [*prompts, *self.prompts(3 * rows)]
        capture = self.device.type == "cuda"
        made = decode_by_row(self.subject, asked, AS_IS, rows=rows, max_new_tokens=quarter, capture=capture)
        return sum(map(len, made.tokens))

    def verify(self, engine: str) -> dict[str, Any]:
        """Seconds of what `verify` decodes."""
        prompts, start = self.prompts(200), time.perf_counter()
        for change in (AS_IS, AS_IS, replaying()):
            capture = self.device.type == "cuda"
            decode_by_row(self.subject, prompts, change, rows=64, max_new_tokens=128, capture=capture)
        return {"way": self.way, "prompts": 200, "engine": engine, "seconds": round(time.perf_counter() - start, 2)}

    def measured(self, engine: str, count: int) -> dict[str, Any]:
        prompts, new = self.prompts(count), self.args.new
        line: dict[str, Any] = {"way": self.way, "prompts": count, "engine": engine}
        try:
            self.run(engine, prompts, min(new, 6))  # kernels are compiled, libraries set up
            times, tokens = [], 0
            for _ in range(self.args.repeats):
                self._wait()
                start = time.perf_counter()
                tokens = self.run(engine, prompts, new)
                self._wait()
                times.append(time.perf_counter() - start)
            seconds = min(times)
            line |= {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds)}
        except Exception as error:
            line["error"] = repr(error)[:300]
        return line

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def bytes_of_step(self, count: int) -> int:
        """The least that a step of so many rows reads: weights, and a cache half full of what is said."""
        spec, anatomy = self.subject.anatomy.spec, self.subject.anatomy
        experts = sum(_bytes(self.model.get_submodule(layer.experts)) for layer in anatomy.moe)
        rest = _bytes(self.model) - experts - self.model.get_input_embeddings().weight.nbytes
        hit = 1 - (1 - spec.top_k / spec.n_experts) ** count
        config = self.model.config
        width = getattr(config, "head_dim", 128) * config.num_key_value_heads * 2 * 2
        cache = count * (self.args.tokens + self.args.new // 2) * width * config.num_hidden_layers
        return int(rest + hit * experts + cache)

    @torch.no_grad()
    def profile(self, count: int) -> dict[str, float]:
        """Milliseconds of a captured step on the GPU, by part."""
        from torch.profiler import ProfilerActivity, profile

        prompts = self.prompts(count)
        short, long = (self._kernels(profile, ProfilerActivity, prompts, new) for new in (8, 24))
        return {part: round((long[part] - short[part]) / 16, 3) for part in long}

    def _kernels(self, profile: Any, activity: Any, prompts: list[list[int]], new: int) -> Counter[str]:
        self._rows(prompts, new)
        with profile(activities=[activity.CUDA]) as seen:
            self._rows(prompts, new)
            self._wait()
        spent, names = Counter[str](), Counter[str]()
        for event in seen.events():
            if event.device_time > 0:
                spent[_part(event.name)] += event.device_time / 1e3
                names[event.name] += event.device_time / 1e3
        if self.args.kernels and new > 8:
            for name, milliseconds in names.most_common(self.args.kernels):
                print(f"    {milliseconds:8.1f} ms  {name[:100]}", flush=True)
        return spent


def _part(kernel: str) -> str:
    for part, words in PARTS.items():
        if any(word.lower() in kernel.lower() for word in words):
            return part
    return "copies" if "memcpy" in kernel.lower() or "copy" in kernel.lower() else "elementwise and the rest"


def _bytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    if device.type != "cuda":
        return float("nan")
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    target.copy_(source)
    marks[0].record()
    for _ in range(5):
        target.copy_(source)
    marks[1].record()
    torch.cuda.synchronize()
    return 5 * 2 * source.nbytes / marks[0].elapsed_time(marks[1]) * 1e3


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=["nf4", "int4-g32"], choices=[*FORMATS, "bf16"])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=list(step.SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2, help="runs of which the fastest counts")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--kernels", type=int, default=0, help="with --profile: how many kernels to name")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    speed, lines = bandwidth(device), list[dict[str, Any]]()
    print(
        f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
        + (f", {speed / 1e12:.2f} TB/s" if speed == speed else "")
    )
    for way in args.ways:
        bench = Bench(args, way)
        if args.verify:
            lines.append(bench.verify("verify, the first of the process"))
            print(json.dumps(lines[-1]), flush=True)
        for count in args.prompts:
            bound = count * speed / bench.bytes_of_step(count)
            for engine in args.engines:
                line = bench.measured(engine, count)
                if "seconds" in line and speed == speed:
                    line |= {"bound": round(bound), "share": round(line["tokens_per_second"] / bound, 3)}
                lines.append(line)
                print(json.dumps(line), flush=True)
            if args.profile:
                lines.append({"way": way, "prompts": count, "step_ms_by_part": bench.profile(count)})
                print(json.dumps(lines[-1]), flush=True)
        if args.verify:
            lines.append(bench.verify("verify"))
            print(json.dumps(lines[-1]), flush=True)
        del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "lines": lines}, indent=1))
    return lines


if __name__ == "__main__":
    main()
