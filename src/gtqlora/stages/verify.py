"""The `verify` stage: before and after on held-out prompts, the safety floor, drift, and the mediation test."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gtqlora import contrasts, routing
from gtqlora.capture import Recorder, Subject, open_subject, router_hooks
from gtqlora.certificate import ADAPTER
from gtqlora.config import VerifyConfig, is_code
from gtqlora.contrasts import KINDS, Contrast, Row
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.edits.adapters import read_adapter
from gtqlora.edits.edited import Edited
from gtqlora.errors import ContrastError, RunError
from gtqlora.families.identity import identify
from gtqlora.floor import ledger
from gtqlora.floor.ancestry import ancestry
from gtqlora.floor.arithmetic import floor_of, tries
from gtqlora.floor.kept import blind
from gtqlora.floor.outcomes import benign_completions, entry_prompts, judged_again, losses
from gtqlora.floor.shipped import unshipped
from gtqlora.judging.judge import Judge, judge_of
from gtqlora.localize.expert_ablation import AblationCurve, plan, rank
from gtqlora.progress import track
from gtqlora.results.verdict import HISTORY, SCORES, VERDICT, Outcome, Verdict, read_verdict, write_verdict
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.scoring import Score, Switch, batches, left_padded, score
from gtqlora.stats import Floor, benjamini_hochberg, bootstrap_mean, mcnemar, paired_difference, rate


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
    with run.stage("verify", config, inputs, device=config.device, again=again, aside=PATHS) as stage:
        stage.outputs += [VERDICT, SCORES, HISTORY]
        if stage.fresh:
            return read_verdict(run)
        ancestry(config.model).margin(config.margin)  # with nothing left to lose no verdict could pass
        (run / VERDICT).unlink(missing_ok=True)  # a verdict on another adapter must not outlive it
        rows, seen = _held_out(config, trained, judge)
        subject = open_subject(config)
        check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
        edited = Edited(subject, adapter, shipped=config.model)
        model.check_unchanged()
        outcomes = _score_all(config, edited, rows, judge)
        ablation = _ablation(config, edited, seen, rows, outcomes, judge)
        verdict = _verdict(config, edited, rows, outcomes, run, inputs, ablation, judge)
        lost = {o.number: o.lost for o in judged_again(outcomes, judge)}
        write_verdict(run, verdict, [replace(o, lost=lost.get(o.number)) for o in outcomes])
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


def _held_out(config: VerifyConfig, trained: Path, judge: Judge) -> tuple[Contrast, Contrast]:
    """Return the held-out rows and those that were trained on."""
    rows, seen = contrasts.load(config.contrast, judge).split(config.split), contrasts.load(trained, judge)
    contrasts.check_disjoint(rows, seen)
    missing = [kind for kind in KINDS if not rows.of_kind(kind)]
    if missing:
        raise ContrastError(
            f"{config.contrast}: split {config.split!r} has no {' and no '.join(missing)} rows; "
            "a verdict needs every kind"
        )
    return rows, seen


def _score_all(config: VerifyConfig, edited: Edited, rows: Contrast, judge: Judge) -> list[Outcome]:
    """Every row before and after; lookalike ones also edited with the original's routing."""

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
        ids_BS, mask_BS = _padded(subject, [p + c for p, c in chunk])
        keep = max(len(c) for _, c in chunk) + 1
        log_BSV = _logits(subject, ids_BS, mask_BS, keep).log_softmax(-1)
        for i, (_, completion) in enumerate(chunk):
            # what the template puts behind the completion is no part of it
            words = len(subject.tokenizer.encode(rows[start + i].rejected, add_special_tokens=False))
            tokens = torch.tensor(completion[:words], device=subject.device)
            at = log_BSV[i, -len(completion) - 1 :][: len(tokens)]
            found[rows[start + i].number] = float(at.gather(-1, tokens[:, None]).sum())
    return found


def _of_kind(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.kind == kind]


