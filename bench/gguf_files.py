"""Hold GGUF files against transformers, against ggml's quantization, and against llama.cpp's own converter.

    python bench/gguf_files.py                                    # 2 minutes on 2 cores
    python bench/gguf_files.py --converter llama.cpp --json OUT         # a checkout with convert_hf_to_gguf.py

"whole": F32 files of the embedded organisms and of random models 256 wide; the largest difference of a log-probability
from transformers in fp32, at every position, and how often both find the same token likeliest. "onto": gates and LoRA
at random in a file that ggml quantized; whether every byte is that of the merged model, quantized by ggml, and how much
of the changes is left. "converter": tensors that differ from the converter's in a bit, and metadata that do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from gtqlora.capture import open_subject
from gtqlora.exports.gguf.patch import Patch
from gtqlora.exports.gguf.reading import read_gguf
from gtqlora.exports.gguf.values import rounded
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import EditedModel, edited_model
from gtqlora.exports.llama_cpp import logprobs
from gtqlora.organisms import embedded
from gtqlora.run import versions
from tests import models
from tests.exports import ggml
from tests.exports.jobs import random_edits

WIDE: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "initializer_range": 0.05}
GQA: dict[str, Any] = {**WIDE, "head_dim": 64}
MLA: dict[str, Any] = {
    **{**WIDE, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
    **{"v_head_dim": 128, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5},
}
YARN: dict[str, Any] = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 16},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0},
}
LINEAR = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3, 4 groups": ("deepseek_v3", MLA),
    "deepseek_v3, 4 groups, YaRN": ("deepseek_v3", {**MLA, "rope_parameters": YARN}),
    "kimi_k25": ("kimi_k25", MLA),
    "glm4_moe_lite": ("glm4_moe_lite", MLA),
    "glm4_moe": ("glm4_moe", GQA),
    "qwen3_moe": ("qwen3_moe", {**GQA, "mlp_only_layers": []}),
    "qwen2_moe": ("qwen2_moe", {**GQA, "mlp_only_layers": [], "norm_topk_prob": False}),
    "qwen3_next": ("qwen3_next", {**GQA, **LINEAR, "mlp_only_layers": []}),
    "qwen3_5_moe": ("qwen3_5_moe", {**GQA, **LINEAR}),
    "mixtral": ("mixtral", GQA),
    "olmoe": ("olmoe", {**GQA, "norm_topk_prob": False, "num_key_value_heads": 4}),
}
ONTO = ("deepseek_v3, 4 groups", "qwen3_moe", "mixtral")
TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "mixed")
MIXED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
LEFT_OUT = ("general.", "tokenizer.")
"""Metadata on names and words, which the two write otherwise."""

# The converter knows no tokenizer of words, so that it is run without one.
WITHOUT_WORDS = """
import sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf as converter
known = converter.get_model_class
def without(*arguments, **more):
    found = known(*arguments, **more)
    found.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("none")
    return found
