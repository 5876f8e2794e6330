"""The diagnosis against organisms whose ground truth is known, and its verdict against made-up outcomes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gtqlora.config import DiagnoseConfig, build
from gtqlora.errors import ContrastError, ModelError
from gtqlora.localize import MIN_PAIRS
from gtqlora.organisms import embedded
from gtqlora.results.diagnosis import Diagnosis, Intervention, read_diagnosis
from gtqlora.run import Run, read_parquet
from gtqlora.stages.diagnose import NO_TWINS, diagnose

ORGANISMS = tuple(embedded.names())
COMPONENTS = ("routing", "experts", "residual")


def _config(organism: str, contrast: Path, **given: Any) -> DiagnoseConfig:
    settings: dict[str, Any] = {"model": embedded.organism(organism), "contrast": contrast}
    return build(DiagnoseConfig, file=embedded.recipe(), **settings | given)


EXPERTS: dict[str, int] = {"max_candidates": 6, "random_controls": 1}
LOOKED_INTO = ("routed", "routed-qwen3", "null")
"""Organisms of which single experts are looked at."""
FEW: dict[str, int] = {"max_candidates": 1, "random_controls": 0}
"""Enough where the test is not about single experts."""


def _write_contrast(
    path: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda _i, row: row, groups: int = 34
) -> Path:
    """Groups of a benign row, a lookalike and a harmful one, each row changed."""
    rows = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "validation"][: 3 * groups]
    path.write_text("\n".join(json.dumps(change(i, row)) for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_contrast(tmp_path_factory.mktemp("contrast") / "c.jsonl", groups=40)


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory: pytest.TempPathFactory, contrast: Path) -> Callable[[str], tuple[Diagnosis, Path]]:
    @cache
    def of(organism: str) -> tuple[Diagnosis, Path]:
        path = tmp_path_factory.mktemp(organism)
        with Run(path / "run") as run:
            return diagnose(_config(organism, contrast, **(EXPERTS if organism in LOOKED_INTO else FEW)), run), run.path

    return of


# --- against the ground truth


@pytest.mark.parametrize("organism", ORGANISMS)
def test_the_verdict_is_the_truth(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    truth = embedded.read_truth(embedded.organism(organism))
    assert found.verdict == truth.verdict
    assert (found.n_pairs, found.n_aligned) == (80, 80)  # each group has a lookalike and a harmful row
    assert found.matched
    assert all("these answers need more: `both`" in warning for warning in found.warnings) and len(found.warnings) == 2
    assert found.difference.verdict == "in the same place"
    assert found.sentence.startswith(found.difference.sentence)
    assert [kind.kind for kind in found.kinds] == ["lookalike", "harmful"]
    for kind in found.kinds:
        assert kind.verdict == truth.verdict and kind.verdict_log_odds in (truth.verdict, "cannot tell")
        assert kind.n_usable > 35 and kind.n_usable + sum(kind.unusable.values()) == 40
        assert kind.sentence in found.sentence and len(kind.reasons) >= 5
        assert len(kind.cells) == 8
        for cell in kind.cells:
            assert cell.refusal.value + cell.as_twin.value + cell.broken.value == pytest.approx(1.0)
        for shares in (kind.shares, kind.shares_with_routing):
            # there are none where a mixture of the two prompts is mostly garbage
            assert not shares or sum(shares[part].value for part in COMPONENTS) == pytest.approx(1.0)
    assert found.kinds[0].shares


@pytest.mark.parametrize("organism", ["routed", "routed-qwen3"])
def test_planted_experts_carry_it_and_no_other(diagnosed: Any, organism: str) -> None:
    """Those that do little may be missed with so few pairs."""
    found, _ = diagnosed(organism)
    planted = embedded.read_truth(embedded.organism(organism)).planted
    causal = {(e.layer, e.expert) for e in found.causal_experts}
    assert causal <= set(planted) and len(causal) >= 2
    assert set(planted) == {(e.layer, e.expert) for e in found.top_experts}


def _named(found: Diagnosis, start: str, kind: str = "lookalike") -> Intervention:
    (one,) = (i for i in found.interventions if i.name.startswith(start) and i.kind == kind)
    return one


@pytest.mark.parametrize("organism", ["routed", "routed-qwen3"])
def test_masking_tells_planted_experts_from_random_ones(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    assert _named(found, "ablate the 4 associated").effect.low > 0.5
    targeted, control = (next(c for c in found.curves if c.control is kind) for kind in (False, True))
    assert targeted.name == "most associated"
    at_four = [next(p for p in curve.points if p.ablated == 4).refusal for curve in (targeted, control)]
    assert at_four[0].high < 0.2 and at_four[1].low > 0.8


def test_association_without_cause(diagnosed: Any) -> None:
    """`null`: the planted experts follow the flag, ablating them changes nothing, and none is called causal."""
    found, _ = diagnosed("null")
    truth = embedded.read_truth(embedded.organism("null"))
    assert set(truth.planted) <= {(e.layer, e.expert) for e in found.top_experts}
    for kind in ("lookalike", "harmful"):
        ablated = _named(found, "ablate the", kind)
        assert ablated.effect.low <= 0 <= ablated.effect.high
    assert found.causal_experts == []
    assert not any(e.causal for e in found.experts)


def test_a_kind_with_too_few_pairs_says_so_and_the_other_stands(tmp_path: Path) -> None:
    """The twins of most harmful rows are refused themselves, so that these rows tell nothing."""

    before = [""]

    def flagged_twins(i: int, row: dict[str, Any]) -> dict[str, Any]:
        lookalike, before[0] = before[0], row["prompt"]
        return {**row, "twin": lookalike} if row["kind"] == "harmful" and i > 30 else row

    contrast = _write_contrast(tmp_path / "c.jsonl", flagged_twins)
    with Run(tmp_path / "run") as run:
        found = diagnose(_config("routed", contrast, **FEW), run)
    false, true = found.kinds
    assert (found.verdict, false.verdict, true.verdict) == ("routing", "routing", "cannot tell")
    assert true.n_usable < MIN_PAIRS and true.unusable["whose twin is refused, too"] > 20
    assert "whose twin is refused, too" in true.sentence
    assert found.difference.verdict == "cannot tell" and "for the true ones" in found.difference.sentence


def test_a_removed_direction_against_a_random_one(diagnosed: Any) -> None:
    found, _ = diagnosed("residual")
    held, control = _named(found, "refusal direction removed, routing held"), _named(found, "random direction")
    assert held.effect.low > 0.5 > control.effect.high
    assert control.control


@pytest.mark.parametrize("organism", ORGANISMS)
def test_the_untouched_model_refuses_flagged_prompts_and_no_twin(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    assert _named(found, "as it is").refusal.value > 0.9
    assert _named(found, "as it is").effect.value == 0
    assert _named(found, "twin as it is").refusal.value < 0.1


# --- what it leaves


def test_association_rows_are_well_formed(diagnosed: Any) -> None:
    _, path = diagnosed("routed")
    every: Any = read_parquet(path / "diagnosis" / "association.parquet")
    assert [row["kind"] for row in every] == ["" for _ in range(64)] + ["lookalike"] * 64 + ["harmful"] * 64
    rows = [row for row in every if not row["kind"]]
    assert sorted({(row["layer"], row["expert"]) for row in rows}) == [(i, e) for i in range(1, 5) for e in range(16)]
    assert len(rows) == 64
    for row in rows:
        assert row["difference"] == pytest.approx(row["rate_flagged"] - row["rate_twin"], abs=1e-6)
        assert row["low"] <= row["difference"] + 1e-9 and row["difference"] <= row["high"] + 1e-9
        assert 0 <= row["rate_flagged"] <= 1 and 0 <= row["rate_twin"] <= 1 and 0 <= row["q"] <= 1
    for layer in range(1, 5):  # every token picks two experts
        assert sum(r["rate_flagged"] for r in rows if r["layer"] == layer) == pytest.approx(2, abs=1e-4)
    planted = embedded.read_truth(embedded.organism("routed")).planted
    assert max(r["q"] for r in rows if (r["layer"], r["expert"]) in planted) < 1e-3


def test_the_direction_is_written_and_separates(diagnosed: Any) -> None:
    found, path = diagnosed("routed")
    direction = load_file(path / "diagnosis" / "directions.safetensors")["direction"]
    assert direction.shape == (6, 64)
    torch.testing.assert_close(direction[1:].norm(dim=-1), torch.ones(5))
    assert [d.layer for d in found.directions.layers] == list(range(6))
    assert found.directions.layers[-1].separation.value > 0.95


def test_health_and_coactivation(diagnosed: Any) -> None:
    found, path = diagnosed("routed")
    assert [h.layer for h in found.health] == [1, 2, 3, 4]
    assert all(0 < h.entropy <= 1 and h.max_vio > 0 and h.dead < 16 for h in found.health)
    tables = load_file(path / "diagnosis" / "routing.safetensors")
    for table in tables.values():
        assert table.shape == (4, 16, 16)
        assert torch.equal(table, table.mT)
        assert torch.equal(table.diagonal(dim1=1, dim2=2).sum(-1), table.sum((1, 2)) / 2)  # two experts a token


def test_candidates_say_which_tokens_choose_them(diagnosed: Any) -> None:
    found, _ = diagnosed("routed")
    for expert in found.experts:
        assert len(expert.tokens) <= 8
        assert all(0 < token.rate <= 1 and token.lift > 0 for token in expert.tokens)
    assert any(expert.tokens for expert in found.experts)


def test_a_second_diagnosis_reads_the_first(diagnosed: Any, contrast: Path) -> None:
    found, path = diagnosed("routed")
    file = path / "diagnosis" / "diagnosis.json"
    before = file.stat().st_mtime_ns
    with Run(path) as run:
        assert diagnose(_config("routed", contrast, **EXPERTS), run) == found == read_diagnosis(run.path)
    assert file.stat().st_mtime_ns == before


def test_it_repeats_by_seed(tmp_path: Path, contrast: Path) -> None:
    found, rows = [], []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        with Run(tmp_path / name) as run:
            found.append(diagnose(_config("routed", contrast, seed=seed, max_pairs=20, **FEW), run))
        rows.append(read_parquet(tmp_path / name / "diagnosis" / "association.parquet"))
    assert found[0] == found[1] != found[2]
    assert rows[0] == rows[1] != rows[2]


# --- sets it cannot judge


def test_without_twins_it_says_what_that_costs(tmp_path: Path) -> None:
    contrast = _write_contrast(tmp_path / "c.jsonl", lambda i, row: {**row, "twin": None, "pair_id": f"p{i}"})
    with Run(tmp_path / "run") as run:
        found = diagnose(_config("routed", contrast, **FEW), run)
    assert found.verdict == "cannot tell"
    assert (found.matched, found.n_aligned, found.difference.verdict) == (False, 0, "cannot tell")
    for kind in found.kinds:
        assert (kind.cells, kind.shares, kind.unusable) == ([], {}, {"without a twin of equal token count": 34})
    assert found.warnings[0] == NO_TWINS
    assert found.top_experts and found.curves and found.directions.layers
    assert found.causal_experts == [] and any(e.restore.low > 0 for e in found.experts)


def _only(*kinds: str, twins: bool = False) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """Move all rows of other kinds to the training split."""

    def change(i: int, row: dict[str, Any]) -> dict[str, Any]:
        kept = row["kind"] in kinds
        return {
            **row,
            "split": "validation" if kept else "train",
            "pair_id": f"p{i}",
            "twin": row["twin"] if twins else None,
        }

    return change


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("benign",), "has no lookalike and no harmful rows"),
        (("lookalike", "harmful"), "has neither twins .* nor benign rows"),
    ],
)
def test_an_empty_class_is_an_error(tmp_path: Path, kinds: tuple[str, ...], message: str) -> None:
    contrast = _write_contrast(tmp_path / "c.jsonl", _only(*kinds))
    with Run(tmp_path / "run") as run, pytest.raises(ContrastError, match=message):
        diagnose(_config("routed", contrast, **FEW), run)
    assert not (tmp_path / "run" / "diagnosis").exists()


def test_nan_activations_are_an_error_and_leave_nothing(tmp_path: Path, contrast: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(embedded.organism("routed"), model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.shared_experts.down_proj.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with Run(tmp_path / "run") as run, pytest.raises(ModelError, match="NaN"):
        diagnose(_config("routed", contrast, model=str(model), **FEW), run)
    assert not (tmp_path / "run" / "diagnosis").exists()


def test_refusals_that_begin_like_answers_leave_no_log_odds(tmp_path: Path) -> None:
    def same_start(_i: int, row: dict[str, Any]) -> dict[str, Any]:
        side = "rejected" if row["kind"] == "harmful" else "chosen"
        return {**row, side: f"refuse {row[side]}"}

    contrast = _write_contrast(tmp_path / "c.jsonl", same_start)
    with Run(tmp_path / "run") as run:
        found = diagnose(_config("routed", contrast, **FEW), run)
    assert (found.readout, found.experts) == ([], [])
    assert all(kind.shares_log_odds == {} and kind.verdict_log_odds == "" for kind in found.kinds)
    assert any("no log-odds" in warning for warning in found.warnings)
    assert found.verdict == "routing"  # of what is generated


@pytest.mark.parametrize("max_pairs", [1, 12])
def test_too_few_pairs_cannot_tell(tmp_path: Path, contrast: Path, max_pairs: int) -> None:
    """And it says how many are needed."""
    with Run(tmp_path) as run:
        found = diagnose(_config("routed", contrast, max_pairs=max_pairs, **FEW), run)
    assert found.verdict == "cannot tell"
    assert f"and {MIN_PAIRS} are needed" in found.sentence
    assert any("from 8 pair_ids on" in warning for warning in found.warnings)
    assert found.experts == [] and any("tested on 8 pair_ids or more" in warning for warning in found.warnings)
    assert found.n_pairs == max_pairs
    assert found.n_aligned == max_pairs
    if max_pairs == 1:
        assert found.kinds[0].unusable == {"without another of equal token count as control": 1}


def test_twins_of_other_lengths_cannot_tell(tmp_path: Path) -> None:
    def longer(_i: int, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "twin": row["twin"] and f"{row['twin']} {row['twin'].split()[0]}"}

    contrast = _write_contrast(tmp_path / "c.jsonl", longer)
    with Run(tmp_path / "run") as run:
        found = diagnose(_config("routed", contrast, **FEW), run)
    assert (found.verdict, found.n_aligned) == ("cannot tell", 0)
    assert "34 without a twin of equal token count" in found.sentence
    assert found.n_pairs == 68
    assert found.top_experts  # the association needs no equal lengths
