"""What a merge costs: memory, bytes that pass through the process, and time against a bare copy by the kernel.

    python bench/streaming.py --gigabytes 20 --folder /somewhere/with/50GB

Writes a Qwen3-MoE of that size in bf16 (random bytes, no holes), changes its attention and routers as a LoRA of rank 16
with gates does, or every writer of the residual stream as a projection does, and copies it. Each measurement is in a
process of its own; rounds are interleaved, and the least of each is compared. Everything is brought onto the disk
within the time. The model's identity needs a hash of all of its bytes, which a thread computes beside the copy: it is
timed with the hash, as it ships, and without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtqlora.edits.merging import Edit, LowRank, Projected, Whole
from gtqlora.families import copying
from gtqlora.families.headers import Extent, extents
from gtqlora.storage.atomic import sync
from gtqlora.storage.moving import copy_file

RANK, EXPERTS = 16, 32
WAYS = ("copy", "merge unhashed", "merge", "overlay", "projection")


def shapes(gigabytes: float) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of each shard: a layer each, with matrices as large as Kimi K2's where there is room."""
    large = gigabytes >= 15
    hidden, inner, vocabulary = (7168, 2048, 163_840) if large else (2048, 768, 32_000)
    heads, shared = hidden + 1024, 1024
    layer = 2 * (2 * heads * hidden + 2 * shared * hidden + EXPERTS * hidden * (1 + 3 * inner))
    count = max(1, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / layer))
    for index in range(count):
        path = f"model.layers.{index}"
        found: dict[str, tuple[int, ...]] = {
            f"{path}.self_attn.q_proj.weight": (heads, hidden),
            f"{path}.self_attn.k_proj.weight": (shared, hidden),
            f"{path}.self_attn.v_proj.weight": (shared, hidden),
            f"{path}.self_attn.o_proj.weight": (hidden, heads),
            f"{path}.mlp.gate.weight": (EXPERTS, hidden),
        }
        for expert in range(EXPERTS):
            found |= {
                f"{path}.mlp.experts.{expert}.{name}.weight": (inner, hidden) for name in ("gate_proj", "up_proj")
            }
            found[f"{path}.mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
        if index == 0:
            found["model.embed_tokens.weight"] = (vocabulary, hidden)
        if index == count - 1:
            found["lm_head.weight"] = (vocabulary, hidden)
        yield found


def make_model(folder: Path, gigabytes: float) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    pool = (0.02 * torch.randn(2**25)).bfloat16().view(torch.uint8).numpy()
    shards = list(shapes(gigabytes))
    mapped: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, tensors, pool)
        mapped |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    config = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def _write_shard(file: Path, tensors: dict[str, tuple[int, ...]], pool: Any) -> None:
    header, end = dict[str, Any](), 0
    for name, shape in tensors.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= stream.write(pool[: min(end, len(pool))])


def places(folder: Path) -> dict[str, Extent]:
    return {name: place for file in folder.glob("*.safetensors") for name, place in extents(file).items()}


def edits(folder: Path, *, projection: bool) -> dict[str, Edit]:
    found: dict[str, Edit] = {}
    torch.manual_seed(1)
    for name, place in places(folder).items():
        rows, columns = place.shape
        if projection:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                found[name] = Projected(_unit(rows), norm_preserving=True)
            elif "embed_tokens" in name:
                found[name] = Projected(_unit(columns), norm_preserving=True, rows=True)
        elif ".self_attn." in name:
            found[name] = LowRank(torch.randn(RANK, columns), 1e-3 * torch.randn(rows, RANK))
        elif ".gate." in name:
            found[name] = Whole(torch.randn(rows, columns))
    return found


def _unit(size: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(size), dim=0)


# --- one measurement, in a process of its own ------------------------------------------------------------------------


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def counted(moved: dict[str, int]) -> None:
    """Have the bytes counted that this process reads and writes itself."""
    read, write = os.preadv, os.pwrite

    def preadv(file: int, buffers: Any, at: int) -> int:
        count = read(file, buffers, at)
        moved["bytes read"] += count
        return count

    def pwrite(file: int, data: Any, at: int) -> int:
        count = write(file, data, at)
        moved["bytes written"] += count
        return count

    os.preadv, os.pwrite = preadv, pwrite  # type: ignore[assignment]


def measure(way: str, source: Path, target: Path) -> dict[str, float]:
    moved = {"bytes read": 0, "bytes written": 0}
    work = _work(way, source, target)
    counted(moved)
    os.sync()  # what others have still to write must not count
    before, started = peak(), time.perf_counter()
    work()
    sync(target)
    seconds = time.perf_counter() - started
    own = list(target.glob("zz-overlay*"))
    return {"seconds": seconds, "memory": peak() - before, **moved, "overlay": sum(f.stat().st_size for f in own)}


def _work(way: str, source: Path, target: Path) -> Callable[[], object]:
    if way == "copy":
        target.mkdir()
        return lambda: [copy_file(file, target / file.name) for file in sorted(source.iterdir())]
    if way == "merge unhashed":
        copying.sha256_file = copying.sha256_pieces = lambda _bytes: ""  # type: ignore[attr-defined]
    overlay = way == "overlay"
    changes = edits(source, projection=way == "projection")
    return lambda: copying.copy_changed(str(source), target, changes, overlay=overlay, share=overlay)


# --- all of them -----------------------------------------------------------------------------------------------------


def in_child(way: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--source", str(source), "--target", str(target)]
    try:
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def all_ways(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    source = place / "model"
    make_model(source, args.gigabytes)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for index in range(args.rounds):
        for way in WAYS:
            if index == 0 or way in ("copy", "merge unhashed", "merge"):
                found[way].append(in_child(way, source, place / "out"))
                print(way, found[way][-1], file=sys.stderr)
    sizes = {name: extent.stop - extent.start for name, extent in places(source).items()}
    changed = {way: sum(sizes[name] for name in edits(source, projection=way == "projection")) for way in WAYS[1:]}
    least = {way: min(each["seconds"] for each in rounds) for way, rounds in found.items()}
    return {
        "bytes": sum(sizes.values()),
        "largest changed tensor": max(sizes[name] for name in edits(source, projection=True)),
        "seconds, least": {way: round(seconds, 2) for way, seconds in least.items()},
        "seconds, all": {way: [round(each["seconds"], 2) for each in rounds] for way, rounds in found.items()},
        "time against the copy": {way: round(seconds / least["copy"], 3) for way, seconds in least.items()},
        "MiB above start, most": {way: round(max(e["memory"] for e in r) / 2**20, 1) for way, r in found.items()},
        "bytes read and written, of the changed": {
            way: round((found[way][0]["bytes read"] + found[way][0]["bytes written"]) / changed[way], 4)
            for way in changed
        },
        "overlay, of the changed bytes": round(found["overlay"][0]["overlay"] / changed["overlay"], 5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes; a temporary folder by default")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.source, args.target)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        print(json.dumps(all_ways(args, Path(place)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
