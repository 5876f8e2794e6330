"""Interventions that swap or mask routing only, and the Level-1/Level-2 verdict. All in memory; nothing is written."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from gtqlora.capture import Handler, Mask, Subject
from gtqlora.contrasts import Contrast, Row, encode_prompt
from gtqlora.judging import Judge
from gtqlora.progress import track
from gtqlora.scoring import Score, decode, judged
from gtqlora.stats import Interval, paired_difference, rate

MIN_PAIRS = 30
"""Behaving pairs below which no verdict is given: an interval of a share then spans a third."""


@dataclass(frozen=True)
class Pair:
    """A flagged prompt and its twin: same words but for what makes it flagged; equal token counts if `aligned`."""

    row: Row
    prompt: list[int]
    twin: list[int]

    @property
    def aligned(self) -> bool:
        return len(self.prompt) == len(self.twin)

    @property
    def common(self) -> int:
        """Tokens before the two differ; a causal model computes the same on them."""
        return next(
            (i for i, (a, b) in enumerate(zip(self.prompt, self.twin, strict=False)) if a != b), len(self.prompt)
        )


def pairs_of(contrast: Contrast, subject: Subject, limit: int, seed: int) -> list[Pair]:
    """Lookalike and harmful rows that have a twin, at most `limit`, drawn reproducibly with their siblings."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for row in (*contrast.of_kind("lookalike"), *contrast.of_kind("harmful")):
        twin = contrast.twin_of(row)
        if twin is not None:
            pair = Pair(row, encode_prompt(subject.tokenizer, row.prompt), encode_prompt(subject.tokenizer, twin))
            groups[row.pair_id].append(pair)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    return [pair for pair_id in order for pair in groups[pair_id]][:limit]


def control_prompts(pairs: Sequence[Pair], seed: int) -> list[list[int] | None]:
    """For each pair a flagged prompt whose routing to borrow as control: it disturbs as a twin's does, but is flagged.

    The nearest is the sibling (same pair_id, so mostly the same words); else any flagged prompt of the same token
    count; None where there is neither.
    """
    by_length: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_length[len(pair.prompt)].append(pair)
    rng = random.Random(seed)

    def partner(pair: Pair) -> list[int] | None:
        others = [p for p in by_length[len(pair.prompt)] if p is not pair]
        siblings = [p for p in others if p.row.pair_id == pair.row.pair_id]
        return rng.choice(siblings or others).prompt if others else None

    return [partner(pair) for pair in pairs]


@dataclass(frozen=True)
class Intervention:
    """Refusal under one change to the routing, with the paired effect on it (base - changed)."""

    name: str
    control: bool
    refusal: Interval
    accuracy: Interval | None
    effect: Interval
    refused: list[bool]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "control": self.control,
            "refusal": self.refusal.to_json(),
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "effect": self.effect.to_json(),
        }


class Bench:
    """Runs the same pairs under one intervention after another."""

    def __init__(self, subject: Subject, pairs: Sequence[Pair], judge: Judge, batch_size: int, max_new: int) -> None:
        self.subject, self.pairs, self.judge = subject, list(pairs), judge
        self.batch_size, self.max_new = batch_size, max_new
        self.base = self.flagged("as it is")

    def _run(
        self,
        label: str,
        prompts: list[list[int]],
        handlers: Sequence[Handler] = (),
        routing: list[list[int]] | None = None,
    ) -> list[Score]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts: dict[int, str] = {}
        starts = range(0, len(order), self.batch_size)
        for start in track(starts, label, len(starts)):
            chosen = order[start : start + self.batch_size]
            found = decode(
                self.subject,
                [prompts[i] for i in chosen],
                max_new_tokens=self.max_new,
                handlers=handlers,
                routing_from=None if routing is None else nullcontext,
                routing_prompts=None if routing is None else [routing[i] for i in chosen],
            )
            texts.update(zip(chosen, found, strict=True))
        return [judged(pair.row, texts[i], self.judge) for i, pair in enumerate(self.pairs)]

    def flagged(
        self, label: str, handlers: Sequence[Handler] = (), routing: list[list[int]] | None = None
    ) -> list[Score]:
        """The flagged prompts, with handlers or with the routing of other prompts."""
        return self._run(label, [pair.prompt for pair in self.pairs], handlers, routing)

    def twins(self, label: str, routing: list[list[int]] | None = None) -> list[Score]:
        """The twins of the flagged prompts."""
        return self._run(label, [pair.twin for pair in self.pairs], (), routing)

    def intervention(self, name: str, scores: list[Score], base: list[Score], control: bool = False) -> Intervention:
        refused = [s.refused for s in scores]
        known = [s.correct for s in scores if s.correct is not None]
        return Intervention(
            name=name,
            control=control,
            refusal=rate(refused),
            accuracy=rate(known) if known else None,
            effect=paired_difference([s.refused for s in base], refused),
            refused=refused,
        )


