"""The safety floor in the form that ships: a verdict on other bits says nothing of these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from gtqlora.certificate import Certificate
from gtqlora.edits.effects import table
from gtqlora.errors import FloorError
from gtqlora.exports.job import Form, Said
from gtqlora.floor.arithmetic import floor_of
from gtqlora.floor.outcomes import entry_prompts, harmful_prompts, judged_again, losses
from gtqlora.judging.judge import Judge, judge_of, refusals
from gtqlora.results.export import FormVerdict
from gtqlora.results.verdict import Outcome, of_kind
from gtqlora.scoring import is_correct

_OTHERS = 200
"""Prompts of each other kind that are asked, at most: they have no part in the floor."""


def judge_form(form: Form, certificate: Certificate, otherwise: str) -> FormVerdict:
    """Ask the held-out prompts in the form that ships, of the base and of the edit, and decide the floor on that.

    Args:
        otherwise: what may pass where this form does not, for the message.

    Raises:
        FloorError: no pass; nothing may be written in this form.
    """
    judge, chosen = judge_of(certificate.config.judge), _asked(certificate)
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
    for kind in ("lookalike", "benign"):
        rows = of_kind(certificate.outcomes, kind)
        chosen += draw.sample(rows, min(_OTHERS, len(rows)))
    return chosen


def compared(rows: Sequence[Outcome], before: Sequence[Said], after: Sequence[Said], judge: Judge) -> list[Outcome]:
    """Return rows with what was said to them before and after in their places, judged."""
    return _judged([_in_form(*each) for each in zip(rows, before, after, strict=True)], judge)


def _in_form(outcome: Outcome, before: Said, after: Said) -> Outcome:
    return replace(
        outcome,
        text_before=before.text,
        text_after=after.text,
        tokens_before=before.tokens,
        tokens_after=after.tokens,
        ended_before=before.ended,
        ended_after=after.ended,
        refused_replayed=None,
        correct_before=is_correct(outcome, before.text),
        correct_after=is_correct(outcome, after.text),
        rejected_log_prob_before=before.rejected_log_prob,
        rejected_log_prob_after=after.rejected_log_prob,
        lost=None,
    )


def _judged(outcomes: Sequence[Outcome], judge: Judge) -> list[Outcome]:
    prompts = [outcome.prompt for outcome in outcomes]
    before = refusals(judge, prompts, [outcome.text_before for outcome in outcomes])
    after = refusals(judge, prompts, [outcome.text_after for outcome in outcomes])
    return [
        replace(outcome, refused_before=was, refused_after=now)
        for outcome, was, now in zip(outcomes, before, after, strict=True)
    ]
