"""Interchanges, masks and the verdict: against an organism whose truth is known, and on made-up outcomes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gtqlora import localize
from gtqlora.capture import CallRecorder, Interchange, Subject, expert_hooks, left_padded, log_odds, open_subject
from gtqlora.contrasts import Contrast, load
from gtqlora.contrasts.readout import Readout, find_readout
from gtqlora.errors import ModelError
from gtqlora.judging.judge import judge_of
from gtqlora.localize import (
    CELLS,
    MIN_PAIRS,
    Control,
    Controlled,
    Disturbed,
    Interchanges,
    Outcome,
    Pair,
    Trials,
    conclude,
    controlled,
    difference,
    masks,
    random_like,
)
from gtqlora.localize.controls import OTHER_TOPIC, SAME_TOPIC, chosen_experts, overlaps
from gtqlora.localize.depth import _sentence, _Swept, depth_of
from gtqlora.localize.evidence import COMPONENTS
from gtqlora.localize.interchange import FLAGGED, TWIN, InLayers, exchange, interventions_of, partly
from gtqlora.localize.masks import ablatable, counts_up_to
from gtqlora.localize.sample_size import needed, sample_sizes
from gtqlora.localize.trials import odds_of
from gtqlora.organisms import embedded
from gtqlora.results.diagnosis import Difference
from gtqlora.routing import RouterSpec
from gtqlora.scoring import Answer, Runner
from gtqlora.stages.diagnose import _cut_off_said
from gtqlora.stats import paired_difference

N_PAIRS = 40


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject(str(embedded.organism("routed")))


@pytest.fixture(scope="module")
def contrast() -> Contrast:
    return load(embedded.contrast(), judge_of(embedded.JUDGE)).split("validation")


@pytest.fixture(scope="module")
def trials(subject: Subject, contrast: Contrast) -> Trials:
    runner = Runner(model=subject, judge=judge_of(embedded.JUDGE), batch_size=N_PAIRS, max_new_tokens=6)
    pairs = localize.pairs_of(contrast, subject, N_PAIRS, seed=0)
    return Trials(runner, pairs, find_readout(subject.tokenizer, contrast.rows))


@pytest.fixture(scope="module")
def interchanges(trials: Trials) -> Interchanges:
    pairs = controlled(trials.subject, trials.sorted_out()[0], N_PAIRS)
    assert len(pairs) == N_PAIRS
    return localize.run_interchanges(trials, pairs)


@pytest.fixture(scope="module")
def planted(subject: Subject) -> list[localize.Expert]:
    layers = [layer.index for layer in subject.anatomy.moe]
    return [(layers.index(layer), e) for layer, e in embedded.read_truth(embedded.organism("routed")).planted]


# --- pairs


def test_a_pair_differs_after_its_common_start(trials: Trials) -> None:
    assert len(trials.pairs) == N_PAIRS
    for pair in trials.pairs:
        assert pair.aligned and pair.matched
        assert pair.prompt[: pair.common] == pair.twin[: pair.common]
        assert pair.prompt[pair.common] != pair.twin[pair.common]


def test_controls_are_of_the_same_kind_and_as_near_as_the_twin(trials: Trials) -> None:
    assert len(set(trials.groups)) == N_PAIRS // 2  # lookalike and harmful of each
    found = controlled(trials.subject, trials.pairs, N_PAIRS)
    assert [one.pair for one in found] == trials.pairs
    for one in found:
        same, other = one.controls
        assert other.pair is not one.pair and other.pair.row.topic != one.pair.row.topic and other.topic
        assert same.topic == (same.pair.row.topic == one.pair.row.topic)
        for control in one.controls:
            assert control.pair.row.kind == one.pair.row.kind and control.kind
            assert len(control.pair.prompt) == len(one.pair.prompt)
    by_hand = _overlap_by_hand(trials, found[0].pair.prompt, found[0].pair.twin)
    assert found[0].overlap == pytest.approx(by_hand)
    others = [
        p for p in trials.pairs if p.row.kind == found[0].pair.row.kind and p.row.topic != found[0].pair.row.topic
    ]
    gaps = [abs(_overlap_by_hand(trials, found[0].pair.prompt, p.prompt) - by_hand) for p in others]
    assert abs(found[0].controls[1].overlap - by_hand) == pytest.approx(min(gaps))


def _overlap_by_hand(trials: Trials, one: list[int], other: list[int]) -> float:
    (a_LSK,), (b_LSK,) = (chosen_experts(trials.subject, [prompt], 1).tolist() for prompt in (one, other))
    shared = [
        len(set(x) & set(y)) / len(x) for a, b in zip(a_LSK, b_LSK, strict=True) for x, y in zip(a, b, strict=True)
    ]
    return sum(shared) / len(shared)


def test_what_stands_in_for_a_control_is_marked(trials: Trials) -> None:
    """None of the kind left: the sibling stands in. None of the topic: another topic. None at all: no control."""
    lookalike, harmful = (next(p for p in trials.pairs if p.row.kind == kind) for kind in ("lookalike", "harmful"))
    both = controlled(trials.subject, [lookalike, harmful], N_PAIRS)
    assert [control.pair for control in both[0].controls] == [harmful] * 2
    assert not any(control.kind for one in both for control in one.controls)
    assert controlled(trials.subject, [lookalike], N_PAIRS) == []
    alone = replace(lookalike, row=replace(lookalike.row, topic="a topic of its own", pair_id="its own"))
    found = controlled(trials.subject, [alone, *(p for p in trials.pairs if p.row.kind == "lookalike")], N_PAIRS)
    assert [control.topic for control in found[0].controls] == [False, True]
    assert found[0].controls[0].pair is not found[0].controls[1].pair


def test_overlaps_count_experts_in_common() -> None:
    flagged_NLSK = torch.tensor([[[[0, 1], [2, 3]]], [[[1, 0], [4, 5]]]])
    twins_NLSK = torch.tensor([[[[0, 2], [2, 3]]], [[[6, 7], [6, 7]]]])
    between_NN, twin_N = overlaps(flagged_NLSK, twins_NLSK, 8)
    assert between_NN.tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert twin_N.tolist() == [0.75, 0.0]


def test_halves_keep_siblings_together(trials: Trials) -> None:
    first, second = localize.halves(trials.pairs)
    assert len(first) == len(second) == N_PAIRS // 2
    assert not {p.row.pair_id for p in first} & {p.row.pair_id for p in second}


def test_the_rarer_kind_is_drawn_first(subject: Subject, contrast: Contrast) -> None:
    lookalikes = [row for row in contrast.rows if row.kind == "lookalike"]
    few = replace(contrast, rows=tuple(row for row in contrast.rows if row not in lookalikes[4:]))
    drawn = localize.pairs_of(few, subject, 10, seed=0)
    assert Counter(pair.row.kind for pair in drawn) == {"lookalike": 4, "harmful": 6}
    even = localize.pairs_of(contrast, subject, 10, seed=0)
    assert Counter(pair.row.kind for pair in even) == {"lookalike": 5, "harmful": 5}
    assert len({pair.row.pair_id for pair in even}) == 5  # siblings together


def test_without_twins_benign_prompts_stand_in(subject: Subject, contrast: Contrast) -> None:
    rows = tuple(replace(row, twin=None, pair_id=str(i)) for i, row in enumerate(contrast.rows))
    pairs = localize.pairs_of(replace(contrast, rows=rows), subject, 20, seed=0)
    assert len(pairs) == 20
    assert not any(pair.matched or pair.aligned for pair in pairs)
    benign = {tuple(row.prompt[0]["content"].split()) for row in rows if row.kind == "benign"}
    words = subject.tokenizer.convert_ids_to_tokens(pairs[0].twin)
    assert tuple(words[1:-1]) in benign


def test_the_readout_is_the_refusal_s_first_token(trials: Trials) -> None:
    assert trials.subject.tokenizer.convert_ids_to_tokens(trials.readout) == ["refuse"]


@pytest.mark.parametrize(("alike", "readout"), [(4, ["refuse"]), (5, [])])
def test_a_refusal_s_first_token_may_begin_few_answers(
    subject: Subject, contrast: Contrast, alike: int, readout: list[str]
) -> None:
    """Four times as many refusals as answers begin with it, or it tells nothing."""
    rows = [row for row in contrast.rows if row.kind == "lookalike"][:16]
    rows = [replace(row, chosen=f"refuse {row.chosen}") if i < alike else row for i, row in enumerate(rows)]
    assert subject.tokenizer.convert_ids_to_tokens(find_readout(subject.tokenizer, rows).tokens) == readout


def test_a_beginning_that_the_model_never_says_is_not_put_into_its_mouth(trials: Trials) -> None:
    refuse, sorry = (trials.subject.tokenizer.get_vocab()[word] for word in ("refuse", "sorry"))
    behind = Readout([sorry], [refuse])
    assert localize.readable(trials.runner, trials.pairs, behind) == Readout([], [])  # twins begin otherwise
    assert localize.readable(trials.runner, trials.pairs, Readout([refuse], [])).tokens == [refuse]
    alike = [replace(pair, twin=pair.prompt) for pair in trials.pairs]
    assert localize.readable(trials.runner, alike, behind) == behind


def test_what_has_begun_is_judged_with_what_follows(trials: Trials) -> None:
    refuse, sorry = (trials.subject.tokenizer.get_vocab()[word] for word in ("refuse", "sorry"))
    pairs = [pair.answered_with([refuse]) for pair in trials.pairs]
    found = Trials(trials.runner, pairs, Readout([sorry], [refuse])).run("", FLAGGED)
    plain = trials.run("", FLAGGED)
    assert [o.refused for o in found] == [o.refused for o in plain] and any(o.refused for o in found)
    assert [[refuse, *o.tokens] for o in found if o.refused] == [o.tokens for o in plain if o.refused]
    assert all(o.log_odds is not None and o.log_odds > 0 for o in found if o.refused)


# --- interchanges


def test_swapping_in_one_s_own_computation_changes_nothing(trials: Trials) -> None:
    plain = trials.run("", FLAGGED)
    for own in (exchange(trials.flagged), exchange(trials.flagged, trials.flagged)):
        assert trials.run("", FLAGGED, own) == plain


def test_all_but_the_stream_from_the_twin_by_hand(trials: Trials, interchanges: Interchanges) -> None:
    """(twin, twin, flagged) at the first token: experts get what they got in the twin's own run, and only they."""
    subject, device = trials.subject, trials.subject.device
    ids = {name: left_padded(prompts, subject.pad_id, device)[0] for name, prompts in _prompts(trials).items()}
    recorder = CallRecorder()

    def first_logits(name: str, *taps: Any) -> torch.Tensor:
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(expert_hooks(subject.model, subject.anatomy, *taps))
            return subject.model(input_ids=ids[name], use_cache=False).logits[:, -1]

    first_logits(TWIN, recorder)
    odds = log_odds(first_logits(FLAGGED, Interchange(routing=recorder, inputs=recorder)), torch.tensor(trials.readout))
    found = [o.log_odds for o in interchanges.cells[TWIN, TWIN, FLAGGED]]
    torch.testing.assert_close(torch.tensor(found), odds, rtol=1e-4, atol=1e-3)


