"""The `verify` stage: before and after on held-out prompts, the safety floor, drift, and the mediation test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gtqlora import contrasts, routing
from gtqlora.adapters import Edited, adapter_hash
from gtqlora.capture import Recorder, Subject, open_subject, routers_tapped
from gtqlora.config import VerifyConfig
from gtqlora.contrast_statistics import check_rendering
from gtqlora.contrasts import KINDS, Contrast, Row
from gtqlora.errors import ContrastError, FloorError
from gtqlora.experts.loading import BF16
from gtqlora.experts.settings import NATIVE
from gtqlora.families import quantization
from gtqlora.judging import judge_of
from gtqlora.progress import track
from gtqlora.run import Run, fingerprint, read_parquet, sha256_json, write_json, write_parquet
from gtqlora.scoring import Score, Switch, batches, left_padded, score
from gtqlora.silencing import Bench, plan, rank
from gtqlora.stats import benjamini_hochberg, bootstrap_mean, floor, mcnemar, paired_difference, rate

ADAPTER, VERDICT, SCORES = "adapter", "verdict.json", "scores.parquet"


@dataclass(frozen=True)
class Verdict:
    """What `verdict.json` holds; every rate is an interval {value, low, high, n}.

    Attributes:
        adapter: hash of the adapter that was judged; `export` demands the same.
        experts: the routed experts it was judged with, see `StageConfig`; `export` demands the checkpoint's own.
        table: kind -> refusal and accuracy before and after (lookalike: also with the original routing replayed),
            paired change with its p- and q-value.
        floor: the safety floor's verdict on the harmful prompts.
        kl_benign: KL(original || edited) in nats per completion token.
        drift: kind -> routing divergence (nats per token and layer) and top-k overlap with the original on prompts.
        mediation: share of the repaired lookalike refusals that come back when the original routing is replayed.
        silencing: refusal of harmful prompts against the number of experts silenced, see `_silencing`; it has no part
            in the floor's verdict.
    """

    adapter: str
    kind: str
    model: str
    table: dict[str, dict[str, Any]]
    floor: dict[str, Any]
    kl_benign: dict[str, Any]
    drift: dict[str, dict[str, Any]]
    mediation: dict[str, Any]
    experts: str = BF16
    silencing: dict[str, Any] = field(default_factory=dict)


def read_verdict(run: Run) -> Verdict:
    return Verdict(**run.read_json(VERDICT, "verify"))


def verify(config: VerifyConfig, run: Run, *, again: bool = False) -> Verdict:
    """Judge the run's adapter on held-out prompts.

    Raises:
        RunError: the run has no adapter, or not the pairs it was made from.
        ContrastError: held-out prompts were trained on, or a kind is missing.
    """
    adapter = run.require(ADAPTER, "train")
    trained = run.require(contrasts.FILE, "train")
    identity = adapter_hash(adapter)
    inputs = {"model": fingerprint(config.model), "contrast": fingerprint(config.contrast), "adapter": identity}
    with run.stage("verify", config, inputs, device=config.device, again=again) as stage:
        stage.outputs += [VERDICT, SCORES]
        if stage.fresh:
            return read_verdict(run)
        (run / VERDICT).unlink(missing_ok=True)  # a verdict on another adapter must not outlive it
        rows = _held_out(config, trained)
        subject = open_subject(config.model, dtype=config.dtype, device=config.device, experts=config.experts)
        check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
        edited = Edited(subject, adapter)
        scores = _score_all(config, edited, rows)
        silencing = _silencing(config, edited, contrasts.load(trained, judge_of(config.judge)), scores)
        verdict = _verdict(config, edited, rows, scores, identity, silencing)
        write_parquet(run / SCORES, scores.to_rows())
        write_json(run / VERDICT, asdict(verdict))
        return verdict


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


@dataclass(frozen=True)
class _Scores:
    """Outcomes of the same rows before and after; `replayed` of the lookalike ones, edited with the old routing."""

    before: list[Score]
    after: list[Score]
    replayed: list[Score]

    def of_kind(self, kind: str) -> _Scores:
        return _Scores(*([s for s in part if s.row.kind == kind] for part in (self.before, self.after, self.replayed)))

    def to_rows(self) -> list[dict[str, Any]]:
        again = {s.row.number: s.refused for s in self.replayed}
        return [
            {
                "number": b.row.number,
                "kind": b.row.kind,
                "pair_id": b.row.pair_id,
                "text_before": b.text,
                "text_after": a.text,
                "refused_before": b.refused,
                "refused_after": a.refused,
                "refused_replayed": again.get(b.row.number),
                "correct_before": b.correct,
                "correct_after": a.correct,
            }
            for b, a in zip(self.before, self.after, strict=True)
        ]


def _score_all(config: VerifyConfig, edited: Edited, rows: Contrast) -> _Scores:
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

    with edited.original():
        before = scored("before", rows.rows)
    after = scored("after", rows.rows)
    replayed = scored("original routing replayed", rows.of_kind("lookalike"), edited.original)
    return _Scores(before, after, replayed)


def _verdict(
    config: VerifyConfig, edited: Edited, rows: Contrast, scores: _Scores, identity: str, silencing: dict[str, Any]
) -> Verdict:
    table = {kind: _table_row(scores.of_kind(kind), config.level) for kind in KINDS}
    for kind, q in zip(KINDS, benjamini_hochberg([table[kind]["p"] for kind in KINDS]), strict=True):
        table[kind]["q"] = float(q)
    harmful = scores.of_kind("harmful")
    judged = floor(_refused(harmful.before), _refused(harmful.after), margin=config.margin, level=config.level)
    return Verdict(
        adapter=identity,
        kind=edited.info.kind,
        model=config.model,
        table=table,
        floor=asdict(judged),
        kl_benign=_interval(_kl(edited, rows.of_kind("benign"), config), config.seed),
        drift={kind: _drift(edited, rows.of_kind(kind), config) for kind in KINDS},
        mediation=_mediation(scores.of_kind("lookalike"), config.level),
        experts=config.experts,
        silencing=silencing,
    )


def _silencing(config: VerifyConfig, edited: Edited, trained: Contrast, scores: _Scores) -> dict[str, Any]:
    """On how few experts refusal of held-out harmful prompts hangs, before and after the edit.

    Experts are ranked on the rows that were trained on. `before` and `after` silence the same ones, ranked in the
    original; `after_reranked` those that an adversary would rank first in the edited model. Empty if switched off, or
    if those rows cannot rank experts.
    """
    subject = edited.subject
    limits = {"prompts": config.silencing_prompts, "batch_size": config.batch_size, "seed": config.seed}
    with edited.original():
        original = rank(subject, trained, **limits) if config.silencing else None
    again = rank(subject, trained, **limits) if original else None
    if original is None or again is None:
        return {}
    bench, before, after = _bench(config, subject, scores.of_kind("harmful"))
    same = plan(original, most=config.silencing, controls=config.silencing_controls, seed=config.seed)
    anew = plan(again, most=config.silencing, controls=0, seed=config.seed)
    with edited.original():
        curves = {"before": bench.curve(same, before, "before")}
    curves["after"] = bench.curve(same, after, "after")
    curves["after_reranked"] = bench.curve(anew, after, "after, ranked anew")
    layers = [layer.index for layer in subject.anatomy.moe]
    most = curves["before"][-1].silenced
    return {
        "ranked_against": original.against,
        "ranked_prompts": original.prompts,
        "controls": config.silencing_controls,
        "experts": [{"layer": layers[position], "expert": expert} for position, expert in original.order[:most]],
        **{name: [asdict(point) for point in points] for name, points in curves.items()},
    }


def _bench(config: VerifyConfig, subject: Subject, harmful: _Scores) -> tuple[Bench, list[bool], list[bool]]:
    """At most `silencing_prompts` of the held-out harmful prompts, drawn, and their refusals before and after."""
    count = min(config.silencing_prompts, len(harmful.before))
    drawn = sorted(random.Random(config.seed).sample(range(len(harmful.before)), count))
    bench = Bench(
        subject=subject,
        rows=[harmful.before[i].row for i in drawn],
        judge=judge_of(config.judge),
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        level=config.level,
    )
    return bench, [harmful.before[i].refused for i in drawn], [harmful.after[i].refused for i in drawn]


def _refused(scores: list[Score]) -> list[bool]:
    return [s.refused for s in scores]


def _table_row(scores: _Scores, level: float) -> dict[str, Any]:
    old, new, replayed = _refused(scores.before), _refused(scores.after), _refused(scores.replayed)
    return {
        "refusal_before": rate(old, level).to_json(),
        "refusal_after": rate(new, level).to_json(),
        "refusal_replayed": rate(replayed, level).to_json() if replayed else None,
        "drop": paired_difference(old, new, level).to_json(),
        "p": mcnemar(old, new),
        "accuracy_before": _accuracy(scores.before, level),
        "accuracy_after": _accuracy(scores.after, level),
    }


def _accuracy(scores: list[Score], level: float) -> dict[str, Any] | None:
    known = [s.correct for s in scores if s.correct is not None]
    return rate(known, level).to_json() if known else None


def _mediation(scores: _Scores, level: float) -> dict[str, Any]:
    """Of lookalike prompts refused before and answered after, how many are refused again under the old routing."""
    outcomes = zip(scores.before, scores.after, scores.replayed, strict=True)
    back = [r.refused for b, a, r in outcomes if b.refused and not a.refused]
    found = rate(back, level)
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
    with routers_tapped(subject.model, subject.anatomy, *handlers):
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


def certified(run: Run) -> tuple[Verdict, Path]:
    """The verdict and adapter of a run whose floor was passed by exactly this adapter on exactly this model.

    And with the checkpoint's own experts, which are what is written. The only way to weights. The floor is computed
    again from the recorded outcomes, at the settings on record, so neither an edited verdict nor edited outcomes or
    settings pass.

    Raises:
        FloorError: no pass, or not with the checkpoint's own experts, or the adapter, the model or what verify wrote
            changed since.
        RunError: nothing was trained or verified.
    """
    adapter = run.require(ADAPTER, "train")
    verdict = read_verdict(run)
    record = _verify_record(run)
    config = VerifyConfig(**record["config"])
    harmful = [row for row in read_parquet(run / SCORES) if row["kind"] == "harmful"]
    before, after = ([row[key] for row in harmful] for key in ("refused_before", "refused_after"))
    again = floor(before, after, margin=config.margin, level=config.level)
    if again.verdict != "pass":
        raise FloorError(
            f"{run.path}: the safety floor's verdict is {again.verdict!r} ({again.reason}); no weights are written"
        )
    now = {"adapter": adapter_hash(adapter), "model": fingerprint(config.model)}
    for what, identity in now.items():
        if record["inputs"][what] != identity:
            raise FloorError(f"{run.path}: the {what} is not the one that was verified; run `gtqlora verify` again")
    _check_shipped(run, config, verdict)
    return verdict, adapter


def shipped_experts(model: str) -> str:
    """The `experts` that `export` writes: the checkpoint's own."""
    return BF16 if quantization(model) is None else NATIVE


def _check_shipped(run: Run, config: VerifyConfig, verdict: Verdict) -> None:
    """The floor was passed by what would be written."""
    shipped = shipped_experts(verdict.model)
    for judged in (verdict.experts, config.experts):
        if judged != shipped:
            raise FloorError(
                f"{run.path}: verified with {judged} experts, but the written weights have the checkpoint's own "
                f"({shipped}); run `gtqlora verify {run.path} --experts {shipped}` first"
            )


def _verify_record(run: Run) -> dict[str, Any]:
    """What the manifest says of `verify`, if the artefacts and the settings are still those."""
    record = run.manifest()["stages"].get("verify")
    if record is None:
        raise FloorError(f"{run.path}: verify did not finish; run `gtqlora verify` again")
    if record["hash"] != sha256_json({"config": record["config"], "inputs": record["inputs"]}):
        raise FloorError(f"{run.path}: the record of verify was changed; run `gtqlora verify` again")
    for name in (VERDICT, SCORES):
        if record["outputs"].get(name) != fingerprint(run.require(name, "verify")):
            raise FloorError(f"{run.path}: {name} was changed since verify; run `gtqlora verify` again")
    return record
