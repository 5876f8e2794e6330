"""What only a GPU shows: the same stages on CUDA, in bf16 where it matters. Run by hand: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gtqlora.config import DiagnoseConfig, TrainConfig, VerifyConfig, build
from gtqlora.contrasts import encode_prompt
from gtqlora.contrasts import load as load_contrast
from gtqlora.edits.edited import load
from gtqlora.edits.wrapping import trainable
from gtqlora.errors import TrainingError
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.results.metrics import read_metrics
from gtqlora.run import Run
from gtqlora.stages.diagnose import diagnose
from gtqlora.stages.export import export
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify
from tests import helpers

pytestmark = pytest.mark.gpu


def _given(name: str, dtype: str) -> dict:
    return {
        "file": embedded.recipe(),
        "model": str(embedded.organism(name)),
        "contrast": str(embedded.contrast()),
        "device": "cuda",
        "dtype": dtype,
    }


def test_a_batch_that_no_gpu_holds_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    config = build(TrainConfig, **_given("routed", "float32"), overrides=["batch_size=4000000"])
    with Run(tmp_path / "run") as run, pytest.raises(TrainingError, match="cheapest change that fits: batch_size"):
        train(config, run)


@pytest.mark.parametrize(("name", "dtype"), [("routed", "float32"), ("routed-qwen3", "bfloat16")])
def test_diagnose_train_verify_export_on_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    # in few steps an edit loses a refusal or two: a pass must not hang on the tries of other tests
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    given = _given(name, dtype)
    with Run(tmp_path / "run") as run:
        found = diagnose(build(DiagnoseConfig, **given), run)
        assert found.verdict == "routing"
        trained = train(build(TrainConfig, **given, overrides=["steps=200"]), run)
        assert trained.stopped is None
        losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
        assert losses[-1] < 0.5 * losses[0]
        # what ships has the checkpoint's dtype, whichever the edit was trained in
        verdict = verify(build(VerifyConfig, **{**given, "dtype": "auto"}), run)
        assert verdict.floor.verdict == "pass"
        assert verdict.table["lookalike"].refusal_after.value < 0.2
        exported = export(run, tmp_path / "out")
        assert exported.tensors_changed > 0


def test_adapter_gives_the_same_logits_twice_on_cuda(tmp_path: Path) -> None:
    given = _given("routed", "float32")
    with Run(tmp_path / "run") as run:
        train(build(TrainConfig, **given, overrides=["steps=5"]), run)
    rows = load_contrast(given["contrast"], judge_of(embedded.JUDGE)).split("heldout").rows[:8]
    logits = []
    for _ in range(2):
        edited = load(given["model"], tmp_path / "run" / "adapter", device="cuda")
        ids = torch.tensor([encode_prompt(edited.subject.tokenizer, row.prompt) for row in rows], device="cuda")
        with torch.no_grad():
            logits.append(edited.subject.model(ids).logits)
    assert torch.equal(*logits)


# --- frozen 4-bit experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert_format", ["nf4", "int4-g32"])
@pytest.mark.parametrize(("name", "dtype"), [("routed", "float32"), ("routed-qwen3", "bfloat16")])
def test_train_through_frozen_experts_on_cuda(tmp_path: Path, name: str, dtype: str, expert_format: str) -> None:
    given = _given(name, dtype)
    with Run(tmp_path / "run") as run:
        trained = train(build(TrainConfig, **given, expert_format=expert_format, overrides=["steps=200"]), run)
        assert trained.stopped is None  # and the stage has compared the experts' bits
        losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
        assert losses[-1] < 0.5 * losses[0]
        for on in (expert_format, "bf16"):
            verdict = verify(build(VerifyConfig, **{**given, "dtype": "auto"}, expert_format=on), run)
            assert (verdict.expert_format, verdict.floor.verdict) == (on, "pass")
            assert verdict.table["lookalike"].refusal_after.value < 0.2
        assert export(run, tmp_path / "out").tensors_changed > 0


@pytest.mark.parametrize("expert_format", ["nf4", "int4-g32"])
@pytest.mark.parametrize(
    "shape",
    [["qwen3-30b-a3b", "--layers", "2"], ["k2.5", "--layers", "2", "--experts", "64"]],
    ids=lambda s: s[0],
)
def test_train_at_the_width_of_real_models(tmp_path: Path, shape: list[str], expert_format: str) -> None:
    """Random weights, one batch of random tokens, learnt by heart; gradient checkpointing on."""
    bench, device = helpers.bench_module("step"), torch.device("cuda", torch.cuda.current_device())
    args = bench.parse(["--shape", *shape, "--pairs", "4", "--tokens", "128", "--steps", "10", "--anchor"])
    model, anatomy = bench.build(args, expert_format, device)
    before = helpers.digests(model)
    trainer: Any = bench.trainer_of(args, expert_format, model, anatomy, tmp_path, bench.Clock(device))
    trainer.args.logging_steps = 1
    start = {name: p.detach().clone() for name, p in trainable(trainer.model).items()}
    trainer.assert_exact_reference()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.02
    assert not [name for name, p in trainable(trainer.model).items() if torch.equal(p, start[name])]
    assert helpers.digests(trainer.model) == before and len(before) > 0