def _prompts(trials: Trials) -> dict[str, list[list[int]]]:
    return {FLAGGED: trials.flagged, TWIN: trials.twins}


def test_the_routed_organism_in_every_cell(interchanges: Interchanges) -> None:
    refused = {cell: np.mean([o.refused for o in outcomes]) for cell, outcomes in interchanges.cells.items()}
    assert refused[FLAGGED, FLAGGED, FLAGGED] > 0.95 and refused[TWIN, TWIN, TWIN] < 0.05
    assert max(refused[TWIN, experts, stream] for experts in (FLAGGED, TWIN) for stream in (FLAGGED, TWIN)) < 0.05
    for control in interchanges.controls.values():
        for outcomes in (control.routing, control.experts):
            assert np.mean([o.refused for o in outcomes]) > 0.9
        assert not any(o.refused for o in control.twins)


def test_the_verdict_on_the_routed_organism(interchanges: Interchanges) -> None:
    for kind in ("lookalike", "harmful"):
        found = conclude(kind, interchanges.of(kind))
        assert found.n_usable == N_PAIRS // 2 < MIN_PAIRS
        assert (found.verdict, found.words, found.shares) == ("cannot tell", {}, {})
        assert len(found.cells) == 8
    found = conclude("lookalike", interchanges)  # both kinds as one
    assert (found.verdict, found.verdict_log_odds, found.n_usable) == ("routing", "routing", N_PAIRS)
    for shares in (
        found.shares,
        found.shares_log_odds,
        found.shares_with_routing,
        found.shares_with_routing_log_odds,
    ):
        assert sum(shares[part].value for part in COMPONENTS) == pytest.approx(1.0)
    assert found.shares["routing"].low > 0.5
    assert found.necessary["routing"].low > 0.6
    assert found.words["routing"] in ("necessary", "both") and found.words["residual"] == "neither"
    assert found.overlap.keys() == {"its twin", SAME_TOPIC, OTHER_TOPIC}


