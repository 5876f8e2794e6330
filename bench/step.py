"""A whole DPO step through frozen 4-bit experts, against TRL and PEFT on bf16 experts: tokens a second, peak memory.

    python bench/step.py                                       # Qwen3-30B-A3B, all layers, 8 pairs of 512 tokens
    python bench/step.py --pairs 4 --tokens 1024 --json out.json
    python bench/step.py --shape k2.5 --layers 3               # Kimi-K2.5's width: one dense and two MoE layers
    python bench/step.py --ways nf4 --profile                        # where the time of one step goes
    python bench/step.py --ways nf4 --curve 100 --no-graphs          # losses of a hundred steps, to set beside others
    python bench/step.py --device cpu --tiny                         # does it run?

Random weights and random tokens; all sequences are `--tokens` long, half of them prompt. Every way trains the same LoRA
(rank 32) and routers with the same loss (DPO and SFT), gradient checkpointing and stored reference log-probabilities:

    nf4, int4-g32, int4-g128    gtqlora's trainer on experts frozen in that format
    bf16                        gtqlora's trainer on transformers' own experts
    trl                         TRL's DPOTrainer and PEFT as they come, on transformers' own experts, bf16 autocast

`--anchor` adds the routing anchor to gtqlora's trainer: one more forward pass of the anchored rows. Ways run one after
the other; two steps warm up (the second records CUDA graphs), the median of five counts. Experts' bits are compared
before and after. "bound" is six operations a token for every parameter that it meets, at 790 TFLOP/s, although frozen
weights need but four (and six with recomputation). Peaks are what the allocator held, graphs and all. By default every
layer is computed again, as in the other trainer; `--activation-memory` lets layers keep their activations.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"

import torch
import transformers
from accelerate import init_empty_weights
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import DeepseekV3Config, PreTrainedTokenizerFast, Qwen3MoeConfig, TrainerCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from gtqlora.capture.subject import exchanging, ready
from gtqlora.config import TrainConfig
from gtqlora.contrasts import KINDS
from gtqlora.edits.arguments import arguments as training_arguments
from gtqlora.edits.collating import KindCollator
from gtqlora.edits.frozen import assert_experts_frozen, frozen_state, sum_of_bits
from gtqlora.edits.trainer import GateTargetedTrainer, weights_unhashed
from gtqlora.edits.wrapping import assert_trains_exactly, lora_config, peft_targets_kept
from gtqlora.experts import FORMATS, FrozenExperts, FrozenExpertsConfig
from gtqlora.experts.placing import chosen
from gtqlora.experts.quantizer import replace_experts
from gtqlora.experts.sharding import is_worth_it, shard
from gtqlora.experts.streaming import Streaming
from gtqlora.families import FAMILIES, Anatomy, bind
from gtqlora.ranks import ranks

TRL, BF16 = "trl", "bf16"
WAYS = (*FORMATS, BF16, TRL)
WARMUP = 2
TFLOPS = 790e12
_WEIGHTS_AT_ONCE = 2**28

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            **{"num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
            **{"num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4},
            **{"head_dim": 128, "vocab_size": 151936, "norm_topk_prob": True, "max_position_embeddings": 40960},
        },
    ),
    "qwen3-235b-a22b": (
        "qwen3_moe",
        {
            **{"num_hidden_layers": 94, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536},
            **{"num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 64, "num_key_value_heads": 4},
            **{"head_dim": 128, "vocab_size": 151936, "norm_topk_prob": True, "max_position_embeddings": 40960},
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **{"num_hidden_layers": 61, "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432},
            **{"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8},
            **{"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
            **{"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512},
            **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280},
            "max_position_embeddings": 163840,
        },
    ),
    "k2.5": (
        "deepseek_v3",
        {
            **{"num_hidden_layers": 3, "first_k_dense_replace": 1, "hidden_size": 7168, "intermediate_size": 18432},
            **{"moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8},
            **{"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.827},
            **{"num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512},
            **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840},
            "max_position_embeddings": 262144,
        },
    ),
}
TINY: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {"num_experts": 8, "num_key_value_heads": 2, "head_dim": 16},
    "k2.5": {"n_routed_experts": 8, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
    | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
}
TINY["qwen3-235b-a22b"] = TINY["qwen3-30b-a3b"]
TINY["deepseek-v3"] = TINY["k2.5"] | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
_TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32} | {
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way: seconds of each counted step, the loss, the mean of all, GiB at the peak and of weights."""

    way: str
    steps: list[float]
    loss: float
    losses: list[float]
    peak_gib: float | None
    model_gib: float
    experts_gib: float
    build_seconds: float

    @property
    def seconds(self) -> float:
        return statistics.median(self.steps)


