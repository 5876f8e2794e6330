"""Residual directions: what is planted is found, what is said holds on other pairs, the unknown is not said."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats as st
from torch import Tensor

from gtqlora import contrasts
from gtqlora.capture import observe, open_subject
from gtqlora.errors import ModelError
from gtqlora.judging.judge import judge_of
from gtqlora.localize import pairs_of
from gtqlora.localize.directions import named_directions, study
from gtqlora.localize.directions.areas import Fold, auroc, auroc_interval, over_splits, score_interval
from gtqlora.localize.directions.erasure import _shrunk_covariance, leace, probe, without
from gtqlora.localize.directions.named import MIN_GROUPS
from gtqlora.localize.directions.separability import mean_difference, separation, split, splits
from gtqlora.organisms import embedded
from gtqlora.results.directions import LayerDirections
from gtqlora.results.typed import to_json

NAMES = {"direction", "false_refusal", "true_refusal", "intent", "false_refusal_orthogonal", "first_component"}
LOOKALIKE, HARMFUL = torch.eye(8)[0], torch.eye(8)[:2].sum(0) / 2**0.5
"""What flagged prompts of each kind have and their twins lack; 45 degrees between."""


class Drawn:
    """Pairs of one layer: unit Gaussian states, flagged ones moved by `size` along what their kind has."""

    def __init__(self, seed: int, n_groups: int, size: float = 3.0, dims: int = 8, kinds: str = "lookalike harmful"):
        generator = torch.Generator().manual_seed(seed)
        self.kinds = kinds.split() * n_groups
        n = len(self.kinds)
        self.groups = [str(i // len(kinds.split())) for i in range(n)]
        moves = [HARMFUL if kind == "harmful" else LOOKALIKE for kind in self.kinds]
        move_ND = torch.nn.functional.pad(torch.stack(moves), (0, dims - 8))
        self.flagged = torch.randn(n, 1, dims, generator=generator) + size * move_ND[:, None]
        self.twins = torch.randn(n, 1, dims, generator=generator)

    def studied(self, seed: int = 0) -> LayerDirections:
        return study(self.flagged, self.twins, self.kinds, self.groups, seed=seed).study.layers[0]


def cosine(layer: LayerDirections, first: str, second: str) -> Any:
    return next(c.value for c in layer.cosines if {c.first, c.second} == {first, second})


# --- named directions


def test_planted_directions_are_found() -> None:
    drawn = Drawn(0, 150, size=10.0)
    found = study(drawn.flagged, drawn.twins, drawn.kinds, drawn.groups, seed=0)
    assert found.tensors.keys() == NAMES and (found.study.n_pairs, found.study.n_groups) == (300, 150)
    truth = {
        "direction": LOOKALIKE + HARMFUL,
        "false_refusal": LOOKALIKE,
        "true_refusal": HARMFUL,
        "intent": HARMFUL - LOOKALIKE,
        "false_refusal_orthogonal": LOOKALIKE - HARMFUL * (LOOKALIKE @ HARMFUL),
        "first_component": LOOKALIKE + HARMFUL,
    }
    for name, direction_D in truth.items():
        assert found.tensors[name].shape == (1, 8)
        assert found.tensors[name][0] @ direction_D / direction_D.norm() > 0.99, name
    layer = found.study.layers[0]
    assert layer.norm == pytest.approx(10 * np.cos(np.pi / 8), rel=0.05)
    assert layer.norms["false_refusal"] == pytest.approx(10, rel=0.05)
    assert layer.components and layer.components.cosine > 0.99
    # 8 dimensions of variance 2, and the squared move: 100, of which cos(22.5 degrees) squared along the mean
    share = (2 + 100 * np.cos(np.pi / 8) ** 2) / (16 + 100)
    assert layer.components.share_mean.low < share < layer.components.share_mean.high
    assert layer.components.shares[0].value > 3 * layer.components.shares[2].value


def rows(draw: some.DrawFn) -> tuple[Tensor, Tensor, list[str], list[str]]:
    n, layers, dims = draw(some.integers(2, 30)), draw(some.integers(1, 3)), draw(some.integers(3, 40))
    generator = torch.Generator().manual_seed(draw(some.integers(0, 10**6)))
    kinds = draw(some.lists(some.sampled_from(["lookalike", "harmful"]), min_size=n, max_size=n))
    groups = draw(some.lists(some.sampled_from("abcdefghijkl"), min_size=n, max_size=n))
    return (
        torch.randn(n, layers, dims, generator=generator),
        torch.randn(n, layers, dims, generator=generator),
        kinds,
        groups,
    )


@settings(max_examples=40, deadline=None)
@given(some.composite(rows)())
def test_directions_have_unit_length_and_absent_kinds_have_none(
    drawn: tuple[Tensor, Tensor, list[str], list[str]],
) -> None:
    flagged, _, kinds, groups = drawn
    found = named_directions(*drawn)
    both = [
        g
        for g in set(groups)
        if {k for k, of in zip(kinds, groups, strict=True) if of == g} == {"lookalike", "harmful"}
    ]
    assert ("false_refusal" in found) == ("lookalike" in kinds) and ("true_refusal" in found) == ("harmful" in kinds)
    assert ("intent" in found) == bool(both) and ("false_refusal_orthogonal" in found) == (len(set(kinds)) == 2)
    for direction_LD in found.values():
        torch.testing.assert_close(direction_LD.norm(dim=-1), torch.ones(len(direction_LD)))
    if len(set(kinds)) == 2:
        assert (found["false_refusal_orthogonal"] * found["true_refusal"]).sum(-1).abs().max() < 1e-5
    if both:
        pairs = [
            torch.stack([f for f, k, of in zip(flagged, kinds, groups, strict=True) if (k, of) == (kind, g)]).mean(0)
            * (1 if kind == "harmful" else -1)
            for g in both
            for kind in ("harmful", "lookalike")
        ]
        torch.testing.assert_close(found["intent"], torch.nn.functional.normalize(torch.stack(pairs).sum(0), dim=-1))


def test_cosines_are_of_the_population_and_not_of_the_noise() -> None:
    """In 64 dimensions the plain cosine of 40 pairs' means is far below that of what was planted."""
    covered = plain = 0
    for seed in range(40):
        drawn = Drawn(seed, 40, size=2.0, dims=64)
        found = cosine(drawn.studied(), "false_refusal", "true_refusal")
        covered += found is not None and found.low <= 0.5**0.5 <= found.high
        named = named_directions(drawn.flagged, drawn.twins, drawn.kinds, drawn.groups)
        plain += float(named["false_refusal"][0] @ named["true_refusal"][0])
    assert covered >= 36 and plain / 40 < 0.6


