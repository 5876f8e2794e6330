"""What learning rates do to routers: how far a step moves their logits, and what gates and LoRA repair at each.

    python bench/gate_rates.py                                     # random models of real width, CPU, minutes
    python bench/gate_rates.py --shapes qwen3 --steps 100 --device cuda
    python bench/gate_rates.py --organism routed --workers 16      # the embedded organism, gates, LoRA, both
    python bench/gate_rates.py --organism DIR --device cuda --workers 4 --json out.json

Random models have real widths, experts and top-k, but narrow experts, two layers and the organisms' language; norms
are uneven, as in trained models. Gates train alone: the published rate 5e-6 and several `gate_step`, whose rates are
measured before training. Printed is the root mean square of the change of router logits (`routing.log_scores_TE`)
after one step and after all, and how many of the chosen experts are still the original's, in the worst layer.

An organism is edited on its training rows and asked held-out prompts, as `train` and `verify` do: refusals of
lookalike and harmful prompts, the lowest overlap that the guard would have seen, and what gates and LoRA of the same
edit repair alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from transformers.trainer_utils import SaveStrategy

from gtqlora import contrasts
from gtqlora.capture import Subject
from gtqlora.capture.subject import ready
from gtqlora.config import TrainConfig, VerifyConfig, build
from gtqlora.contrasts import KINDS
from gtqlora.edits.checkpoint_files import Origin
from gtqlora.errors import GtqloraError
from gtqlora.families import FAMILIES, bind
from gtqlora.families.anatomy import is_norm
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.organisms.language import Language
from gtqlora.results.adapter import Deviation, Training, read_info
from gtqlora.results.metrics import LOGITS_BY_GATES, LOGITS_BY_LORA, Metrics, read_metrics
from gtqlora.run import Run
from gtqlora.stages import train as stage
from gtqlora.stages.verify import verify

PUBLISHED = "lr_gates=5e-6"
RATES = (PUBLISHED, "gate_step=0.01", "gate_step=0.03", "gate_step=0.05", "gate_step=0.1")
LORAS = ("lr_lora=3e-5", "lr_lora=2e-4")

_NARROW = {"num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
_NARROW |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "norm_topk_prob": True}
_GQA = {"num_key_value_heads": 2, "head_dim": 64}
_MLA = {"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32}
_MLA |= {"qk_rope_head_dim": 32, "v_head_dim": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Qwen3-30B-A3B, OLMoE-1B-7B, GLM-4.5-Air and Kimi-K2.5
    "qwen3": ("qwen3_moe", {**_GQA, "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8}),
    "olmoe": (
        "olmoe",
        {"hidden_size": 2048, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}
        | {"num_key_value_heads": 4},
    ),
    "glm4": (
        "glm4_moe",
        {**_GQA, "hidden_size": 4096, "n_routed_experts": 128, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
        | {"n_shared_experts": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0},
    ),
    "k2.5": (
        "deepseek_v3",
        {**_MLA, "hidden_size": 7168, "n_routed_experts": 384, "num_experts_per_tok": 8}
        | {"first_k_dense_replace": 0, "routed_scaling_factor": 2.827},
    ),
}
_INNER = 32


# --- random models of real width -------------------------------------------------------------------------------------


def width(args: argparse.Namespace, shape: str, rate: str) -> dict[str, Any]:
    """One shape at one rate, gates alone; the first line is logged before any step has been done."""
    subject = _subject(args, shape)
    spec, started = subject.anatomy.spec, time.monotonic()
    lines, rates, reference = _gates_alone(args, subject, rate)
    return {
        "shape": f"{shape} {subject.anatomy.hidden_size}x{spec.n_experts}, {spec.score}",
        "rate": rate,
        "lr": sum(rates) / len(rates),
        "first": lines[1][LOGITS_BY_GATES],
        "moved": lines[-1][LOGITS_BY_GATES],
        "overlap": {kind: lines[-1][f"health/overlap_{kind}_worst"] for kind in KINDS},
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
        "reference": asdict(reference),
        "seconds": round(time.monotonic() - started),
    }


def _subject(args: argparse.Namespace, shape: str) -> Subject:
    name, sizes = SHAPES[shape]
    family, language = FAMILIES[name], Language()
    kind = getattr(transformers, family.class_name)
    torch.manual_seed(0)
    made = {**_NARROW, "vocab_size": len(language.vocabulary), **sizes, family.inner_key: _INNER}
    with torch.device(args.device):
        model = kind(kind.config_class(**made)).eval()
        for module in filter(is_norm, model.modules()):
            for parameter in module.parameters():
                parameter.data *= torch.exp(0.5 * torch.randn(parameter.shape))
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.data = 0.02 * torch.randn(buffer.shape)
    model.to(getattr(torch, args.dtype))
    subject = Subject(model, language.tokenizer(), bind(model, family))
    ready(model, subject.anatomy)
    return subject


def _gates_alone(args: argparse.Namespace, subject: Subject, rate: str) -> tuple[list[Metrics], list[float], Deviation]:
    """Train the gates; the logged lines, the routers' learning rates, and how exact the reference was."""
    settings = [rate, "mode=gates", f"steps={args.steps}", f"batch_size={args.rows}", "warmup=0", "min_overlap=0"]
    settings += ["logging_steps=1", "save_steps=1000000", "max_load_cv=1e9", f"judge={embedded.JUDGE}"]
    settings += [f"device={args.device}"]
    config = build(TrainConfig, model="random", contrast=str(embedded.contrast()), overrides=settings)
    rows = contrasts.load(config.contrast, judge_of(config.judge)).split(config.split)
    rows = replace(rows, rows=tuple(random.Random(0).sample(rows.rows, args.pairs)))
    with TemporaryDirectory() as folder, Run(Path(folder) / "run") as run:
        trainer = stage._trainer(config, subject, rows, run, Origin({}, {}))
        trainer.args.save_strategy = SaveStrategy.NO
        stage._fit(trainer, run / stage.CHECKPOINTS)
        lines = read_metrics(run / stage.CHECKPOINTS / stage.METRICS)
    assert trainer.reference is not None
    return lines, list(trainer.gate_rates.values()) or [float(str(config.lr_gates))], trainer.reference


