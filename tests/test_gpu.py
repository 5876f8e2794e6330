"""What only a GPU shows: the same stages on CUDA, in bf16 where it matters. Run by hand: pytest -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gtqlora.adapters import load
from gtqlora.config import DiagnoseConfig, TrainConfig, VerifyConfig, build
from gtqlora.contrasts import encode_prompt
from gtqlora.contrasts import load as load_contrast
from gtqlora.diagnose import diagnose
from gtqlora.edit import train
from gtqlora.export import export
from gtqlora.gate_trainer import read_metrics
from gtqlora.judging import judge_of
from gtqlora.organisms import embedded
from gtqlora.run import Run
from gtqlora.verify import verify

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def _given(name: str, dtype: str) -> dict:
    return {
        "file": embedded.recipe(),
        "model": str(embedded.organism(name)),
        "contrast": str(embedded.contrast()),
        "device": "cuda",
        "dtype": dtype,
    }


@pytest.mark.parametrize(("name", "dtype"), [("routed", "float32"), ("routed-qwen3", "bfloat16")])
def test_diagnose_train_verify_export_on_cuda(tmp_path: Path, name: str, dtype: str) -> None:
    given = _given(name, dtype)
    with Run(tmp_path / "run") as run:
        found = diagnose(build(DiagnoseConfig, **given), run)
        assert found.verdict == "routing"
        trained = train(build(TrainConfig, **given, overrides=["steps=100"]), run)
        assert trained.stopped is None
        losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
        assert losses[-1] < 0.5 * losses[0]
        verdict = verify(build(VerifyConfig, **given), run)
        assert verdict.floor["verdict"] == "pass"
        assert verdict.table["lookalike"]["refusal_after"]["value"] < 0.2
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