def test_what_batches_swaps_are_run_in_does_not_matter(trials: Trials, interchanges: Interchanges) -> None:
    small = trials.of(trials.pairs[::-1][:10])
    small.runner = replace(small.runner, batch_size=3)
    again = small.run("", FLAGGED, exchange(small.twins))
    before = interchanges.cells[TWIN, FLAGGED, FLAGGED][::-1][:10]
    assert [o.tokens for o in again] == [o.tokens for o in before]


# --- some layers only, some steps only


def test_the_twin_s_routing_in_no_layer_changes_nothing_and_in_all_is_the_interchange(
    trials: Trials, interchanges: Interchanges
) -> None:
    twins, few = exchange(trials.twins), trials.of(trials.pairs[:10])
    none = few.run("", FLAGGED, partly(twins, lambda h: InLayers(h, range(0))))
    assert [o.tokens for o in none] == [o.tokens for o in trials.own[0][:10]]
    whole = few.run("", FLAGGED, partly(twins, lambda h: InLayers(h, range(4))))
    assert [o.tokens for o in whole] == [o.tokens for o in interchanges.cells[TWIN, FLAGGED, FLAGGED][:10]]


def test_the_twin_s_routing_on_the_prompt_only_and_on_what_is_generated_only(interchanges: Interchanges) -> None:
    prompt, generated = (odds_of(outcomes) for outcomes in interchanges.steps.values())
    # the first token's log-odds are the prompt's
    assert prompt == pytest.approx(odds_of(interchanges.cells[TWIN, FLAGGED, FLAGGED]), abs=1e-3)
    assert generated == pytest.approx(odds_of(interchanges.flagged), abs=1e-3)
    assert not any(o.refused for o in interchanges.steps["on the prompt only"])
    names = [i.name for i in interventions_of(interchanges)]
    assert "flagged, routing of its twin on what is generated only" in names