def print_widths(found: Sequence[dict[str, Any]], steps: int) -> None:
    print(f"\n{'random model':24}{'rate':17}{'lr':>10}{'a step':>9}{f'{steps} steps':>10}{'harmful':>9}", end="")
    print(f"{'benign':>8}{'lookalike':>11}{'loss':>8}{'reference':>11}{'seconds':>9}")
    for row in found:
        shared = "".join(f"{row['overlap'][k]:>{w}.3f}" for k, w in (("harmful", 9), ("benign", 8), ("lookalike", 11)))
        print(
            f"{row['shape']:24}{row['rate']:17}{row['lr']:10.2e}{row['first']:9.4f}{row['moved']:10.4f}{shared}",
            f"{row['loss'][-1]:7.3f}{row['reference']['max']:11.1e}{row['seconds']:9}",
        )
    print("logits: rms change by a step, and in all; overlap in the worst layer; reference: largest error in nats")


# --- organisms -------------------------------------------------------------------------------------------------------


def edits(rates: Sequence[str], loras: Sequence[str]) -> list[tuple[str, ...]]:
    """Gates at every rate, LoRA at every rate, and both at all combinations."""
    gates = [("mode=gates", rate) for rate in rates]
    return [*gates, *(("mode=lora", lora) for lora in loras), *(("mode=gt", g, x) for g in rates for x in loras)]


