"""Stages on tiny models of the families that other tests leave out: diagnosis, and an edit on experts in 4 bits.

That every family trains, is verified and exported on experts as they are is in tests/stages/test_export.py.
"""

from __future__ import annotations

import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gtqlora.config import DiagnoseConfig
from gtqlora.edits import wrapping
from gtqlora.results.association import read_associations
from gtqlora.run import Run
from gtqlora.stages.diagnose import diagnose
from gtqlora.stages.verify import verify
from tests import helpers, models


@pytest.mark.parametrize("family", models.OTHERS)
def test_diagnosis_interchanges_and_ablates(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
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


@pytest.mark.parametrize("family", models.OTHERS)
def test_training_through_experts_in_4_bits(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    inside = helpers.Inside.start(toy.train_config(model(toy, family), expert_format="int4-g32"), tmp_path)
    before, frozen = inside.state(), helpers.digests(inside.trainer.model)
    assert len(frozen) == len(models.moe_layers(family)) * 2 * 2  # gate_up and down, each packed and scaled
    assert inside.fit() == (4, None) and helpers.digests(inside.trainer.model) == frozen
    moved = {name for name, tensor in inside.state().items() if not torch.equal(tensor, before[name])}
    assert moved == set(wrapping.trainable(inside.trainer.model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe"])
def test_an_edit_made_on_experts_in_4_bits_is_exported(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Into the checkpoint's own weights, under its own names."""
    # This edit loses a refusal or two: a pass must not hang on how many tries other tests made on the same prompts.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    pairs = shutil.copy(toy.contrast, tmp_path / "pairs.jsonl")
    path, run = model(toy, family), tmp_path / "run"
    helpers.trained(toy.train_config(path, contrast=pairs, expert_format="nf4"), run)
    with Run(run) as opened:
        assert verify(toy.verify_config(path, contrast=pairs), opened).floor.verdict == "pass"
    helpers.exported(run, tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys()
    assert {name for name in changed if ".gate.weight" in name} == {
        models.disk_name(family, f"model.layers.{i}.mlp.gate.weight") for i in models.moe_layers(family)
    }
    assert not any(".experts." in name or name.startswith(("model.visual.", "mtp.")) for name in changed)


def model(toy: helpers.Toy, family: str) -> Path:
    """A model whose experts every format can hold."""
    return toy.model(family, moe_intermediate_size=32)
