"""Bytes that a step of `train` takes on each GPU, by part, as the trainer allocates them.

Every term is written after the code that it stands for (`edits/`, `experts/kernels/layer.py`, TRL's fused head) and the
sum is held against measured peaks by `bench/plan.py`. Shape letters: T tokens, D hidden, K experts of a token, I their
inner size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from gtqlora.errors import ConfigError
from gtqlora.families.kinds import GATES, ROUTED
from gtqlora.families.sizes import Layer, Sizes
from gtqlora.planning.cards import GIB, in_binary
from gtqlora.planning.formats import NF4, PLAIN, expert_bytes
from gtqlora.ranks import share

if TYPE_CHECKING:
    from gtqlora.config import Mode, TrainConfig

EXPERTS, OTHERS, GATE_STATE, LORA = "routed experts", "other weights", "gates in fp32, with Adam", "LoRA, with Adam"
LAYERS, HEAD, ANCHOR = "activations", "log-probabilities", "routing anchor"
EXCHANGE, BUFFERS, WORKSPACE = "tokens of all GPUs", "layers on their way", "workspace"
CONTEXT = "CUDA context and graphs"

_HALF, _FP32 = 2, 4
_ADAM = 2 * _FP32
SPARE = 0.1
"""Share of a GPU's memory that `edits.recomputing` leaves free."""
TILE, TILE_ROWS = 32768, 4096
"""Logits that TRL's fused head has at once: of so many words, for so many tokens."""
_SLACK = 1.06
"""What the allocator holds for activations, beyond their bytes."""
_CONTEXT, _WORKSPACE = 0.8 * GIB, 0.1 * GIB
IN_FLIGHT = 2
"""Layers on their way, of experts from the host or of dense weights from other GPUs: one computes, the next arrives."""
SPLIT = 1 / 16
"""Share of a GPU's memory from which on dense weights are split among GPUs, see `experts.sharding`."""
_EXCHANGED = 3
"""Tensors of all GPUs' tokens that an exchange has at once; where GPUs read one another's memory, there is one more."""
FIRST_ROOM = 1.5
"""Rows that experts have room for in recorded passes, where others hold some: times an even share of all rows."""
_COPIED = 4
"""Inputs of layers that are on their way to host memory or from there."""
RESERVE = 0.15
"""Share of the memory that is free which experts leave to all that is no weight, where `expert_memory` does not say."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What of the settings of `train` decides about memory.

    Attributes:
        tokens: of the longest prompt with its answer.
        pairs: in a batch, which all GPUs share; as many rows again, as each has two answers.
        shared: of these tokens, those of the prompt, which run once for both rows where batches are packed.
        held: format of the routed experts.
        checkpointing: whether activations are computed again, but for those that `activation_memory` (GiB) allows.
        expert_memory: GiB of each GPU that experts may take; the other layers wait in host memory.
    """

    tokens: int
    pairs: int
    held: str
    shared: int = 0
    rank: int = 32
    mode: Mode = "gt"
    checkpointing: bool = False
    activation_memory: float | None = None
    expert_memory: float | None = None
    anchored: bool = True
    accumulation: int = 1

    @property
    def together(self) -> int:
        """Tokens that run together on each GPU."""
        return self.places - self.pairs * self.shared

    @property
    def places(self) -> int:
        """Places of the rows, where prompts stand twice."""
        return 2 * self.pairs * self.tokens

    def of_each(self, gpus: int) -> Step:
        """Return what of the step each of several GPUs runs."""
        return replace(self, pairs=ceil(self.pairs / gpus))

    @staticmethod
    def of(config: TrainConfig, tokens: int, held: str, shared: int = 0) -> Step:
        """Return the step of a training with these settings."""
        return Step(
            tokens=tokens,
            shared=shared,
            pairs=config.batch_size,
            held=held,
            rank=config.rank,
            mode=config.mode,
            checkpointing=config.gradient_checkpointing,
            activation_memory=config.activation_memory,
            expert_memory=config.expert_memory,
            accumulation=config.accumulation,
            anchored=max(config.anchor_harmful, config.anchor_benign) > 0,
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where experts lie: over how many GPUs of a machine, of how many, and how many MoE layers of them on the host."""

    gpus: int = 1
    machines: int = 1
    on_host: int = 0

    @property
    def ranks(self) -> int:
        """Return the number of all GPUs."""
        return self.gpus * self.machines

    def splits(self, sizes: Sizes, usable: float) -> bool:
        """Tell whether GPUs with so many bytes each hold a part of the dense weights."""
        return is_split(others_of(sizes), self.gpus, usable)

    def held(self, sizes: Sizes) -> int:
        """Return the experts of a layer that the fullest GPU holds."""
        return ceil(sizes.experts / self.gpus)

    def layer(self, sizes: Sizes, held: str) -> int:
        """Return the bytes of one layer's experts there, in a format."""
        return self.held(sizes) * expert_bytes(sizes, held)

    def on_gpu(self, sizes: Sizes) -> int:
        """Return how many layers of experts are there at a time, those on their way among them."""
        return len(sizes.moe) - self.on_host + min(IN_FLIGHT, self.on_host)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the fullest GPU by part, and the layers that keep their activations.

    Attributes:
        host: bytes of a machine's host memory in which experts wait.
        inputs: the same, in which what layers were given waits until they are computed again.
    """

    parts: dict[str, int]
    kept: int
    host: int
    inputs: int

    @property
    def beside(self) -> int:
        """All that waits in host memory."""
        return self.host + self.inputs

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def memory_of(sizes: Sizes, step: Step, placed: Placement, usable: int) -> Memory:
    """Return what a step takes; of the layers that may keep their activations, as many do as fit into usable bytes.

    Raises:
        ConfigError: the experts cannot be held in the format.
    """
    step = step.of_each(placed.ranks)
    layer, there = placed.layer(sizes, step.held), len(sizes.moe) - placed.on_host
    counts = sizes.counts()
    others, split = others_of(sizes), placed.splits(sizes, usable)
    # gradients are where a graph writes them, and those of parts before in memory of their own
    gradients = _FP32 * (1 if step.accumulation == 1 else 2)
    trained = _FP32 + gradients + (_ADAM // placed.ranks if split else _ADAM)
    parts = {
        EXPERTS: there * layer,
        BUFFERS: (placed.on_gpu(sizes) - there) * layer + (_on_their_way(sizes) if split else 0),
        OTHERS: others // placed.gpus if split else others,
        GATE_STATE: counts[GATES] * (_FP32 + (0 if step.mode == "lora" else trained)),
        LORA: 0 if step.mode == "gates" else sizes.lora(step.rank) * (_HALF + trained),
        HEAD: _head(sizes, step),
        ANCHOR: _anchor(sizes, step),
        EXCHANGE: _exchanged(sizes, step, placed, direct=not split),
        WORKSPACE: round(_WORKSPACE) + _decoded(sizes, step, placed),
        CONTEXT: round(_CONTEXT),
    }
    away = split and step.checkpointing
    kept = 0 if away else _kept(sizes, step, usable, sum(parts.values()))
    parts[LAYERS] = round(_SLACK * _activations(sizes, step, kept, on_host=away))
    host = placed.on_host * sizes.experts * expert_bytes(sizes, step.held)
    inputs = away * placed.gpus * len(sizes.layers) * step.together * sizes.hidden * sizes.width
    return Memory(parts={name: size for name, size in parts.items() if size}, kept=kept, host=host, inputs=inputs)


def _on_their_way(sizes: Sizes) -> int:
    """Bytes of dense weights that are whole: of the even layers' largest, and of the odd ones'."""
    each = [
        sum(
            one.outputs * one.inputs
            for one in (*layer.attention.values(), *layer.shared.values(), *layer.dense.values())
        )
        for layer in sizes.layers
    ]
    # a tile of the head's words is in the larger place for a while
    places = max(max(each[::2]) + max(each[1::2], default=0), TILE * sizes.hidden)
    return places * sizes.width


def _exchanged(sizes: Sizes, step: Step, placed: Placement, *, direct: bool) -> int:
    """Bytes of all GPUs' tokens; and of rows that nobody may want, in recorded passes, whose shapes are fixed."""
    if placed.gpus == 1:
        return 0
    # those that others fetch are beside what others have to add up
    tokens = (_EXCHANGED * placed.gpus + direct * (placed.gpus + 1)) * sizes.hidden
    spare = 0 if placed.on_host else min(FIRST_ROOM, placed.gpus) - 1
    return round(step.together * (tokens + spare * sizes.top_k * (2 * sizes.inner + sizes.hidden)) * sizes.width)


def _kept(sizes: Sizes, step: Step, usable: int, rest: int) -> int:
    """Return how many of the last layers keep their activations, as `edits.recomputing` decides it."""
    layers = len(sizes.layers)
    if not step.checkpointing:
        return layers
    each = max(1, _saved(sizes, sizes.layers[-1], step)) * step.together
    if step.activation_memory is not None:
        room = step.activation_memory * GIB
    else:
        room = usable - rest - _SLACK * _activations(sizes, step, 0) - SPARE * usable
    return max(0, min(layers, int(room / each)))


def _activations(sizes: Sizes, step: Step, kept: int, *, on_host: bool = False) -> float:
    """Bytes while the backward pass goes through the layers, of which the last ones are not computed again.

    Args:
        on_host: whether what the others were given waits in host memory.
    """
    again = len(sizes.layers) - kept
    inputs = (min(again, _COPIED) if on_host else again) * sizes.hidden * sizes.width
    saved = sum(_saved(sizes, layer, step) for layer in sizes.layers[again:])
    # the layer that is computed again, if any is, and what its backward pass adds
    busy = max(
        (_saved(sizes, layer, step) if index < again else 0) + _busy(sizes, layer, step)
        for index, layer in enumerate(sizes.layers)
    )
    logits = 2 * len(sizes.moe) * sizes.experts * _FP32 + 2 * sizes.hidden * sizes.width
    return (inputs + saved + busy + logits) * step.together


def _saved(sizes: Sizes, layer: Layer, step: Step) -> int:
    """Bytes a token that a layer keeps for its backward pass."""
    w, hidden = sizes.width, sizes.hidden
    # both norms keep what they are given, and linears after them what comes out; frozen experts keep no inputs
    kept = 4 if layer.shared or not layer.routed or step.held == PLAIN else 3
    saved = kept * hidden * w + _attention(sizes, layer, step) * w
    if not layer.routed:
        return saved + 4 * layer.dense["up"].outputs * w
    shared = 4 * layer.shared["up"].outputs if layer.shared else 0
    # routers compute in fp32: their input, logits, scores and what weighs them
    router = (hidden + 3 * sizes.experts) * _FP32
    return saved + shared * w + router + sizes.top_k * _of_row(sizes, step) * w


def _of_row(sizes: Sizes, step: Step) -> int:
    """Numbers that experts keep for each row: gate and up; transformers' own experts also what comes after them."""
    return 2 * sizes.inner + (sizes.inner + sizes.hidden if step.held == PLAIN else 0)


def _attention(sizes: Sizes, layer: Layer, step: Step) -> int:
    """Numbers a token that attention keeps, beside its input."""
    linears = layer.attention
    if layer.recurrent:  # projections, what the convolution makes of them, and the kernel's own
        return 3 * sum(one.outputs for name, one in linears.items() if name != "out") + linears["out"].inputs
    # keys and values stand twice where both rows of a pair have them
    twice = step.places / step.together
    if "kv_b" in linears:  # the low ranks before and after their norms; values are filled up to the keys' size
        low = sum(linears[name].outputs for name in ("q_a", "kv_a") if name in linears)
        return round(2 * low + 2 * sizes.qk * (1 + twice))
    keys, values = linears["k"].outputs, linears["v"].outputs
    # queries and keys before their norms and after, values, and what comes out
    return round(2 * sizes.qk + sizes.v + keys + (keys + values) * twice)


def _busy(sizes: Sizes, layer: Layer, step: Step) -> int:
    """Bytes a token that the backward pass of a layer has beside what was saved."""
    if not layer.routed:
        return (3 * layer.dense["up"].outputs + 2 * sizes.hidden) * sizes.width
    rows = sizes.top_k * (2 * sizes.inner + sizes.hidden) * (2 if step.held == PLAIN else 1)
    return (rows + 3 * sizes.hidden) * sizes.width


def _tile(sizes: Sizes, step: Step) -> int:
    """Bytes of the logits that are there at once; half of the tokens are taken to be answers."""
    return min(step.places // 2, TILE_ROWS) * min(TILE, sizes.vocabulary) * sizes.width


def _head(sizes: Sizes, step: Step) -> int:
    """Bytes of log-probabilities."""
    # the answers' states and their gradients, once in fp32, and gradients of all states
    states = step.places // 2 * sizes.hidden * (2 * sizes.width + _FP32)
    return _tile(sizes, step) + states + 2 * step.places * sizes.hidden * sizes.width


def _anchor(sizes: Sizes, step: Step) -> int:
    """Bytes of one more pass of the chosen rows, without gradients, and of comparing every router's scores."""
    if not step.anchored:
        return 0
    rows = sizes.top_k * (3 * sizes.inner + sizes.hidden) + 4 * sizes.hidden + 2 * sizes.qk + 2 * sizes.v
    scores = 4 * len(sizes.moe) * sizes.experts * _FP32
    # the pass begins when the logits are gone, and is over when a layer's backward pass begins
    later = max(_saved(sizes, layer, step) + _busy(sizes, layer, step) for layer in sizes.layers) * step.together
    between = step.places // 2 * rows * sizes.width - max(_tile(sizes, step), later)
    return step.places // 2 * scores + max(0, between)


def _decoded(sizes: Sizes, step: Step, placed: Placement) -> int:
    """Bytes of one layer's decoded scales, which only NF4 has."""
    return placed.held(sizes) * sizes.expert // 64 * _HALF if step.held == NF4 else 0


def spread(experts: int, gpus: int) -> tuple[tuple[int, int], ...]:
    """Return the range of experts of each GPU; where they do not divide evenly some GPUs hold one more."""
    ranges = (share(experts, index, gpus) for index in range(gpus))
    return tuple((one.start, one.stop) for one in ranges)


def on_host(layers: int, layer: int, room: float) -> int | None:
    """Return how many MoE layers wait on the host, so that the others and two on their way fit into bytes of the GPU.

    None if not even those two do. One or two never wait: on their way they would take as much as if they stayed.
    """
    if layers * layer <= room:
        return 0
    there = int(room // layer) - IN_FLIGHT
    return None if there < 0 else layers - there


def spaced(layers: int, chosen: int) -> set[int]:
    """Return so many of the layers, by number, as evenly as may be from the first to the last of them."""
    # both ends: from what a turn is left with it is farthest to what has to come
    return {round(index * (layers - 1) / max(1, chosen - 1)) for index in range(chosen)}


def room_for_experts(free: float, others: float) -> float:
    """Return the bytes of a GPU that experts may take by themselves: what is free, less other weights and `RESERVE`."""
    return (1 - RESERVE) * free - others


def others_of(sizes: Sizes) -> int:
    """Return the bytes of all weights but those of routed experts and routers."""
    counts = sizes.counts()
    return (sum(counts.values()) - counts[ROUTED] - counts[GATES]) * sizes.width


def is_split(dense: int, gpus: int, usable: float) -> bool:
    """Tell whether several GPUs each hold a part of so many bytes of dense weights, and not all of them."""
    return gpus > 1 and dense > SPLIT * usable


def as_loaded(sizes: Sizes, step: Step, gpus: int, free: int) -> Placement:
    """Return where experts lie once the model is loaded, on GPUs with so many free bytes.

    Raises:
        ConfigError: `expert_memory` has no room for two layers.
    """
    placed, moe = Placement(gpus=gpus), len(sizes.moe)
    if step.held == PLAIN:
        return placed
    layer = placed.layer(sizes, step.held)
    if step.expert_memory is None:
        others = others_of(sizes) + sizes.counts()[GATES] * sizes.width
        others //= gpus if is_split(others, gpus, free) else 1
        return replace(placed, on_host=on_host(moe, layer, room_for_experts(free, others)) or 0)
    waiting = on_host(moe, layer, step.expert_memory * GIB)
    if waiting is None:
        raise no_room(step.expert_memory, layer, moe)
    return replace(placed, on_host=waiting)


def no_room(expert_memory: float, layer: int, layers: int) -> ConfigError:
    """Return the complaint about GiB in which there is no room for the layers of experts that are there at a time."""
    least = min(IN_FLIGHT, layers) * layer
    return ConfigError(
        f"expert_memory = {expert_memory:g}: {IN_FLIGHT} layers of experts have to be there at a time, which take "
        f"{in_binary(least)}; set expert_memory = {in_gib(least)}"
    )


def in_gib(size: int) -> float:
    """Return bytes in GiB with two places, and not less than they are."""
    return -(-size * 100 // GIB) / 100


def without_keeping(step: Step) -> Step:
    """Return the step that takes least: every layer is computed again."""
    return replace(step, checkpointing=True, activation_memory=0.0)