def test_directions_of_noise_have_no_angle() -> None:
    assert [c.value for c in Drawn(1, 40, size=0.0, dims=64).studied().cosines] == [None] * 10


def test_the_orthogonalized_direction_has_no_part_along_true_refusal() -> None:
    assert cosine(Drawn(2, 100).studied(), "false_refusal_orthogonal", "true_refusal").value == pytest.approx(
        0, abs=1e-6
    )


# --- separability


@settings(max_examples=60, deadline=None)
@given(some.lists(some.sampled_from("abcdefghijklmnop"), min_size=1, max_size=40), some.integers(0, 100))
def test_groups_are_never_split(groups: list[str], seed: int) -> None:
    parts = split(groups, seed)
    membership = np.stack([parts.fit, *parts.folds])
    assert (membership.sum(0) == 1).all() and (parts.held_out == ~parts.fit).all()
    for group in set(groups):
        of_group = membership[:, np.array(groups) == group]
        assert (of_group == of_group[:, :1]).all()
    if len(set(groups)) >= MIN_GROUPS:
        assert min(len({g for g, here in zip(groups, part, strict=True) if here}) for part in membership) >= 2


def _correlated(rng: np.random.Generator, n: int, size: float, alike: float) -> tuple[Any, Any]:
    """Unit Gaussian states in 8 dimensions, moved by `size` along the first; a pair's have this correlation."""
    flagged, own = rng.normal(size=(2, n, 8))
    return flagged + size * LOOKALIKE.numpy(), alike * flagged + (1 - alike**2) ** 0.5 * own


@pytest.mark.parametrize(("size", "n_groups"), [(0.0, 60), (1.0, 60), (2.5, 40)])
@pytest.mark.parametrize("alike", [-0.5, 0.0, 0.5])
def test_auroc_interval_holds_the_analytic_value(size: float, n_groups: int, alike: float) -> None:
    """Of the direction that the fit half gave: its states are Gaussian, so AUROC is Phi(shift / sqrt 2)."""
    rng, covered = np.random.default_rng(0), 0
    fit = np.arange(n_groups) < n_groups // 2
    groups = np.arange(n_groups)[~fit].astype(str)
    for seed in range(200):
        flagged_ND, twins_ND = _correlated(rng, n_groups, size, alike)
        direction_D = mean_difference(flagged_ND[fit], twins_ND[fit])
        truth = st.norm.cdf(size * direction_D @ LOOKALIKE.numpy() / 2**0.5)
        fold = Fold(flagged_ND[~fit] @ direction_D, twins_ND[~fit] @ direction_D, groups)
        found = auroc_interval([fold], seed=seed, level=0.95)
        covered += found.low <= truth <= found.high
    assert covered >= 182


