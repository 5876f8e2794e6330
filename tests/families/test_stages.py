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

from gtqlora import localize
from gtqlora.capture import open_subject
from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import load
from gtqlora.contrasts.readout import find_readout
from gtqlora.edits import wrapping
from gtqlora.judging.judge import judge_of
from gtqlora.localize import Outcome, Trials
from gtqlora.localize.interchange import Cell
from gtqlora.results.association import read_associations
from gtqlora.run import Run
from gtqlora.scoring import Runner
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
    assert found.n_aligned == 24
    cells = _interchanged(config)
    assert len(cells) == 8
    odds = {outcomes[0].log_odds for outcomes in cells.values()}
    assert len(odds) == 8 and all(
        value is not None and math.isfinite(value) for value in odds
    )  # every interchange does something
    experts = {(row.layer, row.expert) for row in read_associations(tmp_path / "run")}
    assert experts == set(product(models.moe_layers(family), range(models.EXPERTS)))


def _interchanged(config: DiagnoseConfig) -> dict[Cell, list[Outcome]]:
    """Interchange all pairs, as random models refuse none, from which a diagnosis could say anything."""
    judge, subject = judge_of(config.judge), open_subject(config)
    rows = load(config.contrast, judge).split(config.split)
    pairs = localize.pairs_of(rows, subject, config.max_pairs, config.seed)
    readout = find_readout(subject.tokenizer, rows.rows)
    made = Trials(Runner.of(subject, judge, config), pairs, readout)
    return localize.run_interchanges(made, localize.controlled(subject, pairs, config.batch_size)).cells


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
