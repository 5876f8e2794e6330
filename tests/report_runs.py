"""Run directories for the report's tests: artefacts in the form that the stages leave, with made-up numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import KINDS
from gtqlora.results.adapter import (
    DIRECTION,
    EDIT_WEIGHTS,
    GT_QLORA,
    PROJECTION,
    Candidate,
    Info,
    Projection,
    Training,
    adapter_hash,
    write_settings,
)
from gtqlora.results.mediation import FACTORIAL, Factorial, Mediation, Role, Shares
from gtqlora.results.typed import to_json
from gtqlora.results.wrapped import Repairs, WrappedFloor, WrapperRow
from gtqlora.run import Run, write_json, write_parquet
from gtqlora.stats import Interval, floor, mcnemar, paired_difference, rate

EVIL = "</script></style><script>window.top.pwned=1;window.pwned=1</script><img src=x onerror='window.pwned=1'>"
SIDES = ("twin", "flagged")
TOP = [{"layer": 1, "expert": 2}, {"layer": 2, "expert": 0}]


def hits(share: float, n: int = 200) -> np.ndarray:
    return np.arange(n) < round(share * n)


def interval(share: float, n: int = 200) -> dict[str, Any]:
    return to_json(rate(hits(share, n)))


def real(value: float, half: float = 0.1) -> dict[str, Any]:
    return to_json(Interval(value, value - half, value + half, 200))


# --- the diagnosis


def association(layers: int, experts: int) -> list[dict[str, Any]]:
    """Selection rates in which the experts of `TOP` stand out."""
    rng = np.random.default_rng(0)
    rows = []
    for layer in range(1, layers + 1):
        for expert in range(experts):
            twin, spread, noise = rng.beta(2, 6), rng.normal(0, 0.03), rng.normal(0, 1)
            flagged = 0.95 if {"layer": layer, "expert": expert} in TOP else float(np.clip(twin + spread, 0, 1))
            gap = flagged - twin
            rows.append(
                {
                    "kind": "", "layer": layer, "expert": expert,
                    "rate_flagged": flagged, "rate_twin": twin, "difference": gap,
                    "low": gap - 0.05, "high": gap + 0.05, "q": float(np.exp(-50 * abs(gap))),
                    "mass": gap / 2, "mass_low": gap / 2 - 0.05, "mass_high": gap / 2 + 0.05, "mass_q": 0.01,
                    "stability": float(min(1.0, 2 * abs(gap))), "gradient": 2 * gap + 0.1 * noise,
                    "gradient_low": 2 * gap - 0.2, "gradient_high": 2 * gap + 0.2, "weight_flagged": 0.4,
                    "weight_twin": 0.3, "last_flagged": flagged, "last_twin": twin, "answer_flagged": flagged / 2,
                    "answer_twin": twin / 2,
                }
            )  # fmt: skip
    return rows


def behaviour(refusal: float) -> dict[str, Any]:
    return {"refusal": interval(refusal), "as_twin": interval(1 - refusal), "broken": interval(0.0)}


def cells() -> list[dict[str, Any]]:
    """Refusal follows the routing, and the stream a little."""
    return [
        {
            "routing": routing, "experts": experts, "stream": stream,
            **behaviour(0.02 + 0.85 * (routing == "flagged") + 0.1 * (stream == "flagged")),
            "log_odds": real(-4 + 7 * (routing == "flagged") + (stream == "flagged"), 0.6),
        }
        for routing in SIDES for experts in SIDES for stream in SIDES
    ]  # fmt: skip


def curves() -> list[dict[str, Any]]:
    def curve(name: str, control: bool, left: Sequence[float]) -> dict[str, Any]:
        points = [
            {"ablated": m, "refusal": interval(share), "broken": interval(0.0), "log_odds": real(8 * share - 4, 0.5)}
            for m, share in zip((0, 1, 2, 4, 8, 16), left, strict=True)
        ]
        return {"name": name, "control": control, "points": points, "kind": "lookalike"}

    return [
        curve("most associated", False, (1, 0.7, 0.2, 0.03, 0.0, 0.0)),
        curve("largest gradient", False, (1, 0.8, 0.35, 0.1, 0.02, 0.0)),
        curve("random, matched in layer and frequency", True, (1, 1, 0.99, 0.97, 0.95, 0.86)),
    ]


def expert(layer: int, number: int, effect: float, token: str) -> dict[str, Any]:
    return {
        "kind": "lookalike", "layer": layer, "expert": number, "ablate": real(effect), "restore": real(effect / 2),
        "control": real(0.01, 0.05), "q": 0.001 if effect > 0.2 else 0.6, "causal": effect > 0.2, "computes": False,
        "contributes": False,
        "tokens": [{"token": token, "rate": 0.9, "lift": 7.5}, {"token": " stop", "rate": 0.8, "lift": 6.1}],
    }  # fmt: skip


def directions(layers: int) -> dict[str, Any]:
    """As `directions.study` leaves them, with nothing known of the embedding."""

    def layer_of(layer: int) -> dict[str, Any]:
        known, far = layer > 0, layer / layers
        pairs = [
            ("refusal", "intent"),
            ("false_refusal", "true_refusal"),
            ("false_refusal", "intent"),
            ("true_refusal", "intent"),
        ]
        return {
            "layer": layer,
            "norm": 1.5 * far,
            "norms": {"false_refusal": far, "true_refusal": 2 * far},
            "separation": interval(0.6 + 0.4 * far) if known else None,
            "components": {
                "share_mean": interval(0.5 * far), "shares": [interval(0.6 * far), interval(0.1)], "cosine": 0.9 * far,
                "separation": interval(0.55 + 0.4 * far),
            } if known else None,
            "erasure": {
                "before": interval(0.99), "mean_removed": interval(0.8), "leace": interval(0.52),
                "mean_removed_cost": 0.1,
                "leace_cost": 0.05,
            } if known else None,
            "cosines": [
                {"first": first, "second": second, "value": real(0.8 * far - 0.3 * i, 0.05) if known else None}
                for i, (first, second) in enumerate(pairs)
            ],
        }  # fmt: skip

    return {
        "n_pairs": 200,
        "n_groups": 100,
        "cosines": 60,
        "cosines_not_told": 7,
        "layers": [layer_of(layer) for layer in range(layers + 1)],
    }


def localization(kind: str, levels: dict[str, float]) -> dict[str, Any]:
    whole = {key: real(share, 0.06) for key, share in {**levels, "interaction": -0.02}.items()}
    odds = {key: real(share - 0.05, 0.04) for key, share in {**levels, "interaction": 0.03}.items()}
    return {
        "kind": kind,
        "verdict": "routing",
        "verdict_log_odds": "routing",
        "sentence": f"The routing mediates the refusals of {kind} prompts: 86 % of them go.",
        "reasons": [
            "Is the routing necessary? 88 % of the prompts do what the twin does.",
            "Is the routing sufficient? It makes 87 % of the twins refuse.",
        ],
        "n_usable": 70,
        "unusable": {"whose twin is refused, too": 3},
        "stood_in": {"no other prompt of its topic": 4},
        "overlap": {"its twin": 0.45, "another prompt of its topic": 0.55},
        "words": {"routing": "both", "experts": "neither", "residual": "neither"},
        "shares": whole,
        "shares_log_odds": odds,
        "shares_with_routing": whole,
        "shares_with_routing_log_odds": odds,
        "necessary": {key: real(share, 0.06) for key, share in levels.items()},
        "sufficient": {key: real(share - 0.03, 0.06) for key, share in levels.items()},
        "necessary_log_odds": {},
        "sufficient_log_odds": {},
        "cells": cells(),
        "depth": depth(),
    }


def depth() -> dict[str, Any]:
    """Mediated in the first two of four layers."""

    def moved(part: float) -> dict[str, Any]:
        return {"log_odds": real(part, 0.05), "as_twin": interval(part)}

    lasts, up_to, after = (None, 1, 2, 3, 4), (0, 0.1, 0.8, 0.85, 0.9), (0.9, 0.8, 0.1, 0.05, 0)
    points = [
        {"layers": layers, "last": last, "up_to": moved(first), "after": moved(second)}
        for layers, (last, first, second) in enumerate(zip(lasts, up_to, after, strict=True))
    ]
    return {"sentence": "The routing mediates in MoE layers 1 to 2.", "generated": 40, "points": points}


NOTHING_KNOWN: dict[str, Any] = {
    "reasons": [],
    "n_usable": 0,
    "unusable": {"without a twin of equal token count": 100},
    "stood_in": {},
    "overlap": {},
    "words": {},
    "shares": {},
    "shares_log_odds": {},
    "shares_with_routing": {},
    "shares_with_routing_log_odds": {},
    "necessary": {},
    "sufficient": {},
    "cells": [],
    "depth": None,
}


def diagnosis(
    layers: int = 2, *, name: str = "ablate the 2 associated experts", token: str = " lever"
) -> dict[str, Any]:
    effect = to_json(paired_difference(hits(1), hits(0)))
    levels = {"routing": 0.86, "experts": 0.04, "residual": 0.1}
    acts = [("as it is", False, 1.0), (name, False, 0.0), ("ablate 2 random experts (1)", True, 0.95)]
    return {
        "verdict": "routing",
        "sentence": "False refusals are mediated elsewhere than true ones: 100 % and 2 %. The routing mediates ...",
        "difference": {
            "verdict": "elsewhere",
            "sentence": "False refusals are mediated elsewhere than true ones: 100 % and 2 %.",
            "parts": {"necessary: routing": real(0.9, 0.1), "sufficient: routing": real(0.8, 0.1)},
        },
        "kinds": [localization("lookalike", levels), localization("harmful", levels)],
        "warnings": [],
        "matched": True,
        "n_pairs": 200,
        "n_aligned": 150,
        "readout": ["Sorry"],
        "interventions": [
            {
                "kind": "lookalike", "name": act, "control": control, **behaviour(share),
                "accuracy": interval(1 - share), "effect": effect, "log_odds": real(8 * share - 4),
                "log_odds_effect": real(8 - 8 * share),
            }
            for act, control, share in acts
        ],
        "curves": curves(),
        "experts": [expert(1, 2, 0.6, token), expert(2, 0, 0.35, token), expert(2, 3, 0.03, token)],
        "causal_experts": TOP,
        "top_experts": TOP,
        "directions": directions(layers),
        "health": [
            {"layer": layer, "cv": 0.5 + layer / 9, "max_vio": 1.4, "entropy": 0.93, "dead": layer % 2}
            for layer in range(1, layers + 1)
        ],
        "health_tokens": 12_345,
    }  # fmt: skip


NO_TWINS = {
    "verdict": "cannot tell",
    "sentence": "Whether false refusals are mediated elsewhere cannot be told: without twins nothing can be exchanged.",
    "difference": {"verdict": "cannot tell", "sentence": "It cannot be told: there are too few pairs.", "parts": {}},
    "kinds": [
        {
            **localization(kind, {"routing": 1.0}),
            **NOTHING_KNOWN,
            "verdict": "cannot tell",
            "verdict_log_odds": "",
            "sentence": f"What mediates the refusals of {kind} prompts cannot be told: there are no twins.",
        }
        for kind in ("lookalike", "harmful")
    ],
    "warnings": ["There are no twins, so association cannot be told from topic; add a `twin` to each row."],
    "matched": False,
    "n_aligned": 0,
    "readout": [],
    "experts": [],
    "causal_experts": [],
    "directions": {"n_pairs": 200, "n_groups": 100, "cosines": 0, "cosines_not_told": 0, "layers": []},
}


def write_diagnosis(run: Run, *, size: tuple[int, int] = (2, 4), **changes: Any) -> None:
    """`size`: layers and experts."""
    texts = {key: changes.pop(key) for key in ("name", "token") if key in changes}
    write_json(run / "diagnosis" / "diagnosis.json", {**diagnosis(size[0], **texts), **changes})
    write_parquet(run / "diagnosis" / "association.parquet", association(*size))


# --- the edit


def write_adapter(run: Run, *, mode: str = "gt", kind: str = GT_QLORA, stopped: str | None = None) -> None:
    details = Training({"mode": mode, "rank": 4, "alpha": 8}, 20, stopped)
    if kind == PROJECTION:
        config = {"direction": "false_refusal_orthogonal", "norm_preserving": True}
        details = Projection(config, 2, [Candidate(layer=2, refusal=0.1, accuracy=0.9)])
    (run / "adapter").mkdir(exist_ok=True)
    write_settings(run / "adapter", Info(kind, "some/model", "deepseek_v3", details), rank=4, alpha=8)
    (run / "adapter" / (DIRECTION if kind == PROJECTION else EDIT_WEIGHTS)).write_bytes(b"made up")


def write_metrics(run: Run, steps: int = 5, more: Sequence[str] = ()) -> None:
    keys = [
        "loss",
        "rewards/margins",
        "loss/anchor",
        *(f"health/{k}" for k in ("load_cv", "load_cv_original", "overlap_benign", *more)),
    ]
    lines = [json.dumps({"step": 10 * step, **dict.fromkeys(keys, 1 / step)}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "lo']))


def ablation() -> dict[str, Any]:
    def points(left: Sequence[float], *, control: bool = True) -> list[dict[str, Any]]:
        counts = (0, 1, 2, 4, 8, 16)
        return [
            {"ablated": m, "targeted": interval(share), "random": interval(1 - m / 200) if control else None}
            for m, share in zip(counts, left, strict=True)
        ]

    return {
        "ranked_against": "twins",
        "ranked_prompts": 100,
        "controls": 3,
        "experts": TOP,
        "before": points((1, 0.8, 0.1, 0.0, 0.0, 0.0)),
        "after": points((1, 1, 0.99, 0.97, 0.95, 0.9)),
        "after_reranked": points((1, 0.99, 0.97, 0.95, 0.9, 0.8), control=False),
    }


def shares(refuses: float, n: int = 200) -> Shares:
    """Prompts of which the rest does as the edited model does."""
    return Shares(refuses=rate(hits(refuses, n)), as_edited=rate(~hits(refuses, n)), broken=rate(hits(0, n)))


def mediation(back: float, n: int = 200, routing: Role = "both") -> Mediation:
    """With this share of n repaired refusals that return under the original's routing."""
    replays = (shares(back, n), shares(0.0, n), shares(0.0, n)) if n else (None, None, None)
    direct, indirect, control = replays
    return Mediation(
        drawn=200,
        repaired=n,
        refusal_replayed=rate(hits(back)),
        direct=direct,
        indirect=indirect,
        control=control,
        routing=routing if n else "cannot tell",
        reason=f"{n} repaired lookalike refusals",
    )


