"""Routing maths against hand-worked numbers and its defining properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtqlora.routing import RouterSpec, check_mask, choose, divergence_T, load, overlap_T, scores, selection_TE, weigh

SOFTMAX = RouterSpec(score="softmax", top_k=2, n_experts=8, normalize=True)
SIGMOID = RouterSpec(score="sigmoid", top_k=2, n_experts=8, normalize=True, scale=2.5)
GROUPED = RouterSpec(score="sigmoid", top_k=2, n_experts=8, normalize=True, n_group=4, topk_group=1)
BOTH = pytest.mark.parametrize("spec", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])


def _logits(seed: int, tokens: int = 16) -> Tensor:
    return 2 * torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def test_load_by_hand() -> None:
    found = load(torch.tensor([6.0, 2.0, 0.0, 0.0]))
    assert found.cv == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    assert found.max_vio == pytest.approx((6 - 2) / 2)
    assert found.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))


def test_load_at_its_extremes() -> None:
    even, one, none = load(torch.full((5,), 3.0)), load(torch.tensor([9.0, 0, 0, 0])), load(torch.zeros(4))
    assert (even.cv, even.max_vio) == (0.0, 0.0)
    assert even.entropy == pytest.approx(1.0)
    assert (one.max_vio, one.entropy) == (3.0, 0.0)
    assert (none.cv, none.max_vio, none.entropy) == (0.0, 0.0, 1.0)


def test_overlap_by_hand() -> None:
    ours, theirs = torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[1, 0], [3, 6], [0, 1]])
    assert overlap_T(ours, theirs).tolist() == [1.0, 0.5, 0.0]


def test_selection_by_hand() -> None:
    assert selection_TE(torch.tensor([[2, 0]]), 4).tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_scores_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert scores(logits, SIGMOID).tolist() == [pytest.approx([0.5, 0.75])]
    assert scores(logits, SOFTMAX).tolist() == [pytest.approx([0.25, 0.75])]


def test_scores_are_computed_in_fp32() -> None:
    assert scores(_logits(0).bfloat16(), SOFTMAX).dtype == torch.float32


def test_weights_by_hand() -> None:
    logits, indices = torch.tensor([[0.0, math.log(3.0), -9.0]]), torch.tensor([[1, 0]])
    plain = RouterSpec(score="sigmoid", top_k=2, n_experts=3, normalize=False)
    normal = RouterSpec(score="sigmoid", top_k=2, n_experts=3, normalize=True, scale=2.0)
    assert weigh(logits, indices, plain).tolist() == [pytest.approx([0.75, 0.5])]
    assert weigh(logits, indices, normal).tolist() == [pytest.approx([1.2, 0.8])]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1, -1, -1, -1]]), torch.zeros(8)
    bias[3] = 5.0
    indices = choose(logits, SIGMOID, bias)
    assert set(indices[0].tolist()) == {0, 3}
    weight = weigh(logits, indices, SIGMOID)[0, indices[0] == 3]
    assert weight.item() == pytest.approx(2.5 * 0.5 / (0.5 + 0.952574), 1e-5)


def test_groups_limit_the_choice() -> None:
    """The best single expert loses to the group with the best two."""
    logits = torch.tensor([[4.0, -9, 1.0, 1.5, -9, -9, -9, -9]])
    assert set(choose(logits, GROUPED)[0].tolist()) == {2, 3}


@settings(deadline=None, max_examples=60)
@given(
    spec=st.sampled_from([SOFTMAX, SIGMOID, GROUPED]),
    seed=st.integers(0, 10_000),
    masked=st.sets(st.integers(0, 7), max_size=6),
    biased=st.booleans(),
)
def test_a_masked_expert_is_never_picked(spec: RouterSpec, seed: int, masked: set[int], biased: bool) -> None:
    masked_E = torch.zeros(8, dtype=torch.bool)
    masked_E[list(masked)] = True
    bias_E = torch.randn(8, generator=torch.Generator().manual_seed(seed + 1)) if biased else None
    chosen = choose(_logits(seed), spec, bias_E, masked_E)
    assert not masked & set(chosen.flatten().tolist())
    assert all(len(set(row)) == spec.top_k for row in chosen.tolist())


@BOTH
def test_masking_leaves_tokens_that_did_not_use_the_expert(spec: RouterSpec) -> None:
    before, masked_E = choose(_logits(1, 200), spec), torch.zeros(8, dtype=torch.bool)
    masked_E[3] = True
    after = choose(_logits(1, 200), spec, masked_E=masked_E)
    used = (before == 3).any(-1)
    assert 0 < used.sum() < 200
    assert torch.equal(before[~used], after[~used])
    assert (overlap_T(before[used], after[used]) == 0.5).all()


def test_masking_too_many_experts_is_an_error() -> None:
    with pytest.raises(ValueError, match="7 of 8 experts masked, but 2 are needed"):
        check_mask(range(1, 8), SOFTMAX)


def _bernoulli(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_divergence_by_hand() -> None:
    """Three experts of which two are chosen: weights by hand, and margins of 1 to either side of the threshold."""
    flat, tilted = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[2.0, 1.5, -1.5]])
    spec = RouterSpec(score="softmax", top_k=2, n_experts=3, normalize=True)
    chances = [[_sigmoid(2 * (x - t)) for x in row] for row, t in ((flat[0].tolist(), 0.0), (tilted[0].tolist(), 0.0))]
    choice = sum(_bernoulli(p, q) for p, q in zip(*chances, strict=True)) / 2
    weights = _bernoulli(_sigmoid(1.0), _sigmoid(0.5))
    assert divergence_T(flat, tilted, spec).item() == pytest.approx(choice + weights, abs=1e-6)


@pytest.mark.parametrize("n_experts", [16, 128, 384])
def test_divergence_has_one_scale_for_softmax_and_sigmoid_and_any_number_of_experts(n_experts: int) -> None:
    """The same noise on the logits: Bernoulli divergences summed over experts were 3 to 55 times softmax's."""
    generator = torch.Generator().manual_seed(0)
    original, noise = (torch.randn(500, n_experts, generator=generator) for _ in range(2))
    specs = [RouterSpec(score=score, top_k=8, n_experts=n_experts, normalize=True) for score in ("softmax", "sigmoid")]
    soft, sigmoid = (float(divergence_T(original, original + 0.2 * noise, spec).mean()) for spec in specs)
    assert 0.5 < sigmoid / soft < 2


