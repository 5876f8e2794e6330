"""The `diagnose` stage: association, interventions, directions, and a verdict line.

Shape letters: N pairs, L MoE layers, E experts.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy import stats as st

from gtqlora import localise
from gtqlora.capture import Recorder, Subject, open_subject, routers_tapped
from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import load
from gtqlora.directions import difference_of_means, last_token_states, separations
from gtqlora.errors import ContrastError
from gtqlora.judging import judge_of
from gtqlora.localise import Bench, Intervention, Pair, control_prompts, pairs_of, random_like
from gtqlora.progress import track
from gtqlora.routing import selection_TE
from gtqlora.run import Run, fingerprint, whole, write_json, write_parquet
from gtqlora.scoring import left_padded
from gtqlora.stats import benjamini_hochberg, bootstrap_means

FOLDER = "diagnosis"


@dataclass(frozen=True)
class Association:
    """One expert's selection rate on flagged prompts and on their twins, after the two differ."""

    layer: int
    expert: int
    rate_flagged: float
    rate_twin: float
    difference: float
    low: float
    high: float
    q: float


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnosis/diagnosis.json` holds."""

    verdict: str
    sentence: str
    share_routing: dict[str, Any]
    top_experts: list[dict[str, int]]
    interventions: list[dict[str, Any]]
    directions: list[dict[str, Any]]
    n_pairs: int
    n_aligned: int


def read_diagnosis(run: Run) -> Diagnosis:
    return Diagnosis(**run.read_json(f"{FOLDER}/diagnosis.json", "diagnose"))


@torch.no_grad()
def selection_rates(
    subject: Subject, prompts: Sequence[Sequence[int]], skip: Sequence[int], batch_size: int, label: str
) -> np.ndarray:
    """rates_NLE: how often each expert is chosen over a prompt's tokens from position `skip` on."""
    parts = []
    n_experts = subject.anatomy.spec.n_experts
    starts = range(0, len(prompts), batch_size)
    for start in track(starts, label, len(starts)):
        chunk = prompts[start : start + batch_size]
        ids_BS, mask_BS = left_padded(chunk, subject.pad_id, subject.device)
        recorder = Recorder()
        with routers_tapped(subject.model, subject.anatomy, recorder):
            subject.model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            )
        skip_B = torch.tensor(skip[start : start + batch_size], device=subject.device)
        counted_BS = ((mask_BS.cumsum(-1) > skip_B[:, None]) & (mask_BS > 0)).float()
        layers = [
            torch.einsum("bse,bs->be", selection_TE(d.indices_TK, n_experts).view(*ids_BS.shape, -1), counted_BS)
            / counted_BS.sum(1, keepdim=True).clamp(min=1)
            for _, d in sorted(recorder.decisions.items())
        ]
        parts.append(torch.stack(layers, 1).cpu().numpy())
    return np.concatenate(parts)


def associate(flagged_NLE: np.ndarray, twin_NLE: np.ndarray, layers: Sequence[int], config: DiagnoseConfig):
    """Per expert: paired difference of selection rates, bootstrap interval over pairs, q-value over all experts."""
    difference_NLE = flagged_NLE - twin_NLE
    means = bootstrap_means(difference_NLE, seed=config.seed, resamples=config.bootstrap)
    edge = (1 - config.level) / 2
    low_LE, high_LE = np.quantile(means, [edge, 1 - edge], axis=0)
    q_LE = benjamini_hochberg(_p_values(difference_NLE))
    flagged_LE, twin_LE, mean_LE = flagged_NLE.mean(0), twin_NLE.mean(0), difference_NLE.mean(0)
    return [
        Association(
            layer=layers[position],
            expert=expert,
            rate_flagged=float(flagged_LE[position, expert]),
            rate_twin=float(twin_LE[position, expert]),
            difference=float(mean_LE[position, expert]),
            low=float(low_LE[position, expert]),
            high=float(high_LE[position, expert]),
            q=float(q_LE[position, expert]),
        )
        for position in range(len(layers))
        for expert in range(mean_LE.shape[1])
    ]


def _p_values(difference_NLE: np.ndarray) -> np.ndarray:
    """Two-sided paired t-test; where every pair differs by the same amount, the exact sign test."""
    n = len(difference_NLE)
    mean_LE, spread_LE = difference_NLE.mean(0), difference_NLE.std(0, ddof=1) if n > 1 else np.zeros(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_LE = 2 * st.t.sf(np.abs(mean_LE) / (spread_LE / np.sqrt(n)), df=max(n - 1, 1))
    constant = np.broadcast_to(spread_LE, mean_LE.shape) < 1e-12
    return np.where(constant, np.where(np.abs(mean_LE) < 1e-12, 1.0, 2.0 ** (1 - min(n, 1000))), p_LE)


def top_experts(associations: Sequence[Association], config: DiagnoseConfig) -> list[Association]:
    """Experts chosen clearly more on flagged prompts: significant, and surely by three quarters of the first's gap."""
    sure = [a for a in associations if a.q < 1 - config.level and a.low > 0]
    ranked = sorted(sure, key=lambda a: -a.difference)
    cut = max(config.min_difference, 0.75 * ranked[0].difference) if ranked else 0.0
    return [a for a in ranked if a.low >= cut][: config.max_experts]


def diagnose(config: DiagnoseConfig, run: Run, *, again: bool = False) -> Diagnosis:
    """Find where the refusal of flagged prompts (lookalike and harmful) sits.

    Raises:
        ContrastError: the split has no twins.
        ModelError: the model cannot be loaded.
    """
    inputs = {"model": fingerprint(config.model), "contrast": fingerprint(config.contrast)}
    with run.stage("diagnose", config, inputs, device=config.device, again=again) as stage:
        stage.outputs.append(FOLDER)
        if stage.fresh:
            return read_diagnosis(run)
        judge = judge_of(config.judge)
        contrast = load(config.contrast, judge).split(config.split)
        subject = open_subject(config.model, dtype=config.dtype, device=config.device, experts=config.experts)
        pairs = pairs_of(contrast, subject, config.max_pairs, config.seed)
        if not pairs:
            raise ContrastError(
                f"{config.contrast}: split {config.split!r} has no twins (a `twin` prompt, or a benign row with the "
                "same pair_id), so association cannot be told from topic"
            )
        bench = Bench(subject, pairs, judge, config.batch_size, config.max_new_tokens)
        return _diagnose(config, run, subject, pairs, bench)


def _diagnose(config: DiagnoseConfig, run: Run, subject: Subject, pairs: list[Pair], bench: Bench) -> Diagnosis:
    layers = [layer.index for layer in subject.anatomy.moe]
    skip = [pair.common for pair in pairs]
    flagged_NLE = selection_rates(subject, [p.prompt for p in pairs], skip, config.batch_size, "routing of flagged")
    twin_NLE = selection_rates(subject, [p.twin for p in pairs], skip, config.batch_size, "routing of twins")
    associations = associate(flagged_NLE, twin_NLE, layers, config)
    top = top_experts(associations, config)
    masked: dict[int, list[int]] = defaultdict(list)
    for a in top:
        masked[layers.index(a.layer)].append(a.expert)
    frequency_LE = (flagged_NLE.mean(0) + twin_NLE.mean(0)) / 2
    interventions = _mask_tests(config, bench, {k: tuple(v) for k, v in masked.items()}, frequency_LE)
    swaps, verdict, n_aligned = _swap_tests(config, subject, bench)
    interventions += swaps
    states = last_token_states(subject, [p.prompt for p in pairs], config.batch_size, "residual of flagged")
    others = last_token_states(subject, [p.twin for p in pairs], config.batch_size, "residual of twins")
    diagnosis = Diagnosis(
        verdict=verdict.verdict,
        sentence=verdict.sentence,
        share_routing=verdict.share_routing.to_json() if verdict.n_pairs else {},
        top_experts=[{"layer": a.layer, "expert": a.expert} for a in top],
        interventions=[i.to_json() for i in interventions],
        directions=[asdict(d) for d in separations(states, others)] if len(pairs) > 1 else [],
        n_pairs=len(pairs),
        n_aligned=n_aligned,
    )
    with whole(run / FOLDER) as staged:
        staged.mkdir()
        write_parquet(staged / "association.parquet", [asdict(a) for a in associations])
        save_file({"direction": difference_of_means(states, others)}, staged / "directions.safetensors")
        write_json(staged / "diagnosis.json", asdict(diagnosis))
    return diagnosis


def _mask_tests(
    config: DiagnoseConfig, bench: Bench, masked: dict[int, tuple[int, ...]], frequency_LE: np.ndarray
) -> list[Intervention]:
    """Mask the associated experts, then as many random ones of like frequency in the same layers."""
    out = [bench.intervention("as it is", bench.base, bench.base)]
    if not masked:
        return out
    count = sum(map(len, masked.values()))
    scores = bench.flagged("mask", [localise.mask_handler(bench.subject, masked)])
    out.append(bench.intervention(f"mask the {count} associated experts", scores, bench.base))
    rng = random.Random(config.seed)
    for index in range(config.random_controls):
        control = random_like(masked, frequency_LE, rng)
        scores = bench.flagged(f"random mask {index + 1}", [localise.mask_handler(bench.subject, control)])
        out.append(bench.intervention(f"mask {count} random experts ({index + 1})", scores, bench.base, control=True))
    return out


def _swap_tests(
    config: DiagnoseConfig, subject: Subject, bench: Bench
) -> tuple[list[Intervention], localise.Verdict, int]:
    """Twin's routing into the flagged prompt and back, against another flagged prompt's routing as control."""
    aligned_pairs = [pair for pair in bench.pairs if pair.aligned]
    partners = control_prompts(aligned_pairs, config.seed)
    chosen = [(pair, prompt) for pair, prompt in zip(aligned_pairs, partners, strict=True) if prompt is not None]
    if not chosen:
        return [], localise.verdict_of_scores([], [], []), 0
    pairs, controls = [pair for pair, _ in chosen], [prompt for _, prompt in chosen]
    aligned = Bench(subject, pairs, bench.judge, config.batch_size, config.max_new_tokens)
    twins = aligned.twins("twins")
    swapped = aligned.flagged("twin's routing", routing=[p.twin for p in pairs])
    control = aligned.flagged("another's routing", routing=controls)
    back = aligned.twins("flagged routing in twins", routing=[p.prompt for p in pairs])
    out = [
        aligned.intervention("flagged with its twin's routing", swapped, aligned.base),
        aligned.intervention("flagged with another flagged prompt's routing", control, aligned.base, control=True),
        aligned.intervention("twin as it is", twins, twins),
        aligned.intervention("twin with the flagged prompt's routing", back, twins),
    ]
    usable = [b.refused and not t.refused for b, t in zip(aligned.base, twins, strict=True)]
    return out, localise.verdict_of_scores(swapped, control, usable), len(pairs)
