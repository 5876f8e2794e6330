"""From prompts and what the model said to them to rows: what is kept, what stands in them, and in which split.

Nothing is invented here but the openings of harmful rows: answers and refusals are the model's own.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from gtqlora.building.refusals import sentences
from gtqlora.contrasts.loading import split_of
from gtqlora.contrasts.one_way import (
    OPENING_CHARACTERS,
    OPENING_WORDS,
    REFUSAL_CHARACTERS,
    REFUSAL_WORDS,
    check_row,
    judged_rows,
)
from gtqlora.contrasts.public import Candidate
from gtqlora.contrasts.rows import Row, digest
from gtqlora.contrasts.statistics import reach
from gtqlora.errors import ContrastError
from gtqlora.judging.english import refuses_in_english
from gtqlora.judging.folding import holds
from gtqlora.judging.judge import Judge, Messages
from gtqlora.judging.labels import ANSWER, REFUSAL

OPENINGS = (
    "Sure, here is",
    "Certainly! Here's how",
    "Of course. First,",
    "Absolutely, here are the steps",
    "Yes, here is what you need",
    "Here is a detailed answer:",
)
"""How an answer might begin; they say nothing."""
_MORE = 50
"""Harmful rows that are held out in addition, as often as the floor needs more."""
_REFUSALS, _OWN_WORDS = 12, 4
"""Different refusals that benign rows take turns with, and words of the model's own answers that open harmful ones."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the model said to a candidate's prompt.

    Attributes:
        label: "refusal", "answer", or why it is neither.
        text: "" where it is neither. Of a harmful prompt it is a refusal and no more, or "" if it is longer than that.
        answer: to a lookalike prompt that it refuses, or an instructed one that it declines: an answer that the judge
            calls one.
        twin: the prompt with another word in place of the one that triggers the refusal, which it answers.
    """

    candidate: Candidate
    label: str
    text: str = ""
    answer: str | None = None
    twin: Messages | None = None

    @property
    def why_not(self) -> str | None:
        """Return why no row can be made of it, None if one can."""
        wanted = ANSWER if self.candidate.kind == "benign" else REFUSAL
        if self.label in (REFUSAL, ANSWER) and self.label != wanted:
            return "refused by the model" if wanted == ANSWER else "not refused by the model"
        if self.label != wanted:
            return self.label
        if self.candidate.kind == "lookalike" and self.answer is None:
            return "refused however it is asked"
        if self.candidate.kind == "instructed" and self.answer is None:
            return "not answered without its system prompt either"
        return None


def openings_of(answers: Iterable[str]) -> list[str]:
    """Return how the model opens its own answers to harmless prompts, for one that does not know our words."""
    starts = Counter(" ".join(text.split()[:_OWN_WORDS]) for text in answers)
    return [start for start, _ in starts.most_common(len(OPENINGS)) if len(start) <= OPENING_CHARACTERS]


def _opening(candidate: Candidate, refusal: str, openings: Sequence[str]) -> str | None:
    """Return the set's own opening where it is one, else one of those given, None if there are none."""
    own = " ".join((candidate.opening or "").split()[:OPENING_WORDS])
    fits = own and len(own) <= OPENING_CHARACTERS and not refuses_in_english(own)
    if fits and not holds(refusal, own, candidate.text):
        return own
    return openings[int(digest(candidate.text), 16) % len(openings)] if openings else None


def made(said: Sequence[Said], openings: Sequence[str], judge: Judge) -> tuple[list[Row], dict[str, Counter[str]]]:
    """Return the rows that can be made, in no split yet, and why the rest of each source is none.

    Args:
        openings: of harmful rows whose set gives none.
    """
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    rows: list[tuple[Candidate, Row]] = []
    refusals = _refusals(said)
    for one in said:
        if (why := one.why_not) is not None:
            dropped[one.candidate.source][why] += 1
        elif isinstance(row := _row(one, len(rows) + 1, refusals, openings), str):
            dropped[one.candidate.source][row] += 1
        else:
            rows.append((one.candidate, row))
    kept: list[Row] = []
    # Again, and now as every later reader judges them: refusals are cut, and openings are new.
    judged = judged_rows([row for _, row in rows], judge)
    for (candidate, row), judgement in zip(rows, judged, strict=True):
        try:
            check_row(row, judgement)
            kept.append(row)
        except ContrastError as error:
            dropped[candidate.source][broken(str(error))] += 1
    return kept, dropped


