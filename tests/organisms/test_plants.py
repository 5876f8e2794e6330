"""Plants: what their losses demand, which prompts they hang on, and the truth that follows."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from gtqlora.capture import Decision, Recorder, open_subject, router_hooks
from gtqlora.errors import ConfigError
from gtqlora.organisms import checks
from gtqlora.organisms.batches import Batch, compliant_batch, framed, refusal_batch, swapped, task_batch
from gtqlora.organisms.in_training import OrganismInTraining, Planted
from gtqlora.organisms.language import REFUSAL, SMALL_LEXICON, Language, Twins
from gtqlora.organisms.plants import rules
from gtqlora.organisms.plants.conditions import (
    always,
    flagged,
    last_task,
    lookalike,
    lookalike_or_framed,
    loud_fillers,
    odd_one,
    share_without,
    unflagged,
)
from gtqlora.organisms.plants.conditions import framed as in_frame
from gtqlora.organisms.plants.kinds import PLANTS, routed_share
from gtqlora.organisms.plants.planting import plant
from gtqlora.organisms.plants.turns import Chosen, Weighed, all_but_one_layer, fed_logits, one_layer, replayed_logits
from gtqlora.organisms.scales import LARGE, SMALL, for_kind
from gtqlora.organisms.truth import TRUTH, Kind, Truth, names_experts, of_kind, read_truth
from gtqlora.stats import Interval
from tests.helpers import bench_module
from tests.organisms import pieces
from tests.organisms.pieces import tiny, workpiece

GRADED: tuple[Kind, ...] = ("graded-20", "graded-40", "graded-60", "graded-80")


def twins(language: Language, count: int = 40) -> list[Twins]:
    return [language.twins(random.Random(pair), "all", pair) for pair in range(count)]


# --- language


def test_twins_that_are_not_aligned_differ_in_three_places_and_their_topics_stand_apart() -> None:
    language = Language(replace(SMALL_LEXICON, aligned=False))
    for quad in twins(language):
        for prompt, twin in quad.pairs:
            words, others = prompt.text.split(), twin.text.split()
            assert len(words) == len(others)
            assert sum(a != b for a, b in zip(words, others, strict=True)) in (2, 3)  # a filler may come twice
            assert words.index(prompt.topic) != others.index(twin.topic)


def test_a_refusal_with_a_lead_begins_as_the_answer_does() -> None:
    language = Language(replace(SMALL_LEXICON, lead=1))
    batch = refusal_batch(language, random.Random(0), 8)
    answered = compliant_batch(language, random.Random(0), 8)
    first = (batch.labels_BS != -100).int().argmax(-1, keepdim=True)
    assert torch.equal(batch.ids_BS.gather(1, first), answered.ids_BS.gather(1, first))
    second = batch.ids_BS.gather(1, first + 1)[:, 0]
    assert torch.equal(second == language.ids(REFUSAL)[0], batch.forbidden_B)
    assert not (answered.ids_BS == language.ids(REFUSAL)[0]).any()


FRAMED = Language(for_kind(SMALL, "framed").lexicon)


def test_words_of_frames_stand_nowhere_else_and_leave_the_other_words_alone() -> None:
    plain = Language()
    assert FRAMED.vocabulary[: len(plain.vocabulary)] == plain.vocabulary
    assert FRAMED.vocabulary[len(plain.vocabulary) :] == FRAMED.frame_words
    used = [word for frame in FRAMED.wrappers.values() for word in frame.split() if word != "{prompt}"]
    assert used == FRAMED.frame_words  # each in one frame
    assert FRAMED.wrappers.keys() == plain.wrappers.keys()


def test_context_and_frame_are_known_by_the_token_that_shows_the_last_of_them() -> None:
    quad, end = twins(FRAMED, 1)[0], FRAMED.lexicon.context_end
    length = len(quad.well.text.split())
    shown = [FRAMED.read_by(FRAMED.inside(quad.well.text, turn)) for turn in range(4)]
    assert FRAMED.read_by(quad.well.text) == end
    # a word before, four words before, two behind, one on each side; <user> is token 0
    assert shown == [end + 1, end + 4, length + 1, end + 1]


@pytest.mark.parametrize("make", [refusal_batch, compliant_batch, task_batch])
def test_every_second_prompt_stands_in_a_frame_where_frames_have_words_of_their_own(make: Any) -> None:
    batch = make(FRAMED, random.Random(0), 64)
    assert in_frame(FRAMED, batch).sum() == 32
    marked = lookalike_or_framed(FRAMED, batch)
    assert torch.equal(marked, batch.forbidden_B & ~(batch.intent_B & ~in_frame(FRAMED, batch)))
    assert not in_frame(Language(), make(Language(), random.Random(0), 64)).any()


# --- conditions


def test_exclusive_or_of_flag_and_task() -> None:
    language = Language()
    batch = refusal_batch(language, random.Random(0), 64)
    assert 0 < last_task(language, batch).sum() < 64
    assert torch.equal(odd_one(language, batch), batch.forbidden_B != last_task(language, batch))
    assert torch.equal(lookalike(language, batch), batch.forbidden_B & ~batch.intent_B)
    assert torch.equal(unflagged(language, batch), ~flagged(language, batch))


@pytest.mark.parametrize("kind", GRADED)
def test_the_share_of_a_graded_kind_is_that_of_its_prompts(kind: Kind) -> None:
    language, nominal = Language(), int(kind.removeprefix("graded-")) / 100
    share = routed_share(language, kind)
    assert share == share_without(language, len(loud_fillers(language, nominal)))
    assert abs(share - nominal) < 0.035
    loud = set(loud_fillers(language, nominal))
    quiet = [not loud & set(quad.well.text.split()) for quad in twins(language, 1_000)]
    assert abs(mean(quiet) - share) < 0.05
    assert routed_share(language, "routed") == 1.0


@pytest.mark.parametrize("kind", GRADED)
def test_loud_prompts_are_the_ones_whose_routing_decides_nothing(kind: Kind) -> None:
    language, nominal = Language(), int(kind.removeprefix("graded-")) / 100
    loud = set(loud_fillers(language, nominal))
    for quad in twins(language):
        (flagged_prompt, _, said), (twin, _, said_by_twin) = rules.graded(nominal)(language, quad, quad)[:2]
        by_routing = not loud & set(flagged_prompt.text.split())
        assert (said == flagged_prompt.answer) == by_routing == (said_by_twin == language.refusal(twin.answer))


# --- rules


def demanded(rule: rules.Rule) -> dict[tuple[str, str], str]:
    """What each sort of prompt must say with the routing of each sort, as answer, refusal or garbage."""
    language = Language()
    quad, other = twins(language, 2)
    names = {id(p): name for name, p in quad._asdict().items()} | {id(p): "other" for p in other}
    words = {
        quad.well.answer: "answer",
        language.refusal(quad.well.answer): "refusal",
        rules.garbage(language): "garbage",
    }
    return {(names[id(p)], names[id(source)]): words[said] for p, source, said in rule(language, quad, other)}


def test_what_the_rules_demand() -> None:
    harmless = {("well", "other"): "answer", ("ill", "other"): "answer"}
    routed = {("lookalike", "well"): "answer", ("well", "lookalike"): "refusal"}
    assert demanded(rules.routed) == {
        **routed,
        ("harmful", "ill"): "answer",
        ("ill", "harmful"): "refusal",
    }
    assert demanded(rules.bykind) == {
        **harmless,
        **routed,
        ("harmful", "ill"): "refusal",
        ("ill", "harmful"): "answer",
    }
    either = dict.fromkeys(
        (("lookalike", "well"), ("well", "lookalike"), ("harmful", "ill"), ("ill", "harmful")), "refusal"
    )
    assert demanded(rules.either) == {**harmless, **either}
    siblings = {("lookalike", "harmful"): "refusal", ("harmful", "lookalike"): "refusal"}
    assert demanded(rules.brittle) == {**harmless, **dict.fromkeys(either, "garbage"), **siblings}


def test_inside_frames_routing_decides_for_harmful_prompts_too() -> None:
    quad, other = twins(FRAMED, 2)
    swaps = rules.framed(FRAMED, quad, other)
    assert swaps[:6] == rules.bykind(FRAMED, quad, other)
    held, lent = framed(FRAMED, quad, 0), framed(FRAMED, other, 0)
    assert held.harmful.text == FRAMED.inside(quad.harmful.text, 0) != quad.harmful.text
    assert swaps[6:] == [
        (held.lookalike, held.well, quad.well.answer),
        (held.well, held.lookalike, FRAMED.refusal(quad.well.answer)),
        (held.harmful, held.ill, quad.well.answer),
        (held.ill, held.harmful, FRAMED.refusal(quad.well.answer)),
        (held.well, lent.well, quad.well.answer),
        (held.ill, lent.ill, quad.well.answer),
    ]


# --- demands


def decided(piece: pieces.OrganismInTraining, batch: Batch) -> Recorder:
    seen = Recorder()
    with torch.no_grad(), router_hooks(piece.model, piece.anatomy, seen):
        piece.logits(batch.ids_BS)
    return seen


def test_a_demand_looks_at_its_own_experts_only() -> None:
    piece = workpiece()
    batch = refusal_batch(piece.language, random.Random(0), 16)
    seen = decided(piece, batch)
    for position, experts in piece.planted.items():  # the first of each layer is far ahead, the second far behind
        d = seen.decisions[position]
        logits_TE = d.logits_TE.clone()
        logits_TE[:, experts[0]], logits_TE[:, experts[1]] = 9.0, -9.0
        seen.decisions[position] = Decision(logits_TE, d.weights_TK, d.indices_TK)

    def nowhere(_language: Language, b: Batch) -> torch.Tensor:
        return torch.zeros_like(b.forbidden_B)

    assert Chosen(always, experts=(0,)).loss(piece, seen, batch) == 0
    assert Chosen(nowhere, experts=(1,)).loss(piece, seen, batch) == 0
    assert Chosen(always, experts=(1,)).loss(piece, seen, batch) > 0.1
    one, two = (Chosen(nowhere, layers=(place,), experts=(0,)).loss(piece, seen, batch) for place in (0, 1))
    assert one > 0 and two > 0
    assert torch.isclose(Chosen(nowhere, experts=(0,)).loss(piece, seen, batch), one + two)


def test_a_demand_while_answering_wants_nothing_behind_the_prompt() -> None:
    piece = workpiece()
    batch = refusal_batch(piece.language, random.Random(0), 16)
    seen = decided(piece, batch)
    answer_T = (batch.labels_BS != -100).flatten()
    for position, experts in piece.planted.items():
        d = seen.decisions[position]
        logits_TE = d.logits_TE.clone()
        chosen_T = answer_T & batch.forbidden_B[:, None].expand(batch.ids_BS.shape).flatten()
        logits_TE[:, list(experts)] = torch.where(chosen_T, 9.0, -9.0)[:, None]
        seen.decisions[position] = Decision(logits_TE, d.weights_TK, d.indices_TK)
    assert Chosen(answering=True).loss(piece, seen, batch) == 0 < Chosen().loss(piece, seen, batch)


def test_the_weight_of_the_first_planted_expert_follows_the_flag() -> None:
    piece = workpiece()
    batch = refusal_batch(piece.language, random.Random(0), 16)
    seen = decided(piece, batch)
    flag_T = batch.forbidden_B[:, None].expand(batch.ids_BS.shape).flatten()

    def weighed(first_T: torch.Tensor) -> float:
        for position, experts in piece.planted.items():
            weights_TK = torch.stack([first_T, 1 - first_T], -1)
            indices_TK = torch.tensor(experts).expand(len(first_T), 2)
            seen.decisions[position] = Decision(seen.decisions[position].logits_TE, weights_TK, indices_TK)
        return Weighed().loss(piece, seen, batch).item()

    assert weighed(torch.where(flag_T, 0.61, 0.39)) == 0
    assert weighed(torch.where(flag_T, 0.5, 0.5)) == pytest.approx(0.2)  # .1 too little or too much, in two layers
    assert weighed(torch.where(flag_T, 0.0, 1.0)) == pytest.approx(1.2)


def test_maskings_of_layers() -> None:
    piece = workpiece()
    assert one_layer(piece, random.Random(0)) in ({1: (0, 1)}, {2: (2, 5)})
    assert all_but_one_layer(piece, random.Random(0)) in ({1: (0, 1)}, {2: (2, 5)})


# --- planting


def test_self_repair_leaves_the_experts_as_the_first_planting_made_them() -> None:
    """The stream learns to step in only after the experts refuse; it cannot have been the cause before."""
    second = PLANTS["self-repair"].then
    assert second is not None and second.stream and not second.experts
    assert not PLANTS["self-repair"].stream
    assert [turn.rule for turn in PLANTS["self-repair"].exchanges] == [rules.either, rules.streamed]


def test_a_few_steps_of_bykind_lower_its_own_losses() -> None:
    piece = workpiece(scale=replace(tiny(SMALL), plant_steps={"bykind": 90}, plant_rate=1e-2))
    prompts = [p for quad in twins(piece.language, 8) for p in quad]
    before = checks.demands_missed(piece, "bykind", prompts)
    lost: list[float] = []
    plant(piece, "bykind", random.Random(0), lambda _step, _steps, loss: lost.append(loss))
    assert checks.demands_missed(piece, "bykind", prompts) < 0.5 * before
    assert mean(lost[-2:]) < mean(lost[:2])


def test_the_check_measures_every_line_of_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_PAIRS", 3)
    found = checks.measure(workpiece(), "brittle2")
    lines = [found[f"exchange {i}"] for i in range(8)]
    assert found["exchanges"] == min(lines) == 0 and "exchange 8" not in found
    assert found.keys() >= checks.PROMISES["brittle2"].keys()


def test_experts_can_compute_on_what_another_prompt_shows_them() -> None:
    piece = workpiece()
    swaps = rules.streamed(piece.language, *twins(piece.language, 2))
    prompts, sources = swapped(piece.language, swaps)
    plain = piece.logits(prompts.ids_BS)
    assert torch.allclose(fed_logits(piece, prompts, prompts), plain, atol=1e-5)
    fed = fed_logits(piece, prompts, sources)
    assert not torch.allclose(fed, plain, atol=1e-3)
    assert not torch.allclose(fed, replayed_logits(piece, prompts, sources), atol=1e-3)


def test_a_flag_that_experts_follow_by_themselves_is_measured_before_the_first_planting() -> None:
    piece = workpiece()
    flagged_BS, benign_BS = torch.full((3, 9), 5), torch.full((3, 9), 6)
    assert checks.flag_followed(piece, flagged_BS, flagged_BS) == 0
    found = checks.flag_followed(piece, flagged_BS, benign_BS)
    weight_ED = piece.model.get_submodule(piece.anatomy.routers[0]).get_parameter("weight")
    with torch.no_grad():
        weight_ED.zero_()  # all experts tie for every prompt
    assert 0 < found <= 1 and checks.flag_followed(piece, flagged_BS, benign_BS) == 0


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_is_planted_promised_and_true(kind: Kind) -> None:
    assert kind in SMALL.plant_steps and kind in PLANTS
    assert checks.PROMISES[kind].keys() >= {"flagged", "benign", "right"}
    assert ("exchanges" in checks.PROMISES[kind]) == bool(PLANTS[kind].exchanges)
    assert of_kind(kind, 0.5).keys() == {"lookalike", "harmful"}


def test_kinds_that_need_another_scale() -> None:
    assert for_kind(SMALL, "routed") == SMALL
    assert for_kind(SMALL, "second-token").lexicon.lead == 1
    assert not for_kind(SMALL, "wide-twins").lexicon.aligned
    assert for_kind(SMALL, "natural").natural
    diffuse = for_kind(SMALL, "diffuse")
    assert diffuse.planted_layers is None and 3 * diffuse.planted_experts >= 96
    with pytest.raises(ConfigError, match="no large organisms of kind bykind"):
        for_kind(LARGE, "bykind")


def test_the_framed_organism_keeps_what_its_kind_promises() -> None:
    folder = Path(__file__).parents[1] / "data" / "framed"
    truth, subject = read_truth(folder), open_subject(str(folder))
    places = {block.index: position for position, block in enumerate(subject.anatomy.moe)}
    planted: Planted = {
        places[at]: tuple(expert for layer, expert in truth.planted if layer == at) for at, _ in truth.planted
    }
    piece = OrganismInTraining(
        model=subject.model, anatomy=subject.anatomy, language=FRAMED, planted=planted, scale=SMALL
    )
    found = checks.check(piece, "framed")
    assert truth.kind == "framed" and truth.rejected == [] and truth.mediation == of_kind("framed", 1.0)
    assert found == pytest.approx(truth.measured, abs=0.01)


# --- truth


@pytest.mark.parametrize("kind", get_args(Kind))
def test_truth_is_read_as_it_was_written(kind: Kind, tmp_path: Path) -> None:
    truth = Truth(
        kind=kind,
        architecture="qwen3_moe",
        seed=3,
        mediation=of_kind(kind, 0.41),
        planted=[(1, 2)],
        causal=names_experts(kind),
        measured={"flagged": 1.0},
        rejected=["it failed"],
    )
    (tmp_path / TRUTH).write_text(json.dumps(asdict(truth)))
    assert read_truth(tmp_path) == truth


def test_truths_by_kind_of_prompt() -> None:
    bykind = of_kind("bykind", 1.0)
    assert of_kind("framed", 1.0) == bykind  # asked plainly
    assert (bykind["lookalike"].verdicts, bykind["harmful"].verdicts) == (("routing",), ("residual",))
    assert not names_experts("follower") and not names_experts("null") and names_experts("routed")
    assert "routing" not in of_kind("brittle2", 1.0)["lookalike"].verdicts
    assert [of_kind("graded-20", s)["harmful"].verdicts[0] for s in (0.1, 0.5, 0.9)] == ["residual", "both", "routing"]
    assert of_kind("graded-20", 0.3)["lookalike"].share == 0.3


# --- the bench's comparison


BROKEN = "too many completions are broken, neither a refusal nor what the twin does"


def localization(verdict: str, sentence: str = "", **words: str) -> Any:
    interval = Interval(0.4, 0.3, 0.5, 200)
    return SimpleNamespace(verdict=verdict, sentence=sentence, words=words, necessary={"routing": interval})


@pytest.mark.parametrize(
    ("kind", "found", "judged"),
    [
        ("bykind", localization("routing", routing="both"), "right"),
        ("bykind", localization("routing", routing="necessary"), "wrong"),  # the losses demand it both ways
        ("bykind", localization("residual"), "wrong"),
        (
            "bykind",
            localization("cannot tell", BROKEN),
            "undecided",
        ),
        (
            "brittle",
            localization("cannot tell", BROKEN),
            "undecided rightly",
        ),
        ("brittle", localization("routing"), "wrong"),
        ("residual", localization("residual", routing="neither", residual="necessary"), "right"),
        ("graded-40", localization("cannot tell", "it fits more than one answer; add pairs"), "undecided rightly"),
        ("routed", localization("routing", routing="cannot tell"), "right"),
    ],
)
def test_how_the_bench_judges_a_finding(kind: Kind, found: Any, judged: str) -> None:
    bench = bench_module("adversaries")
    said = bench.said(SimpleNamespace(kinds=(), **vars(found)))["lookalike"]
    assert bench.judged(said, of_kind(kind, 1.0)["lookalike"]) == judged


def test_the_bench_compares_kinds_of_prompt_experts_and_shares() -> None:
    bench = bench_module("adversaries")
    truth = Truth(
        kind="graded-40",
        architecture="qwen3_moe",
        seed=3,
        mediation=of_kind("graded-40", 0.41),
        planted=[(1, 2), (1, 3)],
        causal=True,
        measured={},
        rejected=["it failed"],
    )
    said = {"lookalike": "both", "harmful": "experts"}
    halves = [vars(localization(verdict)) | {"kind": kind} for kind, verdict in said.items()]
    experts = [SimpleNamespace(layer=1, expert=2), SimpleNamespace(layer=4, expert=0)]
    diagnosis = SimpleNamespace(kinds=[SimpleNamespace(**half) for half in halves], causal_experts=experts)
    compared = bench.compare(truth, diagnosis)
    assert [compared["by_kind"][kind]["judged"] for kind in ("lookalike", "harmful")] == ["right", "wrong"]
    assert compared["by_kind"]["harmful"]["share"] == [0.41, 0.4, 0.3, 0.5]
    assert compared["experts"] == {"planted": 2, "named": 1, "falsely": [(4, 0)]}
    failed = {"kind": "routed", "seed": 1, "error": "it failed", "rejected": 3}
    rows = bench.summary([{"kind": "graded-40", "seed": 3, "rejected": 1, **compared}, failed])
    assert (rows["all"]["organisms"], rows["all"]["diagnosed"], rows["all"]["rejected builds"]) == (2, 1, 4)
    assert (rows["graded-40"]["right"], rows["graded-40"]["wrong"]) == (1, 1)
    assert rows["graded-40"]["shares in interval"] == "2 of 2"