BETWEEN = "between GPUs"
_KINDS = {
    BETWEEN: ("nccl", "symmetric_memory", "memcpy ptop"),
    "experts": ("grouped", "few_rows", "_gated", "_gather", "_combine", "absmax", "plan("),
    "attention": ("flash", "fmha", "attention", "sdpa", "cudnn"),
    "matrix products": ("gemm", "cutlass", "nvjet", "cublas", "xmma"),
    "norms, rotary": ("rms_norm", "rope"),
    "copies, casts": ("copy", "memcpy", "memset", "catarray"),
    "routing": ("sort", "topk", "scatter", "index", "searchsorted", "softmax"),
    "elementwise": ("elementwise", "reduce"),
}


class Profile(TrainerCallback):
    """Kernels of one counted step by kind, from torch's profiler."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARMUP + 1:
            torch.cuda.synchronize()
            self._started = time.perf_counter()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step != WARMUP + 2:
            return
        torch.cuda.synchronize()
        wall = time.perf_counter() - self._started
        self._profile.__exit__(None, None, None)
        kernels = [e for e in self._profile.events() or [] if str(e.device_type).endswith("CUDA")]
        spent = by_kind(kernels)
        print(f"one step: {len(kernels):,} kernels, busy {sum(spent.values()):.0f} of {wall * 1e3:.0f} ms")
        for kind, milliseconds in sorted(spent.items(), key=lambda item: -item[1]):
            print(f"  {kind:16}{milliseconds:9.1f} ms")


def kind_of(kernel: Any) -> str:
    name = kernel.name.lower()
    return next((kind for kind, words in _KINDS.items() if any(word in name for word in words)), "other")


def by_kind(kernels: list[Any]) -> dict[str, float]:
    """Milliseconds of a profiler's kernels."""
    spent: dict[str, float] = dict.fromkeys((*_KINDS, "other"), 0.0)
    for kernel in kernels:
        spent[kind_of(kernel)] += kernel.time_range.elapsed_us() / 1e3
    return spent


class Clock(TrainerCallback):
    """Seconds of every step, losses, and peak memory after the warm-up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.started = device, 0.0
        self.steps: list[float] = []
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(self._now() - self.started)


# --- a model made of random numbers ----------------------------------------------------------------------------------


def config_of(args: argparse.Namespace) -> tuple[str, Any]:
    """The family's name and a transformers config."""
    family, sizes = SHAPES[args.shape]
    sizes = {**sizes, **_TINY, **TINY[args.shape]} if args.tiny else dict(sizes)
    sizes |= {} if args.layers is None else {"num_hidden_layers": args.layers}
    sizes |= {} if args.experts is None else {FAMILIES[family].experts_key: args.experts}
    kind = Qwen3MoeConfig if family == "qwen3_moe" else DeepseekV3Config
    return family, kind(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None, dtype=torch.bfloat16)


