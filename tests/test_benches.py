"""The benches that claims about statistics rest on: what they compute without drawing holds, and their methods work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gtqlora.organisms import embedded
from tests.helpers import bench_module

# --- operating characteristics


def test_characteristics_are_nominal_where_they_are_enumerated(capsys: pytest.CaptureFixture[str]) -> None:
    """Few draws tell little of the sizes that are simulated, so only those that are not are held to it."""
    bench = bench_module("characteristics")
    assert bench.main(["--quick"]) == 0
    out = capsys.readouterr().out
    for table in ("rate:", "paired difference", "thirds rule", "floor, margin", "expert effects", "AUROC"):
        assert f"\n{table}" in out
    enumerated = [line for line in bench.beyond if " x " not in line and line.startswith(("rate", "thirds", "floor"))]
    assert enumerated == []


def test_a_size_above_nominal_is_marked_and_remembered() -> None:
    bench = bench_module("characteristics")
    assert bench.size("here", 0.059, 0.05) == "0.059 " and bench.beyond == []
    assert bench.size("here", 0.07, 0.05) == "0.070*" and bench.beyond == ["here: 0.070, nominal 0.05"]
    assert bench.size("here", 0.07, 0.05, draws=100) == "0.070 "  # two standard errors are 0.044


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_drawn_topics_have_the_shares_and_the_correlation(rho: float) -> None:
    counts = bench_module("characteristics").drawn((50, 10), (0.2, 0.1, 0.7), rho, 400)
    assert counts.shape == (400, 50, 3) and (counts.sum(-1) == 10).all()
    assert counts.mean((0, 1)) / 10 == pytest.approx([0.2, 0.1, 0.7], abs=0.01)
    inflation = counts[..., 0].var() / (10 * 0.2 * 0.8)
    assert inflation == pytest.approx(1 + 9 * rho, rel=0.05)


# --- published rankings


def _rates(seed: int, moved: float) -> tuple[Any, Any]:
    """Rates of 40 experts in 30 groups; on flagged prompts the first two are chosen more."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(0.1, 0.3, size=40)
    flagged, twins = (np.clip(base + rng.normal(0, 0.05, size=(30, 40)), 0, 1) for _ in range(2))
    flagged[:, :2] += moved
    return flagged, twins


@pytest.mark.parametrize("statistic", ["risk_difference", "stable_frequency"])
def test_rankings_name_what_is_chosen_more_and_nothing_where_labels_tell_nothing(statistic: str) -> None:
    bench = bench_module("baselines")
    rank = getattr(bench, statistic)
    assert sorted(bench.ranked(*_rates(0, 0.4), rank, 0, 0.95)) == [0, 1]
    some = sum(bool(bench.ranked(*_rates(seed, 0.0), rank, seed, 0.95)) for seed in range(1, 31))
    assert some <= 5  # 5 % of 30 samples, and the simulation's own error


@pytest.mark.parametrize(("organism", "named"), [("routed", True), ("null", False)])
def test_rankings_are_named_only_where_their_mask_takes_refusals_away(organism: str, named: bool) -> None:
    """In both organisms experts are chosen more on flagged prompts; in one of them nothing hangs on that."""
    bench = bench_module("baselines")
    observed = bench.observed_of(embedded.organism(organism), embedded.contrast(), "max_pairs=40")
    for found in bench.baselines(observed, seed=0):
        assert found.ranked and bool(found.named) == named
        assert {does["as twin"] for does in found.does.values()} == {1.0 if named else 0.0}
        assert {does["broken"] for does in found.does.values()} == {0.0}