def factorial() -> Factorial:
    did: dict[str, Shares] = dict(zip(FACTORIAL, map(shares, (1.0, 0.4, 1.0, 0.0)), strict=True))
    alone = {"gates_repair": rate(hits(0.6)), "lora_repair": rate(hits(0.0))}
    harmful: dict[str, Interval] = dict.fromkeys(FACTORIAL, rate(hits(1.0)))
    return Factorial(lookalike=did, harmful=harmful, gates_idle=False, sentence="gates alone repair 60 %", **alone)


def labelled(refused: float) -> dict[str, int]:
    return {"refusal": round(200 * refused), "answer": round(200 * (1 - refused))}


def wrapped(kept: float) -> WrappedFloor:
    whole, verdict = floor(hits(1.0), hits(kept), margin=0.05), "pass" if kept == 1 else "fail"
    rows = [
        WrapperRow(name=name, asked=200, refused=190, losses=whole.losses, verdict=verdict)
        for name in ("story", "German frame", "lead-in with praise")
    ]
    repairs = Repairs(before=rate(hits(0.1)), after=rate(hits(0.9)))
    return WrappedFloor(
        verdict=verdict, reason=whole.reason, floor=whole, worst_margin=0.1, wrappers=rows, repairs=repairs
    )


def verdict_of(run: Run, *, harmful: float = 1.0, lookalike: float = 0.0, repaired: int = 200) -> dict[str, Any]:
    after = {"harmful": harmful, "lookalike": lookalike, "benign": 0.0}
    before = {"harmful": 1.0, "lookalike": 1.0, "benign": 0.0}
    table = {
        kind: {
            "refusal_before": interval(before[kind]),
            "refusal_after": interval(after[kind]),
            "drop": to_json(paired_difference(hits(before[kind]), hits(after[kind]))),
            "p": mcnemar(hits(before[kind]), hits(after[kind])),
            "q": 0.03,
            "accuracy_before": None if kind == "harmful" else interval(0.2),
            "accuracy_after": None if kind == "harmful" else interval(0.9),
            "answered_before": interval(1 - before[kind]),
            "answered_after": interval(1 - after[kind]),
            "gain": to_json(paired_difference(hits(1 - after[kind]), hits(1 - before[kind]))),
            "labels_before": labelled(before[kind]),
            "labels_after": labelled(after[kind]),
        }
        for kind in KINDS
    }
    return {
        "adapter": adapter_hash(run / "adapter"),
        "kind": GT_QLORA,
        "model": "some/model",
        "table": table,
        "floor": asdict(floor(hits(1.0), hits(harmful), margin=0.05)),
        "wrapped": to_json(wrapped(harmful)),
        "agreement": None,
        "instructed": None,
        "wrappers": None,
        "served": None,
        "ablation_left_out": None,
        "kl_benign": real(0.01, 0.005),
        "drift": {kind: {"kl": real(0.1), "overlap": interval(0.8)} for kind in KINDS},
        "mediation": to_json(mediation(0.9, repaired)),
        "factorial": to_json(factorial()),
        "expert_format": "bf16",
        "ablation": ablation(),
        "judge": "string",
        "prompts": {"source": "pairs.jsonl", "fingerprint": "0123456789abcdef", "split": "heldout"},
        "lost": {"answers": 3, "tells": 1} if harmful < 1 else {},
        "tries": 2,
        "blind": None,
    }


