"""Which tensors of a checkpoint make which of a GGUF, and how: names, order of rows, and what llama.cpp expects inside.

As llama.cpp's own converter makes them (convert_hf_to_gguf.py, release b10605). Shape letters: E experts, D hidden
(what a matrix reads), I inner size, N rows, H heads, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import prod
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gtqlora.errors import ModelError, RunError
from gtqlora.families.facts import DOWN, GATE_UP, Family
from gtqlora.families.loading import load_config, meta_model
from gtqlora.families.names import TensorNames

if TYPE_CHECKING:
    from gtqlora.families.facts import TextConfig

_ARCHITECTURES = {
    "deepseek_v3": "deepseek2",
    "kimi_k25": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "glm4_moe": "glm4moe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
}
"""What llama.cpp calls each family; `qwen3_5_moe_text` is the language model of `qwen3_5_moe`."""
HYBRID = ("qwen3next", "qwen35moe")
"""Architectures of which most layers are Gated DeltaNet."""

Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """Rows of a GGUF's tensor: a tensor on disk, or one expert of a stack there, and what is taken of it."""

    disk: str
    take: Take
    expert: int | None = None


@dataclass(frozen=True)
class Made:
    """A tensor of a GGUF: its parts below each other, seen as a tensor of this shape."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def sources(self) -> set[str]:
        """Return the names on disk of what it is made from."""
        return {part.disk for part in self.parts}

    @property
    def is_float(self) -> bool:
        """Return whether llama.cpp keeps it in F32 at every type of file: vectors, norms, routers, convolutions."""
        return len(self.shape) == 1 or self.name.endswith("_norm.weight") or any(word in self.name for word in _FLOAT)


_FLOAT = (".ffn_gate_inp.", ".ffn_gate_inp_shexp.", ".ssm_conv1d.")


@dataclass(frozen=True)
class Layout:
    """All tensors of a model's GGUF.

    Attributes:
        made: as the converter writes them, in the checkpoint's order.
        fused: what some files have instead of several of these.
    """

    architecture: str
    config: TextConfig
    made: dict[str, Made]
    fused: dict[tuple[str, ...], Made] = field(default_factory=dict)

    @staticmethod
    def of(model: str, names: TensorNames) -> Layout:
        """Return the layout of MODEL (folder or hub id), whose tensors on disk have these names.

        Raises:
            ModelError: llama.cpp has no place for a tensor of it.
            RunError: the `gguf` package is not installed.
        """
        family, config = load_config(model)
        builder = _Builder(_architecture(family), config, names, model)
        tensors = meta_model(family, config).state_dict()
        # A tied head is no tensor of its own.
        if config.tie_word_embeddings:
            tensors.pop(f"{family.head}.weight", None)
        made = {one.name: one for name, tensor in tensors.items() for one in builder.made(name, tensor)}
        return Layout(builder.architecture, config, made, builder.fused(made))

    @property
    def is_softmax_by_default(self) -> bool:
        """Return whether llama.cpp takes routers for softmax ones, but where a file says otherwise."""
        return self.architecture == "deepseek2"

    def fitting(self, present: Collection[str]) -> dict[str, Made]:
        """Return the tensors as a file with these names has them."""
        found = dict(self.made)
        for names, one in self.fused.items():
            if one.name in present and not any(name in present for name in names):
                found = {name: each for name, each in found.items() if name not in names} | {one.name: one}
        return found


class _Builder:
    """Makes the tensors of one model, one parameter in memory after the other."""

    def __init__(self, architecture: str, config: TextConfig, names: TensorNames, model: str) -> None:
        self.architecture, self._config, self._names, self._model = architecture, config, names, model
        package = _gguf()
        kind = next(kind for kind, name in package.MODEL_ARCH_NAMES.items() if name == architecture)
        self._map = package.get_tensor_name_map(kind, config.num_hidden_layers)

    def made(self, memory: str, tensor: Tensor) -> Iterator[Made]:
        """Yield what a parameter or buffer becomes."""
        stem, _, last = memory.rpartition(".")
        if last == GATE_UP:
            yield self._stack(f"{stem}.gate_proj.weight", memory, tensor, _upper, 0)
            yield self._stack(f"{stem}.up_proj.weight", memory, tensor, _lower, 1)
        elif last == DOWN:
            yield self._stack(f"{memory}.weight", memory, tensor, as_is, 0)
        elif memory.endswith(".kv_b_proj.weight"):
            for part in ("k_b", "v_b"):
                take = partial(_heads_of, heads=self._heads, keys=self._size("qk_nope_head_dim"), part=part)
                yield self._one(memory.replace("kv_b_proj", f"{part}_proj"), memory, tensor, take)
        elif memory.endswith(".in_proj_qkvz.weight"):
            for index, name in enumerate(("attn_qkv", "attn_gate")):
                take = partial(_ungrouped, groups=self._size("linear_num_key_heads"), sizes=self._qkvz, gate=index)
                yield self._named(f"blk.{memory.split('.')[2]}.{name}.weight", memory, tensor, take)
        else:
            yield self._one(_in_their_words(memory), memory, tensor, self._take(memory))

    def fused(self, made: dict[str, Made]) -> dict[tuple[str, ...], Made]:
        """Return what stands for several tensors in files of other converters, or older ones."""
        layers = range(self._config.num_hidden_layers)
        every = (self._fused_in(f"blk.{layer}", made) for layer in layers)
        return {names: one for found in every for names, one in found}

    def _fused_in(self, layer: str, made: dict[str, Made]) -> Iterator[tuple[tuple[str, ...], Made]]:
        for kind in ("weight", "bias"):
            names = tuple(f"{layer}.attn_{part}.{kind}" for part in "qkv")
            if all(name in made for name in names):
                yield names, _below(f"{layer}.attn_qkv.{kind}", [made[name] for name in names])
        # The converter fuses gate and up on request, expert by expert.
        names = (f"{layer}.ffn_gate_exps.weight", f"{layer}.ffn_up_exps.weight")
        if names[0] in made:
            yield names, _paired(f"{layer}.ffn_gate_up_exps.weight", made[names[0]], made[names[1]])
        # Before MLA was absorbed into attention its projection was one tensor, and so was Qwen3-Next's: as on disk.
        for parts, name in ((("attn_k_b", "attn_v_b"), "attn_kv_b"), (("attn_qkv", "attn_gate"), "ssm_in")):
            names = tuple(f"{layer}.{part}.weight" for part in parts)
            if all(each in made for each in names) and made[names[0]].sources == made[names[1]].sources:
                disk, columns = made[names[1]].parts[0].disk, made[names[1]].shape[-1]
                rows = sum(prod(made[each].shape) for each in names) // columns
                yield names, Made(f"{layer}.{name}.weight", (rows, columns), (Part(disk, as_is),))

    @property
    def _heads(self) -> int:
        return self._size("num_attention_heads")

    def _size(self, key: str) -> int:
        return cast(int, getattr(self._config, key))

    @property
    def _qkvz(self) -> tuple[int, int, int, int]:
        """Return the rows of queries, keys, values and gates in each group of Qwen3-Next's fused projection."""
        values = self._size("linear_num_value_heads") // self._size("linear_num_key_heads")
        key, value = self._size("linear_key_head_dim"), values * self._size("linear_value_head_dim")
        return key, key, value, value

    def _gguf_name(self, theirs: str) -> str:
        name = self._map.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                f"{self._model}: llama.cpp's {self.architecture} has no place for a tensor as {theirs}; export to "
                "safetensors or peft instead"
            )
        return name

    def _one(self, theirs: str, memory: str, tensor: Tensor, take: Take) -> Made:
        return self._named(self._gguf_name(theirs), memory, tensor, take)

    def _named(self, name: str, memory: str, tensor: Tensor, take: Take) -> Made:
        return Made(name, tuple(take(tensor).shape), (Part(self._names.whole(memory), take),))

    def _stack(self, theirs: str, memory: str, tensor: Tensor, half: Take, part: int) -> Made:
        name, n_experts = self._gguf_name(theirs), len(tensor)
        shape = (n_experts, *half(tensor[0]).shape)
        if self._names.is_whole(memory):
            disk = self._names.whole(memory)
            return Made(name, shape, tuple(Part(disk, half, expert) for expert in range(n_experts)))
        # one by one on disk, where gate and up are tensors of their own
        matrices = (self._names.matrix(memory, expert, part) for expert in range(n_experts))
        return Made(name, shape, tuple(Part(matrix, as_is) for matrix in matrices))

    def _take(self, memory: str) -> Take:
        if self.architecture == "llama" and memory.endswith((".q_proj.weight", ".k_proj.weight")):
            key = "num_attention_heads" if ".q_proj." in memory else "num_key_value_heads"
            return partial(_rotary_pairs, heads=self._size(key))
        if self.architecture in HYBRID:
            return self._hybrid_take(memory)
        return as_is

    def _hybrid_take(self, memory: str) -> Take:
        if memory.endswith("norm.weight") and ".linear_attn." not in memory:
            return _plus_one
        # Qwen3-Next's graph repeats key heads one by one, as they are on disk; only the newer one broadcasts.
        if self.architecture == "qwen35moe" and ".linear_attn." in memory:
            return self._tiled(memory)
        return _CHANGED.get(memory.rpartition("linear_attn.")[2], as_is)

    def _tiled(self, memory: str) -> Take:
        """Return how value heads, grouped by their key head on disk, come to repeat as ggml's broadcasting does."""
        groups, values = self._size("linear_num_key_heads"), self._size("linear_num_value_heads")
        width, keys = self._size("linear_value_head_dim"), 2 * groups * self._size("linear_key_head_dim")
        name = memory.rpartition("linear_attn.")[2]
        rows = {"in_proj_z.weight": width, "in_proj_a.weight": 1, "in_proj_b.weight": 1, "A_log": 1, "dt_bias": 1}
        order = partial(_tiles, groups=groups, per_group=values // groups)
        if name in ("in_proj_qkv.weight", "conv1d.weight"):
            return partial(_after, skip=keys, order=partial(order, width=width), first=_CHANGED.get(name, as_is))
        if name == "out_proj.weight":
            return partial(_columns, order=partial(order, width=width))
        if name in rows:
            return partial(_after, skip=0, order=partial(order, width=rows[name]), first=_CHANGED.get(name, as_is))
        return as_is


def _architecture(family: Family) -> str:
    name = _ARCHITECTURES.get(family.model_type.removesuffix("_text"))
    if name is None:
        raise ModelError(
            f"{family.model_type}: not known to be an architecture of llama.cpp; known: {', '.join(_ARCHITECTURES)}"
        )
    return name


def _gguf() -> ModuleType:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise RunError("a GGUF's names need the package gguf; pip install 'gtqlora[gguf]'") from error


def _in_their_words(memory: str) -> str:
    """Return a parameter's name as the converter looks for it."""
    renamed = memory.replace("e_score_correction_bias", "e_score_correction.bias")
    return renamed.replace(".dt_bias", ".dt_proj.bias")


def _below(name: str, parts: list[Made]) -> Made:
    rows = sum(part.shape[0] for part in parts)
    return Made(name, (rows, *parts[0].shape[1:]), tuple(part for one in parts for part in one.parts))


def _paired(name: str, gate: Made, up: Made) -> Made:
    n_experts, inner, hidden = gate.shape
    parts = tuple(part for pair in zip(gate.parts, up.parts, strict=True) for part in pair)
    return Made(name, (n_experts, 2 * inner, hidden), parts)


# --- what is taken of a tensor ---------------------------------------------------------------------------------------


def as_is(tensor: Tensor) -> Tensor:
    """Return the tensor."""
    return tensor


def _upper(tensor: Tensor) -> Tensor:
    return tensor.chunk(2)[0]


def _lower(tensor: Tensor) -> Tensor:
    return tensor.chunk(2)[1]


def _plus_one(tensor: Tensor) -> Tensor:
    # Qwen's norms multiply by 1 + weight, llama.cpp's by the weight
    return tensor + 1


def _minus_exp(tensor: Tensor) -> Tensor:
    return -tensor.exp()


def _squeezed(tensor: Tensor) -> Tensor:
    return tensor.squeeze(1)


_CHANGED: dict[str, Take] = {"A_log": _minus_exp, "conv1d.weight": _squeezed}


def _heads_of(kv_b: Tensor, heads: int, keys: int, part: str) -> Tensor:
    """Return the half of MLA's fused projection for keys [H, R, nope], transposed, or for values [H, v, R]."""
    # Queries are multiplied by the keys' half from the other side, so that it is stored transposed.
    by_head = kv_b.view(heads, -1, kv_b.shape[-1])
    return by_head[:, :keys].transpose(1, 2) if part == "k_b" else by_head[:, keys:]


def _rotary_pairs(tensor_ND: Tensor, heads: int) -> Tensor:
    """Return rows in the order of Llama's first release, in which the two of a rotary pair are neighbours."""
    return tensor_ND.view(heads, 2, -1, *tensor_ND.shape[1:]).transpose(1, 2).reshape(tensor_ND.shape)


def _ungrouped(tensor_ND: Tensor, groups: int, sizes: tuple[int, int, int, int], gate: int) -> Tensor:
    """Return queries, keys and values of all heads below each other, or the gates of all heads."""
    parts = tensor_ND.view(groups, sum(sizes), -1).split(sizes, dim=1)
    chosen = parts[3:] if gate else parts[:3]
    return torch.cat([part.reshape(-1, tensor_ND.shape[-1]) for part in chosen])


def _tiles(tensor: Tensor, groups: int, per_group: int, width: int) -> Tensor:
    """Return blocks of `width` rows, given group by group, so that every group's first comes first."""
    return tensor.view(groups, per_group, width, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _after(tensor: Tensor, skip: int, order: Take, first: Take) -> Tensor:
    changed = first(tensor)
    return torch.cat([changed[:skip], order(changed[skip:])])


def _columns(tensor_ND: Tensor, order: Take) -> Tensor:
    return order(tensor_ND.mT.contiguous()).mT
