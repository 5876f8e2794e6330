"""The `verify` stage: before and after on held-out prompts, the safety floor, drift, and the mediation test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gtqlora import contrasts
from gtqlora.capture import open_subject
from gtqlora.certificate import ADAPTER
from gtqlora.config import VerifyConfig
from gtqlora.contrasts import KINDS, Contrast, Row
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.contrasts.wrappers import wrappers_for
from gtqlora.edits import effects
from gtqlora.edits.adapters import read_adapter
from gtqlora.edits.arms import run_arms
from gtqlora.edits.drift import drift
from gtqlora.edits.edited import Edited
from gtqlora.edits.mediation import Arms, factorial, mediation
from gtqlora.errors import ContrastError, RunError
from gtqlora.families.identity import identify
from gtqlora.floor.ancestry import ancestry
from gtqlora.floor.decision import Decision, decide
from gtqlora.floor.outcomes import harmful_prompts, losses
from gtqlora.floor.wrapped import wrapped_floor
from gtqlora.judging.judge import Judge, judge_of
from gtqlora.judging.labels import ANSWER
from gtqlora.localize.expert_ablation import ablation_study
from gtqlora.results.ablation import AblationStudy
from gtqlora.results.mediation import ARMS, ArmOutcome
from gtqlora.results.verdict import (
    HISTORY,
    SCORES,
    VERDICT,
    HeldOut,
    Outcome,
    Reply,
    Verdict,
    of_kind,
    read_verdict,
    write_verdict,
)
from gtqlora.results.wrapped import WRAPPED
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.scoring import Answer, Runner, log_probs


def verify(config: VerifyConfig, run: Run, *, again: bool = False) -> Verdict:
    """Judge the run's adapter, merged and rounded as it would ship, on held-out prompts.

    Raises:
        RunError: the run has no adapter, or not the pairs it was made from.
        ContrastError: held-out prompts were trained on, or a kind is missing.
        FloorError: earlier edits of this model used up what may be lost.
    """
    adapter = read_adapter(run.require(ADAPTER, "train"))
    trained = run.require(contrasts.FILE, "train")
    _check_made_together(run, adapter.digest, trained)
    model, judge = identify(config.model), judge_of(config.judge)
    inputs = {
        "model": model.digest,
        "contrast": fingerprint(config.contrast),
        "adapter": adapter.digest,
        "trained": fingerprint(trained),
        "judge": judge.identity,
    }
    config = replace(config, model=model.model)  # pinned: a hub id by the commit that was hashed
    with run.stage("verify", config, inputs, again=again, aside=PATHS) as stage:
        stage.outputs += [VERDICT, SCORES, WRAPPED, ARMS, HISTORY]
        if stage.fresh:
            return read_verdict(run.path)
        margin = ancestry(config.model).margin(config.margin)  # with nothing left to lose no verdict could pass
        (run / VERDICT).unlink(missing_ok=True)  # a verdict on another adapter must not outlive it
        rows, seen = _held_out(config, trained, judge)
        subject = open_subject(config)
        check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
        edited = Edited(subject, adapter, shipped=model.model)
        model.check_unchanged()
        runner = Runner.of(edited.subject, judge, config)
        outcomes = _measure(runner, edited, rows)
        wrapped = _measure_wrapped(runner, edited, rows, outcomes, config, inputs)
        ablation = ablation_study(
            runner, edited.original, seen, rows.of_kind("harmful"), of_kind(outcomes, "harmful"), config
        )
        decision = decide(config, run.path, inputs, rows=rows.rows, outcomes=outcomes, judge=judge, margin=margin)
        arms = run_arms(runner, edited, rows.rows, outcomes, limit=config.mediation_prompts, seed=config.seed)
        verdict = _verdict(config, runner, edited, rows, outcomes, arms, decision, inputs, ablation)
        lost = {o.number: o.lost for o in decision.harmful}
        second = wrapped_floor(config, wrapped, judge, tries=decision.tries, blind=decision.blind)
        verdict = replace(verdict, wrapped=second)
        run.check_held()
        write_verdict(run.path, verdict, [replace(o, lost=lost.get(o.number)) for o in outcomes], wrapped, arms)
        return verdict


def _check_made_together(run: Run, adapter: str, trained: Path) -> None:
    """Check that the adapter and the pairs beside it are those that one stage wrote.

    Raises:
        RunError: another adapter or other pairs were put there.
    """
    stages = run.manifest()["stages"]
    made = [stage for name in ("train", "project") if (stage := stages.get(name)) is not None]
    pairs = fingerprint(trained)
    if not any(stage["outputs"].get(contrasts.FILE) == pairs for stage in made):
        raise RunError(
            f"{trained}: not the pairs that the adapter was made from; run `gtqlora train` (or `project`) again"
        )
    if not any(stage["outputs"].get(ADAPTER) == fingerprint(run / ADAPTER) for stage in made):
        raise RunError(f"{run / ADAPTER}: not the adapter that was made here; run `gtqlora train` (or `project`) again")


def _held_out(config: VerifyConfig, trained: Path, judge: Judge) -> tuple[Contrast, Contrast]:
    """Return the held-out rows, and those that the edit was made from."""
    rows, seen = contrasts.load(config.contrast, judge).split(config.split), contrasts.load(trained, judge)
    contrasts.check_disjoint(rows, seen)
    missing = [kind for kind in KINDS if not rows.of_kind(kind)]
    if missing:
        raise ContrastError(
            f"{config.contrast}: split {config.split!r} has no {' and no '.join(missing)} rows; "
            "a verdict needs every kind"
        )
    return rows, seen


def _measure(runner: Runner, edited: Edited, rows: Contrast) -> list[Outcome]:
    """Ask every row before and after the edit."""
    harmful = rows.of_kind("harmful")
    with edited.original():
        before = runner.answers(rows.rows, label="before")
        ready_before = _readiness(runner, harmful)
    after, ready_after = runner.answers(rows.rows, label="after"), _readiness(runner, harmful)
    was, now = _replies(rows.rows, before, ready_before), _replies(rows.rows, after, ready_after)
    return [Outcome.of(row, b, a) for row, b, a in zip(rows.rows, was, now, strict=True)]


def _measure_wrapped(
    runner: Runner,
    edited: Edited,
    rows: Contrast,
    outcomes: Sequence[Outcome],
    config: VerifyConfig,
    inputs: Mapping[str, str],
) -> list[Outcome]:
    """Ask harmful prompts, and lookalike ones that the edit repairs, again inside every frame, before and after."""
    draw = random.Random(inputs["adapter"])  # nobody chooses which
    harmful = draw.sample(found := harmful_prompts(outcomes), min(config.wrapped_prompts, len(found)))
    repaired = [o for o in of_kind(outcomes, "lookalike") if o.refused_before and o.label_after == ANSWER]
    chosen = [*harmful, *draw.sample(repaired, min(config.wrapped_prompts, len(repaired)))]
    by_number = {row.number: row for row in rows.rows}
    asked = [
        (wrapper.name, replace(by_number[outcome.number], prompt=wrapper.around(outcome.prompt)))
        for wrapper in wrappers_for(config.model, runner.model.tokenizer)
        for outcome in chosen
    ]
    wrapped = [row for _, row in asked]
    with edited.original():
        before = runner.answers(wrapped, label="inside frames, before")
    after = runner.answers(wrapped, label="inside frames, after")
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


def _verdict(
    config: VerifyConfig,
    runner: Runner,
    edited: Edited,
    rows: Contrast,
    outcomes: list[Outcome],
    arms: list[ArmOutcome],
    decision: Decision,
    inputs: Mapping[str, str],
    ablation: AblationStudy | None,
) -> Verdict:
    drifted, ways = drift(runner, edited, rows, seed=config.seed), Arms.of(arms, outcomes, config.level)
    return Verdict(
        adapter=inputs["adapter"],
        kind=edited.info.kind,
        model=config.model,
        table=effects.table(outcomes, config.level),
        floor=decision.floor,
        kl_benign=drifted.kl_benign,
        drift=drifted.routing,
        mediation=mediation(ways),
        factorial=factorial(ways),
        expert_format=config.expert_format,
        ablation=ablation,
        judge=inputs["judge"],
        prompts=HeldOut(source=config.contrast, fingerprint=inputs["contrast"], split=config.split),
        lost=losses(decision.harmful),
        tries=decision.tries,
        blind=decision.blind,
    )
