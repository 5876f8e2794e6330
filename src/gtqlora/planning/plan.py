"""What fits where, how long it takes, and the cheapest change where nothing fits: found by trying, cheapest first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from gtqlora.errors import ConfigError
from gtqlora.families.kinds import ROUTED
from gtqlora.families.sizes import Sizes
from gtqlora.planning.cards import MOST_CARDS, MOST_HERE, Cards
from gtqlora.planning.formats import FORMATS, PLAIN, expert_bytes
from gtqlora.planning.memory import (
    IN_FLIGHT,
    Memory,
    Placement,
    Step,
    as_loaded,
    in_gib,
    memory_of,
    spread,
    without_keeping,
)
from gtqlora.planning.rates import BETWEEN, GPU_EACH, LINKS, TFLOPS, link, nearest


@dataclass(frozen=True, kw_only=True)
class Held:
    """A model's bytes with its routed experts in a format; `native` is the checkpoint's own."""

    format: str
    experts: int
    whole: int
    native: bool


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Experts that wait in host memory.

    Attributes:
        layers: MoE layers of them.
        expert_memory: the setting of that name that makes them wait, GiB.
        per_pass: bytes that come to each GPU in a pass, in which two layers are there already; a step has two.
        seconds: of a pass, by the links alone.
    """

    layers: int
    expert_memory: float
    host: int
    per_pass: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How long steps take, from the rate that was measured on what is most alike; `bound_by` is compute or links."""

    tokens_per_second: float
    seconds: float
    steps_per_hour: float
    steps: int
    gpu_hours: float
    bound_by: str
    measured: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What makes it fit: the options that say so, and the bytes that each GPU then needs."""

    what: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training takes.

    Attributes:
        counts: parameters by kind.
        formats: bytes of the model by format of its experts.
        experts: the range of routed experts of each GPU.
        usable, needed: bytes of each GPU, and those needed on the fullest, by part in `memory`.
        host, beside: bytes of host memory that were named, 0 if none were, and those needed of each machine.
        layers_kept: layers whose activations are not computed again.
        streamed: experts in host memory, if some have to be there.
        rated: whether speeds were measured on such a card.
        speed: of what fits; None if nothing does, or nothing like it was measured.
        change: the cheapest change that fits, if this does not; None, too, if no change does.
    """

    model: str
    family: str
    gpus: int
    card: str
    tokens: int
    pairs: int
    expert_format: str
    parameters: int
    active_parameters: int
    lora_parameters: int
    counts: dict[str, int]
    formats: tuple[Held, ...]
    experts: tuple[tuple[int, int], ...]
    usable: int
    needed: int
    host: int
    beside: int
    memory: dict[str, int]
    layers_kept: int
    layers: int
    fits: bool
    streamed: Streamed | None
    rated: bool
    speed: Speed | None
    change: Change | None
    notes: tuple[str, ...]


def plan_for(sizes: Sizes, step: Step, cards: Cards, host: int, steps: int) -> Plan:
    """Return the plan of a training.

    Args:
        host: bytes of host memory that experts may wait in; 0 for none.

    Raises:
        ConfigError: more tokens than the model's context, more GPUs than experts, or a format that does not go.
    """
    _check(sizes, step, cards)
    placed, memory = _placed(sizes, step, cards, host)
    fits = _fits(memory, cards, host)
    counts = sizes.counts()
    return Plan(
        model=sizes.model,
        family=sizes.family.model_type,
        gpus=cards.count,
        card=cards.name,
        tokens=step.tokens,
        pairs=step.pairs,
        expert_format=step.held,
        parameters=sum(counts.values()),
        active_parameters=sizes.active(),
        lora_parameters=sizes.lora(step.rank),
        counts=counts,
        formats=_formats(sizes),
        experts=spread(sizes.experts, cards.here),
        usable=cards.bytes,
        needed=memory.total,
        host=host,
        beside=memory.beside,
        memory=memory.parts,
        layers_kept=memory.kept,
        layers=len(sizes.layers),
        fits=fits,
        streamed=_streamed(sizes, step, placed, memory) if placed.on_host else None,
        rated=cards.measured,
        speed=_speed(sizes, step, placed, memory, cards, steps) if fits else None,
        change=None if fits else cheapest_change(sizes, step, cards, host),
        notes=tuple(_notes(sizes, step, cards, placed)),
    )


def _fits(memory: Memory, cards: Cards, host: int) -> bool:
    """Tell whether it fits the GPUs, and the host memory that was named."""
    return memory.total <= cards.bytes and (host == 0 or memory.beside <= host)


def _check(sizes: Sizes, step: Step, cards: Cards) -> None:
    if step.tokens > sizes.context:
        raise ConfigError(
            f"--seq-len {step.tokens}: {sizes.model} reads {sizes.context:,} tokens at most (max_position_embeddings)"
        )
    if cards.here > sizes.experts:
        raise ConfigError(
            f"--gpus {cards.count}x{cards.name}: a layer has {sizes.experts} experts, less than one a GPU"
        )


def _nodes(cards: Cards) -> str:
    machines = cards.count // cards.here
    return f"--nnodes {machines} " if machines > 1 else ""


def _formats(sizes: Sizes) -> tuple[Held, ...]:
    """Return what the model takes in every format that divides its matrices."""
    counts, found = sizes.counts(), []
    rest, number = (sum(counts.values()) - counts[ROUTED]) * sizes.width, len(sizes.moe) * sizes.experts
    for name in FORMATS:
        try:
            experts = number * expert_bytes(sizes, name)
        except ConfigError:
            continue
        native = name == (sizes.native or (None if sizes.quantized else PLAIN))
        found.append(Held(format=name, experts=experts, whole=experts + rest, native=native))
    return tuple(found)


def _placed(sizes: Sizes, step: Step, cards: Cards, host: int) -> tuple[Placement, Memory]:
    """Return the placement that is set, or that with the fewest layers in host memory that fits; none if none does."""
    moe, layer = len(sizes.moe), sizes.experts * expert_bytes(sizes, step.held)
    resident = Placement(gpus=cards.here, machines=cards.count // cards.here)
    if step.expert_memory is not None:
        placed = replace(as_loaded(sizes, step, cards.here, cards.bytes), machines=resident.machines)
        return placed, memory_of(sizes, step, placed, cards.bytes)

    def memory(on_host: int) -> Memory:
        return memory_of(sizes, step, replace(resident, on_host=on_host), cards.bytes)

    # more layers in host memory never take more of the GPU
    tried = range(min(moe, 0 if step.held == PLAIN else host // layer) + 1)
    fewest = bisect_left(tried, True, key=lambda on_host: memory(on_host).total <= cards.bytes)
    placed = replace(resident, on_host=fewest) if fewest in tried else resident
    return placed, memory(placed.on_host)


def _streamed(sizes: Sizes, step: Step, placed: Placement, memory: Memory) -> Streamed:
    layer = placed.layer(sizes, step.held)
    per_pass = max(0, placed.on_host - IN_FLIGHT) * layer
    return Streamed(
        layers=placed.on_host,
        expert_memory=in_gib(placed.on_gpu(sizes) * layer),
        host=memory.host,
        per_pass=per_pass,
        seconds=per_pass / link(placed.gpus),
    )


def _speed(sizes: Sizes, step: Step, placed: Placement, memory: Memory, cards: Cards, steps: int) -> Speed | None:
    step, split = step.of_each(placed.ranks), placed.splits(sizes, cards.bytes)
    recomputed = memory.kept < len(sizes.layers)
    rate = nearest(sizes.hidden, step.together, recomputed=recomputed, split=split)
    if rate is None or not cards.measured:
        return None
    computing = step.together * 6 * sizes.active() / (TFLOPS * rate.share)
    # what was measured on GPUs that split dense weights has their exchanges in it
    exchanging = 0.0 if split else _exchanging(sizes, step, placed.gpus, recomputed)
    # Copies hide under the work that there is, wholly: only the longer of both counts.
    copying = 2 * _streamed(sizes, step, placed, memory).seconds
    seconds = max(computing + exchanging, copying)
    sources = ((LINKS, placed.on_host > 0), (BETWEEN, exchanging > 0))
    return Speed(
        tokens_per_second=placed.ranks * step.together / seconds,
        seconds=seconds,
        steps_per_hour=3600 / seconds,
        steps=steps,
        gpu_hours=placed.ranks * steps * seconds / 3600,
        bound_by="links" if copying > computing + exchanging else "compute",
        measured=(str(rate), *(source for source, counts in sources if counts)),
    )


def _exchanging(sizes: Sizes, step: Step, gpus: int, recomputed: bool) -> float:
    """Return the seconds in which a GPU's tokens go to the others and sums come back, there and in the pass back."""
    trips = 6 if recomputed else 4
    return len(sizes.moe) * trips * (gpus - 1) * step.together * sizes.hidden * sizes.width / GPU_EACH


