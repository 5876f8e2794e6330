"""Which parts of an edit a program applies when it loads the edit as an adapter: data, and what would be lost.

Programs load adapters with tensors that they then ignore, without a message. So nothing is written for a program that
does not apply all of it; what each one applies stands here, with where that was read or that our tests run it.
A merged checkpoint, or a merged GGUF, is applied whole by every program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
    """

    lora: tuple[str, ...]
    gates: bool
    source: str
    tested: bool = False

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


_EVERYTHING = ("",)
_HEAD = "lm_head"
_MLA = ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa")
_KV_B = "self_attn.kv_b_proj"


def _llama_cpp(file: str, but: tuple[str, ...] = ()) -> _Part:
    return _Part(f"llama.cpp b10605, src/models/{file}.cpp and src/llama-graph.cpp", but=but, tested=True)


# `build_lora_mm` adds an adapter's product, and a bare `ggml_mul_mat` does not: the latter is what MLA is made of.
_DEEPSEEK2 = _llama_cpp("deepseek2", but=(*_MLA, _KV_B, _HEAD))
_IN_LLAMA_CPP = {
    "deepseek_v3": _DEEPSEEK2,
    "kimi_k25": _DEEPSEEK2,
    "glm4_moe_lite": _DEEPSEEK2,
    "glm4_moe": _llama_cpp("glm4-moe"),
    "qwen2_moe": _llama_cpp("qwen2moe"),
    "qwen3_moe": _llama_cpp("qwen3moe"),
    "qwen3_next": _llama_cpp("qwen3next"),
    "qwen3_5_moe": _llama_cpp("qwen35moe"),
    "mixtral": _llama_cpp("llama"),
    "olmoe": _llama_cpp("olmoe"),
}


def _vllm(file: str, but: tuple[str, ...] = (), *, gates: bool = True) -> _Part:
    return _Part(f"vLLM 0.33.0, vllm/lora and vllm/model_executor/models/{file}.py", but=but, gates=gates)


_IN_VLLM = {
    # kv_b is absorbed into attention's matrices, where no adapter reaches it (vllm#48974).
    "deepseek_v3": _vllm("deepseek_v2", (_KV_B,)),
    # Its class does not take adapters (no SupportsLoRA).
    "kimi_k25": _vllm("kimi_k25", _EVERYTHING, gates=False),
    # Routers are fp32 there, and adapters 16 bits: the kernel's types do not meet.
    "glm4_moe": _vllm("glm4_moe", gates=False),
    "glm4_moe_lite": _vllm("glm4_moe_lite", (_KV_B,), gates=False),
    "qwen2_moe": _vllm("qwen2_moe"),
    "qwen3_moe": _vllm("qwen3_moe"),
    "qwen3_next": _vllm("qwen3_next"),
    "qwen3_5_moe": _vllm("qwen3_5"),
    "mixtral": _vllm("mixtral"),
    "olmoe": _vllm("olmoe"),
}


def _sglang(file: str, but: tuple[str, ...] = ()) -> _Part:
    # No router takes LoRA there.
    return _Part(f"SGLang 0.5.23, sglang/srt/lora and sglang/srt/models/{file}.py", but=but, gates=False)


_Q, _QKV = "self_attn.q_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_IN_SGLANG = {
    # What is called q_proj is taken for a part of a fused q, k and v, which MLA has not.
    "deepseek_v3": _sglang("deepseek_v2", (_Q,)),
    # Names are matched by layer numbers, which its vision tower has, too.
    "kimi_k25": _sglang("kimi_k25", _EVERYTHING),
    "glm4_moe": _sglang("glm4_moe"),
    "glm4_moe_lite": _sglang("glm4_moe_lite", (_Q,)),
    "qwen2_moe": _sglang("qwen2_moe"),
    "qwen3_moe": _sglang("qwen3_moe"),
    # The sizes that it takes for granted forget that attention has an output gate, and linear attention has none.
    "qwen3_next": _sglang("qwen3_next", (*_QKV, "linear_attn.")),
    # It knows in_proj_q, in_proj_k, in_proj_v and in_proj_z, and not in_proj_qkv, in_proj_a and in_proj_b.
    "qwen3_5_moe": _sglang("qwen3_5", ("linear_attn.in_proj_",)),
    "mixtral": _sglang("mixtral"),
    "olmoe": _sglang("olmoe"),
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
    return Coverage(lora=lora, gates=part.gates, source=part.source, tested=part.tested)


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


def check_tensors_covered(family: Family, tensors: Mapping[str, int], *, tied: bool) -> None:
    """Check that llama.cpp would apply a change of any of a model's tensors whole, as an adapter.

    It does so for all that multiplies: also for routed experts, dense MLPs, the embedding and the gate of a shared
    expert; and for the head, but where the same family's attention is not.

    Args:
        tensors: by name in the language model, how many dimensions each tensor that changes has on disk.
        tied: whether the head is the embedding.

    Raises:
        RunError: it would not; the message names what would be lost, and what to do.
    """
    name = _SAME.get(family.model_type, family.model_type)
    part, experts = _IN_LLAMA_CPP[name], f"{family.experts}."
    groups = {in_layer(family, tensor): dimensions for tensor, dimensions in tensors.items()}
    lost = {group for group, dimensions in groups.items() if dimensions != 2 and not group.startswith(experts)}
    lost |= {group for group in groups if part.but and group.startswith(part.but)}
    if tied:
        lost |= {group for group in groups if group == f"{family.embedding}.weight"}
    if lost:
        what = _listed(sorted(group.removesuffix(".weight") for group in lost))
        raise RunError(
            f"llama.cpp applies no adapter to {what} of {family.model_type} ({part.source}), so that this part of the "
            "variant would be lost; make weights of it (`gtqlora bitdelta apply` without --to) and convert those, or "
            "fine-tune with these parts frozen"
        )


def _listed(groups: list[str]) -> str:
    return groups[0] if len(groups) == 1 else f"{', '.join(groups[:-1])} and {groups[-1]}"
