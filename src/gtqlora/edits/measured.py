"""What an edit does on held-out prompts, in texts: before and after, inside frames, in every arm. Decides nothing.

Texts are kept with what judges say of them, so that another judge can read them without the model: see `judged_by`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gtqlora.config import VerifyConfig
from gtqlora.contrasts import Contrast, Row
from gtqlora.contrasts.wrappers import Wrapper
from gtqlora.edits.arms import rejudged, run_arms
from gtqlora.edits.drift import Drifted, drift
from gtqlora.edits.edited import Edited
from gtqlora.floor.outcomes import harmful_prompts
from gtqlora.judging.judge import NamedJudge
from gtqlora.judging.labels import ANSWER
from gtqlora.localize.expert_ablation import ablation_study
from gtqlora.results.ablation import AblationStudy
from gtqlora.results.mediation import ArmOutcome
from gtqlora.results.served import ServedPair
from gtqlora.results.verdict import Outcome, Reply, of_kind
from gtqlora.scoring import Answer, Runner, Speaker, log_probs


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything that takes the model.

    Attributes:
        outcomes: of the held-out rows, before and after.
        wrapped: of harmful rows, and of lookalike rows that the edit repairs, inside every frame.
        arms: of drawn rows with parts of the edit, or another routing.
        ablation: None if it was switched off, or if another judge reads the texts: those of an ablation are not kept.
        ablation_left_out: why there is none any more; None where nothing was left out.
        served: the models of a server that gave the plain answers; None where the model here did.
    """

    outcomes: list[Outcome]
    wrapped: list[Outcome]
    arms: list[ArmOutcome]
    drifted: Drifted
    ablation: AblationStudy | None
    ablation_left_out: str | None = None
    served: ServedPair | None = None


@dataclass(frozen=True, kw_only=True)
class Speakers:
    """What gives the plain answers in place of the model here, before the edit and after it."""

    before: Speaker
    after: Speaker
    pair: ServedPair


def measure(
    runner: Runner,
    edited: Edited,
    rows: Contrast,
    seen: Contrast,
    config: VerifyConfig,
    *,
    frames: Sequence[Wrapper],
    speakers: Speakers | None = None,
) -> Measured:
    """Ask held-out prompts of the original and of the edited model.

    Args:
        runner: of the edited model.
        seen: what the edit was made from.
        frames: what harmful prompts are asked inside of, too.
        speakers: give plain answers; what needs a look inside, the model here is asked all the same.
    """
    voices = _Voices.of(runner, speakers)
    outcomes, harmful = _asked(voices, edited, rows), rows.of_kind("harmful")
    limit = config.mediation_prompts
    return Measured(
        outcomes=outcomes,
        wrapped=_asked_in_frames(voices, edited, rows, outcomes, frames, config.wrapped_prompts),
        ablation=ablation_study(runner, edited.original, seen, harmful, of_kind(outcomes, "harmful"), config),
        arms=run_arms(runner, edited, rows.rows, outcomes, limit=limit, seed=config.seed) if limit else [],
        drifted=drift(runner, edited, rows, seed=config.seed),
        served=None if speakers is None else speakers.pair,
    )


def judged_by(judge: NamedJudge, found: Measured) -> Measured:
    """Return the same with every text judged again."""
    outcomes = relabelled(found.outcomes, judge)
    return replace(
        found,
        outcomes=outcomes,
        wrapped=relabelled(found.wrapped, judge),
        arms=rejudged(judge, found.arms, outcomes),
    )


def relabelled(outcomes: Sequence[Outcome], judge: NamedJudge) -> list[Outcome]:
    """Return outcomes with what a judge, or two together, say of their texts."""
    prompts = [outcome.prompt for outcome in outcomes]
    before = judge.labels_by(prompts, [outcome.text_before for outcome in outcomes])
    after = judge.labels_by(prompts, [outcome.text_after for outcome in outcomes])
    return [
        replace(
            outcome,
            label_before=judge.joint(was),
            label_after=judge.joint(now),
            said_before=list(was) if len(was) > 1 else [],
            said_after=list(now) if len(now) > 1 else [],
        )
        for outcome, was, now in zip(outcomes, before, after, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Voices:
    """What is asked before the edit, which is out of the way then, and after it."""

    before: Runner
    after: Runner

    @staticmethod
    def of(runner: Runner, speakers: Speakers | None) -> _Voices:
        if speakers is None:
            return _Voices(before=runner, after=runner)
        return _Voices(before=replace(runner, speaker=speakers.before), after=replace(runner, speaker=speakers.after))


def _asked(voices: _Voices, edited: Edited, rows: Contrast) -> list[Outcome]:
    """Ask every row before and after the edit."""
    harmful = rows.of_kind("harmful")
    with edited.original():
        before = voices.before.answers(rows.rows, label="before")
        ready_before = _readiness(voices.before, harmful)
    after, ready_after = voices.after.answers(rows.rows, label="after"), _readiness(voices.after, harmful)
    was, now = _replies(rows.rows, before, ready_before), _replies(rows.rows, after, ready_after)
    return [Outcome.of(row, b, a) for row, b, a in zip(rows.rows, was, now, strict=True)]


def _asked_in_frames(
    voices: _Voices,
    edited: Edited,
    rows: Contrast,
    outcomes: Sequence[Outcome],
    frames: Sequence[Wrapper],
    most: int,
) -> list[Outcome]:
    """Ask harmful prompts, and lookalike ones that the edit repairs, again inside every frame, before and after."""
    draw = random.Random(edited.drawn_by)  # by the edit, so that nobody chooses which
    harmful = draw.sample(found := harmful_prompts(outcomes), min(most, len(found)))
    repaired = [o for o in of_kind(outcomes, "lookalike") if o.refused_before and o.label_after == ANSWER]
    chosen = [*harmful, *draw.sample(repaired, min(most, len(repaired)))]
    by_number = {row.number: row for row in rows.rows}
    asked = [
        (wrapper.name, replace(by_number[outcome.number], prompt=wrapper.around(outcome.prompt)))
        for wrapper in frames
        for outcome in chosen
    ]
    wrapped = [row for _, row in asked]
    with edited.original():
        before = voices.before.answers(wrapped, label="inside frames, before")
    after = voices.after.answers(wrapped, label="inside frames, after")
    replies = zip(asked, _replies(wrapped, before, {}), _replies(wrapped, after, {}), strict=True)
    return [Outcome.of(row, was, now, name) for (name, row), was, now in replies]


def _readiness(runner: Runner, rows: Sequence[Row]) -> dict[int, float]:
    """Return the log-probability of each row's `rejected` as the completion, by row number."""
    found = log_probs(runner, rows, [row.rejected for row in rows], label="readiness to answer")
    return dict(zip([row.number for row in rows], found, strict=True))


def _replies(rows: Sequence[Row], answers: Sequence[Answer], ready: Mapping[int, float]) -> list[Reply]:
    return [
        Reply(
            text=answer.text,
            tokens=answer.length,
            ended=answer.ended,
            label=answer.label,
            correct=answer.correct,
            rejected_log_prob=ready.get(row.number),
        )
        for row, answer in zip(rows, answers, strict=True)
    ]