def _notes(sizes: Sizes, step: Step, cards: Cards, placed: Placement) -> Iterator[str]:
    if sizes.experts % cards.here:
        ranges = [end - start for start, end in spread(sizes.experts, cards.here)]
        yield (
            f"{sizes.experts} experts do not divide by {cards.here} GPUs: {ranges.count(max(ranges))} hold "
            f"{max(ranges)} of each layer and {ranges.count(min(ranges))} hold {min(ranges)}"
        )
    if cards.count > 1:
        yield f"start it as `torchrun {_nodes(cards)}--nproc-per-node {cards.here} -m -- gtqlora train ...`"
    if cards.count > cards.here:
        yield (
            f"{cards.count // cards.here} machines of {cards.here} GPUs each hold all experts; the time that gradients "
            "take between machines was not measured and is not counted"
        )
    if step.pairs % cards.count:
        yield f"batch_size = {step.pairs} cannot be shared by {cards.count} GPUs: set a multiple of {cards.count}"
    if not cards.measured:
        yield f"no time is told of {cards.name}: rates were measured on H100 and H200 only"
    if sizes.quantized and sizes.native is None:
        yield f"the checkpoint is quantized ({sizes.quantized}), and is loaded as {PLAIN}"
    if any(layer.recurrent for layer in sizes.layers):
        yield "what linear attention keeps for its backward pass is an estimate that was never measured"
    if sizes.native is None and step.held != PLAIN:
        yield f"before `export`, `gtqlora verify RUN --expert-format {PLAIN}` needs the model in {PLAIN}"