def test_separation_does_not_rest_on_one_split() -> None:
    drawn = Drawn(0, 60, 1.0)
    flagged, twins, groups = drawn.flagged[:, 0].numpy(), drawn.twins[:, 0].numpy(), np.array(drawn.groups)
    parts = splits(drawn.groups, seed=0)
    found = [separation(flagged, twins, groups, [part], mean_difference, 0.95) for part in parts]
    whole = separation(flagged, twins, groups, parts, mean_difference, 0.95)
    assert len({i.value for i in found}) > 2 and whole.value == pytest.approx(np.mean([i.value for i in found]))
    assert min(i.low for i in found) < whole.low < whole.value < whole.high < max(i.high for i in found)
    assert over_splits(found[:1]) == found[0]


def test_rows_of_one_group_add_no_certainty() -> None:
    once, drawn = Drawn(3, 40, 2.0), Drawn(3, 40, 2.0)
    drawn.flagged, drawn.twins = drawn.flagged.repeat(5, 1, 1), drawn.twins.repeat(5, 1, 1)
    drawn.kinds, drawn.groups = drawn.kinds * 5, drawn.groups * 5
    five, one = drawn.studied(), once.studied()
    assert five.separation and one.separation
    for name in ("value", "low", "high"):
        assert getattr(five.separation, name) == pytest.approx(getattr(one.separation, name), abs=1e-9)
    angles = [cosine(layer, "refusal", "intent") for layer in (one, five)]
    assert angles[0].high - angles[0].low > 0.05 and angles[0].high == pytest.approx(angles[1].high)


@settings(max_examples=60, deadline=None)
@given(some.floats(0, 1), some.integers(4, 500))
def test_score_interval_is_never_without_width(area: float, n_groups: int) -> None:
    found = score_interval(area, n_groups, 0.95)
    assert 0 <= found.low <= area <= found.high <= 1 and found.high - found.low > 1 / n_groups
    more = score_interval(area, 2 * n_groups, 0.95)
    assert more.high - more.low < found.high - found.low
    assert score_interval(1 - area, n_groups, 0.95).low == pytest.approx(1 - found.high, abs=1e-9)


