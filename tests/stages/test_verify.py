"""Verify: paired counts, the floor's three answers on real models, and a verdict that cannot outlive its adapter."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gtqlora.stages.verify as stage
from gtqlora.certificate import certify
from gtqlora.config import ProjectConfig, VerifyConfig
from gtqlora.contrasts import KINDS
from gtqlora.errors import ContrastError, FloorError, ModelError, RunError
from gtqlora.organisms import embedded
from gtqlora.results.adapter import adapter_hash
from gtqlora.results.mediation import FACTORIAL, REPLAYS, read_arms
from gtqlora.results.verdict import Verdict, read_outcomes, read_verdict
from gtqlora.results.wrapped import WRAPPED
from gtqlora.run import Run, read_parquet
from gtqlora.stages.project import project
from gtqlora.stages.verify import verify
from gtqlora.stats import floor, rate
from tests import helpers

ROUTED = embedded.organism("routed")


def rows_of(path: Path, harmful: int, others: int = 20, train: int = 40) -> Path:
    counts = {("train", kind): train for kind in KINDS}
    counts |= {("heldout", kind): harmful if kind == "harmful" else others for kind in KINDS}
    return helpers.write_rows(path, helpers.toy_rows(counts))


def settings(contrast: Path, **changes: Any) -> VerifyConfig:
    base: dict[str, Any] = {"model": str(ROUTED), "contrast": str(contrast), "judge": embedded.JUDGE}
    return VerifyConfig(**{**base, "max_new_tokens": 6, "margin": 0.05, "batch_size": 64, "ablation": 4, **changes})


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    """A run whose adapter changes nothing, verified."""
    folder = tmp_path_factory.mktemp("noop")
    contrast, path = rows_of(folder / "c.jsonl", 60), folder / "run"
    helpers.noop_adapter(ROUTED, contrast, embedded.JUDGE, path)
    with Run(path) as run:
        return path, verify(settings(contrast), run)


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    """A run whose edit answers what the organism refused, verified."""
    folder = tmp_path_factory.mktemp("projected")
    contrast, path = rows_of(folder / "c.jsonl", 60), folder / "run"
    with Run(path) as run:
        config = ProjectConfig(model=str(ROUTED), contrast=str(contrast), judge=embedded.JUDGE, max_new_tokens=6)
        project(config, run)
        return path, verify(settings(contrast), run)


# --- the floor's three answers ---------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_passes(noop: tuple[Path, Verdict]) -> None:
    _, verdict = noop
    assert verdict.floor.verdict == "pass"
    assert verdict.table["harmful"].refusal_before.value > 0.8  # there was something to lose
    assert verdict.floor.drop.value == 0


def test_an_edit_that_answers_everything_fails(projected: tuple[Path, Verdict]) -> None:
    _, verdict = projected
    assert (verdict.kind, verdict.floor.verdict) == ("projection", "fail")
    assert verdict.floor.drop.low > 0.05


def test_few_prompts_cannot_tell_and_say_how_many_would(tmp_path: Path) -> None:
    contrast = rows_of(tmp_path / "c.jsonl", 20, others=4)
    helpers.noop_adapter(ROUTED, contrast, embedded.JUDGE, tmp_path / "run")
    with Run(tmp_path / "run") as run:
        verdict = verify(settings(contrast), run)
    assert verdict.floor.verdict == "cannot tell"
    needed = verdict.floor.needed
    assert needed is not None
    assert f"about {needed} paired harmful prompts would tell" in verdict.floor.reason
    assert floor([True] * needed, [True] * needed, margin=0.05).verdict == "pass"


# --- what is counted -------------------------------------------------------------------------------------------------


def test_without_effect_everything_is_equal(noop: tuple[Path, Verdict]) -> None:
    path, verdict = noop
    for kind in KINDS:
        row = verdict.table[kind]
        assert row.refusal_before == row.refusal_after
        assert row.drop.value == 0 and row.p == row.q == 1
        assert verdict.drift[kind].overlap.value == 1
        assert abs(verdict.drift[kind].kl.value) < 1e-6
    assert verdict.kl_benign.value == 0
    rows = {row["number"]: row for row in read_parquet(path / "scores.parquet")}
    assert all(row["text_before"] == row["text_after"] for row in rows.values())
    found, parts = verdict.mediation, verdict.factorial
    assert (found.repaired, found.direct, found.routing) == (0, None, "cannot tell")
    assert found.refusal_replayed == verdict.table["lookalike"].refusal_after
    assert parts is not None and parts.gates_repair is parts.lora_repair is parts.gates_idle is None
    assert all(did == parts.lookalike["original"] for did in parts.lookalike.values())
    assert all(refused == verdict.table["harmful"].refusal_before for refused in parts.harmful.values())
    arms = [line for line in read_arms(path) if line.arm != "other_routing"]  # the model's routing on the same prompt
    assert all(line.text == rows[line.number]["text_before"] for line in arms)
    assert {line.arm for line in read_arms(path)} == {*FACTORIAL, *REPLAYS}


def test_the_drawn_prompts_are_asked_in_every_arm(noop: tuple[Path, Verdict], toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    drawn: list[set[int]] = []
    with Run(tmp_path) as run:
        for seed in (0, 0, 1):
            verdict = verify(toy.verify_config(model, ablation=0, mediation_prompts=5, seed=seed), run, again=True)
            assert verdict.mediation.drawn == 5 and verdict.table["harmful"].refusal_before.n == 120
            arms = read_arms(tmp_path)
            assert Counter((line.kind, line.arm) for line in arms if line.arm != "other_routing") == Counter(
                {
                    **{("lookalike", arm): 5 for arm in (*FACTORIAL, "original_routing", "edited_routing")},
                    **{("harmful", arm): 5 for arm in FACTORIAL},
                }
            )
            drawn.append({line.number for line in arms})
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_verdict_is_what_the_scores_say(projected: tuple[Path, Verdict]) -> None:
    path, verdict = projected
    rows: Any = read_parquet(path / "scores.parquet")
    given = [json.loads(line) for line in (path.parent / "c.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows] == [i for i, row in enumerate(given, 1) if row["split"] == "heldout"]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        assert [row["pair_id"] for row in mine] == [
            row["pair_id"] for row in given if (row["split"], row["kind"]) == ("heldout", kind)
        ]
        for when in ("before", "after"):
            refused = [row[f"label_{when}"] == "refusal" for row in mine]
            assert refused == ["refuse sorry" in row[f"text_{when}"] for row in mine]
            assert getattr(verdict.table[kind], f"refusal_{when}") == rate(refused)
            correct = [row[f"correct_{when}"] for row in mine]
            wanted = None if kind == "harmful" else rate(correct)
            assert getattr(verdict.table[kind], f"accuracy_{when}") == wanted
    harmful = [row for row in rows if row["kind"] == "harmful"]
    drops = sum(row["label_before"] == "refusal" != row["label_after"] for row in harmful)
    gains = sum(row["label_after"] == "refusal" != row["label_before"] for row in harmful)
    assert verdict.floor.drop.value == pytest.approx((drops - gains) / 60)
    assert verdict.factorial is None  # a projection has no parts
    did = {(line.arm, line.number): line.does for line in read_arms(path)}
    repaired = [
        row["number"]
        for row in rows
        if row["kind"] == "lookalike"
        and row["label_before"] == "refusal" != row["label_after"]
        and row["correct_after"]
    ]
    assert verdict.mediation.repaired == len(repaired) > 0
    for arm, shares in (("original_routing", verdict.mediation.direct), ("edited_routing", verdict.mediation.indirect)):
        assert shares is not None
        for does, share in (("refuses", shares.refuses), ("as edited", shares.as_edited), ("broken", shares.broken)):
            assert share.value * len(repaired) == pytest.approx(sum(did[arm, number] == does for number in repaired))
    assert verdict.kl_benign.value > 0.001
    assert verdict.drift["harmful"].kl.value > 0.001 and verdict.drift["harmful"].overlap.value < 1


def test_files_hold_the_verdict_and_it_is_fresh(noop: tuple[Path, Verdict]) -> None:
    path, verdict = noop
    assert verdict.adapter == adapter_hash(path / "adapter")
    before = (path / "verdict.json").stat().st_mtime_ns
    with Run(path) as run:
        assert verdict == read_verdict(path)
        assert verify(settings(path.parent / "c.jsonl"), run) == read_verdict(path)
    assert (path / "verdict.json").stat().st_mtime_ns == before


def test_silencing_is_measured_before_and_after_on_prompts_that_ranked_nothing(noop: tuple[Path, Verdict]) -> None:
    path, verdict = noop
    found = verdict.ablation
    assert found is not None
    assert {(e.layer, e.expert) for e in found.experts} == set(embedded.read_truth(ROUTED).planted)
    assert (found.ranked_against, found.ranked_prompts, found.controls) == ("twins", 40, 3)
    for curve in (found.before, found.after, found.after_reranked):
        assert [point.ablated for point in curve] == [0, 1, 2, 4]
        assert all(point.targeted.n == 60 for point in curve)
        assert curve[0].targeted == verdict.table["harmful"].refusal_before
        assert curve[-1].targeted.high < 0.2
    assert found.before == found.after  # the edit changes nothing
    assert all(point.random is not None and point.random.low > 0.85 for point in found.before)
    assert all(point.random is None for point in found.after_reranked)
    assert read_verdict(path).ablation == found


def test_silencing_can_be_left_out_and_older_verdicts_are_read(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    with Run(tmp_path) as run:
        full = verify(toy.verify_config(model, ablation=2, ablation_prompts=10, ablation_controls=0), run)
        assert full.ablation is not None
        assert [point.targeted.n for point in full.ablation.before] == [10, 10, 10]
        assert all(point.random is None for point in full.ablation.before)
        bare = verify(toy.verify_config(model, ablation=0), run)
        assert bare.ablation is None and bare.floor == full.floor and bare.table == full.table
        file = tmp_path / "verdict.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "ablation"}))
        assert read_verdict(tmp_path) == bare


def test_bf16_is_compared_in_fp32(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("deepseek_v3", torch.bfloat16)
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    with Run(tmp_path) as run:
        verdict = verify(toy.verify_config(model), run)
    assert verdict.floor.verdict == "pass" and verdict.kl_benign.value == 0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_prompts_that_were_trained_on_are_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    with Run(tmp_path) as run, pytest.raises(ContrastError, match="was trained on"):
        verify(toy.verify_config(model, split="train"), run)
    (tmp_path / "contrast.parquet").unlink()  # without the trained rows nobody could say
    with Run(tmp_path) as run, pytest.raises(RunError, match=r"no contrast\.parquet"):
        verify(toy.verify_config(model, split="train"), run)


def test_every_kind_is_needed(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    counts = {("heldout", "harmful"): 4, ("heldout", "benign"): 4}
    contrast = helpers.write_rows(tmp_path / "c.jsonl", helpers.toy_rows(counts))
    with Run(tmp_path) as run, pytest.raises(ContrastError, match="no lookalike rows"):
        verify(toy.verify_config(model, contrast=str(contrast)), run)


def test_no_adapter_no_verdict(toy: helpers.Toy, tmp_path: Path) -> None:
    with Run(tmp_path) as run, pytest.raises(RunError, match="run `gtqlora train` first"):
        verify(toy.verify_config(toy.model("qwen3_moe")), run)


def test_a_verify_that_fails_leaves_the_verdict_on_the_same_adapter_and_none_on_another(
    toy: helpers.Toy, tmp_path: Path
) -> None:
    model, file = toy.model("qwen3_moe"), tmp_path / "run" / "verdict.json"

    def failing(run: Run) -> None:
        with pytest.raises(ContrastError, match="no rows in split"):
            verify(toy.verify_config(model, split="validation"), run)

    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path / "run")
    with Run(tmp_path / "run") as run:
        verify(toy.verify_config(model), run)
        before = file.read_bytes()
        failing(run)
        assert file.read_bytes() == before and certify(run, helpers.JUDGE).floor.verdict == "pass"
        file.write_text(json.dumps({**json.loads(before), "adapter": "0" * 64}))
        failing(run)
        assert not file.exists()


def test_a_verify_that_ends_between_ledger_and_verdict_leaves_no_older_pass_to_export(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = toy.model("qwen3_moe"), tmp_path / "verdict.json"
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    with Run(tmp_path) as run:
        verify(toy.verify_config(model), run)
        before = file.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(stage, "write_verdict", interrupted)
            with pytest.raises(KeyboardInterrupt):
                verify(toy.verify_config(model), run, again=True)
        assert file.read_bytes() == before
        with pytest.raises(FloorError, match=r"verdicts\.jsonl was changed since verify"):
            certify(run, helpers.JUDGE)
        verify(toy.verify_config(model), run)
        assert certify(run, helpers.JUDGE).tries == 1


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_adapter_or_pairs_put_into_the_run_are_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    for name in ("adapter/edit.safetensors", "contrast.parquet"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept[:-4] + b"\x00\x00\xc0\x7f")
        with Run(tmp_path) as run, pytest.raises(RunError, match="made"):
            verify(toy.verify_config(model), run)
        (tmp_path / name).write_bytes(kept)


def test_the_same_edit_in_another_folder_is_asked_the_same_prompts_and_is_another_adapter(
    toy: helpers.Toy, tmp_path: Path
) -> None:
    model, found = toy.model("qwen3_moe"), []
    for name, idle in (("here", {}), ("there", {"logging_steps": 2})):
        copied, pairs = shutil.copytree(model, tmp_path / name / "model"), toy.pairs(tmp_path / name / "pairs.jsonl")
        place = {"contrast": str(pairs)}
        helpers.trained(toy.train_config(copied, **place, **idle), tmp_path / name / "run")
        # a sixth of the prompts: two draws would hardly be the same
        with Run(tmp_path / name / "run") as run:
            found.append(verify(toy.verify_config(copied, **place, wrapped_prompts=20, margin=0.05), run))
    here, there = found
    asked = [read_outcomes(tmp_path / name / "run", WRAPPED) for name in ("here", "there")]
    assert asked[0] == asked[1] and len({o.number for o in asked[0] if o.kind == "harmful"}) == 20
    aside: Any = {"adapter": "", "model": "", "prompts": None, "judge": ""}
    assert here.adapter != there.adapter and replace(here, **aside) == replace(there, **aside)
    shutil.rmtree(tmp_path / "here" / "run" / "adapter")
    shutil.copytree(tmp_path / "there" / "run" / "adapter", tmp_path / "here" / "run" / "adapter")
    with Run(tmp_path / "here" / "run") as run, pytest.raises(FloorError, match="not the one that was verified"):
        certify(run, helpers.JUDGE)


def test_weights_that_are_not_finite_are_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path, break_it=True)
    with Run(tmp_path) as run, pytest.raises(ModelError, match="NaN"):
        verify(toy.verify_config(model), run)


def test_an_edited_verdict_is_judged_anew(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path)
    with Run(tmp_path) as run:
        verdict = verify(toy.verify_config(model), run)
        file = tmp_path / "verdict.json"
        file.write_text(file.read_text().replace('"pass"', '"excellent"'))
        assert verify(toy.verify_config(model), run) == verdict
