"""Results of every verb with made-up numbers, all of them different, so that a number that is cut shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from gtqlora.contrasts.agreement import Agreement
from gtqlora.contrasts.prompting import Prompting
from gtqlora.contrasts.repairs import Repair
from gtqlora.contrasts.statistics import Lengths, Reach, Statistics, Twins
from gtqlora.demo import EditNumbers, Numbers, Outcome
from gtqlora.results.ablation import AblationPoint, AblationStudy
from gtqlora.results.adapter import Candidate, LogitsMoved
from gtqlora.results.diagnosis import Diagnosis, Difference, Intervention, Localization
from gtqlora.results.directions import DirectionStudy
from gtqlora.results.experts import ExpertEffect, ExpertId
from gtqlora.results.mediation import FACTORIAL, Factorial, Mediation, Shares
from gtqlora.results.verdict import Drift, HeldOut, KindRow, Verdict
from gtqlora.stages.export import Exported
from gtqlora.stages.project import Projected
from gtqlora.stages.train import TrainResult
from gtqlora.stats import Floor, Interval

_fresh = itertools.count(1)


def share() -> float:
    """Return a share that no other number here has."""
    return next(_fresh) * 37 % 1000 / 1000


def near(scale: float = 1.0) -> Interval:
    """Return an interval with three numbers of its own, some below 0."""
    value = scale * (share() - 0.3)
    return Interval(value, value - 0.7 * scale * share(), value + 0.6 * scale * share(), 1234)


def rate() -> Interval:
    """Return the interval of a share, with three numbers of its own."""
    value = share()
    return Interval(value, value * share(), value + (1 - value) * share(), 1234)


def statistics() -> Statistics:
    kinds = {"benign": 123456, "lookalike": 23456, "harmful": 3456789}
    lengths = Lengths(minimum=11, median=1234.5, p95=23456, maximum=131072)
    return Statistics(
        rows=3603701, kinds=kinds, splits={"train": 3603701}, counts={"train": kinds, "heldout": {"harmful": 98765}},
        pairs=1801850, with_twin=1700001, unique_prompts=3599999, duplicates=0,
        leaks=0, floor=Reach(prompts=98, groups=17, fewest=150, reachable=False, note="98 prompts in 17 topics"),
        repair=Repair(share=0.35, prompts=13, fewest=14, note="13 prompts, which 14 would show"),
        prompt_tokens=lengths, full_tokens=lengths,
        twins={"train": {"lookalike": Twins(rows=1234567, with_twin=765432, swappable=543210)}},
        max_length=262144, readout=[],
        template=Prompting(
            reads=("enable_thinking",), opens="<think>", closes="", before_answers="", switch="template.thinking=false"
        ),
        agreement=[Agreement(kind="lookalike", column="rejected", meant="refusal", rows=2345678, agreeing=1234568,
                             labels={"refusal": 1234568, "partial": 1111110})],
    )  # fmt: skip


def diagnosis() -> Diagnosis:
    names = ("as it is", "ablate the 12 associated experts", "twin's routing in layers 1, 2, 3 and 17")
    components = ("routing", "experts", "residual", "interaction")
    kinds = [
        Localization(
            kind=kind, verdict="routing", reasons=[], n_usable=30,
            sentence=f"The routing mediates the refusals of {kind} prompts: 99.{next(_fresh)} % of them go.",
            words={"routing": "necessary", "residual": "neither"},
            shares={c: near() for c in components}, necessary={c: near() for c in components[:3]},
            sufficient={c: near() for c in components[:3]},
        )
        for kind in ("lookalike", "harmful")
    ]  # fmt: skip
    return Diagnosis(
        verdict="routing", sentence="as in the difference and the kinds",
        difference=Difference("elsewhere", f"False refusals are elsewhere: 98.{next(_fresh)} % and 1 %."),
        kinds=kinds, warnings=["only 31 pairs align; 200 would do"], matched=True, n_pairs=200, n_aligned=31,
        readout=[],
        interventions=[
            Intervention(kind="lookalike", name=name, control=control, refusal=near(), as_twin=near(), broken=near(),
                         accuracy=None, effect=near(), log_odds=near(40), log_odds_effect=None)
            for name in names for control in (False, True)
        ],
        curves=[],
        experts=[
            ExpertEffect(kind="harmful", layer=layer, expert=expert, ablate=near(), restore=near(), control=near(),
                         q=0.01, causal=expert > 200, computes=expert < 100, tokens=[])
            for layer, expert in ((1, 7), (17, 131), (60, 383))
        ],
        causal_experts=[], top_experts=[ExpertId(layer, 5 * layer) for layer in range(60)],
        directions=DirectionStudy(n_pairs=0, n_groups=0, cosines=0, cosines_not_told=0, layers=[]),
        health=[], health_tokens=0,
    )  # fmt: skip


def did() -> Shares:
    return Shares(refuses=near(), as_edited=near(), broken=near())


def verdict(outcome: str = "cannot tell") -> Verdict:
    kinds = ("benign", "lookalike", "harmful")
    floor = Floor(
        verdict=outcome, drop=near(), losses=near(), margin=0.0201, level=0.98765, refused=1203, prompts=1234,
        groups=617, effective=881.5, needed=4321, reason="losses up to 3.21 % of 1,203; margin 2.01 %",
    )  # fmt: skip

    def points(counts: tuple[int, ...]) -> list[AblationPoint]:
        return [AblationPoint(ablated=n, targeted=near(), random=near() if n else None) for n in counts]

    return Verdict(
        adapter="0" * 64, kind="gt-qlora", model="owner/model-8x22b", expert_format="int4-g32",
        table={
            kind: KindRow(refusal_before=rate(), refusal_after=rate(), drop=near(), p=1.23e-9,
                          q=4.56e-8, accuracy_before=rate(), accuracy_after=rate(), answered_before=rate(),
                          answered_after=rate(), gain=near(), labels_before={"refusal": 1203, "undecided": 31},
                          labels_after={"answer": 1100, "partial": 100, "evasion": 34})
            for kind in kinds
        },
        floor=floor, kl_benign=near(), drift={kind: Drift(kl=near(), overlap=near()) for kind in kinds},
        mediation=Mediation(
            drawn=200, repaired=187, refusal_replayed=near(), direct=did(), indirect=did(), control=did(),
            routing="necessary", reason="187 repaired lookalike refusals",
        ),
        factorial=Factorial(
            lookalike=dict.fromkeys(FACTORIAL, did()), harmful=dict.fromkeys(FACTORIAL, near()), gates_repair=near(),
            lora_repair=near(), gates_idle=True, sentence="this edit is not gate-targeted: gates alone repair 1.2%",
        ),
        ablation=AblationStudy(
            ranked_against="twins", ranked_prompts=200, controls=3, experts=[],
            before=points((0, 1, 16)), after=points((0, 1, 2, 4, 8, 16)), after_reranked=points((0, 1, 16)),
        ),
        judge="package.module:function", prompts=HeldOut(source="pairs.jsonl", fingerprint="1" * 64, split="heldout"),
        lost={"answers": 13, "ready": 21}, tries=7, blind=None,
    )  # fmt: skip


def projected() -> Projected:
    tried = [Candidate(layer, 0.9 + share() / 10, share()) for layer in range(1, 13)]
    return Projected(Path("run/adapter"), 11, tried)


def trained(*, fresh: bool = False, stopped: str | None = None) -> TrainResult:
    return TrainResult(Path("runs/one/adapter"), 12345, stopped, LogitsMoved(gates=0.25, lora=0.03), fresh)


def exported() -> Exported:
    return Exported(Path("weights"), "merged weights", 1234, 165150720, 3.21e-5, {}, None, [])


def outcomes() -> dict[str, Outcome]:
    """Return two organisms of the demo, with every verdict a floor can give."""

    def edits() -> Iterator[tuple[str, EditNumbers]]:
        floors = {"base": None, "projection": "fail", "lora": "cannot tell", "gates": "pass", "gt": "pass"}
        for name, floor in floors.items():
            yield name, EditNumbers(
                harmful_refusal=share(), lookalike_refusal=share(), benign_refusal=share(), lookalike_accuracy=share(),
                benign_accuracy=share(), floor=floor, replayed_lookalike_refusal=share(),
                repaired_by_routing=share(), repaired_by_gates=share(), repaired_by_lora=share(),
            )  # fmt: skip

    def numbers(recall: float | None) -> Numbers:
        return Numbers(
            verdict="routing", truth="routing", planted_precision=0.875, planted_recall=recall, edits=dict(edits())
        )

    where = Path("demo-run")
    sentence = "Routing: 98 % [91 %, 99 %] of the refusals go with the twin's routing (200 pairs)."
    recalls = {"routed": 0.9375, "residual": None}
    return {
        name: Outcome(numbers(recall), sentence, where / name / "gt" / "report.html", where / name / "exported")
        for name, recall in recalls.items()
    }