def edited(job: tuple[tuple[str, ...], str, str, str, tuple[str, ...]]) -> dict[str, Any]:
    """One edit of an organism, verified."""
    settings, model, contrast, device, more = job
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    given = {"file": embedded.recipe(), "model": model, "contrast": contrast, "device": device}
    overrides = ["min_overlap=0", "logging_steps=5", *more, *settings]
    with TemporaryDirectory() as folder, Run(Path(folder) / "run") as run:
        try:
            trained = stage.train(build(TrainConfig, overrides=overrides, **given), run)  # type: ignore[arg-type]
            verdict = verify(build(VerifyConfig, overrides=["ablation=0"], **given), run)  # type: ignore[arg-type]
        except GtqloraError as error:
            return {"settings": settings, "error": str(error)}
        lines, made = read_metrics(run / stage.METRICS), read_info(run / stage.ADAPTER).details
    assert isinstance(made, Training)
    kinds, parts, last = verdict.table, verdict.factorial, lines[-1]
    seen = [line["health/overlap_harmful_worst"] for line in lines if "health/overlap_harmful_worst" in line]
    return {
        "settings": settings,
        "stopped": trained.stopped,
        "rates": made.gate_rates,
        "reference": asdict(made.reference) if made.reference else None,
        "lookalike": kinds["lookalike"].refusal_after.value,
        "accuracy": kinds["lookalike"].accuracy_after.value if kinds["lookalike"].accuracy_after else None,
        "harmful": kinds["harmful"].refusal_after.value,
        "floor": verdict.floor.verdict,
        "gates repair": parts.gates_repair.value if parts and parts.gates_repair else None,
        "lora repairs": parts.lora_repair.value if parts and parts.lora_repair else None,
        "least overlap": min(mean(seen[max(0, i - 2) : i + 1]) for i in range(len(seen))),
        "by gates": last[LOGITS_BY_GATES],
        "by lora": last[LOGITS_BY_LORA],
    }


_COLUMNS = ("lookalike", "accuracy", "harmful", "gates repair", "lora repairs", "least overlap", "by gates", "by lora")


def print_edits(name: str, found: Sequence[dict[str, Any]]) -> None:
    print(f"\n{name + ': edit':44}{'floor':>12}" + "".join(f"{column:>14}" for column in _COLUMNS))
    for row in found:
        what = " ".join(row["settings"]).removeprefix("mode=")
        if "error" in row:
            print(f"{what:44}{row['error']}")
            continue
        numbers = "".join(f"{'-' if row[c] is None else format(row[c], '.3f'):>14}" for c in _COLUMNS)
        print(f"{what:44}{row['floor']:>12}{numbers}")
    if errors := [row["reference"] for row in found if row.get("reference")]:
        worst = max(errors, key=lambda error: error["max"])
        print(
            f"reference: {worst['mean']:.1e} nats on the mean and {worst['max']:.1e} at most, in {worst['rows']} rows"
        )


# --- all of it -------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rates", nargs="+", default=RATES, help="key=value of what gates train at")
    parser.add_argument("--loras", nargs="*", default=LORAS, help="key=value of what LoRA trains at")
    parser.add_argument("--steps", type=int, default=30, help="of random models")
    parser.add_argument("--pairs", type=int, default=480, help="that random models train on")
    parser.add_argument("--rows", type=int, default=16, help="pairs of a step, of random models")
    parser.add_argument(
        "--organism", help="an embedded organism, or the folder of one; random models only if asked for"
    )
    parser.add_argument("--set", nargs="*", default=(), help="more key=value for every edit of the organism")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of random models")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    warnings.filterwarnings("ignore")
    started = time.monotonic()
    widths = [width(args, shape, rate) for shape in args.shapes for rate in args.rates]
    if widths:
        print_widths(widths, args.steps)
    found: list[dict[str, Any]] = []
    if args.organism:
        inside = args.organism in embedded.names()
        model = embedded.organism(args.organism) if inside else Path(args.organism)
        with TemporaryDirectory() as folder:  # a copy of the pairs, whose ledger counts these tries only
            jobs = []
            for number, settings in enumerate(edits(args.rates, args.loras)):
                pairs = Path(folder) / f"{number}.jsonl"
                shutil.copyfile(embedded.contrast() if inside else model / embedded.CONTRAST, pairs)
                jobs.append((settings, str(model), str(pairs), args.device, tuple(args.set)))
            with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
                for row in pool.imap(edited, jobs, chunksize=1):
                    found.append(row)
                    print(".", end="", flush=True, file=sys.stderr)
        print_edits(args.organism, found)
    card = torch.cuda.get_device_name(args.device) if args.device != "cpu" else platform.processor() or "CPU"
    print(f"\n{time.monotonic() - started:.0f} s on {card}, {args.workers} workers; torch {torch.__version__}", end="")
    print(f", transformers {transformers.__version__}")
    if args.json:
        args.json.write_text(json.dumps({"device": card, "widths": widths, "edits": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
