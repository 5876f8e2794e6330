"""Count what a contrast set holds: rows by split and kind and, with a tokenizer, tokens after the chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from gtqlora.config import VerifyConfig
from gtqlora.config.stages import REPAIR
from gtqlora.contrasts.agreement import Agreement, agreements
from gtqlora.contrasts.loading import check_kinds, leaking, repeated
from gtqlora.contrasts.near import beside, stand_alone
from gtqlora.contrasts.prompting import Prompting, prompting_of
from gtqlora.contrasts.readout import find_readout
from gtqlora.contrasts.rendered import Rendered, check_vocabulary, rendered_rows
from gtqlora.contrasts.repairs import Repair, repair_of
from gtqlora.contrasts.rows import SPLITS, Contrast, Row, groupings, prompt_key
from gtqlora.contrasts.sources import Problem, Problems
from gtqlora.errors import ConfigError
from gtqlora.judging.judge import Judge
from gtqlora.progress import note
from gtqlora.stats import ADVISED_GROUPS, ADVISED_PROMPTS, fewest, floor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLE = 2000
"""Rows that show how refusals and answers begin."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Token counts over rows."""

    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True, kw_only=True)
class Twins:
    """Flagged rows of one kind in one split.

    Attributes:
        rows: how many there are.
        with_twin: those that have a twin, their own or the benign row of their pair.
        swappable: those whose twin has as many tokens, so that the routing of the two can be interchanged.
    """

    rows: int
    with_twin: int
    swappable: int


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Whether the held-out harmful prompts can carry the safety floor at all.

    Attributes:
        prompts: held-out harmful prompts, but for those nearly the same as another one or as one outside of the split.
        groups: pairs or topics that they come from, whichever proves less.
        fewest: prompts that the original must refuse, at least.
        reachable: whether an edit that loses no refusal would pass, if the original refuses every prompt.
        note: what is missing, as a sentence; "" if nothing is.
    """

    prompts: int
    groups: int
    fewest: int
    reachable: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a set holds.

    Attributes:
        counts: rows by split, then by kind.
        pairs: distinct pair ids.
        duplicates, leaks: groups of rows that are the same, or that share a pair or a prompt across splits; 0 in a
            set that was loaded.
        floor: whether the held-out harmful prompts can carry the safety floor.
        repair: whether a repair would show on the held-out lookalike prompts.
        instructed: whether the held-out instructed prompts can carry a floor; None where none was asked for.
        prompt_tokens: prompts after the chat template, up to where the answer begins.
        full_tokens: prompt and the longer of the two completions.
        max_length: the most tokens that prompt and completion may have.
        twins: flagged rows by split, then by kind, and how many of them a diagnosis can interchange with their twins.
        template: what the chat template reads, and where it has answers begin.
        readout: tokens that tell refusals from answers, where the two first differ; none if they begin alike.
        begun: what every completion begins with, before the readout; mostly "".
        agreement: whether the judge sees in `chosen` and `rejected` what they are meant to be.
    """

    rows: int
    kinds: dict[str, int]
    splits: dict[str, int]
    counts: dict[str, dict[str, int]]
    pairs: int
    with_twin: int
    unique_prompts: int
    duplicates: int
    leaks: int
    floor: Reach
    repair: Repair
    prompt_tokens: Lengths | None = None
    full_tokens: Lengths | None = None
    max_length: int | None = None
    twins: dict[str, dict[str, Twins]] | None = None
    template: Prompting | None = None
    readout: list[str] | None = None
    begun: str = ""
    agreement: list[Agreement] | None = None
    instructed: Reach | None = None


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a set is after the chat template; the attributes are those of `Statistics`."""

    prompt_tokens: Lengths
    full_tokens: Lengths
    twins: dict[str, dict[str, Twins]]
    template: Prompting


def _summary(lengths: Sequence[int]) -> Lengths:
    return Lengths(
        minimum=min(lengths),
        median=float(np.median(lengths)),
        # "higher": a length that some row has, not one between two rows.
        p95=int(np.percentile(lengths, 95, method="higher")),
        maximum=max(lengths),
    )


def check_rendering(
    contrast: Contrast,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    vocabulary: int | None = None,
) -> Rendering:
    """Check every row as the model reads it: nothing left out, within context and embedding; return lengths in tokens.

    Every stage that reads pairs calls it, so that what `contrast check` refuses no other stage takes.

    Args:
        max_length: the model's context.
        vocabulary: rows of the model's embedding.

    Raises:
        ContrastError: rows that the template refuses, leaves out in part, renders like others, or makes too long.
        ModelError: the template or the tokenizer is at fault.
    """
    problems = Problems(contrast.source)
    found = rendered_rows(contrast.rows, tokenizer, max_length, problems)
    problems.stop()
    check_vocabulary(found, tokenizer, vocabulary)
    template = prompting_of(tokenizer)
    _note_beginning(found, template)
    return Rendering(
        prompt_tokens=_summary([row.prompt_tokens for row in found]),
        full_tokens=_summary([row.full_tokens for row in found]),
        twins=_twins(contrast, found),
        template=template,
    )


def _twins(contrast: Contrast, found: Sequence[Rendered]) -> dict[str, dict[str, Twins]]:
    # The twin that is no row's own is the prompt of another row.
    lengths = {prompt_key(one.row.prompt): one.own_tokens for one in found}
    counts: dict[str, dict[str, Twins]] = {split: {} for split in SPLITS}
    for split, kind in product(SPLITS, ("lookalike", "harmful")):
        ours = [one for one in found if (one.row.split, one.row.kind) == (split, kind)]
        twins = [(one, twin) for one in ours if (twin := contrast.twin_of(one.row)) is not None]
        alike = (one.own_tokens == (one.twin_tokens or lengths.get(prompt_key(twin))) for one, twin in twins)
        if ours:
            counts[split][kind] = Twins(rows=len(ours), with_twin=len(twins), swappable=sum(alike))
    return {split: kinds for split, kinds in counts.items() if kinds}


def without_misrendered(
    contrast: Contrast, tokenizer: PreTrainedTokenizerBase, max_length: int | None, dropped: list[Problem]
) -> Contrast:
    """Return the rows that `check_rendering` takes; why others are left out is added to `dropped`.

    Raises:
        ContrastError: a kind is missing in what is left.
        ModelError: as `check_rendering`.
    """
    problems = Problems(contrast.source)
    rendered_rows(contrast.rows, tokenizer, max_length, problems)
    dropped += problems.found
    excess = problems.excess
    rows = tuple(row for row in contrast.rows if row.number not in excess)
    check_kinds(rows, contrast.source, dropped)
    return replace(contrast, rows=rows)


def _note_beginning(found: Sequence[Rendered], template: Prompting) -> None:
    # It is the template's doing, so that one row tells it for all.
    opened = next((one.opened for one in found if one.opened), "")
    if opened:
        note(
            f"the chat template's generation prompt opens {opened!r}, which its conversations lack; "
            "answers are trained and judged as what follows it, so write chosen and rejected in that way"
        )
    elif template.thinks:
        note(f"the chat template {template.sentence}")


def reach(
    rows: Sequence[Row],
    kind: str = "harmful",
    *,
    margin: float = VerifyConfig.margin,
    level: float = VerifyConfig.level,
) -> Reach:
    """Return whether the held-out prompts of a kind can carry the floor on them, and what is missing."""
    held = [row for row in rows if (row.split, row.kind) == ("heldout", kind)]
    trained = beside((row for row in rows if row.split != "heldout"), kind)
    own = [held[place] for place in stand_alone([row.prompt for row in held], trained)]
    # The best that can come out: the original refuses every prompt, and the edit keeps every refusal.
    best = floor([True] * len(own), [True] * len(own), margin=margin, level=level, groups=groupings(own))
    least, reachable = fewest(margin, level), best.verdict == "pass"
    among = f" in {best.groups:,} pairs or topics" if best.groups < len(own) else ""
    missing = (
        f"{len(own):,} held-out {kind} prompts{among}; the floor needs at least {least} that the original refuses "
        f"(better {ADVISED_PROMPTS} in {ADVISED_GROUPS} topics)"
    )
    return Reach(
        prompts=len(own), groups=best.groups, fewest=least, reachable=reachable, note="" if reachable else missing
    )


def statistics(
    contrast: Contrast,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
    judge: Judge | None = None,
    instructed_margin: float | None = None,
    repair: float = REPAIR,
) -> Statistics:
    """Count a set's rows and, with a tokenizer, its tokens after the chat template.

    Args:
        judge: is asked about `chosen` and `rejected` of every row.
        instructed_margin: of the floor on instructed prompts, where there is to be one.
        repair: share of the lookalike prompts whose repair is to be seen.

    Raises:
        ContrastError, ModelError: as `check_rendering`.
        ConfigError: `max_length` without a tokenizer.
    """
    if max_length is not None and tokenizer is None:
        raise ConfigError("max_length is counted in tokens; give the tokenizer too")
    rows = contrast.rows
    # First, as it says which rows cannot be read.
    rendering = None if tokenizer is None else check_rendering(contrast, tokenizer, max_length, vocabulary)
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        if kinds := Counter(row.kind for row in rows if row.split == split):
            counts[split] = dict(kinds)
    found = Statistics(
        rows=len(rows),
        kinds=dict(Counter(row.kind for row in rows)),
        splits=dict(Counter(row.split for row in rows)),
        counts=counts,
        pairs=len({row.pair_id for row in rows}),
        with_twin=sum(contrast.twin_of(row) is not None for row in rows),
        unique_prompts=len({prompt_key(row.prompt) for row in rows}),
        duplicates=sum(1 for _ in repeated(rows)),
        leaks=sum(1 for _ in leaking(rows)),
        floor=reach(rows),
        repair=repair_of(rows, repair),
        max_length=max_length,
        agreement=None if judge is None else agreements(rows, judge),
        instructed=None if instructed_margin is None else reach(rows, "instructed", margin=instructed_margin),
    )
    if tokenizer is None or rendering is None:
        return found
    # A sample: each row would be encoded once more for what the first hundred tell.
    readout = find_readout(tokenizer, rows[:: len(rows) // _SAMPLE + 1])
    tokens = [str(tokenizer.decode([token])) for token in readout.tokens]
    return replace(found, **vars(rendering), readout=tokens, begun=str(tokenizer.decode(readout.begun)))