@torch.no_grad()
def build(
    args: argparse.Namespace, way: str, device: torch.device, expert_memory: float | None = None
) -> tuple[Any, Anatomy]:
    """A bf16 model; routers in fp32 for gtqlora's trainer, experts frozen if the way is a format."""
    name, config = config_of(args)
    family = FAMILIES[name]
    torch.manual_seed(0)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, family.class_name)(config)
    if way in FORMATS:  # filled later: dense weights first, as of a large model each rank keeps a part of them
        held = FrozenExpertsConfig(expert_range=(ranks().place, ranks().here), memory=expert_memory)
        replace_experts(model, family, FORMATS[way], held)
    experts = [module for module in model.modules() if isinstance(module, FrozenExperts)]
    for path, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, _random(f"{path}.{key}", parameter, device))
        if module not in experts:
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, buffer.to(device))
    model.eval().requires_grad_(False)
    anatomy = bind(model, family)
    if way != TRL:
        ready(model, anatomy)
    if is_worth_it(model, anatomy.family):
        shard(model, anatomy.family)
        torch.cuda.empty_cache()
    waiting = chosen(model, experts, held, device) if expert_memory else []
    for module in experts:
        module.empty() if module in waiting else module.to_empty(device=device)
    if waiting:
        Streaming(waiting, device)
    for module in experts:
        _fill(module, device)
    exchanging(model, anatomy)
    return model, anatomy


