"""Association on made data whose truth is known, against scipy, and on the organisms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats as st

from gtqlora.capture import Observation, Region, observe, open_subject
from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import encode_prompt, load
from gtqlora.judging.judge import judge_of
from gtqlora.localize.association import Association, associate, top_experts
from gtqlora.localize.ranking import _by_difference
from gtqlora.organisms import embedded
from gtqlora.results.association import STABLE, first_of

LAYERS, SHAPE = [1, 2], (2, 8)
MOVED = (1, 5)
TOP: dict[str, Any] = {"level": 0.95, "min_difference": 0.1, "limit": 16}


def _seen(rates_NLE: NDArray[np.floating], answers: bool = True) -> Observation:
    """Rates as given in the prompt, halved at the last token, doubled in the answer."""

    def region(factor: float) -> Region:
        counts_LE = np.ones(rates_NLE.shape[1:], np.int64)
        weight_LE = np.full(rates_NLE.shape[1:], 0.1 * factor, np.float32)
        mass_NLE = 0.1 * factor * rates_NLE
        return Region(
            rates_NLE=factor * rates_NLE,
            mass_NLE=mass_NLE,
            counts_LE=counts_LE,
            weight_LE=weight_LE,
            tokens=len(rates_NLE),
        )

    return Observation(
        prompt=region(1.0),
        last=region(0.5),
        answer=region(2.0) if answers else None,
        coactivation_LEE=np.zeros((*rates_NLE.shape[1:], rates_NLE.shape[2]), np.int64),
        states_NSD=torch.zeros(len(rates_NLE), 3, 4),
    )


def _noise(seed: int, n: int, size: int = 1, shape: tuple[int, int] = SHAPE) -> NDArray[np.floating]:
    """Rates around 0.3; prompts of a group of `size` are alike."""
    rng = np.random.default_rng(seed)
    return 0.3 + np.repeat(0.1 * rng.normal(size=(n // size, *shape)), size, axis=0)


def _moved(rates_NLE: NDArray[np.floating], by: float = 0.4) -> NDArray[np.floating]:
    rates_NLE = rates_NLE.copy()
    rates_NLE[:, *MOVED] += by
    return rates_NLE


def _controlled(p_LE: NDArray[np.floating]) -> NDArray[np.floating]:
    return st.false_discovery_control(p_LE.ravel()).reshape(p_LE.shape)


def _grid(found: list[Association], name: str) -> NDArray[np.floating]:
    return np.array([getattr(a, name) for a in found]).reshape(SHAPE)


# --- columns


def test_columns_are_what_was_seen() -> None:
    flagged, twins = _moved(_noise(0, 20)), _noise(1, 20)
    found = associate(_seen(flagged), _seen(twins), LAYERS)
    assert [(a.layer, a.expert) for a in found] == [(layer, e) for layer in LAYERS for e in range(8)]
    for side, rates in (("flagged", flagged), ("twin", twins)):
        np.testing.assert_allclose(_grid(found, f"rate_{side}"), rates.mean(0))
        np.testing.assert_allclose(_grid(found, f"last_{side}"), rates.mean(0) / 2)
        np.testing.assert_allclose(_grid(found, f"answer_{side}"), rates.mean(0) * 2)
        np.testing.assert_allclose(_grid(found, f"weight_{side}"), 0.1)
    difference = (flagged - twins).mean(0)
    np.testing.assert_allclose(_grid(found, "difference"), difference)
    assert (_grid(found, "low") < difference).all() and (difference < _grid(found, "high")).all()
    # the made routing weight is a tenth wherever an expert is chosen
    np.testing.assert_allclose(_grid(found, "mass"), difference / 10)
    np.testing.assert_allclose(_grid(found, "mass_q"), _grid(found, "q"))
    assert {(a.gradient, a.gradient_low, a.gradient_high) for a in found} == {(None, None, None)}
    bare = associate(_seen(flagged, answers=False), _seen(twins, answers=False), LAYERS)
    assert {(a.answer_flagged, a.answer_twin) for a in bare} == {(None, None)}


def test_gradients_are_means_with_intervals() -> None:
    seen, scores = _seen(_noise(0, 20)), _noise(3, 20)
    found = associate(seen, seen, LAYERS, gradients=scores)
    np.testing.assert_allclose(_grid(found, "gradient"), scores.mean(0))
    assert (_grid(found, "gradient_low") < scores.mean(0)).all()
    assert (_grid(found, "gradient_high") > scores.mean(0)).all()


# --- tests


def test_paired_q_values_are_those_of_scipy() -> None:
    flagged, twins = _moved(_noise(0, 20)), _noise(1, 20)
    p = st.ttest_rel(flagged, twins, axis=0).pvalue  # type: ignore[union-attr]
    found = associate(_seen(flagged), _seen(twins), LAYERS)
    np.testing.assert_allclose(_grid(found, "q"), _controlled(p))


def test_unmatched_q_values_are_welch_s() -> None:
    flagged, others = _moved(_noise(0, 20)), 0.5 * _noise(1, 35)
    p = st.ttest_ind(flagged, others, axis=0, equal_var=False).pvalue  # type: ignore[union-attr]
    found = associate(_seen(flagged), _seen(others), LAYERS, matched=False)
    np.testing.assert_allclose(_grid(found, "q"), _controlled(p))
    difference = flagged.mean(0) - others.mean(0)
    np.testing.assert_allclose(_grid(found, "difference"), difference)
    assert (_grid(found, "low") < difference).all() and (difference < _grid(found, "high")).all()
    assert [(a.layer, a.expert) for a in top_experts(found, **TOP)] == [(2, 5)]


def test_two_prompts_of_a_group_count_once() -> None:
    """A lookalike row and its harmful sibling are no independent prompts."""
    groups = [i // 2 for i in range(40)]
    twice = associate(_seen(_moved(_noise(0, 40, 2))), _seen(_noise(1, 40, 2)), LAYERS, groups=groups)
    once = associate(_seen(_moved(_noise(0, 20))), _seen(_noise(1, 20)), LAYERS)
    for name in ("difference", "low", "high", "q", "stability"):
        np.testing.assert_allclose(_grid(twice, name), _grid(once, name))


@pytest.mark.parametrize("matched", [True, False])
def test_where_nothing_differs_little_is_found_and_intervals_cover(matched: bool) -> None:
    named, covered, runs = 0, 0, 40
    for seed in range(runs):
        seen = _seen(_noise(2 * seed, 30)), _seen(_noise(2 * seed + 1, 30))
        found = associate(*seen, LAYERS, matched=matched, seed=seed, resamples=200)
        named += min(a.q for a in found) < 0.05
        covered += sum(a.low <= 0 <= a.high for a in found)
    assert named / runs <= 0.15
    assert 0.88 <= covered / (runs * 16) <= 0.98


@pytest.mark.parametrize("matched", [True, False])
def test_rates_that_never_vary_have_the_sign_test_s_q(matched: bool) -> None:
    flagged = np.zeros((12, *SHAPE))
    flagged[:, *MOVED] = 1.0
    found = associate(_seen(flagged), _seen(np.zeros_like(flagged)), LAYERS, matched=matched)
    expected = np.ones(SHAPE)
    expected[MOVED] = 16 * 2.0**-11
    np.testing.assert_allclose(_grid(found, "q"), expected)
    np.testing.assert_allclose(_grid(found, "stability"), expected < 1)


def test_one_pair_proves_nothing() -> None:
    found = associate(_seen(_moved(_noise(0, 1))), _seen(_noise(1, 1)), LAYERS)
    assert {a.q for a in found} == {1.0}
    assert {a.stability for a in found} == {0.0}
    assert top_experts(found, **TOP) == []


# --- stability and the top


@pytest.mark.parametrize("matched", [True, False])
def test_what_differs_is_stable_and_noise_is_not(matched: bool) -> None:
    found = associate(_seen(_moved(_noise(0, 40))), _seen(_noise(1, 40)), LAYERS, matched=matched)
    stability = _grid(found, "stability")
    assert stability[MOVED] == 1.0
    assert np.delete(stability.ravel(), np.ravel_multi_index(MOVED, SHAPE)).max() < 0.5


def test_as_many_are_among_the_first_whatever_differs() -> None:
    """Everything differs; k is 3 of 16 in each half-sample, as 3^2 / (0.8 * 16) is the largest of these below 1."""
    found = associate(_seen(_noise(0, 40) + 0.3), _seen(_noise(1, 40)), LAYERS)
    assert _grid(found, "stability").sum() == pytest.approx(3)


@pytest.mark.parametrize(("experts", "first"), [(1, 1), (5, 2), (16, 3), (64, 7), (6144, 70), (23040, 135)])
def test_the_bound_on_stable_experts_sets_how_many_are_first(experts: int, first: int) -> None:
    assert first_of(experts) == first
    assert first == 1 or first**2 / ((2 * STABLE - 1) * experts) <= 1 < (first + 1) ** 2 / ((2 * STABLE - 1) * experts)


def test_noise_has_no_more_stable_experts_than_the_bound() -> None:
    """On average over samples in which nothing differs, whatever the experts' correlations."""
    stable = 0
    for seed in range(30):
        seen = [associate(_seen(_noise(2 * seed, 20)), _seen(_noise(2 * seed + 1, 20)), LAYERS, resamples=2)]
        stable += int((_grid(seen[0], "stability") >= STABLE).sum())
    assert stable / 30 <= 1.0


