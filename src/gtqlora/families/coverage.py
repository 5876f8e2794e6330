"""Which parts of an edit a program applies when it loads the edit as an adapter: data, and what would be lost.

Programs load adapters with tensors that they then ignore, without a message. So nothing is written for a program that
does not apply all of it; what each one applies stands here, with where that was read or that our tests run it.
A merged checkpoint, or a merged GGUF, is applied whole by every program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gtqlora.config import Target
from gtqlora.errors import RunError
from gtqlora.families.facts import Family


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What a program applies of a family's edits when it loads them as an adapter.

    Attributes:
        lora: projections whose LoRA is applied, by their path in a decoder layer.
        gates: whether a change of the routers is applied.
        source: where that was found, with the version.
        tested: a test here runs the program, and sees every group's effect.
        architecture: what the program calls the architecture, where it has a name of its own for it.
        rearranged: projections, of those in `lora`, whose rows or columns the program has in another order than the
            checkpoint, or split: factors of LoRA have to be put into that order, too.
    """

    lora: tuple[str, ...]
    gates: bool
    source: str
    tested: bool = False
    architecture: str | None = None
    rearranged: tuple[str, ...] = ()

    def lost(self, family: Family, lora: Iterable[str], *, gates: bool) -> list[str]:
        """Return the parts that would be ignored or refused: projections as in `lora`, and the routers' path.

        Args:
            lora: projections that the edit changes, by their path in the language model.
            gates: whether it changes routers.
        """
        groups = {in_layer(family, path) for path in lora}
        return sorted(groups - set(self.lora)) + ([family.router] if gates and not self.gates else [])


def in_layer(family: Family, path: str) -> str:
    """Return a module's path in its decoder layer: `self_attn.o_proj` of `model.layers.3.self_attn.o_proj`."""
    return re.sub(rf"{re.escape(family.layers)}\.\d+\.", "", path, count=1)


# --- what each program applies ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What of a family's groups a program applies: all, but for some."""

    source: str
    but: tuple[str, ...] = ()
    gates: bool = True
    tested: bool = False
    architecture: str | None = None
    rearranged: tuple[str, ...] = ()


_EVERYTHING = ("",)
_MLA = ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa")
_KV_B = "self_attn.kv_b_proj"


def _llama_cpp(architecture: str, file: str | None = None, **more: tuple[str, ...]) -> _Part:
    source = f"llama.cpp b10605, src/models/{file or architecture}.cpp and src/llama-graph.cpp"
    return _Part(source, architecture=architecture, tested=True, **more)


# `build_lora_mm` adds an adapter's product, and a bare `ggml_mul_mat` does not: the latter is what MLA is made of.
_DEEPSEEK2 = _llama_cpp("deepseek2", but=(*_MLA, _KV_B))
_IN_LLAMA_CPP = {
    "deepseek_v3": _DEEPSEEK2,
    "kimi_k25": _DEEPSEEK2,
    "glm4_moe_lite": _DEEPSEEK2,
    "glm4_moe": _llama_cpp("glm4moe", "glm4-moe"),
    "qwen2_moe": _llama_cpp("qwen2moe"),
    "qwen3_moe": _llama_cpp("qwen3moe"),
    # Queries, keys, values and gates of linear attention lie head by head in the checkpoint, and kind by kind there.
    "qwen3_next": _llama_cpp("qwen3next", rearranged=("linear_attn.in_proj_qkvz",)),
    # Heads of values lie by their head of keys in the checkpoint, and in turn there.
    "qwen3_5_moe": _llama_cpp("qwen35moe", rearranged=("linear_attn.",)),
    # Its rotary embedding turns neighbouring rows of a head, and not one half against the other.
    "mixtral": _llama_cpp("llama", rearranged=("self_attn.q_proj", "self_attn.k_proj")),
    "olmoe": _llama_cpp("olmoe"),
}