def _random(name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
    return nn.Parameter(made.fill_(1.0) if "norm" in name else made.normal_(std=0.02))


def _fill(frozen: FrozenExperts, device: torch.device) -> None:
    for projection, matrices in (("gate_up", 2), ("down", 1)):
        sizes = frozen.sizes(projection)  # type: ignore[arg-type]
        at_once = max(1, _WEIGHTS_AT_ONCE // (matrices * sizes[0] * sizes[1]))
        for start in range(0, frozen.count, at_once):
            held = frozen.parts(projection, slice(start, start + at_once))  # type: ignore[arg-type]
            weights = torch.randn(*held["packed"].shape[:2], *sizes, dtype=torch.bfloat16, device=device) * 0.02
            for part, tensor in frozen.format.quantize(weights).items():
                held[part].copy_(tensor)


def _bytes(tensors: Any) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 2**30


def _expert_tensors(model: Any, anatomy: Anatomy) -> list[Tensor]:
    modules = [model.get_submodule(layer.experts) for layer in anatomy.moe]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


# --- a batch of random tokens ----------------------------------------------------------------------------------------


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Token i is the word `wi`, but for the first two, which no word may begin with."""
    named = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    words = Tokenizer(models.WordLevel(named, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<pad>")


def dataset_of(args: argparse.Namespace, vocabulary: int) -> Dataset:
    """One batch; TRL ends every answer with the end token."""
    rng, half = random.Random(0), args.tokens // 2

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(2, vocabulary)}" for _ in range(count))

    rest = args.tokens - half - 1
    return Dataset.from_list(
        [
            {"prompt": words(half), "chosen": f" {words(rest)}", "rejected": f" {words(rest)}"}
            | {"kind": KINDS[i % len(KINDS)]}
            for i in range(args.pairs)
        ]
    )


def in_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """The same as the `train` stage hands it over."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])  # type: ignore[arg-type]

    end = [tokenizer.eos_token_id]
    return Dataset.from_list(
        [
            {"prompt_ids": ids(row["prompt"]), "kind": row["kind"]}
            | {f"{answer}_ids": ids(row[answer]) + end for answer in ("chosen", "rejected")}
            for row in rows.to_list()
        ]
    )


# --- trainers --------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, device: torch.device) -> TrainConfig:
    steps = args.curve or WARMUP + args.steps
    return TrainConfig(
        model="random",
        contrast="random",
        device=device.type,
        batch_size=args.pairs,
        steps=steps,
        gradient_checkpointing=not args.no_checkpointing,
        activation_memory=None if args.activation_memory < 0 else args.activation_memory,
        cuda_graphs=not args.no_graphs,
        # router health, which a logging step measures, is not part of a plain step
        logging_steps=1 if args.curve else steps + 1,
        lr_gates=5e-6,  # measuring rates is no part of a step
        anchor_harmful=1.0 if args.anchor else 0.0,
        anchor_benign=0.1 if args.anchor else 0.0,
        max_load_cv=1e6,
        min_overlap=0.0,
    )


def trainer_of(args: argparse.Namespace, way: str, model: Any, anatomy: Anatomy, out: Path, clock: Clock) -> Any:
    """What the `train` stage builds, or TRL's own trainer with the same modules to train."""
    settings, tokenizer = settings_of(args, clock.device), tokenizer_of(model.config.vocab_size)
    arguments = training_arguments(settings, out)
    arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    shared: dict[str, Any] = {
        "model": model,
        "train_dataset": dataset_of(args, model.config.vocab_size),
        "processing_class": tokenizer,
        "peft_config": lora_config(anatomy, mode="gt", rank=settings.rank, alpha=settings.alpha),
        "callbacks": [clock],
    }
    with peft_targets_kept(), weights_unhashed():
        if way == TRL:
            return DPOTrainer(args=_trl_arguments(settings, out), **shared)
        share = (ranks().rank, ranks().count)
        collator = KindCollator(pad_token_id=0, packed=not args.no_packing, share=share)
        shared["train_dataset"] = in_tokens(shared["train_dataset"], tokenizer)
        trainer = GateTargetedTrainer(
            anatomy=anatomy, settings=settings, args=arguments, data_collator=collator, **shared
        )
    assert_trains_exactly(trainer.model, anatomy, mode="gt", rank=settings.rank)
    return trainer


def _trl_arguments(settings: TrainConfig, out: Path) -> DPOConfig:
    """TRL's defaults but for what has to be the same; bf16 autocast is one of them."""
    return DPOConfig(
        output_dir=str(out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, settings.sft_weight],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=settings.batch_size,
        max_length=None,
        bf16=True,
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device != "cpu",
        logging_steps=settings.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def measure(args: argparse.Namespace, way: str, device: torch.device) -> Measured:
    """Build, warm up, count.

    Raises:
        TrainingError: the experts' bits changed.
    """
    started = time.perf_counter()
    model, anatomy = build(args, way, device, args.expert_memory)
    experts = _expert_tensors(model, anatomy)
    before = frozen_state(model) or {"": _checksum(experts)}
    clock = Clock(device)
    with TemporaryDirectory() as folder:
        trainer = trainer_of(args, way, model, anatomy, Path(folder), clock)
        trainer.remove_callback(transformers.PrinterCallback)
        if args.profile:
            trainer.add_callback(Profile())
        built = time.perf_counter() - started
        if device.type == "cuda":  # what building held is not part of a step
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        loss = trainer.train().training_loss
        # what the allocator held, and not what tensors filled: the memory of a graph is counted while it is recorded
        peak = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None
    if way in FORMATS:
        assert_experts_frozen(trainer.model, before)
    elif before[""] != _checksum(experts):
        raise RuntimeError("the experts changed")
    return Measured(
        way=way,
        steps=clock.steps[WARMUP:],
        loss=loss,
        losses=clock.losses,
        peak_gib=peak,
        model_gib=_bytes([*model.parameters(), *model.buffers()]),
        experts_gib=_bytes(experts),
        build_seconds=built,
    )


def _checksum(tensors: list[Tensor]) -> tuple[int, int]:
    return 0, sum(sum_of_bits(tensor) for tensor in tensors)


# --- the table -------------------------------------------------------------------------------------------------------


def print_table(args: argparse.Namespace, found: list[Measured]) -> None:
    """Ratios are to TRL's: how many times faster, and which share of its peak memory."""
    tokens = 2 * args.pairs * args.tokens
    reference = next((m for m in found if m.way == TRL), None)
    bound = TFLOPS / (6 * active_parameters(args))
    columns = ("s/step", "fastest", "slowest", "tokens/s", "of bound", "x faster", "peak GiB", "share", "experts GiB")
    columns += ("built in s",)
    print(f"{'way':10}" + "".join(f"{column:>12}" for column in columns))
    for m in found:
        numbers = [m.seconds, min(m.steps), max(m.steps), tokens / m.seconds, tokens / m.seconds / bound]
        numbers += [reference.seconds / m.seconds if reference else None, m.peak_gib]
        numbers += [m.peak_gib / reference.peak_gib if reference and m.peak_gib and reference.peak_gib else None]
        numbers += [m.experts_gib, m.build_seconds]
        cells = ("-" if n is None else f"{n:,.0f}" if n >= 1000 else f"{n:.3f}" for n in numbers)
        print(f"{m.way:10}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def active_parameters(args: argparse.Namespace) -> int:
    """Parameters that one token meets, without the embedding."""
    name, config = config_of(args)
    family = FAMILIES[name]
    with init_empty_weights():
        model = getattr(transformers, family.class_name)(config)
    layers = family.moe_layers(config)
    experts = sum(p.numel() for i in layers for p in model.get_submodule(family.experts_of(i)).parameters())
    rest = sum(p.numel() for p in model.parameters()) - experts - model.get_input_embeddings().weight.numel()
    return rest + round(experts * config.num_experts_per_tok / family.n_experts(config))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="decoder layers, instead of the shape's")
    parser.add_argument("--experts", type=int, help="experts a layer, instead of the shape's")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of every sequence, prompt and answer")
    parser.add_argument("--steps", type=int, default=5, help="steps that count, after two that do not")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["nf4", "int4-g32", TRL])
    parser.add_argument("--anchor", action="store_true", help="train with the routing anchor, too (not trl)")
    parser.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")
    parser.add_argument(
        "--activation-memory", type=float, default=0.0, help="GiB for kept activations; below 0: what is free"
    )
    parser.add_argument(
        "--expert-memory", type=float, help="GiB of a GPU for experts; layers of them beyond wait in host memory"
    )
    parser.add_argument("--no-packing", action="store_true", help="with padding, and every prompt twice")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="print one step's kernels by kind; needs a GPU")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="as many steps, with the loss of each")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the shape's architecture in miniature")
    parser.add_argument("--json", type=Path)
    found = parser.parse_args(arguments)
    if found.profile and torch.device(found.device).type != "cuda":
        parser.error("--profile shows kernels of a GPU; leave it out on a CPU")
    return found