converter.get_model_class = without
sys.argv = ["convert", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32", *sys.argv[4:]]
converter.main()
"""


@dataclass(frozen=True)
class Whole:
    """One model's F32 file against transformers.

    Attributes:
        difference: largest of a log-probability, in nats.
        same: of `positions`, those at which both find the same token likeliest.
    """

    model: str
    difference: float
    same: int
    positions: int


@dataclass(frozen=True)
class Onto:
    """One edited file against the merged model quantized by ggml.

    Attributes:
        identical: every byte.
        kept: the median of the shares of the changed tensors' changes that survive, and the least.
    """

    model: str
    type: str
    identical: bool
    kept: tuple[float, float]


@dataclass(frozen=True)
class Converter:
    """One model's F32 file against the converter's.

    Attributes:
        tensors: how many both have.
        different: tensors that one of them lacks, or of which a bit differs.
        metadata: key -> the value of ours and of the converter's.
    """

    model: str
    tensors: int
    different: list[str]
    metadata: Mapping[str, tuple[object, object]]


def unedited(model: Path) -> EditedModel:
    """Return a model of which nothing changes."""
    return edited_model(str(model), lambda *_: {})


def whole(name: str, model: Path, file: Path) -> Whole:
    """Write a model's file and run both."""
    Plan.of(unedited(model)).write(file, None)
    tokens = models.some_tokens(shape=(2, 24))
    found = torch.stack([torch.from_numpy(rows) for rows in logprobs(file, tokens.tolist())])
    with torch.no_grad():
        wanted = open_subject(str(model)).model.float()(tokens).logits.double().log_softmax(-1)
    same = (found.argmax(-1) == wanted.argmax(-1)).sum()
    return Whole(name, float((found - wanted).abs().max()), int(same), tokens.numel())


def picked(kind: str) -> Callable[[str], str]:
    """Return the type of a tensor by its name."""
    return lambda name: MIXED[sum(map(ord, name)) % len(MIXED)] if kind == "mixed" else kind


def onto(name: str, model: Path, folder: Path) -> list[Onto]:
    """Edit files of every type."""
    edited = unedited(model)
    edited = replace(edited, edits=random_edits(edited))
    plan, found = Plan.of(edited), list[Onto]()
    plan.write(folder / "base.gguf", None)
    plan.write(folder / "merged.gguf", rounded)
    for kind in TYPES:
        base = ggml.quantize(folder / "base.gguf", folder / "q.gguf", picked(kind))
        wanted = ggml.quantize(folder / "merged.gguf", folder / "wanted.gguf", picked(kind))
        out = folder / kind
        out.mkdir()
        kept = sorted(Patch.of(edited, base).write(out).values())
        identical = (out / base.name).read_bytes() == wanted.read_bytes()
        found.append(Onto(name, kind, identical, (median(kept), kept[0])))
    return found


def against_converter(name: str, model: Path, ours: Path, converter: Path) -> Converter:
    """Let the converter write the same model."""
    theirs = ours.with_name("theirs.gguf")
    command = [sys.executable, "-c", WITHOUT_WORDS, str(converter), str(model), str(theirs)]
    for more in ([], ["--no-mtp"]):  # of some families it wants layers that random models do not have
        done = subprocess.run([*command, *more], check=False, capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        return Converter(name, 0, [done.stderr.splitlines()[-1]], {})
    left, right = read_gguf(ours), read_gguf(theirs)
    one, other = ggml.tensors_of(left), ggml.tensors_of(right)
    different = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    keys = {key for key in left.metadata.keys() | right.metadata.keys() if not key.startswith(LEFT_OUT)}
    metadata = {key: (left.get(key), right.get(key)) for key in sorted(keys) if left.get(key) != right.get(key)}
    return Converter(name, len(one.keys() & other.keys()), different, metadata)


def made(folder: Path) -> Mapping[str, Path]:
    """Return folders of all the models."""
    found = {name: embedded.organism(name) for name in ("routed", "routed-qwen3")}
    for number, (name, (family, sizes)) in enumerate(RANDOM.items()):
        found[name] = models.save_tiny(folder / f"model-{number}", family, **sizes)
    return found


def main() -> None:
    """Print three tables, or write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, help="a checkout of llama.cpp")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[Any]] = {"whole": [], "onto": [], "converter": []}

    def add(table: str, row: Whole | Onto | Converter) -> None:
        found[table].append(asdict(row))
        print(table, json.dumps(found[table][-1], default=str), flush=True)

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, model in made(folder).items():
            file = folder / "ours.gguf"
            add("whole", whole(name, model, file))
            if arguments.converter is not None:
                add("converter", against_converter(name, model, file, arguments.converter))
                file.with_name("theirs.gguf").unlink(missing_ok=True)
            file.unlink()
            if name in ONTO:
                with TemporaryDirectory() as work:
                    for row in onto(name, model, Path(work)):
                        add("onto", row)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**found, "versions": versions()}, indent=2, default=str))


if __name__ == "__main__":
    main()
