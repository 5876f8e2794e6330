"""The safety floor in the form that ships: a verdict on other bits says nothing of these."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from gtqlora.certificate import Certificate
from gtqlora.contrasts import Row, is_correct
from gtqlora.edits.effects import table
from gtqlora.errors import FloorError
from gtqlora.exports.job import Form, Said, frame_of
from gtqlora.floor.arithmetic import floor_of
from gtqlora.floor.outcomes import entry_prompts, harmful_prompts, judged_again, losses
from gtqlora.floor.wrapped import enough, wrapped_floor
from gtqlora.judging.judge import Judge, labels
from gtqlora.judging.pair import judges_of
from gtqlora.progress import note
from gtqlora.results.export import FormVerdict
from gtqlora.results.verdict import Outcome, Reply, of_kind

_OTHERS = 200
"""Prompts of each other kind that are asked, at most: they have no part in the floor."""
_SHARE = 0.6
"""Prompts inside frames, in share of the plain ones, from which on there are no more than are needed."""


def judge_form(form: Form, certificate: Certificate, otherwise: str) -> FormVerdict:
    """Ask the held-out prompts in the form that ships, of the base and of the edit, and decide the floor on that.

    Args:
        otherwise: what may pass where this form does not, for the message.

    Raises:
        FloorError: no pass; nothing may be written in this form.
    """
    judge = judges_of(certificate.config.judge, certificate.config.second_judge)
    plain = _asked(certificate)
    asked = [*plain, *_inside_frames(form, certificate, len(plain))]
    before, after = form.said(asked, edited=False), form.said(asked, edited=True)
    seen = compared(asked, before, after, judge)
    seen, framed = seen[: len(plain)], seen[len(plain) :]
    harmful = judged_again(of_kind(seen, "harmful"), judge)
    floor = floor_of(
        entry_prompts(harmful),
        certificate.config,
        tries=certificate.tries,
        margin=certificate.margin,
        blind=certificate.verdict.blind,
    )
    wrapped = wrapped_floor(certificate.config, framed, judge, tries=certificate.tries, blind=certificate.verdict.blind)
    for where, found in (("", floor), (" inside plain frames", wrapped)):
        if found.verdict != "pass":
            raise FloorError(
                f"{form.name}: the safety floor's verdict{where} in the form that would ship is {found.verdict!r} "
                f"({found.reason}); nothing was written. {otherwise}"
            )
    return FormVerdict(
        name=form.name,
        floor=floor,
        lost=losses(harmful),
        table=table(seen, certificate.config.level),
        wrapped=wrapped,
    )


def _asked(certificate: Certificate) -> list[Outcome]:
    """Return every harmful prompt, and some others that the edit's tensors draw, so that nobody chooses them."""
    draw, chosen = random.Random(certificate.adapter.drawn_by), harmful_prompts(certificate.outcomes)
    # each draw leaves the next as it was: kinds that come later move nothing
    for kind in ("lookalike", "benign", "instructed"):
        rows = of_kind(certificate.outcomes, kind)
        chosen += draw.sample(rows, min(_OTHERS, len(rows)))
    return chosen


def _inside_frames(form: Form, certificate: Certificate, plain: int) -> list[Outcome]:
    """Return harmful prompts inside every frame of `verify`, the same ones in each.

    Fewer than there where they would be more than `_SHARE` of the plain ones, but no fewer than would pass.
    """
    rows = of_kind(certificate.framed, "harmful")
    frames, numbers = len({row.wrapper for row in rows}), sorted({row.number for row in rows})
    # by the edit, so that nobody chooses which
    order = random.Random(certificate.adapter.drawn_by).sample(numbers, len(numbers))
    least = _holding(certificate, rows, order)
    count = min(len(order), max(math.ceil(_SHARE * plain / max(1, frames)), least))
    if count < len(order):
        note(f"{form.name}: inside frames {count:,} of {len(order):,} harmful prompts are asked, in each of {frames}")
    chosen = set(order[:count])
    return [row for row in rows if row.number in chosen]


def _holding(certificate: Certificate, rows: Sequence[Outcome], order: Sequence[int]) -> int:
    """Return how many prompts, in this order, hold `enough` refused ones in each frame that has so many."""
    found = certificate.wrapped
    least, decisive = enough(found, len(order)), {row.name for row in found.wrappers if row.verdict == "pass"}
    refused: dict[str, set[int]] = {name: set() for name in decisive}
    for row in rows:
        if row.refused_before and row.wrapper in refused:
            refused[row.wrapper].add(row.number)
    places = [[i for i, number in enumerate(order, start=1) if number in own] for own in refused.values()]
    return max((place[:least][-1] for place in places if place), default=0)


def compared(
    rows: Sequence[Row | Outcome], before: Sequence[Said], after: Sequence[Said], judge: Judge
) -> list[Outcome]:
    """Return rows with what was said to them before and after, judged."""
    replies = zip(rows, _replies(rows, before, judge), _replies(rows, after, judge), strict=True)
    return [Outcome.of(row, was, now, frame_of(row)) for row, was, now in replies]


def _replies(rows: Sequence[Row | Outcome], said: Sequence[Said], judge: Judge) -> list[Reply]:
    found = labels(judge, [row.prompt for row in rows], [each.text for each in said])
    return [
        Reply(
            text=each.text,
            tokens=each.tokens,
            ended=each.ended,
            label=label,
            correct=is_correct(row, each.text),
            rejected_log_prob=each.rejected_log_prob,
        )
        for row, each, label in zip(rows, said, found, strict=True)
    ]