def test_the_layers_that_mediate_are_the_planted_ones(interchanges: Interchanges) -> None:
    found = depth_of(interchanges, "routing")
    assert found is not None and found.generated == N_PAIRS
    assert [(point.layers, point.last) for point in found.points] == [(0, None), (1, 1), (2, 2), (3, 3), (4, 4)]
    first, last = found.points[0], found.points[-1]
    assert first.after == last.up_to and first.up_to == last.after
    assert first.up_to.as_twin.value == 0 and first.after.as_twin.value > 0.9
    for part in ("log_odds", "as_twin"):  # planted in layers 2 and 4 of 1 to 4
        assert abs(getattr(found.points[1].up_to, part).value) < 0.05 < 0.9 < getattr(found.points[1].after, part).value
        second, third = (getattr(point.up_to, part).value for point in found.points[2:4])
        assert second == pytest.approx(third, abs=0.05)
    assert "The routing mediates the false refusals in MoE layers 2 to 4" in found.sentence
    assert depth_of(interchanges.of("harmful"), "routing") is None  # too few
    unknown = depth_of(interchanges, "cannot tell")
    assert unknown is not None and unknown.points == found.points and "No layers are named" in unknown.sentence


@pytest.mark.parametrize(
    ("up_to", "after", "said"),
    [
        ((0, 0.9, 1, 1, 1), (1, 0.1, 0, 0, 0), "in MoE layer 1: of what the whole routing moves"),
        ((0, 0.1, 0.9, 1, 1), (1, 1, 0.1, 0, 0), "alone 10%"),
        ((0, 0.1, 0.9, 1, 1), (1, 1, 0.1, 0, 0), "in MoE layer 3: of"),
        ((0, 0.1, 0.8, 1, 1), (1, 1, 0.5, 0, 0), "so these take part"),
        ((0, 0.1, 0.5, 0.9, 1), (1, 1, 0.5, 0.2, 0), "in MoE layers 3 to 5: of"),
        ((0, 0, 0, 0.1, 1), (1, 1, 1, 0.9, 0), "in MoE layer 7: of what"),
        ((0, 0.9, 1, 1, 1), (1, 1, 1, 0.9, 0), "stands in for others"),
    ],
)
def test_in_which_layers_the_routing_mediates(up_to: tuple[float, ...], after: tuple[float, ...], said: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, size=60)

    def columns(parts: tuple[float, ...]) -> dict[int, np.ndarray]:
        return {count: part + noise for count, part in enumerate(parts)}

    swept = _Swept(up_to=columns(up_to), after=columns(after), unit=np.ones(60), groups=[str(i) for i in range(60)])
    assert said in _sentence(swept, swept, range(5), (1, 3, 5, 7), "false refusals")
    # garbage: the log-odds fall with fewer layers than it takes to do as the twin
    late = replace(swept, up_to=columns((0, 0, 0, 0, 1)), after=columns((1, 0, 0, 0, 0)))
    assert "in MoE layers 1 to 7" in _sentence(swept, late, range(5), (1, 3, 5, 7), "false refusals")


# --- masks


def test_planted_experts_act_and_no_other(trials: Trials, planted: list[localize.Expert]) -> None:
    frequency = np.full((4, 16), 0.125)
    others = [(0, 3), (2, 5), (3, 1)]
    for kind in ("lookalike", "harmful"):
        part, settings = trials.of_kind(kind), {"min_effect": 0.03, "level": 0.95, "seed": 0}
        found = localize.expert_effects(part, [*planted, *others], frequency, **settings)
        assert [(e.position, e.expert) for e in found] == [*planted, *others]
        assert [e.acts for e in found] == [True] * 4 + [False] * 3
        assert not any(e.contributes for e in found)
        for effect in found[:4]:
            assert effect.restore.value > 0.05 > effect.control.high


@pytest.mark.parametrize("pairs", [10, 40])
def test_an_expert_must_do_more_than_its_control_to_the_same_prompts(pairs: int) -> None:
    """Both are far above the least effect; only the paired difference from the control tells them apart."""
    rng = np.random.default_rng(0)
    prompt_N, groups = rng.normal(2.0, 0.3, size=pairs), [str(i) for i in range(pairs)]
    noise_N = rng.normal(0.0, 0.1, size=pairs)
    control_N = prompt_N + noise_N - noise_N.mean()
    as_control, above = (
        masks._p_values(masks._Measured((part_N, part_N), (prompt_N, prompt_N), part_N), 0.1, np.ones(pairs), groups)
        for part_N in (control_N, control_N + 0.2)
    )
    assert min(as_control) > 0.05 > 0.01 > max(above)