def prepared(name: str) -> torch.device:
    """The device of that name, by its number; from here on nothing but results is printed."""
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    device = prepared(args.device)
    config = config_of(args)[1]
    print(
        f"{args.shape}{' (tiny)' if args.tiny else ''}: {config.num_hidden_layers} layers, hidden "
        f"{config.hidden_size}; {args.pairs} pairs x 2 x {args.tokens} tokens, "
        f"anchor {'on' if args.anchor else 'off'}, "
        f"checkpointing {'off' if args.no_checkpointing else 'on'}",
        flush=True,
    )
    found: list[Measured] = []
    errors: dict[str, str] = {}
    for way in args.ways:
        try:
            found.append(measure(args, way, device))
            print(f"{way}: {found[-1].seconds:.3f} s a step, mean loss {found[-1].loss:.4f}", flush=True)
            if args.curve:
                shown = {i: loss for i, loss in enumerate(found[-1].losses, 1) if i == 1 or i % 10 == 0}
                print("  loss at step " + ", ".join(f"{i}: {loss:.3f}" for i, loss in shown.items()), flush=True)
        except Exception as error:  # the other ways are worth their time, whatever befell this one
            errors[way] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            print(f"{way}: {errors[way]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print_table(args, found)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{card}; torch {torch.__version__}, transformers {transformers.__version__}")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.write_text(
            json.dumps(
                {"settings": settings, "device": card, "errors": errors, "ways": [asdict(m) for m in found]}, indent=1
            )
        )
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
