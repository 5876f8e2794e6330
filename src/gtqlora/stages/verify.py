"""The `verify` stage: before and after on held-out prompts, the safety floor, drift, and the mediation test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from gtqlora import certificate, contrasts
from gtqlora.capture import Subject, open_subject
from gtqlora.certificate import ADAPTER
from gtqlora.config import VerifyConfig
from gtqlora.contrasts import KINDS, Contrast, Row
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.edits import effects
from gtqlora.edits.adapters import read_adapter
from gtqlora.edits.drift import kl_from_original, last_logits, routing_drift
from gtqlora.edits.edited import Edited
from gtqlora.errors import ContrastError, RunError
from gtqlora.families.identity import identify
from gtqlora.floor import ledger
from gtqlora.floor.kept import blind
from gtqlora.judging import trust
from gtqlora.judging.judge import judge_of
from gtqlora.localize.expert_ablation import ablation_study
from gtqlora.progress import track
from gtqlora.results.ablation import AblationStudy
from gtqlora.results.verdict import (
    HISTORY,
    SCORES,
    VERDICT,
    HeldOut,
    Outcome,
    Verdict,
    of_kind,
    read_verdict,
    write_verdict,
)
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.scoring import Score, Switch, left_padded, score
from gtqlora.stats import Floor


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
    model = identify(config.model)
    inputs = {
        "model": model.digest,
        "contrast": fingerprint(config.contrast),
        "adapter": adapter.digest,
        "trained": fingerprint(trained),
        "judge": trust.identity(config.judge),
    }
    config = replace(config, model=model.model)  # pinned: a hub id by the commit that was hashed
    with run.stage("verify", config, inputs, device=config.device, again=again, aside=PATHS) as stage:
        stage.outputs += [VERDICT, SCORES, HISTORY]
        if stage.fresh:
            return read_verdict(run.path)
        certificate.ancestry(config.model).margin(config.margin)  # with nothing left to lose no verdict could pass
        (run / VERDICT).unlink(missing_ok=True)  # a verdict on another adapter must not outlive it
        rows = _held_out(config, trained)
        subject = open_subject(
            config.model, dtype=config.dtype, device=config.device, expert_format=config.expert_format
        )
        check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
        edited = Edited(subject, adapter, shipped=config.model)
        model.check_unchanged()
        outcomes = _score_all(config, edited, rows)
        ablation = ablation_study(
            edited.subject,
            edited.original,
            trained=contrasts.load(trained, judge_of(config.judge)),
            rows=rows.of_kind("harmful"),
            outcomes=of_kind(outcomes, "harmful"),
            judge=judge_of(config.judge),
            config=config,
        )
        verdict = _verdict(config, edited, rows, outcomes, run, inputs, ablation)
        lost = {o.number: o.lost for o in certificate.judged_again(outcomes, judge_of(config.judge))}
        run.check_held()
        write_verdict(run.path, verdict, [replace(o, lost=lost.get(o.number)) for o in outcomes])
        return verdict


def _check_made_together(run: Run, adapter: str, trained: Path) -> None:
    """The adapter and the pairs beside it are those that one stage wrote.

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


def _held_out(config: VerifyConfig, trained: Path) -> Contrast:
    judge = judge_of(config.judge)
    rows = contrasts.load(config.contrast, judge).split(config.split)
    contrasts.check_disjoint(rows, contrasts.load(trained, judge))
    missing = [kind for kind in KINDS if not rows.of_kind(kind)]
    if missing:
        raise ContrastError(
            f"{config.contrast}: split {config.split!r} has no {' and no '.join(missing)} rows; "
            "a verdict needs every kind"
        )
    return rows


def _score_all(config: VerifyConfig, edited: Edited, rows: Contrast) -> list[Outcome]:
    """Every row before and after; lookalike ones also edited with the original's routing."""
    judge = judge_of(config.judge)

    def scored(label: str, rows: Sequence[Row], routing_from: Switch | None = None) -> list[Score]:
        return score(
            edited.subject,
            rows,
            judge,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            label=label,
            routing_from=routing_from,
        )

    harmful, lookalike = rows.of_kind("harmful"), rows.of_kind("lookalike")
    with edited.original():
        before = scored("before", rows.rows)
        rejected_before = _rejected(edited.subject, harmful, config)
    after, rejected_after = scored("after", rows.rows), _rejected(edited.subject, harmful, config)
    again = {s.row.number: s.refused for s in scored("original routing replayed", lookalike, edited.original)}
    return [
        _outcome(b, a, again.get(b.row.number), rejected_before.get(b.row.number), rejected_after.get(b.row.number))
        for b, a in zip(before, after, strict=True)
    ]