_VLLM = "vLLM 0.33.0, vllm/lora and vllm/model_executor/models/{}.py"
# kv_b is absorbed into attention's matrices, where no adapter reaches it (vllm#48974).
_IN_VLLM = {
    "deepseek_v3": _Part(_VLLM.format("deepseek_v2"), but=(_KV_B,)),
    # KimiK25ForConditionalGeneration does not take adapters (no SupportsLoRA).
    "kimi_k25": _Part(_VLLM.format("kimi_k25"), but=_EVERYTHING, gates=False),
    # Their routers are fp32, and adapters are 16 bits: the kernel's types do not meet.
    "glm4_moe": _Part(_VLLM.format("glm4_moe"), gates=False),
    "glm4_moe_lite": _Part(_VLLM.format("glm4_moe_lite"), but=(_KV_B,), gates=False),
    "qwen2_moe": _Part(_VLLM.format("qwen2_moe")),
    "qwen3_moe": _Part(_VLLM.format("qwen3_moe")),
    "qwen3_next": _Part(_VLLM.format("qwen3_next")),
    "qwen3_5_moe": _Part(_VLLM.format("qwen3_5")),
    "mixtral": _Part(_VLLM.format("mixtral")),
    "olmoe": _Part(_VLLM.format("olmoe")),
}

_SGLANG = "SGLang 0.5.23, sglang/srt/lora and sglang/srt/models/{}.py"
# No router takes LoRA there. Sizes of buffers that it guesses wrongly, and names it does not know, are left out.
_IN_SGLANG = {
    "deepseek_v3": _Part(_SGLANG.format("deepseek_v2"), but=("self_attn.q_proj",), gates=False),
    "kimi_k25": _Part(_SGLANG.format("kimi_k25"), but=_EVERYTHING, gates=False),
    "glm4_moe": _Part(_SGLANG.format("glm4_moe"), gates=False),
    "glm4_moe_lite": _Part(_SGLANG.format("glm4_moe_lite"), but=("self_attn.q_proj",), gates=False),
    "qwen2_moe": _Part(_SGLANG.format("qwen2_moe"), gates=False),
    "qwen3_moe": _Part(_SGLANG.format("qwen3_moe"), gates=False),
    "qwen3_next": _Part(
        _SGLANG.format("qwen3_next"),
        but=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear_attn."),
        gates=False,
    ),
    "qwen3_5_moe": _Part(_SGLANG.format("qwen3_5"), but=("linear_attn.in_proj_",), gates=False),
    "mixtral": _Part(_SGLANG.format("mixtral"), gates=False),
    "olmoe": _Part(_SGLANG.format("olmoe"), gates=False),
}

_PEFT = "PEFT 0.21.2 on transformers 5.23.0"
_IN_PEFT = dict.fromkeys(_IN_SGLANG, _Part(_PEFT, tested=True)) | {
    # transformers opens it with its vision tower only, where adapters name other modules.
    "kimi_k25": _Part(f"{_PEFT}, which has no class for the language model alone", but=_EVERYTHING, gates=False),
}
_PARTS: dict[Target, dict[str, _Part]] = {
    "transformers": _IN_PEFT,
    "peft": _IN_PEFT,
    "llama.cpp": _IN_LLAMA_CPP,
    "vllm": _IN_VLLM,
    "sglang": _IN_SGLANG,
}
"""By target and family; transformers loads adapters with PEFT."""
_SAME = {"qwen3_5_moe_text": "qwen3_5_moe"}
"""Families that only differ in how a checkpoint lies on disk."""


def covered(family: Family, target: Target) -> Coverage:
    """Return what a program applies of a family's edits when it loads them as an adapter."""
    every = (*family.attention, *family.shared)
    name = _SAME.get(family.model_type, family.model_type)
    part = _PARTS[target][name]
    lora = tuple(group for group in every if not group.startswith(part.but))
    return Coverage(
        lora=lora,
        gates=part.gates,
        source=part.source,
        tested=part.tested,
        architecture=part.architecture,
        rearranged=tuple(group for group in lora if group.startswith(part.rearranged)),
    )


def check_covered(family: Family, target: Target, lora: Iterable[str], gates: bool) -> None:
    """Check that a program would apply an edit whole.

    Args:
        lora: projections that the edit changes, by their path in the language model.
        gates: whether it changes routers.

    Raises:
        RunError: it would not; the message names what would be lost, and what to do.
    """
    lost = covered(family, target).lost(family, lora, gates=gates)
    if lost:
        applied = covered(family, target)
        train = f", or train it with `gtqlora train --for {target}`" if applied.lora or applied.gates else ""
        raise RunError(
            f"{target} applies no adapter to {_listed(lost)} of {family.model_type} ({applied.source}), so that this "
            f"part of the edit would be lost; export it merged{train}"
        )


def _listed(groups: list[str]) -> str:
    return groups[0] if len(groups) == 1 else f"{', '.join(groups[:-1])} and {groups[-1]}"
