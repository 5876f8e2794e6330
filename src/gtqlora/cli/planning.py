"""The verb `plan`: reads its options, and prints what a training takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gtqlora.cli.console import open_console, say, say_whole, starting
from gtqlora.cli.figures import count, size
from gtqlora.cli.layout import Sheet, draw
from gtqlora.cli.printing import show_json
from gtqlora.cli.settings import ExpertFormat, Json, Model, Recipe, embedded_model, embedded_recipe
from gtqlora.errors import ConfigError, GtqloraError
from gtqlora.planning.cards import in_binary

if TYPE_CHECKING:
    from gtqlora.planning.plan import Plan, Speed


def plan(
    model: Model,
    *,
    gpus: Annotated[str, Parameter(name="--gpus", help="How many of which: 80GB, 4x141GB, 2xH100.")],
    seq_len: Annotated[
        int | None,
        Parameter(name="--seq-len", help="Tokens of the longest prompt with its answer; else the setting max_length."),
    ] = None,
    prompt_len: Annotated[
        int,
        Parameter(
            name="--prompt-len", help="Of these, tokens of the prompt, which run once for both answers of a pair."
        ),
    ] = 0,
    host: Annotated[
        str | None, Parameter(name="--host", help="Host memory that experts may wait in, such as 512GB.")
    ] = None,
    pairs: Annotated[int | None, Parameter(help="Pairs that run together on each GPU (batch_size).")] = None,
    steps: Annotated[int | None, Parameter(help="Steps of the training.")] = None,
    expert_format: ExpertFormat = None,
    config: Recipe = None,
    settings: Annotated[
        list[str] | None,
        Parameter(name="--set", help="One setting of train, e.g. --set rank=16.", negative=(), consume_multiple=False),
    ] = None,
    as_json: Json = False,
) -> int:
    """Say what a training takes before a GPU is rented: memory by part, what fits, how long it lasts.

    From config.json alone: no weights are read, and no GPU is needed.
    """
    with starting():
        from gtqlora.config import TrainConfig, build
        from gtqlora.stages.plan import plan as stage

    given = {"batch_size": pairs, "steps": steps, "expert_format": expert_format}
    settled = build(
        TrainConfig,
        file=embedded_recipe(config) if config else None,
        # the machine that plans is not the one that trains
        overrides=[*(settings or ()), "device=cpu"],
        model=embedded_model(model),
        contrast="unread",
        **{key: value for key, value in given.items() if value is not None},
    )
    tokens = seq_len if seq_len is not None else settled.max_length
    if tokens is None:
        raise ConfigError("--seq-len is missing: the tokens of the longest prompt with its answer, such as 1024")
    found = stage(settled, gpus=gpus, tokens=tokens, prompt=prompt_len, host=host)
    if as_json:
        show_json(found)
    else:
        _show(found)
    # A script that rents what it planned must not take what does not fit for what does.
    return 0 if found.fits else GtqloraError.exit_code


def _show(found: Plan) -> None:
    console = open_console()
    say_whole(console, f"{found.model}:", "bold")
    say(
        console,
        f"{found.family}, {found.layers} layers, {found.parameters:,} parameters, {count(found.active_parameters)} met "
        f"by a token; LoRA {count(found.lora_parameters)}",
    )
    say_whole(console, "")
    draw(console, _counts(found))
    draw(console, _formats(found))
    draw(console, _memory(found))
    for line in (*_placement(found), *(_speed(found.speed, found.gpus) if found.speed else ())):
        say(console, line)
    if found.fits and not found.speed and found.rated:
        say(console, "how long it takes cannot be told: no step with so few tokens, or so narrow a model, was measured")
    if not found.fits:
        say(console, f"does not fit: {', '.join(_short_of(found))}", accent=("does not fit", "bold red"))
        say(console, _change(found))
    for note in found.notes:
        say(console, f"note: {note}", accent=("note:", "yellow"))


def _counts(found: Plan) -> Sheet:
    rows = [(kind, f"{number:,}") for kind, number in found.counts.items()]
    return Sheet(title="Parameters", columns=("part", "parameters"), rows=rows, total=("all", f"{found.parameters:,}"))


def _formats(found: Plan) -> Sheet:
    rows = [
        (f"{one.format}{' (the checkpoint)' if one.native else ''}", size(one.experts), size(one.whole))
        for one in found.formats
    ]
    return Sheet(title="Bytes by format of the experts", columns=("format", "experts", "model"), rows=rows)


def _memory(found: Plan) -> Sheet:
    rows = [(part, in_binary(number)) for part, number in found.memory.items()]
    many = f"{found.gpus} x {found.card}" if found.gpus > 1 else f"one {found.card}"
    return Sheet(
        title=f"Memory on {'the fullest of ' if found.gpus > 1 else ''}{many}, {found.pairs} pairs x 2 x "
        f"{found.tokens} tokens, experts {found.expert_format}",
        columns=("part", "bytes"),
        rows=rows,
        total=("all", f"{in_binary(found.needed)} of {in_binary(found.usable)}"),
    )


def _short_of(found: Plan) -> Iterator[str]:
    if found.needed > found.usable:
        yield f"{in_binary(found.needed)} of {in_binary(found.usable)} on each {found.card}"
    if 0 < found.host < found.beside:
        yield f"{size(found.beside)} of the {size(found.host)} of host memory"


def _placement(found: Plan) -> Iterator[str]:
    if found.fits:
        yield f"fits, with {in_binary(found.usable - found.needed)} to spare on each GPU"
    yield f"layers whose activations are kept: {found.layers_kept} of {found.layers}"
    if found.gpus > 1:
        (_, first), (last, end) = found.experts[0], found.experts[-1]
        yield f"experts of each layer: 0 to {first - 1} on the first GPU, ... {last} to {end - 1} on the last"
    if found.streamed:
        there = found.streamed
        yield (
            f"experts of {there.layers} layers wait in {size(there.host)} of host memory: {size(there.per_pass)} come "
            f"to each GPU in a pass, {there.seconds:.2f} s by the link (--set expert_memory={there.expert_memory})"
        )
    if inputs := found.beside - (found.streamed.host if found.streamed else 0):
        yield f"what layers were given waits in {size(inputs)} of host memory until they are computed again"


def _speed(speed: Speed, gpus: int) -> Iterator[str]:
    yield (
        f"about {speed.tokens_per_second:,.0f} tokens/s, {speed.seconds:.2f} s a step, {speed.steps_per_hour:,.0f} "
        f"steps an hour, bound by {speed.bound_by}; {speed.steps:,} steps: {speed.gpu_hours:.2f} GPU-hours on {gpus}"
    )
    for source in speed.measured:
        yield f"measured: {source}"


def _change(found: Plan) -> str:
    if found.change is None:
        return "no change that was tried makes it fit: fewer tokens, or larger GPUs, may"
    return f"cheapest change that fits: {' '.join(found.change.what)} ({in_binary(found.change.bytes)} on each GPU)"
