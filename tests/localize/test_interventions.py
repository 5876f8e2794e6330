"""Interchanges, masks and the verdict: against an organism whose truth is known, and on made-up outcomes."""

from __future__ import annotations

import random
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
from gtqlora.judging.judge import judge_of
from gtqlora.localize import (
    CELLS,
    MIN_PAIRS,
    Interchanges,
    Outcome,
    Pair,
    Trials,
    conclude,
    masks,
    partners,
    random_like,
)
from gtqlora.localize.conclusion import COMPONENTS
from gtqlora.localize.interchange import FLAGGED, TWIN, exchange
from gtqlora.localize.masks import ablatable, counts_up_to
from gtqlora.organisms import embedded
from gtqlora.routing import RouterSpec
from gtqlora.scoring import Runner

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
    return Trials(runner, pairs, localize.readout_tokens(subject, contrast.rows))


@pytest.fixture(scope="module")
def interchanges(trials: Trials) -> Interchanges:
    return localize.run_interchanges(trials, [p for p in partners(trials.pairs, 0) if p is not None])


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


def test_partners_are_siblings_of_the_same_length(trials: Trials) -> None:
    assert len(set(trials.groups)) == N_PAIRS // 2  # lookalike and harmful of each
    for pair, partner in zip(trials.pairs, partners(trials.pairs, 0), strict=True):
        assert partner is not None
        assert partner.row.pair_id == pair.row.pair_id
        assert len(partner.prompt) == len(pair.prompt)
        assert partner.prompt != pair.prompt
    lone = [pair for pair in trials.pairs if pair.row.kind == "harmful"]
    for pair, partner in zip(lone, partners(lone, 0), strict=True):
        assert partner is not None
        assert partner.prompt != pair.prompt
    assert partners(trials.pairs[:1], 0) == [None]


def test_halves_keep_siblings_together(trials: Trials) -> None:
    first, second = localize.halves(trials.pairs)
    assert len(first) == len(second) == N_PAIRS // 2
    assert not {p.row.pair_id for p in first} & {p.row.pair_id for p in second}


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
    assert subject.tokenizer.convert_ids_to_tokens(localize.readout_tokens(subject, rows)) == readout


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
    for control in (interchanges.routing_control, interchanges.experts_control):
        assert np.mean([o.refused for o in control]) > 0.9
    assert not any(o.refused for o in interchanges.twin_control)


def test_the_verdict_on_the_routed_organism(interchanges: Interchanges) -> None:
    found = conclude(interchanges)
    assert (found.verdict, found.n_usable) == ("routing", N_PAIRS)
    assert sum(found.shares[part].value for part in COMPONENTS) == pytest.approx(1.0)
    assert sum(found.shares_log_odds[part].value for part in COMPONENTS) == pytest.approx(1.0)
    assert found.shares["routing"].low > 0.5
    assert found.necessary["routing"].low > 0.6
    assert len(found.reasons) == 3


def test_what_batches_swaps_are_run_in_does_not_matter(trials: Trials, interchanges: Interchanges) -> None:
    small = trials.of(trials.pairs[::-1][:10])
    small.runner = replace(small.runner, batch_size=3)
    again = small.run("", FLAGGED, exchange(small.twins))
    before = interchanges.cells[TWIN, FLAGGED, FLAGGED][::-1][:10]
    assert [o.tokens for o in again] == [o.tokens for o in before]


# --- masks


def test_planted_experts_act_and_no_other(trials: Trials, planted: list[localize.Expert]) -> None:
    frequency = np.full((4, 16), 0.125)
    others = [(0, 3), (2, 5), (3, 1)]
    found = localize.expert_effects(trials, [*planted, *others], frequency, min_effect=0.03, level=0.95, seed=0)
    assert [(e.position, e.expert) for e in found] == [*planted, *others]
    assert [e.acts for e in found[:2] + found[4:]] == [True] * 2 + [False] * 3  # the last two planted do less
    for effect in found[:4]:
        assert effect.restore.value > 0.05 > effect.control.high


@pytest.mark.parametrize("pairs", [10, 40])
def test_an_expert_must_do_more_than_its_control_to_the_same_prompts(pairs: int) -> None:
    """Both are far above the least effect; only the paired difference from the control tells them apart."""
    rng = np.random.default_rng(0)
    prompt_N, groups = rng.normal(2.0, 0.3, size=pairs), [str(i) for i in range(pairs)]
    noise_N = rng.normal(0.0, 0.1, size=pairs)
    control_N = prompt_N + noise_N - noise_N.mean()
    found = masks._Measured((control_N, control_N + 0.2), (prompt_N, prompt_N))
    as_control, above = masks._p_values(found, np.full(pairs, 0.1), groups)
    assert as_control > 0.05 > 0.01 > above


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