# --- changes


def cheapest_change(sizes: Sizes, step: Step, cards: Cards, host: int, *, here: int | None = None) -> Change | None:
    """Return the cheapest change that fits: all are tried, from those that cost nothing to those that cost GPUs.

    Args:
        here: on these GPUs, with no more than so many bytes of host memory.
    """
    for _, changed, more, memory_there in _candidates(sizes, step, cards, host, here):
        try:
            placed, memory = _placed(sizes, changed, more, memory_there)
        except ConfigError:  # the experts do not divide into that format's groups
            continue
        if _fits(memory, more, memory_there):
            waits = memory_there > host or changed.expert_memory != step.expert_memory
            size = in_gib(placed.on_gpu(sizes) * placed.layer(sizes, changed.held)) if waits else None
            named = [f"--host {ceil(memory.beside / 10**9)}GB"] if here is None and 0 < host < memory.beside else []
            return Change(what=(*_words(step, changed, cards, more, size), *named), bytes=memory.total)
    return None


def _candidates(
    sizes: Sizes, step: Step, cards: Cards, host: int, here: int | None
) -> list[tuple[int, Step, Cards, int]]:
    """Return changed steps, GPUs and host memory with what they cost, cheapest first."""
    formats = [step.held, *(name for name in ("nf4", "int4-g128") if sizes.native is None and step.held == PLAIN)]
    # where layers are computed again at all, as many keep their activations as fit
    less = without_keeping(step) if step.checkpointing else replace(step, checkpointing=True)
    again = [step, *([] if less == step or (step.checkpointing and step.activation_memory is None) else [less])]
    pairs = [step.pairs >> halves for halves in range(step.pairs.bit_length())]
    gpus = (
        [cards.count]
        if here is not None
        else [count for count in _more(cards.count) if min(count, MOST_HERE) <= sizes.experts]
    )
    # as much host memory as there is of experts, where too little was named
    hosts = [host, max(host, sizes.counts()[ROUTED] * sizes.width if here is None else here)]
    memories = [step.expert_memory, None]  # which is found anew, where host memory is
    found = [
        (
            _price(costs, [len(values) - 1 for values in (formats, again)]),
            replace(
                again[costs[1]],
                held=formats[costs[0]],
                pairs=pairs[costs[2]],
                accumulation=-(-step.pairs * step.accumulation // pairs[costs[2]]),
                expert_memory=memories[costs[3]],
            ),
            replace(cards, count=gpus[costs[4]]),
            hosts[costs[3]],
        )
        for costs in product(*(range(len(values)) for values in (formats, again, pairs, hosts, gpus)))
    ]
    return sorted(found, key=lambda candidate: candidate[0])[1:]


_PRICES = (1, 2, 4, 60, 200)
"""What a change costs against others: another format, recomputation, half of the pairs, host memory, a GPU more."""
_SPARED = 20
"""What it costs to take host memory or GPUs where another format, or recomputation, would have spared some of them."""


def _price(costs: Sequence[int], left: Sequence[int]) -> int:
    """Return what changes cost together; `left` is how many there are of those that cost nothing but time."""
    price = sum(price * cost for price, cost in zip(_PRICES, costs, strict=True))
    dear = costs[3] + costs[4] > 0
    return price + dear * _SPARED * sum(bool(more) and not taken for taken, more in zip(costs, left, strict=False))


def _more(count: int) -> Iterator[int]:
    while count <= MOST_CARDS:
        yield count
        count = count + 1 if count < 8 else 2 * count


def _words(old: Step, new: Step, cards: Cards, more: Cards, expert_memory: float | None) -> Iterator[str]:
    """Name the options that make the change, as `plan` and `train` take them."""
    if new.held != old.held:
        yield f"--expert-format {new.held}"
    if new.checkpointing != old.checkpointing:
        yield "--set gradient_checkpointing=true"
    elif new.activation_memory != old.activation_memory:
        yield "--set activation_memory=0"
    if new.pairs != old.pairs:
        yield f"--set batch_size={new.pairs}"
        yield f"--set accumulation={new.accumulation}"
    if more.count != cards.count:
        yield f"--gpus {more.count}x{more.name}"
    if expert_memory is not None:
        yield f"--set expert_memory={expert_memory}"
