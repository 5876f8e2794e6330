"""The `plan` verb: what a training takes, before a GPU is rented; and what `train` asks before it loads a model."""

from __future__ import annotations

from dataclasses import replace

from gtqlora.config import TrainConfig
from gtqlora.config.values import require
from gtqlora.contrasts import Contrast
from gtqlora.contrasts.rendered import rendered_rows
from gtqlora.contrasts.sources import Problems
from gtqlora.errors import TrainingError
from gtqlora.families.sizes import WIDTHS, Sizes, sizes_of
from gtqlora.planning.cards import Cards, in_binary, parse_bytes, parse_cards
from gtqlora.planning.formats import PLAIN, held_as
from gtqlora.planning.memory import CONTEXT, Step, as_loaded, memory_of
from gtqlora.planning.plan import Plan, cheapest_change, plan_for
from gtqlora.ranks import least, ranks

_CLEARLY = 1.1
"""A training is refused where it is predicted to need this many times what is free: predictions are not exact."""


def plan(config: TrainConfig, *, gpus: str, tokens: int, prompt: int = 0, host: str | None = None) -> Plan:
    """Return what a training takes, from the model's config.json alone; neither torch nor a GPU is asked.

    Args:
        config: the training's settings; its pairs need not be there.
        gpus: such as `4x141GB`.
        tokens: of the longest prompt with its answer.
        prompt: of these, tokens of the prompt, which run once for both answers; 0 counts them twice.
        host: memory beside the GPUs that experts may wait in, such as `512GB`.

    Raises:
        ConfigError: GPUs or memory that are written in no known way, or a format that the model does not go with.
        ModelError: no such model, an unknown or dense architecture, or a config.json that lacks keys.
    """
    require(tokens >= 2, f"--seq-len {tokens}: must be at least 2, for a prompt and an answer")
    require(0 <= prompt < tokens, f"--prompt-len {prompt}: must be less than --seq-len {tokens}, and at least 0")
    cards, beside = parse_cards(gpus), parse_bytes(host, "--host") if host is not None else 0
    sizes = _sizes(config)
    return plan_for(sizes, _step(config, sizes, tokens, prompt), cards, beside, config.steps)


def _sizes(config: TrainConfig) -> Sizes:
    """Return the model's sizes, in the dtype that it is loaded in."""
    found = sizes_of(config.model)
    return found if config.dtype == "auto" else replace(found, width=WIDTHS[config.dtype])


def _step(config: TrainConfig, sizes: Sizes, tokens: int, prompt: int) -> Step:
    packed = sizes.family.only_attends and config.objective == "edit"
    return Step.of(config, tokens, _held(config, sizes), prompt if packed else 0)


def _held(config: TrainConfig, sizes: Sizes) -> str:
    # what is packed cannot be loaded in the default, which then is nobody's wish
    asked = None if config.expert_format == PLAIN and sizes.native else config.expert_format
    return held_as(sizes, asked)


def check_memory(config: TrainConfig, rows: Contrast) -> None:
    """Check, where a GPU trains, that the training does not clearly need more memory than is free there.

    Raises:
        TrainingError: it does; the message has the cheapest change that fits.
    """
    if not config.device.startswith("cuda"):
        return
    import torch  # only now: a plan by itself needs none

    from gtqlora.experts import host_memory

    free = least(torch.cuda.mem_get_info(config.device)[0])
    refuse_beyond(config, *longest_row(config, rows), free, host_memory.available() // ranks().here)


def longest_row(config: TrainConfig, rows: Contrast) -> tuple[int, int]:
    """Return the tokens of the longest prompt with its answer, before the model is loaded, and of a prompt.

    With a prompt of so many, the longest pair has at least the tokens of any: both rows, with the prompt once.

    Raises:
        ContrastError: as `check_rendering`.
        ModelError: as `load_tokenizer`.
    """
    from gtqlora.families import load_tokenizer

    problems, limit = Problems(rows.source), config.max_length or sizes_of(config.model).context
    found = list(rendered_rows(rows.rows, load_tokenizer(config.model, config.template), limit, problems))
    problems.stop()
    longest = max(row.full_tokens for row in found)
    return longest, 2 * longest - max(2 * row.full_tokens - row.own_tokens for row in found)


def refuse_beyond(config: TrainConfig, longest: int, prompt: int, free: int, host: int = 0) -> None:
    """Refuse a training that clearly needs more than the free bytes of its GPU.

    Args:
        longest, prompt: as `longest_row` returns them.
        host: bytes of host memory that experts could wait in.

    Raises:
        TrainingError: see `check_memory`.
    """
    sizes = _sizes(config)
    # machines share the batch, too
    step = _step(config, sizes, longest, prompt).of_each(ranks().count // ranks().here)
    memory = memory_of(sizes, step, as_loaded(sizes, step, ranks().here, free), free)
    needed = memory.total - memory.parts[CONTEXT]  # the driver's own is not free any more
    if needed <= _CLEARLY * free:
        return
    change = cheapest_change(sizes, step, Cards(ranks().here, config.device, free), 0, here=host)
    fix = f"; cheapest change that fits: {' '.join(change.what)}" if change else ""
    raise TrainingError(
        f"{config.device}: this training needs about {in_binary(needed)}, and {in_binary(free)} are free{fix}; "
        "`gtqlora plan` shows the parts"
    )
