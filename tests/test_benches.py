"""The benches that claims about statistics rest on: what they compute without drawing holds, and their methods work."""

from __future__ import annotations

import json
from pathlib import Path
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


# --- what changed between two runs


def _steps(path: Path, seconds: list[float], device: str = "H100") -> str:
    found = {"device": device, "settings": {"pairs": 8}, "ways": [{"way": "nf4", "steps": seconds, "peak_gib": 22.0}]}
    path.write_text(json.dumps(found))
    return str(path)


@pytest.mark.parametrize(
    ("seconds", "says", "code"),
    [
        ([0.65, 0.66, 0.64, 0.65], "2 numbers compared, 2 within noise", 0),
        ([0.75, 0.76, 0.74, 0.75], "worse    1.15x  0.65 -> 0.75  ways / nf4 / steps", 1),
        ([0.45, 0.46, 0.44, 0.45], "better   0.69x  0.65 -> 0.45  ways / nf4 / steps", 0),
    ],
)
def test_two_runs_are_compared_beyond_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: list[float], says: str, code: int
) -> None:
    old, new = _steps(tmp_path / "old.json", [0.64, 0.65, 0.66, 0.65]), _steps(tmp_path / "new.json", seconds)
    assert bench_module("compare").main([old, new]) == code
    assert says in capsys.readouterr().out


def test_runs_on_two_kinds_of_gpu_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _steps(tmp_path / "old.json", [1.0]), _steps(tmp_path / "new.json", [1.0], "H200")
    assert bench_module("compare").main([old, new]) == 2
    assert "H200" in capsys.readouterr().out


def test_rates_are_better_when_they_rise(tmp_path: Path) -> None:
    paths = []
    for rate in (100.0, 150.0):
        paths.append(tmp_path / f"{rate}.json")
        paths[-1].write_text(json.dumps({"device": "H100", "lines": [{"way": "nf4", "tokens_per_second": rate}]}))
    bench = bench_module("compare")
    assert bench.main([str(path) for path in paths]) == 0
    assert bench.main([str(path) for path in reversed(paths)]) == 1


# --- experts that wait on the host


def test_the_offload_bench_compares_the_bits_of_what_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, report = bench_module("offload"), tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["offload", "--tiny", "--device", "cpu", "--json", str(report)])
    assert bench.main() == 0
    ways = {(way["way"], way["waiting"]): way for way in json.loads(report.read_text())["ways"]}
    assert ways.keys() == {("resident", 0), *((way, 6) for way in ("accelerate", "accelerate, page-locked")),
                           ("streamed", 3), ("streamed", 6)}  # fmt: skip
    assert ways["streamed", 6]["same_bits"] and ways["accelerate, page-locked", 6]["same_bits"]
    # two of six are there at each turn, and accelerate brings all of them twice
    assert ways["streamed", 6]["gigabytes"] * 12 == pytest.approx(ways["accelerate", 6]["gigabytes"] * 8)
    assert "streamed" in capsys.readouterr().out


# --- several GPUs


def test_scale_and_trillion_say_what_they_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale, trillion, out = bench_module("scale"), bench_module("trillion"), tmp_path / "found.json"
    words = ["--device", "cpu", "--tiny", "--shape", "k2.5", "--layers", "3", "--tokens", "16", "--pairs", "2"]
    given = [*words, "--steps", "2", "--expert-memory", "0.001"]
    assert scale.main([*given, "--worker", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["gpus"] == 1 and len(found["losses"]) == 4 and found["losses"][-1] < found["losses"][0]
    assert found["gates_moved"] > 0 < found["lora_moved"] and found["tokens"] == 2 * 2 * 16
    args = scale.parse(given)
    scale.show(found, found, args)
    assert sum(trillion.report(args, found, 1)["counts"].values()) > 0
    assert "1.00 x one GPU" in capsys.readouterr().out