def write_scores(run: Run, text: str = "an answer", pair_id: str = "p") -> None:
    rows = [
        {
            "number": i,
            "kind": kind,
            "pair_id": pair_id,
            "topic": None,
            "prompt_json": "[]",
            "rejected": "",
            "answer": None,
            "text_before": "sorry",
            "text_after": f"{text} to {kind}",
            **dict.fromkeys(("tokens_before", "tokens_after"), 3),
            **dict.fromkeys(("ended_before", "ended_after"), True),
            "label_before": "refusal",
            "label_after": "answer",
            **dict.fromkeys(("correct_before", "correct_after", "lost")),
            **dict.fromkeys(("rejected_log_prob_before", "rejected_log_prob_after")),
        }
        for i, kind in enumerate(KINDS)
    ]
    write_parquet(run / "scores.parquet", rows)


def write_verdict(run: Run, **changes: Any) -> None:
    write_json(run / "verdict.json", verdict_of(run, **changes))


def whole_run(path: Path, **diagnosis: Any) -> Run:
    run = Run(path)
    with run.stage("diagnose", DiagnoseConfig(model="some/model", contrast="c"), {}) as stage:
        write_diagnosis(run, **diagnosis)
        stage.outputs.append("diagnosis")
    write_adapter(run)
    write_metrics(run)
    write_verdict(run)
    write_scores(run)
    return run


def other_run(path: Path, mode: str, **verdict: Any) -> Path:
    with Run(path) as run:
        write_adapter(run, mode=mode)
        write_verdict(run, **verdict)
    return path


def evil_run(folder: Path, **diagnosis: Any) -> Run:
    """Every text that an artefact brings is a script."""
    said = {"difference": {"verdict": "elsewhere", "sentence": EVIL, "parts": {}}, "warnings": [EVIL]}
    kind = {**localization("lookalike", {"routing": 1.0}), "sentence": EVIL, "reasons": [EVIL], "unusable": {EVIL: 1}}
    run = whole_run(folder / "gt", **diagnosis, **said, kinds=[kind], name=EVIL, token=EVIL)
    write_scores(run, text=EVIL, pair_id=EVIL)
    return run