def _outcome(
    before: Score, after: Score, replayed: bool | None, rejected_before: float | None, rejected_after: float | None
) -> Outcome:
    row = before.row
    return Outcome(
        number=row.number,
        kind=row.kind,
        pair_id=row.pair_id,
        topic=row.topic,
        prompt_json=json.dumps([dict(message) for message in row.prompt]),
        rejected=row.rejected,
        answer=row.answer,
        text_before=before.text,
        text_after=after.text,
        tokens_before=before.tokens,
        tokens_after=after.tokens,
        ended_before=before.ended,
        ended_after=after.ended,
        refused_before=before.refused,
        refused_after=after.refused,
        refused_replayed=replayed,
        correct_before=before.correct,
        correct_after=after.correct,
        rejected_log_prob_before=rejected_before,
        rejected_log_prob_after=rejected_after,
        lost=None,
    )


def _rejected(subject: Subject, rows: Sequence[Row], config: VerifyConfig) -> dict[int, float]:
    """Total log-probability of each row's `rejected` as the completion, in nats, by row number."""
    encoded = [contrasts.encode_row(subject.tokenizer, replace(row, chosen=row.rejected)) for row in rows]
    found: dict[int, float] = {}
    starts = range(0, len(rows), config.batch_size)
    for start in track(starts, "readiness to answer", len(starts)):
        chunk = encoded[start : start + config.batch_size]
        ids_BS, mask_BS = left_padded([p + c for p, c in chunk], subject.pad_id, subject.device)
        keep = max(len(c) for _, c in chunk) + 1
        log_BSV = last_logits(subject, ids_BS, mask_BS, keep).log_softmax(-1)
        for i, (_, completion) in enumerate(chunk):
            # what the template puts behind the completion is no part of it
            words = len(subject.tokenizer.encode(rows[start + i].rejected, add_special_tokens=False))
            tokens = torch.tensor(completion[:words], device=subject.device)
            at = log_BSV[i, -len(completion) - 1 :][: len(tokens)]
            found[rows[start + i].number] = float(at.gather(-1, tokens[:, None]).sum())
    return found


def _verdict(
    config: VerifyConfig,
    edited: Edited,
    rows: Contrast,
    outcomes: list[Outcome],
    run: Run,
    inputs: dict[str, str],
    ablation: AblationStudy | None,
) -> Verdict:
    judge = judge_of(config.judge)
    reason = blind(
        judge,
        rows.rows,
        certificate.benign_completions(outcomes, judge),
        phrases=not trust.is_code(config.judge),
    )
    harmful = certificate.judged_again(outcomes, judge)
    judged, tries = _floor(config, run, inputs, harmful, reason)
    passes = {"batch_size": config.batch_size, "seed": config.seed}
    return Verdict(
        adapter=inputs["adapter"],
        kind=edited.info.kind,
        model=config.model,
        table=effects.table(outcomes, config.level),
        floor=judged,
        kl_benign=kl_from_original(edited, rows.of_kind("benign"), **passes),
        drift={kind: routing_drift(edited, rows.of_kind(kind), **passes) for kind in KINDS},
        mediation=effects.mediation(outcomes, config.level),
        expert_format=config.expert_format,
        ablation=ablation,
        judge=inputs["judge"],
        prompts=HeldOut(source=config.contrast, fingerprint=inputs["contrast"], split=config.split),
        lost=certificate.losses(harmful),
        tries=tries,
        blind=reason,
    )


def _floor(
    config: VerifyConfig, run: Run, inputs: dict[str, str], harmful: list[Outcome], reason: str | None
) -> tuple[Floor, int]:
    """The floor, at the level for as many tries as the ledger knows, and their number; entered into the ledger."""
    entry = ledger.Entry(
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        adapter=inputs["adapter"],
        model=inputs["model"],
        contrast=inputs["contrast"],
        judge=inputs["judge"],
        shipped=certificate.unshipped(config) is None,
        decided=reason is None,
        verdict="",
        reason="",
        prompts=certificate.entry_prompts(harmful),
    )
    files = ledger.places(config.contrast, run.path)
    known = [e for file in (*files, run / HISTORY) for e in ledger.read(file)]
    tries = ledger.tries(known, entry)
    margin = certificate.ancestry(config.model).margin(config.margin)
    found = certificate.undecided(certificate.floor_of(entry.prompts, config, tries=tries, margin=margin), reason)
    entry = replace(entry, verdict=found.verdict, reason=found.reason)
    for places in (files, [ledger.of_edits(run.path), run / ledger.NAME], [run / HISTORY]):
        ledger.append(places, entry)
    return found, tries
