"""Diagnosis of a tiny model of every family: states, routing, gradients and every intervention, decoding included."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gtqlora.config import DiagnoseConfig
from gtqlora.results.association import read_associations
from gtqlora.run import Run
from gtqlora.stages.diagnose import diagnose
from tests import helpers, models


@pytest.mark.parametrize("family", [family for family in models.OTHERS if family != "qwen3_5_moe_text"])
def test_every_stage_of_a_diagnosis_runs(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    kinds = ("lookalike", "harmful", "benign")
    counts = {(split, kind): 12 for split in ("train", "validation") for kind in kinds}
    file = helpers.write_rows(tmp_path / "c.jsonl", helpers.toy_rows(counts))
    settings: dict[str, Any] = {"model": str(toy.model(family)), "contrast": str(file), "judge": helpers.JUDGE}
    config = DiagnoseConfig(**settings, max_new_tokens=2, bootstrap=20, random_controls=1, max_candidates=2)
    with Run(tmp_path / "run") as run:
        found = diagnose(config, run)
    assert found.n_aligned == 24 and len(found.cells) == 8
    odds = {(cell.routing, cell.experts, cell.stream): cell.log_odds for cell in found.cells}
    assert all(interval is not None and math.isfinite(interval.value) for interval in odds.values())
    assert len({interval.value for interval in odds.values() if interval}) == 8  # every interchange does something
    experts = {(row.layer, row.expert) for row in read_associations(tmp_path / "run")}
    assert experts == set(product(models.moe_layers(family), range(models.EXPERTS)))