@BOTH
def test_divergence_counts_what_is_close_to_the_threshold(spec: RouterSpec) -> None:
    original = torch.tensor([[6.0, 5.0, 4.9, 1.0, -4.0, -5.0, -6.0, -7.0]])
    near, far = original.clone(), original.clone()
    near[0, 2] += 0.5  # the first one out gets in
    far[0, 4:] += 0.5  # nobody chooses these
    assert divergence_T(original, near, spec) > 1000 * divergence_T(original, far, spec)


def test_divergence_knows_the_bias_that_steers_the_choice() -> None:
    original = torch.zeros(1, 8)
    bias = torch.tensor([0.5, 0.5, 0.02, -0.9, -0.9, -0.9, -0.9, -0.9])
    near, far = original.clone(), original.clone()
    near[0, 1] -= 1.0
    far[0, 7] -= 1.0
    assert set(choose(original, SIGMOID, bias)[0].tolist()) == {0, 1}
    assert divergence_T(original, near, SIGMOID, bias) > 20 * divergence_T(original, far, SIGMOID, bias)
    assert divergence_T(original, far, SIGMOID) > 20 * divergence_T(original, far, SIGMOID, bias)


@BOTH
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), step=st.floats(0.05, 3.0))
def test_divergence_is_positive_and_zero_only_for_the_same_routing(spec: RouterSpec, seed: int, step: float) -> None:
    original = _logits(seed)
    assert divergence_T(original, original, spec).abs().max() < 1e-6
    assert (divergence_T(original, original + step * _logits(seed + 1), spec) > 0).all()


def test_divergence_of_softmax_ignores_a_common_shift_but_sigmoid_does_not() -> None:
    original = _logits(0)
    assert divergence_T(original, original + 1.0, SOFTMAX).abs().max() < 1e-5
    # it changes the weights of a sigmoid router, and not the choice
    assert (divergence_T(original, original + 1.0, SIGMOID) > 1e-5).all()


@BOTH
def test_descending_the_divergence_leads_back(spec: RouterSpec) -> None:
    original = _logits(2)
    edited = (original + 0.5 * _logits(3)).requires_grad_()
    start = divergence_T(original, edited, spec).sum()
    (gradient,) = torch.autograd.grad(start, edited)
    away = (edited - original).detach()
    assert float((gradient * away).sum()) > 0
    assert divergence_T(original, (edited - 0.1 * gradient).detach(), spec).sum() < start


@BOTH
def test_the_divergence_has_no_gradient_at_the_original(spec: RouterSpec) -> None:
    edited = _logits(4).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence_T(_logits(4), edited, spec).sum(), edited)
    assert gradient.abs().max() < 1e-6
