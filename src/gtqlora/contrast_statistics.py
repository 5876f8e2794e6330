"""What a contrast set holds: counts by split and kind and, with a tokenizer, lengths after the chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gtqlora.contrast_sources import Problems
from gtqlora.contrasts import SPLITS, Contrast, Row, apply_template, encode_prompt, prompt_key
from gtqlora.errors import ConfigError, ContrastError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts over rows."""

    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a set holds.

    Attributes:
        counts: rows by split, then by kind.
        pairs: distinct pair ids.
        prompt_tokens: prompts after the chat template, up to where the answer begins.
        full_tokens: prompt and the longer of the two completions.
    """

    rows: int
    kinds: dict[str, int]
    splits: dict[str, int]
    counts: dict[str, dict[str, int]]
    pairs: int
    with_twin: int
    unique_prompts: int
    prompt_tokens: Lengths | None = None
    full_tokens: Lengths | None = None


def _row_lengths(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[int, int]:
    """Tokens of the prompt, and of the prompt with its longer completion."""
    prompt = len(encode_prompt(tokenizer, row.prompt))
    answers = ([*row.prompt, {"role": "assistant", "content": text}] for text in (row.chosen, row.rejected))
    return prompt, max(len(apply_template(tokenizer, answer, generation=False)) for answer in answers)


def _summary(lengths: Sequence[int]) -> Lengths:
    return Lengths(
        minimum=min(lengths),
        median=float(np.median(lengths)),
        p95=int(np.percentile(lengths, 95, method="higher")),
        maximum=max(lengths),
    )


def _token_lengths(
    contrast: Contrast, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Lengths]:
    problems = Problems(contrast.source)
    lengths: list[tuple[int, int, int]] = []
    for row in contrast.rows:
        try:
            lengths.append((row.number, *_row_lengths(tokenizer, row)))
        except ContrastError as error:
            problems.add([row.number], str(error))
    limit = max_length if max_length is not None else float("inf")
    prompts = [number for number, prompt, _ in lengths if prompt > limit]
    fulls = [number for number, prompt, full in lengths if prompt <= limit < full]
    for numbers, what in ((prompts, "the prompt alone"), (fulls, "prompt and completion")):
        if numbers:
            problems.add(numbers, f"{what} longer than {max_length} tokens; shorten, drop, or raise the length")
    problems.stop()
    return {
        "prompt_tokens": _summary([prompt for _, prompt, _ in lengths]),
        "full_tokens": _summary([full for _, _, full in lengths]),
    }


def statistics(
    contrast: Contrast, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> Statistics:
    """Counts of a set and, with a tokenizer, token lengths after the chat template.

    Raises:
        ContrastError: rows longer than `max_length`, or refused by the chat template.
        ConfigError: `max_length` without a tokenizer.
    """
    if max_length is not None and tokenizer is None:
        raise ConfigError("max_length is counted in tokens; give the tokenizer too")
    rows = contrast.rows
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        if kinds := Counter(row.kind for row in rows if row.split == split):
            counts[split] = dict(kinds)
    return Statistics(
        rows=len(rows),
        kinds=dict(Counter(row.kind for row in rows)),
        splits=dict(Counter(row.split for row in rows)),
        counts=counts,
        pairs=len({row.pair_id for row in rows}),
        with_twin=sum(contrast.twin_of(row) is not None for row in rows),
        unique_prompts=len({prompt_key(row.prompt) for row in rows}),
        **(_token_lengths(contrast, tokenizer, max_length) if tokenizer is not None else {}),
    )