def _interchanges(trials: Trials, refuses: Sequence[set[str]], **controls: int) -> Interchanges:
    """Pairs that refuse in the cells named (F flagged, T twin, in the order routing, experts, stream).

    `controls` says how many of the controls move the behaviour.
    """
    n = len(refuses)
    pairs = [replace(trials.pairs[0], row=replace(trials.pairs[0].row, pair_id=str(i))) for i in range(n)]
    part = Trials(trials.runner, pairs, trials.readout)

    def outcome(refused: bool) -> Outcome:
        return Outcome(refused, None, 5.0 if refused else -5.0, [])

    def control(name: str, usual: bool) -> list[Outcome]:
        return [outcome(usual != (i < controls.get(name, 0))) for i in range(n)]

    cells = {cell: [outcome("".join(part[0].upper() for part in cell) in where) for where in refuses] for cell in CELLS}
    return Interchanges(part, cells, control("routing", True), control("experts", True), control("twin", False))


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
        ([ROUTING | STREAM] * 100, {"twin": 100}, "residual"),  # any other routing makes twins refuse
        ([STREAM] * MIN_PAIRS, {}, "residual"),
        ([ROUTING] * (MIN_PAIRS - 1), {}, "cannot tell"),
        ([], {}, "cannot tell"),
    ],
)
def test_verdicts(trials: Trials, refuses: list[set[str]], controls: dict[str, int], verdict: str) -> None:
    found = conclude(_interchanges(trials, refuses, **controls))
    assert found.verdict == verdict
    assert found.n_usable == len(refuses)
    assert found.sentence.startswith(f"{verdict.capitalize()}: ")
    if len(refuses) < MIN_PAIRS:
        assert f"only {len(refuses)} aligned pairs" in found.sentence
        assert found.shares == {}


@pytest.mark.parametrize(
    ("refuses", "shares"),
    [
        (ROUTING, (1, 0, 0, 0)),
        (EXPERTS, (0, 1, 0, 0)),
        (STREAM, (0, 0, 1, 0)),
        (ROUTING | STREAM, (0.5, 0, 0.5, -1)),
        (ROUTING & STREAM, (0.5, 0, 0.5, 1)),
        (EXPERTS & STREAM, (0, 0.5, 0.5, 0)),  # both are of Level 1, so the levels do not interact
        (ROUTING & EXPERTS & STREAM, (0.5, 0.25, 0.25, 1)),
    ],
)
def test_shares_of_planted_truth_tables(trials: Trials, refuses: set[str], shares: tuple[float, ...]) -> None:
    """Owen values worked out by hand."""
    found = conclude(_interchanges(trials, [refuses] * 60))
    for name in ("shares", "shares_log_odds"):
        values = [getattr(found, name)[part].value for part in (*COMPONENTS, "interaction")]
        assert values == pytest.approx(shares, abs=1e-9)
        assert all(i.low <= i.value <= i.high and i.low < i.high for i in found.shares.values())


def test_garbage_is_not_a_moved_refusal(trials: Trials) -> None:
    interchanges = _interchanges(trials, [ROUTING] * 60)
    garbled = [replace(o, correct=False) for o in interchanges.cells[TWIN, FLAGGED, FLAGGED]]
    cells = {**interchanges.cells, (TWIN, FLAGGED, FLAGGED): garbled}
    assert conclude(replace(interchanges, cells=cells)).verdict != "routing"


def test_pairs_that_do_not_behave_do_not_count(trials: Trials) -> None:
    found = conclude(_interchanges(trials, [ROUTING] * 60 + [set()] * 40 + [{"FFF", "TTT"}] * 20))
    assert (found.verdict, found.n_usable) == ("routing", 60)


@pytest.mark.parametrize(("share", "verdict"), [(0.95, "routing"), (0.5, "both"), (0.1, "residual")])
def test_noisy_outcomes_give_the_verdict_of_their_share(trials: Trials, share: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        kinds = [ROUTING if hit else STREAM for hit in rng.random(300) < share]
        assert conclude(_interchanges(trials, kinds, routing=int(rng.integers(0, 12)))).verdict == verdict


def test_pair_is_not_aligned_with_a_stranger() -> None:
    assert not Pair(row=None, prompt=[1, 2], twin=[1, 3], twin_messages=(), matched=False).aligned  # type: ignore[arg-type]