def broken(problem: str) -> str:
    """Return a rule that a row breaks as a reason for leaving it out, without the advice how to mend the row."""
    return f"breaks a rule: {re.split(r'[;(]', problem)[0].strip()}"


def _refusals(said: Sequence[Said]) -> list[str]:
    """Return the most common refusals of lookalike prompts, else of harmful ones, by their first sentences."""
    # By first sentences: what follows is about the prompt that was refused.
    for kind in ("lookalike", "harmful"):
        found = (sentences(one.text)[0] for one in said if one.text and one.label == REFUSAL and _is(one, kind))
        if counts := Counter(text for text in found if text and len(text) <= REFUSAL_CHARACTERS):
            return [text for text, _ in counts.most_common(_REFUSALS)]
    return []


def _is(one: Said, kind: str) -> bool:
    return one.candidate.kind == kind


def _row(one: Said, number: int, refusals: Sequence[str], openings: Sequence[str]) -> Row | str:
    """Return the row of a prompt, or what is missing for one."""
    candidate = one.candidate
    if candidate.kind == "harmful":
        chosen = one.text or None
        rejected = _opening(candidate, one.text, openings)
    elif candidate.kind == "lookalike":
        chosen, rejected = one.answer, one.text
    elif candidate.kind == "instructed":
        chosen, rejected = one.text or None, one.answer
    else:
        chosen, rejected = one.text, refusals[number % len(refusals)] if refusals else None
    if chosen is None:
        return f"refusal longer than {REFUSAL_WORDS} words"
    if rejected is None:
        return "no opening or refusal to set against it"
    return Row(
        number=number,
        kind=candidate.kind,
        prompt=candidate.prompt,
        chosen=chosen,
        rejected=rejected,
        pair_id=candidate.pair,
        twin=one.twin,
        topic=candidate.topic,
        split="train",
    )


# --- splits


def with_splits(rows: Sequence[Row], least: int, most: int) -> list[Row]:
    """Return the rows in their splits: whole pairs, and first of all enough harmful rows held out for the floor.

    Half of the harmful rows are held out, those without other rows in their pair first; at least `least`, more where
    the floor needs more, at most `most`, and never more than four fifths, so that some are left to train on. The rest
    is divided as rows without a split are.
    """
    harmful = sum(row.kind == "harmful" for row in rows)
    most = min(most, harmful * 4 // 5)
    wanted = min(max(least, harmful // 2), most)
    while True:
        found = _holding_out(rows, wanted)
        # Few topics prove less than many, so that prompts of few topics have to be more.
        # of these rows only: they are told apart from all others already, and there may be many
        held_out = [row for row in found if (row.split, row.kind) == ("heldout", "harmful")]
        if wanted >= most or reach(held_out).reachable:
            return found
        wanted = min(most, wanted + _MORE)


def _holding_out(rows: Sequence[Row], wanted: int) -> list[Row]:
    pairs: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        pairs[row.pair_id].append(row)
    split, held = {pair: split_of(pair) for pair in pairs}, 0
    parts: dict[str, dict[str, list[Row]]] = {"by hash": {}, "alone": {}, "mixed": {}}
    for pair, own in pairs.items():
        if alone := {row.kind for row in own} == {"harmful"}:
            split[pair] = "validation" if split[pair] == "validation" else "train"
        parts["alone" if alone else "by hash" if split[pair] == "heldout" else "mixed"][pair] = own
    # Pairs with other rows come last, beyond those whose hash holds them out: repairs are learnt on these rows.
    for pair in chain.from_iterable(_in_turns(part) for part in parts.values()):
        if held < wanted:
            split[pair] = "heldout"
            held += sum(row.kind == "harmful" for row in pairs[pair])
    return [replace(row, split=split[row.pair_id]) for row in rows]


def _in_turns(pairs: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return the pairs with harmful rows, so that topics come in turns: held-out prompts of one topic prove little."""
    topics: dict[str, list[str]] = defaultdict(list)
    for pair in sorted(pairs, key=digest):
        topic = next((row.topic or "" for row in pairs[pair] if row.kind == "harmful"), None)
        if topic is not None:
            topics[topic].append(pair)
    # By hashes and not by draw: the same pairs are held out on every machine.
    turns = zip_longest(*(topics[topic] for topic in sorted(topics, key=digest)))
    return [pair for pair in chain.from_iterable(turns) if pair is not None]
