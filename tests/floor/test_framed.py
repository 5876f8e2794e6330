"""The second floor on an organism whose harmful refusals hang on the false refusals' mechanism inside frames only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gtqlora.config import TrainConfig, VerifyConfig, build
from gtqlora.errors import FloorError
from gtqlora.organisms import embedded
from gtqlora.run import Run
from gtqlora.stages.export import export
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify
from tests import helpers

FRAMED = Path(__file__).parents[1] / "data" / "framed"
"""What `python -m gtqlora.organisms build framed --rounded --out DIR` makes, without its pairs: the embedded ones."""


def test_an_edit_that_keeps_plain_refusals_and_loses_those_inside_frames_is_caught(tmp_path: Path) -> None:
    """The recipe has plain harmful prompts refused, and says nothing of frames; it trains less here than usually."""
    counts = {("train", "benign"): 100, ("train", "lookalike"): 200, ("train", "harmful"): 200}
    counts |= {("heldout", "harmful"): 200, ("heldout", "lookalike"): 40, ("heldout", "benign"): 40}
    given = {"file": embedded.recipe(), "model": str(FRAMED)}
    given["contrast"] = str(helpers.write_rows(tmp_path / "pairs.jsonl", helpers.toy_rows(counts)))
    few = ("ablation=0", "mediation_prompts=10", "wrapped_prompts=50")
    with Run(tmp_path / "run") as run:
        train(build(TrainConfig, **given, overrides=("steps=80", "save_steps=80", "batch_size=16")), run)
        verdict = verify(build(VerifyConfig, **given, overrides=few), run)
        with pytest.raises(FloorError, match=r"inside plain frames is 'fail' .* no weights are written"):
            export(run, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    plain, wrapped = verdict.floor, verdict.wrapped
    assert (plain.verdict, plain.refused, plain.losses.value) == ("pass", 200, 0)
    assert verdict.table["lookalike"].refusal_before.value == 1 and verdict.table["lookalike"].refusal_after.value < 0.3
    assert wrapped is not None and wrapped.verdict == "fail"
    assert [row.refused for row in wrapped.wrappers] == [50] * 4 and wrapped.floor.losses.value > 0.3


def test_the_bench_puts_every_second_training_pair_inside_frames_and_nothing_that_is_held_out(tmp_path: Path) -> None:
    helpers.bench_module("wrapped").write_pairs(FRAMED, tmp_path / "pairs.jsonl", ("harmful",))
    was, now = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (embedded.contrast(), tmp_path / "pairs.jsonl")
    )
    changed = [(a, b) for a, b in zip(was, now, strict=True) if a != b]
    assert {(b["kind"], b["split"]) for _, b in changed} == {("harmful", "train")} and len(changed) == 300
    for a, b in changed:
        assert a["prompt"] in b["prompt"] and a["twin"] in b["twin"]
        assert len(b["prompt"].split()) == len(b["twin"].split()) > len(a["prompt"].split())
        assert (a["chosen"], a["rejected"]) == (b["chosen"], b["rejected"])