def random_like(
    masked: dict[int, tuple[int, ...]], frequency_LE: np.ndarray, rng: random.Random
) -> dict[int, tuple[int, ...]]:
    """A control for a mask: in each layer as many other experts (or all there are), near in selection frequency."""
    control = {}
    for layer, experts in masked.items():
        others = [e for e in range(frequency_LE.shape[1]) if e not in experts]
        drawn: list[int] = []
        for expert in experts[: len(others)]:
            near = sorted(others, key=lambda e: abs(frequency_LE[layer, e] - frequency_LE[layer, expert]))
            drawn.append(rng.choice(near[: max(4, len(others) // 3)]))
            others.remove(drawn[-1])
        control[layer] = tuple(sorted(drawn))
    return control


@dataclass(frozen=True)
class Verdict:
    """Where the behaviour sits: "routing", "residual", "both" or "cannot tell", with the share and the reason."""

    verdict: str
    share_routing: Interval
    n_pairs: int
    sentence: str


def verdict_of_scores(swapped: Sequence[Score], control: Sequence[Score], usable: Sequence[bool]) -> Verdict:
    """The verdict on pairs whose flagged prompt is refused and whose twin is not (`usable`).

    A refusal that only turned into garbage was not moved, so where enough rows give an expected answer, only those
    count, and they count as moved when answered right.
    """
    rows = [i for i, u in enumerate(usable) if u]
    answered = [i for i in rows if swapped[i].correct is not None]
    rows = answered if len(answered) >= MIN_PAIRS else rows

    def moved(score: Score) -> bool:
        return bool(score.correct) if rows is answered else not score.refused

    return verdict_of([moved(swapped[i]) for i in rows], [moved(control[i]) for i in rows])


def verdict_of(moved: Sequence[bool], moved_by_control: Sequence[bool]) -> Verdict:
    """Share of the behaviour that the routing carries.

    For each behaving pair, whether the twin's routing moves the behaviour, less whether another flagged prompt's
    routing does (the disturbance any swap makes), with Tango's paired interval. Routing if the 95 % interval lies above
    two thirds, residual if below one third, both if between; else, or if the control itself moves more than a third,
    one cannot tell.
    """
    n = len(moved)
    share = paired_difference(moved, moved_by_control)
    if n < MIN_PAIRS:
        reason = f"only {n} aligned pairs show the behaviour and {MIN_PAIRS} are needed; add twins of equal token count"
        return Verdict("cannot tell", share, n, f"Cannot tell: {reason}.")
    percent = f"{share.value:.0%} (95 % interval {share.low:.0%} to {share.high:.0%}, {n} pairs)"
    disturbed = sum(moved_by_control) / n
    if disturbed > 1 / 3:
        name, why = "cannot tell", f"any change of routing disturbs this model (the control moves {disturbed:.0%})"
    elif share.low > 2 / 3:
        name, why = "routing", f"giving a prompt its harmless twin's routing removes {percent} of the refusals"
    elif share.high < 1 / 3:
        name, why = "residual", f"with its harmless twin's routing a prompt is still refused; routing carries {percent}"
    elif share.low > 1 / 3 and share.high < 2 / 3:
        name, why = "both", f"routing carries {percent} of the refusals, the residual stream the rest"
    else:
        name, why = "cannot tell", f"routing carries {percent}, which fits more than one answer; add pairs"
    return Verdict(name, share, n, f"{name.capitalize()}: {why}.")


def mask_handler(subject: Subject, masked: dict[int, tuple[int, ...]]) -> Handler:
    return Mask(subject.anatomy, masked)