def _verdict(
    config: VerifyConfig,
    edited: Edited,
    rows: Contrast,
    outcomes: list[Outcome],
    run: Run,
    inputs: dict[str, str],
    ablation: dict[str, Any],
    judge: Judge,
) -> Verdict:
    table = {kind: _table_row(_of_kind(outcomes, kind), config.level) for kind in KINDS}
    for kind, q in zip(KINDS, benjamini_hochberg([table[kind]["p"] for kind in KINDS]), strict=True):
        table[kind]["q"] = float(q)
    reason = blind(judge, rows.rows, benign_completions(outcomes, judge), phrases=not is_code(config.judge))
    harmful = judged_again(outcomes, judge)
    judged, count = _floor(config, run, inputs, harmful, reason)
    return Verdict(
        adapter=inputs["adapter"],
        kind=edited.info.kind,
        model=config.model,
        table=table,
        floor=asdict(judged),
        kl_benign=_interval(_kl(edited, rows.of_kind("benign"), config), config.seed),
        drift={kind: _drift(edited, rows.of_kind(kind), config) for kind in KINDS},
        mediation=_mediation(_of_kind(outcomes, "lookalike"), config.level),
        expert_format=config.expert_format,
        ablation=ablation,
        judge=inputs["judge"],
        prompts={"source": config.contrast, "fingerprint": inputs["contrast"], "split": config.split},
        lost=losses(harmful),
        tries=count,
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
        shipped=unshipped(config) is None,
        decided=reason is None,
        verdict="",
        reason="",
        prompts=entry_prompts(harmful),
    )
    files = ledger.places(config.contrast, run.path)
    known = [e for file in (*files, run / HISTORY) for e in ledger.read(file)]
    count = tries(known, entry)
    margin = ancestry(config.model).margin(config.margin)
    found = floor_of(entry.prompts, config, tries=count, margin=margin, blind=reason)
    entry = replace(entry, verdict=found.verdict, reason=found.reason)
    for places in (files, [ledger.of_edits(run.path), run / ledger.NAME], [run / HISTORY]):
        ledger.append(places, entry)
    return found, count


_Measured = tuple[AblationCurve, list[bool], list[bool]]


def _ablation(
    config: VerifyConfig, edited: Edited, trained: Contrast, rows: Contrast, outcomes: list[Outcome], judge: Judge
) -> dict[str, Any]:
    """On how few experts refusal of held-out harmful prompts hangs, before and after the edit.

    Experts are ranked on the rows that were trained on. `before` and `after` ablate the same ones, ranked in the
    original; `after_reranked` those that an adversary would rank first in the edited model. Empty if switched off, or
    if those rows cannot rank experts.
    """
    subject = edited.subject
    limits = {"prompts": config.ablation_prompts, "batch_size": config.batch_size, "seed": config.seed}
    with edited.original():
        original = rank(subject, trained, **limits) if config.ablation else None
    again = rank(subject, trained, **limits) if original else None
    if original is None or again is None:
        return {}
    bench, before, after = _bench(config, subject, rows, outcomes, judge)
    same = plan(original, most=config.ablation, controls=config.ablation_controls, seed=config.seed)
    anew = plan(again, most=config.ablation, controls=0, seed=config.seed)
    with edited.original():
        curves = {"before": bench.curve(same, before, "before")}
    curves["after"] = bench.curve(same, after, "after")
    curves["after_reranked"] = bench.curve(anew, after, "after, ranked anew")
    layers = [layer.index for layer in subject.anatomy.moe]
    most = curves["before"][-1].ablated
    return {
        "ranked_against": original.against,
        "ranked_prompts": original.prompts,
        "controls": config.ablation_controls,
        "experts": [{"layer": layers[position], "expert": expert} for position, expert in original.order[:most]],
        **{name: [asdict(point) for point in points] for name, points in curves.items()},
    }


def _bench(config: VerifyConfig, subject: Subject, rows: Contrast, outcomes: list[Outcome], judge: Judge) -> _Measured:
    """At most `ablation_prompts` of the held-out harmful prompts, drawn, and their refusals before and after."""
    harmful, said = rows.of_kind("harmful"), _of_kind(outcomes, "harmful")
    count = min(config.ablation_prompts, len(harmful))
    drawn = sorted(random.Random(config.seed).sample(range(len(harmful)), count))
    bench = AblationCurve(
        subject=subject,
        rows=[harmful[i] for i in drawn],
        judge=judge,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        level=config.level,
    )
    return bench, [said[i].refused_before for i in drawn], [said[i].refused_after for i in drawn]


def _table_row(outcomes: Sequence[Outcome], level: float) -> dict[str, Any]:
    groups = contrasts.groupings(outcomes)[-1]  # topics where the rows carry them, else pairs
    old, new = [o.refused_before for o in outcomes], [o.refused_after for o in outcomes]
    replayed = [o.refused_replayed for o in outcomes if o.refused_replayed is not None]
    return {
        "refusal_before": rate(old, level, groups).to_json(),
        "refusal_after": rate(new, level, groups).to_json(),
        "refusal_replayed": rate(replayed, level, groups).to_json() if replayed else None,
        "drop": paired_difference(old, new, level, groups).to_json(),
        "p": mcnemar(old, new),
        "accuracy_before": _accuracy([(o.correct_before, g) for o, g in zip(outcomes, groups, strict=True)], level),
        "accuracy_after": _accuracy([(o.correct_after, g) for o, g in zip(outcomes, groups, strict=True)], level),
    }