def test_auroc_counts_ties_half() -> None:
    assert auroc(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == 0.875


# --- erasure


def whitened(flagged_ND: Any, twins_ND: Any, states_ND: Any) -> Any:
    """LEACE as the paper writes it, theorem 4.3, on the same covariance."""
    both_ND, label_N = np.concatenate([flagged_ND, twins_ND]), np.repeat([1.0, 0.0], len(flagged_ND))
    mean_D = both_ND.mean(0)
    values, vectors = np.linalg.eigh(_shrunk_covariance(both_ND - mean_D, both_ND.shape[1]))
    whitening = vectors / np.sqrt(values) @ vectors.T
    across = whitening @ ((both_ND - mean_D).T @ (label_N - 0.5))[:, None]
    projection = across @ np.linalg.pinv(across)
    return states_ND - (states_ND - mean_D) @ (np.linalg.pinv(whitening) @ projection @ whitening).T


@settings(max_examples=30, deadline=None)
@given(some.integers(2, 40), some.integers(2, 60), some.integers(0, 1000))
def test_leace_is_the_papers_and_leaves_the_means_equal(n: int, dims: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale_D = rng.uniform(0.1, 3, dims)
    flagged, twins = (rng.normal(size=(n, dims)) * scale_D + shift for shift in (rng.normal(size=dims), 0.0))
    erase = leace(flagged, twins, dims)
    np.testing.assert_allclose(erase(flagged).mean(0), erase(twins).mean(0), atol=1e-8)
    fresh = rng.normal(size=(5, dims))
    np.testing.assert_allclose(erase(fresh), whitened(flagged, twins, fresh), atol=1e-6)
    # so no probe trained on the very same states tells anything, which is why the study trains it on others
    assert np.linalg.norm(probe(erase(flagged), erase(twins), dims)) < 1e-6


def uneven(seed: int, n: int = 300) -> tuple[Tensor, Tensor]:
    """The two differ along a loud coordinate, where the mean is hard to tell, and a quiet one, where it is easy."""
    rng = np.random.default_rng(seed)
    spread = np.array([10.0, 0.1, *[1.0] * 6])
    flagged, twins = (rng.normal(size=(n, 8)) * spread + shift for shift in (np.array([1.0, 0.2, *[0.0] * 6]), 0.0))
    return torch.from_numpy(flagged).float()[:, None], torch.from_numpy(twins).float()[:, None]


def test_leace_erases_as_well_as_projection_and_takes_less_away() -> None:
    groups = [str(i) for i in range(300)]
    found = [study(*uneven(seed), ["lookalike"] * 300, groups, seed=seed).study.layers[0] for seed in range(6)]
    for layer in found:
        erased = layer.erasure
        assert erased and erased.before.low > 0.8
        for after in (erased.mean_removed, erased.leace):
            assert after.low <= 0.5 <= after.high or after.value <= 0.6
        # the same is left, as both have one kernel
        assert erased.leace.value == pytest.approx(erased.mean_removed.value, abs=0.03)
        assert erased.leace_cost < erased.mean_removed_cost / 10
        assert layer.separation and layer.separation.high < erased.before.low  # along the mean, the loud one drowns it


def test_what_the_fit_half_cannot_pin_down_is_left() -> None:
    """In many dimensions the difference of means of a few pairs is mostly noise, and so is what erasing it erases."""
    erased = Drawn(0, 50, size=8.0, dims=400).studied().erasure
    assert erased and erased.before.value > 0.95 and erased.mean_removed.low > 0.6 and erased.leace.low > 0.6


def test_removing_a_direction_leaves_nothing_along_it() -> None:
    states = np.random.default_rng(0).normal(size=(9, 5))
    direction = mean_difference(states[:4], states[4:8])
    assert np.abs(without(direction)(states) @ direction).max() < 1e-12


# --- where little is known


def test_fewer_pairs_than_dimensions() -> None:
    found = Drawn(4, 10, size=30.0, dims=300)
    layer = found.studied()
    assert layer.separation and layer.separation.value == 1.0 and 0.4 < layer.separation.low < 1.0
    assert layer.erasure and layer.erasure.before.value == 1.0
    assert layer.components and layer.components.cosine > 0.9


def test_few_groups_say_nothing() -> None:
    layer = Drawn(5, MIN_GROUPS - 1).studied()
    assert layer.separation is layer.components is layer.erasure is None
    assert [c.value for c in layer.cosines] == [None] * 10
    assert layer.norm > 1
    few = Drawn(5, MIN_GROUPS - 1)
    found = study(few.flagged, few.twins, few.kinds, few.groups, seed=0).study
    assert (found.cosines, found.cosines_not_told) == (10, 10)


def test_states_that_are_the_same_tell_nothing() -> None:
    """Such as the embedding of the last prompt token, which is the template's."""
    states = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(24, 1, 8)
    kinds, groups = ["lookalike", "harmful", "harmful"] * 8, [str(i // 3) for i in range(24)]
    found = study(states, states, kinds, groups, seed=0)
    layer = found.study.layers[0]
    assert layer.norm == 0 and set(layer.norms.values()) == {0.0} and layer.components is None
    assert layer.separation and layer.separation.value == 0.5 and layer.erasure and layer.erasure.leace.value == 0.5
    assert not any(found.tensors[name].any() for name in NAMES)


@pytest.mark.parametrize(("bad", "layer", "where"), [("nan", 0, "of the embedding"), ("inf", 2, "after layer 2")])
def test_states_that_are_not_finite_are_named(bad: str, layer: int, where: str) -> None:
    flagged, twins = torch.randn(9, 4, 5), torch.randn(9, 4, 5)
    twins[3, layer, 1] = float(bad)
    twins[4, 3, 1] = float("nan")
    with pytest.raises(ModelError, match=f"residual states {where} hold NaN or infinity"):
        study(flagged, twins, ["harmful"] * 9, list("abcdefghi"), seed=0)
    with pytest.raises(ModelError, match=where):
        named_directions(flagged, twins, ["harmful"] * 9, list("abcdefghi"))


# --- on an organism


def test_the_residual_organism_separates() -> None:
    subject = open_subject(str(embedded.organism("residual")))
    rows = contrasts.load(embedded.contrast(), judge_of(embedded.JUDGE)).split("validation")
    pairs = pairs_of(rows, subject, 160, 0)
    flagged, twins = (
        observe(subject, prompts, since=[0] * len(prompts), batch_size=80, label="states").states_NSD
        for prompts in ([p.prompt for p in pairs], [p.twin for p in pairs])
    )
    found = study(flagged, twins, [p.row.kind for p in pairs], [p.row.pair_id for p in pairs], seed=0)
    again = study(flagged, twins, [p.row.kind for p in pairs], [p.row.pair_id for p in pairs], seed=0)
    written = json.loads(json.dumps(to_json(found.study), allow_nan=False))
    assert written == json.loads(json.dumps(to_json(again.study))) and written["n_groups"] == 80
    assert [layer.layer for layer in found.study.layers] == list(range(6))
    assert found.tensors["direction"].shape == (6, 64)
    first, last = found.study.layers[0], found.study.layers[-1]
    assert first.separation and first.separation.value == 0.5
    assert last.separation and last.separation.low > 0.8 and last.erasure and last.erasure.before.low > 0.8
    assert last.erasure.leace.value < last.erasure.before.value