def _judged(*measured: tuple[float, float, float]) -> list[str]:
    """Return what experts of one layer do of which each takes, brings back, and brings with its layer, such a part."""
    rng, ones = np.random.default_rng(0), np.ones(30)

    def noisy(part: float) -> np.ndarray:
        return part + rng.normal(0, 0.005, size=30)

    made = [masks._Measured((noisy(t), noisy(b)), (noisy(0), noisy(0)), noisy(layer)) for t, b, layer in measured]
    found = masks._judged([(0, i) for i in range(len(made))], made, ones, [str(i) for i in range(30)], 0.03, 0.95)
    return ["acts" if effect.acts else "contributes" if effect.contributes else "" for effect in found]


def test_an_expert_acts_that_is_needed_or_enough() -> None:
    assert _judged((0.7, 0.2, 0.2)) == ["acts"]  # needed
    assert _judged((0.0, 0.7, 0.7)) == ["acts"]  # enough
    assert _judged((0.0, 0.4, 0.7), (0.0, 0.3, 0.7), (0.0, 0.0, 0.7)) == ["acts", "acts", ""]  # two of them together
    assert _judged((0.1, 0.3, 0.4), (0.02, 0.15, 0.4)) == ["contributes"] * 2  # as routers that only relay it
    # needed by what is downstream, and brings nothing back; where none does, that is all there is to go by
    assert _judged((0.7, 0.0, 0.2), (0.7, 0.2, 0.2)) == ["", "acts"]
    assert _judged((0.7, 0.0, 0.0), (0.0, 0.0, 0.0)) == ["acts", ""]


def test_effects_need_a_gap_and_a_readout(
    trials: Trials, interchanges: Interchanges, planted: list[localize.Expert]
) -> None:
    frequency, settings = np.full((4, 16), 0.125), {"min_effect": 0.05, "level": 0.95, "seed": 0}
    same = trials.of(trials.pairs)
    same.own = (interchanges.flagged, interchanges.flagged)  # no gap
    assert localize.expert_effects(same, planted, frequency, **settings) == []
    blind = trials.of(trials.pairs)
    blind.readout = []
    assert localize.expert_effects(blind, planted, frequency, **settings) == []


def test_a_layer_full_of_candidates_leaves_its_routers_their_choice(trials: Trials) -> None:
    few = trials.of(trials.pairs[:16])
    candidates = [(2, expert) for expert in range(16)]
    found = localize.expert_effects(few, candidates, np.full((4, 16), 0.125), min_effect=0.03, level=0.95, seed=0)
    assert [e.expert for e in found] == list(range(14))  # two are left to choose


def test_curves_fall_where_experts_carry_it_and_not_at_random(trials: Trials, planted: list[localize.Expert]) -> None:
    frequency = np.full((4, 16), 0.125)
    targeted = localize.curve(trials, "planted", planted)
    control = localize.random_curve(trials, planted, frequency, draws=2, seed=0)
    assert [p.ablated for p in targeted.points] == [p.ablated for p in control.points] == [0, 1, 2, 4]
    assert targeted.points[0].refusal.value == control.points[0].refusal.value > 0.95
    assert targeted.points[-1].refusal.high < 0.2
    assert control.points[-1].refusal.low > 0.8
    assert (targeted.control, control.control) == (False, True)


