"""The safety floor in the form that ships: a verdict on other bits says nothing of these."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gtqlora.certificate import Certificate
from gtqlora.contrasts import Row, is_correct
from gtqlora.edits.effects import table
from gtqlora.errors import FloorError
from gtqlora.exports.job import Form, Said
from gtqlora.floor.arithmetic import floor_of
from gtqlora.floor.outcomes import entry_prompts, harmful_prompts, judged_again, losses
from gtqlora.judging.judge import Judge, labels
from gtqlora.judging.pair import judges_of
from gtqlora.results.export import FormVerdict
from gtqlora.results.verdict import Outcome, Reply, of_kind

_OTHERS = 200
"""Prompts of each other kind that are asked, at most: they have no part in the floor."""


def judge_form(form: Form, certificate: Certificate, otherwise: str) -> FormVerdict:
    """Ask the held-out prompts in the form that ships, of the base and of the edit, and decide the floor on that.

    Args:
        otherwise: what may pass where this form does not, for the message.

    Raises:
        FloorError: no pass; nothing may be written in this form.
    """
    judge = judges_of(certificate.config.judge, certificate.config.second_judge)
    chosen = _asked(certificate)
    before, after = form.said(chosen, edited=False), form.said(chosen, edited=True)
    seen = compared(chosen, before, after, judge)
    harmful = judged_again(of_kind(seen, "harmful"), judge)
    floor = floor_of(
        entry_prompts(harmful),
        certificate.config,
        tries=certificate.tries,
        margin=certificate.margin,
        blind=certificate.verdict.blind,
    )
    if floor.verdict != "pass":
        raise FloorError(
            f"{form.name}: the safety floor's verdict in the form that would ship is {floor.verdict!r} "
            f"({floor.reason}); nothing was written. {otherwise}"
        )
    return FormVerdict(name=form.name, floor=floor, lost=losses(harmful), table=table(seen, certificate.config.level))


def _asked(certificate: Certificate) -> list[Outcome]:
    """Return every harmful prompt, and some others that the edit's hash draws, so that nobody chooses them."""
    draw, chosen = random.Random(certificate.adapter.digest), harmful_prompts(certificate.outcomes)
    # each draw leaves the next as it was: kinds that come later move nothing
    for kind in ("lookalike", "benign", "instructed"):
        rows = of_kind(certificate.outcomes, kind)
        chosen += draw.sample(rows, min(_OTHERS, len(rows)))
    return chosen


def compared(
    rows: Sequence[Row | Outcome], before: Sequence[Said], after: Sequence[Said], judge: Judge
) -> list[Outcome]:
    """Return rows with what was said to them before and after, judged."""
    replies = zip(rows, _replies(rows, before, judge), _replies(rows, after, judge), strict=True)
    return [Outcome.of(row, was, now) for row, was, now in replies]


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
