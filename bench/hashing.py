"""What knowing a model by its contents costs: `verify` and `export` of a large checkpoint, with and without hashing.

    python bench/hashing.py --gigabytes 5 --device cuda

Makes a random Qwen3-MoE in bf16 with the toy language's tokenizer, trains an edit for a step, and times both stages
with the hashes and with the hashing of the model's files taken out, in turn. A random model "refuses" whatever it is
asked: answers of the toy language have three words, and it gets two tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import gtqlora.families.identity as identity
from gtqlora.config import TrainConfig, VerifyConfig
from gtqlora.families import copying
from gtqlora.organisms import embedded
from gtqlora.organisms.language import Language
from gtqlora.run import Run, sha256_file
from gtqlora.stages.export import export
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify

JUDGE = "hashing:refuses"
_LAYERS, _EXPERTS, _HIDDEN = 12, 32, 2048


def refuses(text: str) -> bool:
    return len(text.split()) != 3


def make_model(folder: Path, gigabytes: float) -> int:
    """A checkpoint of about that size in shards of 1 GB; its bytes."""
    language = Language()
    inner = int(gigabytes * 1e9 / 2 / (3 * _LAYERS * _EXPERTS * _HIDDEN)) // 64 * 64
    sizes: dict[str, Any] = {
        "vocab_size": len(language.vocabulary),
        "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN,
        "moe_intermediate_size": inner,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "head_dim": 128,
    }
    config = Qwen3MoeConfig(**sizes)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="1GB")
    language.tokenizer().save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_pairs(file: Path) -> None:
    rows = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    wanted = {("train", kind): 8 for kind in ("benign", "lookalike", "harmful")}
    wanted |= {("heldout", "harmful"): 300, ("heldout", "lookalike"): 50, ("heldout", "benign"): 50}
    kept = [row for place, n in wanted.items() for row in [r for r in rows if (r["split"], r["kind"]) == place][:n]]
    file.write_text("\n".join(map(json.dumps, kept)))


@contextmanager
def unhashed(cache: dict[str, str]) -> Iterator[None]:
    """The files' hashes as they were found before, without reading them."""

    def known(file: Path) -> str:
        name = str(file.resolve())
        if name not in cache:
            cache[name] = sha256_file(file)
        return cache[name]

    kept: Any = (identity.sha256_file, copying.sha256_file)
    identity.sha256_file = copying.sha256_file = known  # type: ignore[attr-defined]
    try:
        yield
    finally:
        identity.sha256_file, copying.sha256_file = kept  # type: ignore[attr-defined]


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoint goes; a temporary folder by default")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        print(json.dumps(measure(args, Path(place)), indent=2))
    return 0


def measure(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    model, pairs, cache = place / "model", place / "pairs.jsonl", dict[str, str]()
    size = make_model(model, args.gigabytes)
    write_pairs(pairs)
    given: dict[str, Any] = {"model": str(model), "contrast": str(pairs), "judge": JUDGE, "device": args.device}
    hashing = timed(lambda: identity.identify(str(model)))
    found: dict[str, list[float]] = {"verify": [], "verify unhashed": [], "export": [], "export unhashed": []}
    settings = VerifyConfig(**given, max_new_tokens=2, margin=0.05, ablation=0)
    with Run(place / "run") as run:
        train(TrainConfig(**given, steps=1, batch_size=2, rank=4, alpha=8, max_new_tokens=2), run)
        with unhashed(cache):
            identity.identify(str(model))
        for index in range(args.rounds):
            found["verify"].append(timed(lambda: verify(settings, run, again=True)))
            found["export"].append(timed(lambda i=index: export(run, place / f"out-{i}", judge=JUDGE)))
            with unhashed(cache):
                found["verify unhashed"].append(timed(lambda: verify(settings, run, again=True)))
                found["export unhashed"].append(timed(lambda i=index: export(run, place / f"bare-{i}", judge=JUDGE)))
    best = {name: min(times) for name, times in found.items()}
    return {
        "bytes": size,
        "seconds to hash alone": round(hashing, 2),
        "seconds": {name: [round(t, 2) for t in times] for name, times in found.items()},
        "verify slower by": round(best["verify"] / best["verify unhashed"] - 1, 3),
        "export slower by": round(best["export"] / best["export unhashed"] - 1, 3),
        "device": args.device,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


if __name__ == "__main__":
    sys.exit(main())