def _accuracy(correct: Sequence[tuple[bool | None, str]], level: float) -> dict[str, Any] | None:
    known = [(right, group) for right, group in correct if right is not None]
    return rate([right for right, _ in known], level, [group for _, group in known]).to_json() if known else None


def _mediation(lookalike: Sequence[Outcome], level: float) -> dict[str, Any]:
    """Of lookalike prompts refused before and answered after, how many are refused again under the old routing."""
    repaired = [o for o in lookalike if o.refused_before and not o.refused_after]
    back = [bool(o.refused_replayed) for o in repaired]
    found = rate(back, level, contrasts.groupings(repaired)[-1] if repaired else None)
    return found.to_json() if back else {"value": None, "low": found.low, "high": found.high, "n": 0}


def _interval(values: Sequence[float], seed: int) -> dict[str, Any]:
    return bootstrap_mean(np.array(values), seed=seed).to_json()


def _padded(subject: Subject, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    pad = subject.pad_id
    return left_padded(tokens, pad, subject.device)


@torch.no_grad()
def _logits(subject: Subject, ids_BS: Tensor, mask_BS: Tensor, keep: int, recorder: Recorder | None = None) -> Tensor:
    """Logits of the last `keep` positions, in fp32."""
    handlers = () if recorder is None else (recorder,)
    with router_hooks(subject.model, subject.anatomy, *handlers):
        return subject.model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=keep,
        ).logits.float()


def _kl(edited: Edited, rows: Sequence[Row], config: VerifyConfig) -> list[float]:
    """Per row: mean over the chosen completion's tokens of KL(original || edited) of the next-token distribution."""
    subject, out = edited.subject, []
    encoded = [contrasts.encode_row(subject.tokenizer, row) for row in rows]
    starts = range(0, len(rows), config.batch_size)
    for start in track(starts, "KL on benign", len(starts)):
        chunk = encoded[start : start + config.batch_size]
        ids_BS, mask_BS = _padded(subject, [p + c for p, c in chunk])
        keep = max(len(c) for _, c in chunk) + 1
        with edited.original():
            old_BSV = _logits(subject, ids_BS, mask_BS, keep).log_softmax(-1)
        new_BSV = _logits(subject, ids_BS, mask_BS, keep).log_softmax(-1)
        kl_BS = (old_BSV.exp() * (old_BSV - new_BSV)).sum(-1)
        # the token before each completion token predicts it
        out += [float(kl_BS[i, -len(c) - 1 : -1].mean()) for i, (_, c) in enumerate(chunk)]
    return out


def _drift(edited: Edited, rows: Sequence[Row], config: VerifyConfig) -> dict[str, Any]:
    """Routing divergence and overlap with the original over the prompt, mean over layers, interval over prompts."""
    subject = edited.subject
    kl: list[float] = []
    overlap: list[float] = []
    for _, prompts in batches(rows, subject, config.batch_size):
        ids_BS, mask_BS = _padded(subject, prompts)
        old, new = Recorder(), Recorder()
        with edited.original():
            _logits(subject, ids_BS, mask_BS, 1, old)
        _logits(subject, ids_BS, mask_BS, 1, new)
        kl += _per_prompt(old, new, mask_BS, subject, divergence=True)
        overlap += _per_prompt(old, new, mask_BS, subject, divergence=False)
    return {"kl": _interval(kl, config.seed), "overlap": _interval(overlap, config.seed)}


def _per_prompt(old: Recorder, new: Recorder, mask_BS: Tensor, subject: Subject, *, divergence: bool) -> list[float]:
    layers = []
    for position, was in old.decisions.items():
        now = new.decisions[position]
        value_T = (
            routing.divergence_T(was.logits_TE, now.logits_TE, subject.anatomy.spec)
            if divergence
            else routing.overlap_T(now.indices_TK, was.indices_TK)
        )
        layers.append((value_T.view(mask_BS.shape) * mask_BS).sum(1) / mask_BS.sum(1))
    return torch.stack(layers).mean(0).tolist()
