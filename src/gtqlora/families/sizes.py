"""A model's parts counted from its config.json alone, before torch or any model class is loaded.

`parameters.parameter_counts` counts the model itself; tests hold the two against each other in every family.
Shape letters: D hidden, I intermediate size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from gtqlora.errors import ModelError
from gtqlora.families.config_checks import MAX_EXPERTS
from gtqlora.families.facts import Family
from gtqlora.families.kinds import ATTENTION, DENSE, EMBEDDINGS, GATES, NORMS, ROUTED, SHARED, SHARED_GATES
from gtqlora.families.packed import OURS, method_of, packed_group
from gtqlora.families.source import Source, read_source

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# What keys mean that a config may leave out, as transformers reads them.
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_qk_norm", "norm_topk_prob"), False),
    **dict.fromkeys(("mlp_only_layers", "mlp_layer_types", "layer_types", "q_lora_rank", "head_dim"), None),
    **dict.fromkeys(("decoder_sparse_step", "n_shared_experts"), 1),
    **{"num_key_value_heads": None, "qkv_bias": True, "linear_conv_kernel_dim": 4, "full_attention_interval": 4},
}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight by dtype."""


class Linear(NamedTuple):
    """Inputs and outputs of a linear, and whether it adds a bias."""

    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs + self.outputs * self.bias


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer.

    Attributes:
        routed: whether it has a router and routed experts; otherwise its MLP is dense.
        recurrent: whether its attention is linear.
        attention, shared, dense: linears by name; LoRA is for the first two.
        others: parameters of what is no linear, by kind.
    """

    routed: bool
    recurrent: bool
    attention: Mapping[str, Linear]
    shared: Mapping[str, Linear] = field(default_factory=dict[str, Linear])
    dense: Mapping[str, Linear] = field(default_factory=dict[str, Linear])
    others: Mapping[str, int]

    @property
    def adapted(self) -> tuple[Linear, ...]:
        """The linears that carry LoRA."""
        return (*self.attention.values(), *self.shared.values())


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A model, as its config.json describes it.

    Attributes:
        context: tokens that its positions reach.
        width: bytes of an unquantized weight.
        native: the 4-bit format that the checkpoint has its experts in; None if it is not quantized so.
        quantized: how the checkpoint is quantized, in its own word; None if it is not.
        qk, v: outputs of all heads of queries and values.
        outer: parameters outside the layers, by kind.
    """

    model: str
    family: Family
    hidden: int
    vocabulary: int
    context: int
    width: int
    native: str | None
    quantized: str | None
    experts: int
    top_k: int
    inner: int
    qk: int
    v: int
    layers: tuple[Layer, ...]
    outer: Mapping[str, int]

    @property
    def moe(self) -> tuple[Layer, ...]:
        """The layers with a router."""
        return tuple(layer for layer in self.layers if layer.routed)

    @property
    def expert(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden * self.inner

    def counts(self) -> dict[str, int]:
        """Return how many parameters there are of each kind; none of a kind that the model lacks."""
        moe = len(self.moe) * self.experts
        found = Counter({ROUTED: moe * self.expert, GATES: moe * self.hidden, **self.outer})
        for layer in self.layers:
            parts = {ATTENTION: layer.attention, SHARED: layer.shared, DENSE: layer.dense}
            found.update({kind: sum(one.parameters for one in linears.values()) for kind, linears in parts.items()})
            found.update(layer.others)
        return {kind: number for kind, number in found.items() if number}

    def lora(self, rank: int) -> int:
        """Return how many weights LoRA has: two matrices beside every linear that carries it."""
        return sum(rank * (one.inputs + one.outputs) for layer in self.layers for one in layer.adapted)

    def active(self) -> int:
        """Return the parameters that one token meets, without the embedding."""
        counts = self.counts()
        routed = counts.pop(ROUTED) // self.experts * self.top_k
        return routed + sum(counts.values()) - counts[EMBEDDINGS] + self.hidden * self.vocabulary


def sizes_of(model: str) -> Sizes:
    """Return the sizes of MODEL (folder, config.json, or hub id).

    Raises:
        ModelError: as `read_source`; a key is missing; the model has no routed experts or more than there can be.
    """
    source = read_source(model)
    family, config = source.family, _Config(source)
    text = cast(Any, config.values)  # the facts read keys by name, of whatever holds them
    routed = set(family.moe_layers(text))
    if not routed:
        raise ModelError(f"{model}: this config has no layer with routed experts, so there is nothing to plan")
    if len(routed) * config[family.experts_key] > MAX_EXPERTS:
        raise ModelError(f"{model}: config.json describes more than {MAX_EXPERTS:,} experts")
    if config[family.topk_key] > config[family.experts_key]:
        raise ModelError(
            f"{model}: config.json says {family.topk_key} = {config[family.topk_key]}, but {family.experts_key} = "
            f"{config[family.experts_key]}"
        )
    qk, v = config.heads
    tables = 1 if config["tie_word_embeddings"] else 2
    return Sizes(
        model=model,
        family=family,
        hidden=config["hidden_size"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        width=_width(source),
        native=_native(source),
        quantized=None if source.quantization is None else str(method_of(source.quantization)),
        experts=config[family.experts_key],
        top_k=config[family.topk_key],
        inner=config[family.inner_key],
        qk=qk,
        v=v,
        layers=tuple(_layer(config, index, index in routed) for index in range(config["num_hidden_layers"])),
        outer={EMBEDDINGS: tables * config["hidden_size"] * config["vocab_size"], NORMS: config["hidden_size"]},
    )


class _Config:
    """A language model's settings by key, with what those mean that are left out."""

    def __init__(self, source: Source) -> None:
        self.family = source.family
        self.latent = any("kv_b_proj" in path for path in self.family.attention)
        self.hybrid = "linear_attn" in self.family.attention_blocks
        self._text = {**source.text, **_experts_under(self.family.experts_key, source.text)}
        needed = [*_NEEDED, self.family.experts_key, self.family.topk_key, self.family.inner_key]
        needed += ["first_k_dense_replace"] if self.family.moe_layers_from == "after_dense" else []
        needed += [*(_MLA if self.latent else ()), *(_LINEAR if self.hybrid else ())]
        missing = [key for key in needed if self._text.get(key) is None]
        if missing:
            raise ModelError(
                f"{source.model}: config.json lacks {', '.join(missing)}; take the model's own config.json, whole"
            )
        self.values = SimpleNamespace(**{**_DEFAULTS, **self._text, **self._layer_types()})

    def _layer_types(self) -> dict[str, object]:
        layers = cast(int, self._text["num_hidden_layers"])
        if self.family.moe_layers_from == "by_type" and self._text.get("mlp_layer_types") is None:
            return {"mlp_layer_types": ["dense", *["sparse"] * (layers - 1)]}
        return {}

    def __getitem__(self, key: str) -> Any:
        return getattr(self.values, key)

    def recurrent(self, index: int) -> bool:
        """Return whether a layer's attention is linear."""
        if not self.hybrid:
            return False
        types = self["layer_types"]
        return types[index] == "linear_attention" if types else (index + 1) % self["full_attention_interval"] != 0

    @property
    def heads(self) -> tuple[int, int]:
        """Outputs of all heads of queries, and of values."""
        count = self["num_attention_heads"]
        if self.latent:
            return count * (self["qk_nope_head_dim"] + self["qk_rope_head_dim"]), count * self["v_head_dim"]
        return count * self.head, count * self.head

    @property
    def head(self) -> int:
        """Outputs of one head."""
        return self["head_dim"] or self["hidden_size"] // self["num_attention_heads"]

    @property
    def shared(self) -> int:
        """The intermediate size of the shared experts together."""
        own = getattr(self.values, "shared_expert_intermediate_size", None)
        return own or (self["n_shared_experts"] or 0) * self[self.family.inner_key]


def _experts_under(key: str, text: Mapping[str, object]) -> dict[str, object]:
    """Return the number of experts under the family's key; transformers writes it under others, too."""
    found = [text[name] for name in _EXPERTS if text.get(name) is not None]
    return {key: found[0]} if found else {}


def _layer(config: _Config, index: int, routed: bool) -> Layer:
    family, hidden, recurrent = config.family, config["hidden_size"], config.recurrent(index)
    attention = _recurrent(config) if recurrent else _latent(config) if config.latent else _grouped(config)
    others = {NORMS: 2 * hidden + _norms(config, recurrent)}
    if recurrent:
        others[family.frozen_kinds["linear_attn"]] = _recurrent_rest(config)
    if not routed:
        dense = _swiglu(hidden, config["intermediate_size"])
        return Layer(routed=False, recurrent=recurrent, attention=attention, dense=dense, others=others)
    if family.gates:
        others[SHARED_GATES] = hidden
    shared = _swiglu(hidden, config.shared) if family.shared else {}
    return Layer(routed=True, recurrent=recurrent, attention=attention, shared=shared, others=others)


def _swiglu(hidden: int, inner: int) -> dict[str, Linear]:
    return {"gate": Linear(hidden, inner), "up": Linear(hidden, inner), "down": Linear(inner, hidden)}


def _grouped(config: _Config) -> dict[str, Linear]:
    """Grouped-query attention; queries of the hybrids come with as many gates."""
    hidden, (queries, _) = config["hidden_size"], config.heads
    keys = config.head * (config["num_key_value_heads"] or config["num_attention_heads"])
    bias, out = _biases(config)
    return {
        "q": Linear(hidden, queries * (2 if config.hybrid else 1), bias),
        "k": Linear(hidden, keys, bias),
        "v": Linear(hidden, keys, bias),
        "o": Linear(queries, hidden, out),
    }


def _biases(config: _Config) -> tuple[bool, bool]:
    """Return whether queries, keys and values have biases, and whether the output has."""
    kind = config.family.class_name
    if kind == "Qwen2MoeForCausalLM":
        return config["qkv_bias"], False
    if kind == "MixtralForCausalLM":
        return False, False
    return config["attention_bias"], config["attention_bias"] and kind != "Glm4MoeForCausalLM"


def _latent(config: _Config) -> dict[str, Linear]:
    hidden, (qk, v), rank, bias = config["hidden_size"], config.heads, config["kv_lora_rank"], config["attention_bias"]
    unrotated = config["num_attention_heads"] * config["qk_nope_head_dim"]
    low: int | None = config["q_lora_rank"]
    queries = {"q": Linear(hidden, qk)} if low is None else {"q_a": Linear(hidden, low, bias), "q_b": Linear(low, qk)}
    return {
        **queries,
        "kv_a": Linear(hidden, rank + config["qk_rope_head_dim"], bias),
        "kv_b": Linear(rank, unrotated + v),
        "o": Linear(v, hidden, bias),
    }


def _recurrent_sizes(config: _Config) -> tuple[int, int]:
    """Return the outputs of all heads of keys, and of values, of linear attention."""
    return (
        config["linear_num_key_heads"] * config["linear_key_head_dim"],
        config["linear_num_value_heads"] * config["linear_value_head_dim"],
    )


def _recurrent(config: _Config) -> dict[str, Linear]:
    hidden, heads, (keys, values) = config["hidden_size"], config["linear_num_value_heads"], _recurrent_sizes(config)
    outputs = {"qkv": 2 * keys + values, "z": values, "b": heads, "a": heads}
    if any("qkvz" in path for path in config.family.attention):  # the same rows in two matrices
        outputs = {"qkvz": 2 * keys + 2 * values, "ba": 2 * heads}
    return {**{name: Linear(hidden, rows) for name, rows in outputs.items()}, "out": Linear(values, hidden)}


def _recurrent_rest(config: _Config) -> int:
    keys, values = _recurrent_sizes(config)
    # the convolution, and two numbers for each head
    return (2 * keys + values) * config["linear_conv_kernel_dim"] + 2 * config["linear_num_value_heads"]


def _norms(config: _Config, recurrent: bool) -> int:
    """Return the parameters of the norms inside of attention."""
    if recurrent:
        return config["linear_value_head_dim"]
    if config.latent:
        return config["kv_lora_rank"] + (config["q_lora_rank"] or 0)
    kind = config.family.class_name
    if kind == "OlmoeForCausalLM":
        heads = config["num_attention_heads"]
        return config["hidden_size"] // heads * (heads + (config["num_key_value_heads"] or heads))
    if kind in ("Qwen2MoeForCausalLM", "MixtralForCausalLM") or (
        kind == "Glm4MoeForCausalLM" and not config["use_qk_norm"]
    ):
        return 0
    return 2 * config.head


def _width(source: Source) -> int:
    return WIDTHS.get(str(source.first("dtype", "torch_dtype") or "bfloat16").removeprefix("torch."), 2)


def _native(source: Source) -> str | None:
    settings = source.quantization
    if settings is None:
        return None
    if method_of(settings) == OURS:
        return str(settings.get("format"))
    try:
        return f"int4-g{packed_group(settings)}"
    except ModelError:  # whoever loads it says how it is quantized, and that it is not read
        return None
