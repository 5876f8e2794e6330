"""Memory while loading a model with frozen experts: the peak beyond what the model takes once it is loaded.

    python bench/loading.py                      # matrices of Kimi-K2.5's size: 2 layers x 8 experts, 0.7 GB in bf16
    python bench/loading.py --hidden 2048 --inner 768 --expert-format 64 --layers 4

Each format is loaded in a process of its own, from a random Qwen3-MoE checkpoint in a temporary folder, after a tiny
one, so that imports do not count. "beyond" is the peak of anonymous memory less parameters and buffers; "matrices"
counts it in bf16 matrices of one expert. bf16 is transformers' own loader. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FORMATS = ("bf16", "nf4", "int4-g32", "int4-g128")


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def child(small: str, big: str, expert_format: str) -> None:
    from gtqlora.experts import load_model

    load_model(small, expert_format=expert_format)
    before, peaks, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks.append(anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, model = load_model(big, expert_format=expert_format)
    done.set()
    watcher.join()
    final = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    print(max(peaks) - before, final)


def save(folder: Path, hidden: int, inner: int, experts: int, layers: int) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {"head_dim": 32}
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
        intermediate_size=64,
        vocab_size=256,
    )
    torch.manual_seed(0)
    model: Any = Qwen3MoeForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 7168), ("inner", 2048), ("experts", 8), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    matrix = 2 * given.hidden * given.inner
    print(f"{given.layers} layers x {given.experts} experts, one bf16 matrix {matrix / 1e6:.1f} MB", flush=True)
    print(f"{'experts':12}{'final MB':>10}{'peak MB':>10}{'beyond MB':>11}{'matrices':>10}{'seconds':>9}")
    # freed memory goes back at once, and is not counted
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    with TemporaryDirectory() as folder:
        small, big = Path(folder) / "small", Path(folder) / "big"
        save(small, 64, 32, 4, 2)
        save(big, given.hidden, given.inner, given.experts, given.layers)
        for name in FORMATS:
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--child", str(small), str(big), name],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            peak, final = map(int, done.stdout.split()[-2:])
            beyond, seconds = peak - final, time.perf_counter() - started
            numbers = (
                f"{final / 1e6:>10.1f}{peak / 1e6:>10.1f}{beyond / 1e6:>11.1f}{beyond / matrix:>10.2f}{seconds:>9.1f}"
            )
            print(f"{name:12}{numbers}", flush=True)


if __name__ == "__main__":
    main()
