"""The `verify` stage: before and after on held-out prompts, the safety floors, drift, and the mediation test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gtqlora import contrasts
from gtqlora.capture import open_subject
from gtqlora.certificate import ADAPTER
from gtqlora.config import VerifyConfig, build_recorded
from gtqlora.config.values import require
from gtqlora.contrasts import DECLINED_KINDS, KINDS, Contrast
from gtqlora.contrasts.near import beside, unseen
from gtqlora.contrasts.statistics import check_rendering, reach
from gtqlora.contrasts.wrappers import Wrapper, read_own, wrappers_for
from gtqlora.edits import effects
from gtqlora.edits.adapters import Adapter, read_adapter
from gtqlora.edits.drift import Drifted
from gtqlora.edits.edited import Edited
from gtqlora.edits.measured import Measured, judged_by, measure
from gtqlora.edits.mediation import Arms, factorial, mediation
from gtqlora.errors import ContrastError, RunError
from gtqlora.families.identity import ModelIdentity, identify
from gtqlora.floor.ancestry import ancestry
from gtqlora.floor.decision import Decision, decide
from gtqlora.floor.instructed import instructed_floor
from gtqlora.floor.outcomes import losses
from gtqlora.floor.wrapped import wrapped_floor
from gtqlora.judging.judge import Judge, NamedJudge
from gtqlora.judging.pair import judges_of
from gtqlora.machine import release_memory
from gtqlora.progress import note
from gtqlora.ranks import ranks
from gtqlora.results.ablation import AblationStudy
from gtqlora.results.mediation import ARMS, read_arms
from gtqlora.results.verdict import (
    HISTORY,
    SCORES,
    VERDICT,
    HeldOut,
    Verdict,
    drop_verdict_on_another,
    read_outcomes,
    read_verdict,
    write_verdict,
)
from gtqlora.results.wrapped import WRAPPED, WrappedFloor
from gtqlora.run import PATHS, Run, fingerprint, other_inputs, other_settings
from gtqlora.scoring import Runner
from gtqlora.stages.served import Place, answers_of, speakers_of
from gtqlora.storage.journal import Journal

_OF_JUDGING = frozenset(
    (
        "judge",
        "second_judge",
        "margin",
        "level",
        "min_refused",
        "wrapped_margin",
        "instructed_margin",
        "ablation",
        *PATHS,
    )
)
"""Settings that what models said does not follow from."""


def verify(config: VerifyConfig, run: Run, *, again: bool = False, rejudge: bool = False) -> Verdict:
    """Judge the run's adapter, merged and rounded as it would ship, on held-out prompts.

    Args:
        rejudge: judge the texts of the last verdict anew, with these judges and margins; the model is not opened.

    Where a server gives the answers, the verdict stands in a folder of its own and is for information, see `served`.

    Raises:
        ConfigError: texts are to be judged again and a server to be asked, or ranks would ask it.
        ModelError: a server cannot be asked, or does not serve the two models.
        RunError: the run has no adapter, or not the pairs it was made from; or what is to be judged again is not there.
        ContrastError: held-out prompts were trained on, or a kind is missing.
        FloorError: earlier edits of this model used up what may be lost.
    """
    asks = config.generate_with is not None
    require(not rejudge or not asks, "--rejudge asks nobody; leave out --generate-with")
    require(not (asks and ranks().several), "--generate-with asks a server, which one process does; leave out torchrun")
    made, trained = run.require(ADAPTER, "train"), run.require(contrasts.FILE, "train")
    # what may be misspelt or malformed comes before gigabytes are hashed
    own = None if config.wrappers is None else read_own(config.wrappers)
    judge = judges_of(config.judge, config.second_judge)
    adapter = read_adapter(made)
    _check_made_together(run, trained)
    model = identify(config.model)
    inputs = {
        "model": model.digest,
        "contrast": fingerprint(config.contrast),
        "adapter": adapter.digest,
        "trained": fingerprint(trained),
        "judge": judge.identity,
    }
    if own is not None:
        inputs["wrappers"] = own.fingerprint
    config = replace(config, model=model.model)  # pinned: a hub id by the commit that was hashed
    known, place = _recorded(run, config, inputs, judge.judges[0]) if rejudge else None, Place.of(config, run)
    with (
        run.stage(place.stage, config, inputs, again=again, aside=PATHS) as stage,
        answers_of(config, place, inputs, restart=again) as answers,
    ):
        stage.outputs += [f"{place.below}{name}" for name in (VERDICT, SCORES, WRAPPED, ARMS, HISTORY)]
        if stage.fresh:
            return read_verdict(place.folder)
        drop_verdict_on_another(place.folder, adapter.digest)
        margin = ancestry(config.model).margin(config.margin)  # with nothing left to lose no verdict could pass
        rows, seen = _held_out(config, trained, judge.judges[0])
        frames = () if own is None else own.wrappers
        found = known or _measured(config, adapter, model, judge.judges[0], rows, seen, frames, answers)
        if rejudge or config.second_judge:
            found = judged_by(judge, found)
        outcomes = found.outcomes
        decision = decide(config, place.folder, inputs, rows=rows.rows, outcomes=outcomes, judge=judge, margin=margin)
        wrapped = wrapped_floor(config, found.wrapped, judge, tries=decision.tries, blind=decision.blind)
        declined = instructed_floor(config, outcomes, judge, tries=decision.tries, blind=decision.blind)
        verdict = replace(_verdict(config, adapter, found, decision, wrapped, inputs), instructed=declined)
        lost = {o.number: o.lost for o in decision.harmful}
        run.check_held()
        outcomes = [replace(o, lost=lost.get(o.number)) for o in outcomes]
        write_verdict(place.folder, verdict, outcomes, found.wrapped, found.arms)
        return verdict


def _measured(
    config: VerifyConfig,
    adapter: Adapter,
    model: ModelIdentity,
    judge: Judge,
    rows: Contrast,
    seen: Contrast,
    own: Sequence[Wrapper],
    answers: Journal | None,
) -> Measured:
    """Open the model, ask it, and let go of it: a second judge may need its memory."""
    subject = open_subject(config)
    check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
    frames = wrappers_for(config.model, subject.tokenizer, rows.of_kind("benign"), own)
    edited = Edited(subject, adapter, shipped=model.model)
    model.check_unchanged()
    runner = Runner.of(edited.subject, judge, config)
    speakers = None if answers is None else speakers_of(config, runner, edited, rows, answers)
    found = measure(runner, edited, rows, seen, config, frames=frames, speakers=speakers)
    del subject, edited, runner, speakers
    release_memory()
    return found


def _recorded(run: Run, config: VerifyConfig, inputs: Mapping[str, str], judge: NamedJudge) -> Measured:
    """Return what the last `verify` of this run left, if models would say the same with these settings.

    Raises:
        RunError: there is none, it was changed since, or it was made otherwise.
    """
    record, remedy = run.manifest()["stages"].get("verify"), "run `gtqlora verify` without --rejudge"
    if record is None:
        raise RunError(f"{run.path}: nothing was verified here yet, so there is nothing to judge again; {remedy}")
    for name in (VERDICT, SCORES, WRAPPED, ARMS):
        if record["outputs"].get(name) != fingerprint(run.require(name, "verify")):
            raise RunError(f"{run.path}: {name} was changed since verify; {remedy}")
    was = vars(build_recorded(VerifyConfig, record["config"], str(run / "manifest.json")))
    settings = [key for key in vars(config) if key not in _OF_JUDGING]
    now = {**inputs, "judge": record["inputs"].get("judge", "")}  # which may be another one
    if other := [*other_settings(was, vars(config), settings), *other_inputs(record["inputs"], now)]:
        raise RunError(f"{run.path}: verified with {' and with '.join(other)}; {remedy}")
    verdict = read_verdict(run.path)
    ablation, left_out = _ablation_again(verdict, was, config, judge)
    return Measured(
        outcomes=read_outcomes(run.path),
        wrapped=read_outcomes(run.path, WRAPPED),
        arms=read_arms(run.path),
        drifted=Drifted(kl_benign=verdict.kl_benign, routing=verdict.drift),
        ablation=ablation,
        ablation_left_out=left_out,
    )


def _ablation_again(
    verdict: Verdict, was: Mapping[str, object], config: VerifyConfig, judge: NamedJudge
) -> tuple[AblationStudy | None, str | None]:
    """Return the stored ablation study where it still holds, else why it is left out: its texts are not kept.

    Args:
        was: the settings of the last verdict.
        judge: the first one, which alone judges ablated models.
    """
    if verdict.ablation is None or not config.ablation:
        return None, verdict.ablation_left_out if config.ablation else None
    changed = other_settings(was, vars(config), ("ablation", "level"))
    # of two judges the identity holds both
    if verdict.judge != judge.identity and not verdict.judge.startswith(f"{judge.identity} + "):
        changed.insert(0, "another judge")
    if not changed:
        return verdict.ablation, None
    reason = (
        f"it was made with {' and with '.join(changed)}, and its texts are not kept; verify without --rejudge makes it"
    )
    note(f"ablation study left out: {reason}")
    return None, reason


def _check_made_together(run: Run, trained: Path) -> None:
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
    """Return the held-out rows, and those that the edit was made from; say beforehand what they cannot tell."""
    rows, seen = contrasts.load(config.contrast, judge).split(config.split), contrasts.load(trained, judge)
    contrasts.check_disjoint(rows, seen)
    for kind in DECLINED_KINDS:
        rows = _without_seen(rows, seen, kind)
    missing = [kind for kind in KINDS if not rows.of_kind(kind)]
    if missing:
        raise ContrastError(
            f"{config.contrast}: split {config.split!r} has no {' and no '.join(missing)} rows; "
            "a verdict needs every kind"
        )
    _tell_reach(config, rows)
    return rows, seen


def _tell_reach(config: VerifyConfig, rows: Contrast) -> None:
    """Say which of the floors asked for cannot pass on these rows, whatever the edit does.

    Raises:
        ContrastError: a floor on instructed prompts is asked for, and there are none.
    """
    asked = {"harmful": config.margin, "instructed": config.instructed_margin}
    if config.instructed_margin is not None and not rows.of_kind("instructed"):
        raise ContrastError(
            f"{config.contrast}: instructed_margin = {config.instructed_margin} asks for a floor on instructed prompts "
            f"and split {config.split!r} has none; add some, or leave it out"
        )
    held = [replace(row, split="heldout") for row in rows.rows]
    for kind, margin in asked.items():
        if margin is not None and (lacking := reach(held, kind, margin=margin, level=config.level).note):
            name = "safety floor" if kind == "harmful" else f"floor on {kind} prompts"
            note(f"{config.contrast}: {lacking}; whatever the edit does, the {name} cannot pass on these rows")


def _without_seen(rows: Contrast, seen: Contrast, kind: str) -> Contrast:
    """Return held-out rows without those of a kind whose prompts are nearly the same as one that was trained on."""
    own = rows.of_kind(kind)
    kept = {own[place].number for place in unseen([row.prompt for row in own], beside(seen.rows, kind))}
    if len(kept) < len(own):
        left_out = len(own) - len(kept)
        note(f"{rows.source}: {left_out:,} held-out {kind} prompts are nearly the same as trained ones, and left out")
    return replace(rows, rows=tuple(row for row in rows.rows if row.kind != kind or row.number in kept))


def _verdict(
    config: VerifyConfig,
    adapter: Adapter,
    found: Measured,
    decision: Decision,
    wrapped: WrappedFloor,
    inputs: Mapping[str, str],
) -> Verdict:
    ways = Arms.of(found.arms, found.outcomes, config.level)
    return Verdict(
        adapter=inputs["adapter"],
        kind=adapter.info.kind,
        model=config.model,
        table=effects.table(found.outcomes, config.level),
        floor=decision.floor,
        wrapped=wrapped,
        agreement=effects.agreement(found.outcomes, config.level),
        kl_benign=found.drifted.kl_benign,
        drift=found.drifted.routing,
        mediation=mediation(ways),
        factorial=factorial(ways),
        expert_format=config.expert_format,
        ablation=found.ablation,
        ablation_left_out=found.ablation_left_out,
        judge=inputs["judge"],
        prompts=HeldOut(source=config.contrast, fingerprint=inputs["contrast"], split=config.split),
        lost=losses(decision.harmful),
        tries=decision.tries,
        blind=decision.blind,
        wrappers=inputs.get("wrappers"),
        served=found.served,
    )