@pytest.mark.parametrize(("most", "counts"), [(0, []), (1, [1]), (3, [1, 2, 3]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_numbers_of_masked_experts(most: int, counts: list[int]) -> None:
    assert counts_up_to(most) == counts


def test_masks_leave_every_router_its_choice() -> None:
    spec = RouterSpec(score="softmax", top_k=2, n_experts=4, normalize=True)
    assert ablatable([(0, 0), (0, 1), (0, 2), (1, 0), (0, 3)], spec) == [(0, 0), (0, 1), (1, 0)]


@given(
    seed=st.integers(0, 1000),
    masked=st.dictionaries(
        st.integers(0, 2), st.sets(st.integers(0, 15), min_size=1, max_size=6).map(sorted).map(tuple), min_size=1
    ),
)
def test_random_controls_match_a_mask(seed: int, masked: dict[int, tuple[int, ...]]) -> None:
    frequency = np.random.default_rng(seed).random((3, 16))
    control = random_like(masked, frequency, random.Random(seed))
    assert control.keys() == masked.keys()
    for layer, experts in masked.items():
        assert len(set(control[layer])) == len(experts)
        assert not set(control[layer]) & set(experts)


def test_random_controls_are_of_like_frequency() -> None:
    frequency = np.array([[0.9, 0.88, 0.86, 0.84, 0.82, *[0.0] * 11]])
    drawn = {random_like({0: (0,)}, frequency, random.Random(seed))[0][0] for seed in range(60)}
    assert drawn >= {1, 2, 3, 4}
    assert len(drawn) <= 5


# --- the verdict on made-up outcomes

ROUTING = {"FFF", "FFT", "FTF", "FTT"}
STREAM = {"FFF", "FTF", "TFF", "TTF"}
EXPERTS = {"FFF", "FFT", "TFF", "TFT"}


def _interchanges(
    trials: Trials, refuses: Sequence[set[str]], kind: str = "lookalike", /, **controls: int
) -> Interchanges:
    """Pairs that refuse in the cells named (F flagged, T twin; routing, experts, stream), and else do as the twin.

    `controls` says how many of the controls move the behaviour.
    """
    n = len(refuses)
    pairs = [replace(trials.pairs[0], row=replace(trials.pairs[0].row, pair_id=str(i), kind=kind)) for i in range(n)]

    def outcome(refused: bool) -> Outcome:
        return Outcome("refuses" if refused else "as twin", None, 5.0 if refused else -5.0, [])

    def control(name: str, usual: bool) -> list[Outcome]:
        return [outcome(usual != (i < controls.get(name, 0))) for i in range(n)]

    cells = {cell: [outcome("".join(part[0].upper() for part in cell) in where) for where in refuses] for cell in CELLS}
    moved = Disturbed(routing=control("routing", True), experts=control("experts", True), twins=control("twin", False))
    still = Disturbed(routing=control("", True), experts=control("", True), twins=control("", False))
    part = Trials(trials.runner, pairs, Readout(trials.readout, []))
    part.answers, part.own = ([], []), (cells[CELLS[0]], cells[CELLS[-1]])
    drawn = [Control(pair=pair, overlap=0.5, topic=True, kind=True) for pair in pairs]
    return Interchanges(
        pairs=[Controlled(pair=d.pair, controls=(d, d), overlap=0.4) for d in drawn],
        trials=part,
        cells=cells,
        controls={SAME_TOPIC: still, OTHER_TOPIC: moved},
    )


def _some(interchanges: Interchanges, where: set[str], does: str, share: float = 1.0) -> Interchanges:
    """The same with another outcome in some cells, for a share of the pairs."""
    n = round(share * len(interchanges.pairs))

    def changed(outcomes: list[Outcome]) -> list[Outcome]:
        return [replace(o, does=does) if i < n else o for i, o in enumerate(outcomes)]  # type: ignore[arg-type]

    cells = interchanges.cells.items()
    named = {cell: "".join(part[0].upper() for part in cell) in where for cell, _ in cells}
    return replace(interchanges, cells={cell: changed(o) if named[cell] else o for cell, o in cells})


@pytest.mark.parametrize(
    ("refuses", "controls", "verdict"),
    [
        ([ROUTING] * 100, {}, "routing"),
        ([STREAM] * 100, {}, "residual"),
        ([EXPERTS] * 100, {}, "experts"),
        ([ROUTING | STREAM] * 100, {}, "both"),  # each is enough
        ([ROUTING] * 90 + [STREAM] * 10, {}, "routing"),
        ([ROUTING] * 100 + [STREAM] * 100, {}, "both"),  # some by the one, some by the other
        ([ROUTING & STREAM] * 100, {}, "routing"),  # needed, though not enough
        ([ROUTING] * 70 + [STREAM] * 30, {}, "cannot tell"),
        ([ROUTING | STREAM] * 50 + [STREAM] * 50, {}, "cannot tell"),
        ([EXPERTS] * 50 + [STREAM] * 50, {}, "cannot tell"),
        ([ROUTING] * 100, {"routing": 50}, "cannot tell"),  # another flagged prompt's routing does half of it too
        ([STREAM] * 100, {"experts": 50}, "cannot tell"),
        ([STREAM | {"FTT"}] * 100, {"twin": 100}, "residual"),  # any other routing makes twins refuse
        ([STREAM] * MIN_PAIRS, {}, "residual"),
        ([ROUTING] * (MIN_PAIRS - 1), {}, "cannot tell"),
        ([], {}, "cannot tell"),
    ],
)
def test_verdicts(trials: Trials, refuses: list[set[str]], controls: dict[str, int], verdict: str) -> None:
    found = conclude("lookalike", _interchanges(trials, refuses, **controls), {"whose twin is refused, too": 7})
    assert found.verdict == verdict
    assert found.n_usable == len(refuses)
    assert ("cannot be told" in found.sentence) == (verdict == "cannot tell") and "false refusals" in found.sentence
    if len(refuses) < MIN_PAIRS:
        assert f"{len(refuses)} usable pairs and {MIN_PAIRS} are needed" in found.sentence
        assert "7 whose twin is refused, too" in found.sentence
        assert found.shares == {}


@pytest.mark.parametrize(
    ("refuses", "words"),
    [
        (ROUTING, ("both", "neither", "neither")),
        (ROUTING | STREAM, ("sufficient", "neither", "sufficient")),
        (ROUTING & STREAM, ("necessary", "neither", "necessary")),
        (EXPERTS, ("neither", "both", "neither")),
    ],
)
def test_words_for_each_component(trials: Trials, refuses: set[str], words: tuple[str, ...]) -> None:
    assert tuple(conclude("harmful", _interchanges(trials, [refuses] * 60)).words.values()) == words


@pytest.mark.parametrize(
    ("refuses", "joined_by_stream", "joined_by_routing"),
    [
        (ROUTING, (1, 0, 0, 0), (1, 0, 0, 0)),
        (EXPERTS, (0, 1, 0, 0), (0, 1, 0, 0)),
        (STREAM, (0, 0, 1, 0), (0, 0, 1, 0)),
        (ROUTING | STREAM, (0.5, 0, 0.5, -1), (0.5, 0, 0.5, -1)),
        (ROUTING & STREAM, (0.5, 0, 0.5, 1), (0.5, 0, 0.5, 1)),
        # both are on one side of the first union, and on two of the second
        (EXPERTS & STREAM, (0, 0.5, 0.5, 0), (0, 0.5, 0.5, 1)),
        (ROUTING & EXPERTS & STREAM, (0.5, 0.25, 0.25, 1), (0.25, 0.25, 0.5, 1)),
    ],
)
def test_shares_of_planted_truth_tables(
    trials: Trials, refuses: set[str], joined_by_stream: tuple[float, ...], joined_by_routing: tuple[float, ...]
) -> None:
    """Owen values worked out by hand."""
    found = conclude("lookalike", _interchanges(trials, [refuses] * 60))
    for name, shares in (
        ("shares", joined_by_stream),
        ("shares_log_odds", joined_by_stream),
        ("shares_with_routing", joined_by_routing),
        ("shares_with_routing_log_odds", joined_by_routing),
    ):
        values = [getattr(found, name)[part].value for part in (*COMPONENTS, "interaction")]
        assert values == pytest.approx(shares, abs=1e-9), name
        assert all(i.low <= i.value <= i.high and i.low < i.high for i in found.shares.values())


@pytest.mark.parametrize(("share", "verdict"), [(1.0, "cannot tell"), (0.5, "cannot tell"), (0.1, "routing")])
def test_garbage_is_not_what_the_twin_does(trials: Trials, share: float, verdict: str) -> None:
    found = conclude("lookalike", _some(_interchanges(trials, [ROUTING] * 60), {"TFF"}, "broken", share))
    assert found.verdict == verdict
    assert bool(found.shares) == (verdict == "routing")
    if verdict == "cannot tell":
        assert f"the twin's routing {share:.0%}" in found.sentence and "a judge with a `same`" in found.sentence


def test_a_stream_that_needs_its_experts_is_not_called_routing(trials: Trials) -> None:
    """The counterexample `brittle2`: any mixture turns to garbage, but the flagged stream alone refuses."""
    stream = _interchanges(trials, [{"FFF", "TTF"}] * 100)
    assert conclude("harmful", _some(stream, {"TFF", "FTT"}, "broken")).verdict == "cannot tell"
    clean = conclude("harmful", stream)  # where the mixture does what the twin does, it still is not the routing alone
    assert clean.verdict == "cannot tell" and "residual stream alone brings 100%" in clean.sentence


def test_log_odds_that_say_something_else(trials: Trials) -> None:
    """The refusals go with the routing, the first token's log-odds stay with the stream."""
    found = _interchanges(trials, [ROUTING] * 60)
    stays = {
        cell: [replace(o, log_odds=5.0 if cell[2] == FLAGGED else -5.0) for o in os] for cell, os in found.cells.items()
    }
    said = conclude("lookalike", replace(found, cells=stays))
    assert (said.verdict, said.verdict_log_odds) == ("cannot tell", "residual")
    assert "what is generated says routing, and the log-odds of its first token say residual" in said.sentence
    assert said.reasons[-1].startswith("The log-odds of the first token alone would say residual")
    silent = {cell: [replace(o, log_odds=None) for o in os] for cell, os in found.cells.items()}
    without = conclude("lookalike", replace(found, cells=silent))
    assert (without.verdict, without.verdict_log_odds, without.shares_log_odds) == ("routing", "", {})


@pytest.mark.parametrize(("share", "verdict"), [(0.95, "routing"), (0.5, "both"), (0.1, "residual")])
def test_noisy_outcomes_give_the_verdict_of_their_share(trials: Trials, share: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        kinds = [ROUTING if hit else STREAM for hit in rng.random(300) < share]
        made = _interchanges(trials, kinds, routing=int(rng.integers(0, 12)))
        assert conclude("lookalike", made).verdict == verdict


# --- false refusals against true ones


def _difference(trials: Trials, false: list[set[str]], true: list[set[str]]) -> Difference:
    made = {"lookalike": _interchanges(trials, false), "harmful": _interchanges(trials, true, "harmful")}
    return difference({kind: conclude(kind, part) for kind, part in made.items()}, made)


@pytest.mark.parametrize(
    ("false", "true", "verdict"),
    [
        ([ROUTING] * 60, [ROUTING] * 60, "in the same place"),
        ([STREAM] * MIN_PAIRS, [STREAM] * MIN_PAIRS, "in the same place"),
        ([ROUTING] * 60, [STREAM] * 60, "elsewhere"),
        ([EXPERTS] * 60, [STREAM] * 60, "elsewhere"),  # neither by the routing
        ([ROUTING | STREAM] * 60, [STREAM] * 60, "elsewhere"),  # the routing is necessary for neither
        ([ROUTING] * 40 + [STREAM] * 20, [STREAM] * 60, "elsewhere"),  # though the first cannot be told
        ([ROUTING] * 100 + [STREAM] * 40, [ROUTING] * 140, "cannot tell"),
        ([ROUTING] * (MIN_PAIRS - 1), [STREAM] * 60, "cannot tell"),
    ],
)
def test_differences(trials: Trials, false: list[set[str]], true: list[set[str]], verdict: str) -> None:
    found = _difference(trials, false, true)
    assert found.verdict == verdict
    assert found.sentence.startswith("Whether" if verdict == "cannot tell" else "False refusals are mediated")
    if len(false) >= MIN_PAIRS:
        gap = np.mean([f == ROUTING for f in false]) - np.mean([t == ROUTING for t in true])
        part = found.parts["necessary: routing"]
        assert part.value == pytest.approx(gap) and part.low <= gap <= part.high and part.low < part.high


# --- what one completion does


@pytest.fixture(scope="module")
def answered(trials: Trials) -> tuple[Answer, Answer]:
    """What the first flagged prompt and its twin say."""
    flagged, twins = trials.answers
    return flagged[0], twins[0]


def _does(trials: Trials, answer: Answer, twin: Answer | None = None) -> str:
    one = trials.of(trials.pairs[:1])
    flagged, own = one.answers
    one.answers = flagged, [twin or own[0]]
    return one._outcomes([answer])[0].does  # pyright: ignore[reportPrivateUsage]


def test_an_outcome_is_one_of_three(trials: Trials, answered: tuple[Answer, Answer]) -> None:
    refusal, twin = answered
    assert _does(trials, refusal) == "refuses" and _does(trials, twin) == "as twin"
    assert _does(trials, replace(twin, text="vote vote", tokens=[9, 9], correct=None)) == "broken"
    assert _does(trials, replace(twin, text="", tokens=[], correct=None)) == "broken"
    # an answer that goes on as a refusal is neither
    hybrid = replace(refusal, text=f"vuso {refusal.text}", tokens=[twin.tokens[0], *refusal.tokens])
    assert _does(trials, hybrid) == "broken"
    # cut off at the same words, they may go on differently; but an answer known to be right is right
    cut = replace(twin, ended=False, correct=None)
    assert _does(trials, cut, cut) == "broken" and _does(trials, replace(cut, correct=True), cut) == "as twin"


def test_pairs_that_do_not_behave_do_not_count(trials: Trials, answered: tuple[Answer, Answer]) -> None:
    refusal, twin = answered
    six = Trials(trials.runner, trials.pairs[:6], Readout(trials.readout, []))
    wrong = replace(twin, text="vote", correct=False)
    cut = replace(twin, ended=False, correct=None)
    six.answers = (
        [refusal, twin, refusal, refusal, refusal, refusal],
        [twin, twin, refusal, wrong, replace(wrong, text=""), cut],
    )
    usable, counts = six.sorted_out()
    assert usable == six.pairs[:1]
    assert counts == {
        "not refused": 1,
        "whose twin is refused, too": 1,
        "whose twin is answered wrongly or not at all": 2,
        "whose twin is cut off at the limit of tokens": 1,
    }
    # 6 tokens are the limit; answers in the rows have two
    assert "`max_new_tokens` = 6: raise it to 12" in _cut_off_said(six, 1)


def test_a_replay_that_changes_what_is_said_is_an_error(
    trials: Trials, interchanges: Interchanges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a swap gave prompts the routing of others, what it moves would say nothing of twins."""
    monkeypatch.setattr("gtqlora.localize.interchange.exchange", lambda *_: exchange(trials.twins[:16]))
    with pytest.raises(ModelError, match="replaying a prompt's own routing changes what 16 of 16 prompts say"):
        localize.run_interchanges(trials, interchanges.pairs[:16])


def test_more_pairs_are_asked_for_where_an_answer_cannot_come() -> None:
    assert needed("routing") < needed("both") > needed("residual")
    # by simulation: so many pairs give the answer in about four cases of five, and half as many hardly
    rng = np.random.default_rng(0)
    told = {n: np.mean([_told(rng.random(n) < 0.5) for _ in range(60)]) for n in (needed("both"), needed("both") // 2)}
    assert told[needed("both")] > 0.6 > told[needed("both") // 2]
    assert sample_sizes({"harmful": 1000}) == []
    assert "40 usable harmful pairs" in sample_sizes({"harmful": 40})[0]


def _told(moved: np.ndarray) -> bool:
    interval = paired_difference(moved, np.zeros(len(moved)))
    return interval.low > 1 / 3 and interval.high < 2 / 3


def test_pair_is_not_aligned_with_a_stranger() -> None:
    assert not Pair(row=None, prompt=[1, 2], twin=[1, 3], twin_messages=(), matched=False).aligned  # type: ignore[arg-type]