def test_the_top_is_significant_and_near_the_first() -> None:
    base = associate(_seen(_moved(_noise(0, 40))), _seen(_noise(1, 40)), LAYERS)[0]
    rows = [
        replace(base, expert=e, difference=d, low=low, q=q)
        for e, (d, low, q) in enumerate([(0.3, 0.27, 0.01), (0.4, 0.35, 0.01), (0.5, 0.4, 0.2), (0.35, 0.2, 0.01)])
    ]
    assert [a.expert for a in top_experts(rows, **TOP)] == [1]
    assert [a.expert for a in top_experts(rows[:1] + rows[3:], **TOP)] == [0]
    assert [a.expert for a in top_experts([replace(a, low=0.35) for a in rows], **TOP)] == [1, 3, 0]
    assert len(top_experts([replace(a, low=0.35) for a in rows], **{**TOP, "limit": 2})) == 2
    assert top_experts(rows, **{**TOP, "min_difference": 0.5}) == []


# --- organisms


@pytest.mark.parametrize("name", ["routed", "null", "routed-qwen3"])
def test_planted_experts_are_found_with_and_without_twins(name: str) -> None:
    folder = embedded.organism(name)
    subject = open_subject(str(folder))
    contrast = load(str(embedded.contrast()), judge_of(embedded.JUDGE)).split("train")
    rows = [row for row in contrast.of_kind("lookalike") if contrast.twin_of(row)][:40]
    prompts = [encode_prompt(subject.tokenizer, row.prompt) for row in rows]
    twins = [encode_prompt(subject.tokenizer, contrast.twin_of(row)) for row in rows]  # type: ignore[arg-type]
    since = [
        next(i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
        for pair in zip(prompts, twins, strict=True)
    ]
    seen = observe(subject, prompts, since=since, batch_size=20, label="")
    others = observe(subject, twins, since=since, batch_size=20, label="")
    layers, planted = [layer.index for layer in subject.anatomy.moe], set(embedded.read_truth(folder).planted)
    for matched in (True, False):
        found = associate(seen, others, layers, matched=matched, groups=[row.pair_id for row in rows])
        assert {(a.layer, a.expert) for a in top_experts(found, **TOP)} == planted
        assert all(a.stability == 1 and a.last_flagged == 1 for a in found if (a.layer, a.expert) in planted)


def test_an_expert_that_is_chosen_alike_and_weighed_more_is_ranked() -> None:
    """It is no top expert, which is chosen more."""
    rates, mass = _noise(0, 40), _noise(1, 40) / 3
    flagged, twins = _seen(rates), _seen(rates)
    heavy = replace(flagged, prompt=replace(flagged.prompt, mass_NLE=_moved(mass, 0.2)))
    light = replace(twins, prompt=replace(twins.prompt, mass_NLE=mass))
    found = associate(heavy, light, LAYERS, kind="lookalike")
    (moved,) = _by_difference(found, DiagnoseConfig(model="m", contrast="c"))
    assert (moved.kind, moved.layer, moved.expert) == ("lookalike", LAYERS[MOVED[0]], MOVED[1])
    assert moved.mass == pytest.approx(0.2) and moved.difference == 0 and top_experts(found, **TOP) == []
