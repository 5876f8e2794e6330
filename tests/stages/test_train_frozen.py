"""Training through frozen 4-bit experts: what trains, what stays, and that only what was verified ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gtqlora import contrasts
from gtqlora.capture import Subject, open_subject
from gtqlora.capture.subject import ready
from gtqlora.certificate import certify
from gtqlora.cli import main
from gtqlora.config import DiagnoseConfig, ModelConfig, TrainConfig, build
from gtqlora.edits.checkpoint_files import Origin
from gtqlora.edits.edited import load
from gtqlora.edits.frozen import assert_experts_frozen, frozen_state
from gtqlora.edits.wrapping import trainable
from gtqlora.errors import ConfigError, FloorError, ModelError, RunError, TrainingError
from gtqlora.experts import FORMATS, load_model
from gtqlora.experts.sources import PACKED_PARTS, PACKED_SHAPE
from gtqlora.experts.streaming import bytes_of, waiting
from gtqlora.families import bind, load_tokenizer
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.results import adapter as adapter_files
from gtqlora.results.metrics import read_metrics
from gtqlora.results.verdict import Verdict, read_verdict
from gtqlora.run import PATHS, Run, fingerprint, stage_hash
from gtqlora.stages import train as train_stage
from gtqlora.stages.diagnose import diagnose
from gtqlora.stages.project import project
from gtqlora.stages.verify import verify
from tests import helpers, models, warm
from tests.families.test_packed import packed, set_quantization, settings, tensors_of
from tests.helpers import digests, exported, frozen_experts, gates, trained
from tests.stages.test_train import close, gradients

every_choice = pytest.mark.parametrize("expert_format", [*FORMATS, "native"])
INNER: dict[str, Any] = {"moe_intermediate_size": 32}
"""Of tiny models, so that groups of 32 fit."""


@pytest.fixture(scope="module")
def packed_organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The routed organism as a compressed-tensors INT4 checkpoint."""
    folder = tmp_path_factory.mktemp("packed") / "routed"
    shutil.copytree(embedded.organism("routed"), folder)

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if ".mlp.experts." in name]:
            weight_NK, stem = tensors.pop(name), name.removesuffix(".weight")
            parts = FORMATS["int4-g32"].quantize(weight_NK)
            tensors |= {f"{stem}.{PACKED_PARTS[part]}": tensor for part, tensor in parts.items()}
            tensors[f"{stem}.{PACKED_SHAPE}"] = torch.tensor(weight_NK.shape)
        return tensors

    models.edit_tensors(folder / "model.safetensors", change)
    set_quantization(folder, settings(32))
    return folder


def settled(toy: helpers.Toy, model: Path, expert_format: str, **changes: Any) -> TrainConfig:
    """A short training of an organism, so fast that its routing leaves the original's."""
    base = {"judge": embedded.JUDGE, "steps": 16, "batch_size": 8, "lr_lora": 1e-3, "lr_gates": 3e-3, "min_overlap": 0}
    return toy.train_config(model, **{**base, "save_steps": 16, **changes, "expert_format": expert_format})


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_where_experts_wait_changes_no_bit_of_an_edit(toy: helpers.Toy, tmp_path: Path, again: bool) -> None:
    model = toy.model("qwen3_moe", num_hidden_layers=6, **INNER)
    config = toy.train_config(model, expert_format="nf4", gradient_checkpointing=again)
    (size,) = {bytes_of(module) for module in frozen_experts(open_subject(config).model).values()}
    waits = replace(config, expert_memory=2.5 * size / 2**30, expert_disk=str(tmp_path))
    assert len(waiting(open_subject(waits).model.modules())) == 5
    found = trained(config, tmp_path / "resident"), trained(waits, tmp_path / "waiting")
    assert helpers.same(*(helpers.weights(one.adapter) for one in found))
    # it is the same edit, that is not made anew where there is more or less memory
    assert trained(replace(waits, expert_memory=None), tmp_path / "waiting").fresh


@pytest.fixture(scope="module")
def fitted(
    toy: helpers.Toy, packed_organism: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[helpers.Inside, dict[str, Tensor]]]:
    """Experts -> a training that is done, and the state it started from; made once."""
    made: dict[str, tuple[helpers.Inside, dict[str, Tensor]]] = {}

    def fit(expert_format: str) -> tuple[helpers.Inside, dict[str, Tensor]]:
        if expert_format not in made:
            model = packed_organism if expert_format == "native" else embedded.organism("routed")
            inside = helpers.Inside.start(settled(toy, model, expert_format), tmp_path_factory.mktemp(expert_format))
            start = inside.state()
            assert inside.fit() == (16, None)
            made[expert_format] = inside, start
        return made[expert_format]

    return fit


@every_choice
def test_loss_falls_and_experts_stay(fitted: Callable[[str], Any], expert_format: str) -> None:
    inside, start = fitted(expert_format)
    trainer, model = inside.trainer, inside.trainer.model
    losses = [line["loss"] for line in read_metrics(inside.metrics)]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    moved = {name for name, tensor in inside.state().items() if not torch.equal(tensor, start[name])}
    assert moved == set(trainable(model)) and len(gates(model)) == 4
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    before = digests(load_model(inside.config.model, expert_format=expert_format)[1])
    assert digests(model) == before and len(before) == 4 * 2 * (4 if expert_format == "nf4" else 2)
    _check_optimizer(trainer)


LOGITS = """
import json, sys
import gtqlora
from tests import helpers
for model, adapter in json.loads(sys.argv[1]):
    torch.save(helpers.logits(gtqlora.load(model, adapter).subject.model), adapter + ".pt")
"""


def test_a_fresh_process_computes_the_same(fitted: Callable[[str], Any]) -> None:
    insides = [fitted(experts)[0] for experts in (*FORMATS, "native")]
    done = warm.process(LOGITS, json.dumps([(i.config.model, str(i.save())) for i in insides]), knowing=True)
    assert done.returncode == 0, done.stderr
    expected = [helpers.logits(inside.trainer.model) for inside in insides]
    for inside, logits in zip(insides, expected, strict=True):
        assert torch.equal(torch.load(f"{inside.path / train_stage.ADAPTER}.pt"), logits)
    assert not torch.equal(expected[0], expected[1])


def _check_optimizer(trainer: Any) -> None:
    """It holds what trains and nothing that lies in the experts' memory."""
    groups = trainer.optimizer.param_groups
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainable(trainer.model).values()}
    experts = {b.data_ptr() for module in frozen_experts(trainer.model).values() for b in module.buffers()}
    assert not experts & {p.data_ptr() for p in trainer.model.parameters()}
    assert not any(list(module.parameters()) for module in frozen_experts(trainer.model).values())


@pytest.mark.parametrize("expert_format", ["nf4", "native"])
def test_the_same_with_bf16_weights_around_the_experts(
    toy: helpers.Toy, tmp_path: Path, expert_format: str, packed_organism: Path
) -> None:
    model = packed_tiny(tmp_path) if expert_format == "native" else toy.model("qwen3_moe", torch.bfloat16, **INNER)
    inside = helpers.Inside.start(toy.train_config(model, expert_format=expert_format), tmp_path / "run")
    before, start = digests(inside.trainer.model), inside.state()
    assert inside.fit() == (4, None) and digests(inside.trainer.model) == before
    names = set(trainable(inside.trainer.model))
    assert {name for name, tensor in inside.state().items() if not torch.equal(tensor, start[name])} == names
    assert {p.dtype for p in trainable(inside.trainer.model).values()} == {torch.float32}


def packed_tiny(tmp_path: Path) -> Path:
    """A tiny Kimi-K2.5 checkpoint with INT4 experts."""
    folder = tmp_path / "packed"
    return folder if folder.exists() else packed(folder, "kimi_k25")


def test_resumed_is_bitwise_uninterrupted(toy: helpers.Toy, tmp_path: Path) -> None:
    config = settled(toy, embedded.organism("routed"), "int4-g32", steps=4, save_steps=2, accumulation=2)
    expected = helpers.weights(trained(config, tmp_path / "straight").adapter)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    for gone in ("adapter", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "killed" / gone)
    models.edit_json(tmp_path / "killed" / "manifest.json", lambda old: {**old, "stages": {}})
    resumed = trained(config, tmp_path / "killed")
    assert helpers.same(helpers.weights(resumed.adapter), expected)
    assert (
        json.loads((resumed.adapter / "gtqlora.json").read_text())["details"]["config"]["expert_format"] == "int4-g32"
    )


def test_gradient_checkpointing_gives_the_same_gradients(toy: helpers.Toy, tmp_path: Path) -> None:
    base = {"steps": 2, "anchor_harmful": 5.0, "anchor_benign": 5.0}
    plain, saving = (
        gradients(
            settled(toy, embedded.organism("routed"), "nf4", gradient_checkpointing=flag, **base), tmp_path / str(flag)
        )
        for flag in (False, True)
    )
    assert all(tensor.abs().max() > 0 for tensor in plain.values())
    assert close(plain, saving)


def test_accumulation_is_a_larger_batch(toy: helpers.Toy, tmp_path: Path) -> None:
    base = {"steps": 2, "lr_lora": 1e-4, "lr_gates": 1e-4, "sft_weight": 0.0}
    base |= {"anchor_harmful": 0.0, "anchor_benign": 0.0}
    model = embedded.organism("routed")
    whole = gradients(settled(toy, model, "int4-g128", batch_size=8, **base), tmp_path / "whole")
    parts = gradients(settled(toy, model, "int4-g128", batch_size=2, accumulation=4, **base), tmp_path / "parts")
    assert close(whole, parts)


# MLA, a gated shared expert, and linear attention: each has linears of its own whose weights are packed.
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "qwen3_next"])
def test_dense_weights_in_four_bits_leave_fp32_masters(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    """TRL casts what trains to bf16 for such models; gates trained in bf16 would not move at their rates."""
    pytest.importorskip("bitsandbytes")
    model = toy.model(family, torch.bfloat16, **INNER)
    known, loaded = load_model(str(model), expert_format="int4-g32", dense="nf4")
    anatomy = bind(loaded, known)
    ready(loaded, anatomy)
    subject = Subject(loaded, load_tokenizer(str(model)), anatomy)
    config = toy.train_config(model)
    rows = contrasts.load(config.contrast, judge_of(config.judge)).split("train")
    with Run(tmp_path) as run:
        trainer = train_stage._trainer(
            config, subject, rows, run, Origin(asdict(config), {})
        )  # asserts the exact reference
        assert {p.dtype for p in trainable(trainer.model).values()} == {torch.float32}
        before = {name: p.clone() for name, p in trainable(trainer.model).items()}
        assert train_stage._fit(trainer, tmp_path / "checkpoints") == (4, None)
    assert not any(torch.equal(p, before[name]) for name, p in trainable(trainer.model).items())


def _in_place(buffer: Tensor) -> None:
    buffer.add_(1).sub_(1)


def _behind_the_counter(buffer: Tensor) -> None:
    buffer.data[..., 0] += 1


@pytest.mark.parametrize("write", [_in_place, _behind_the_counter])
def test_a_write_to_the_experts_is_noticed(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Tensor], None]
) -> None:
    inside = helpers.Inside.start(settled(toy, embedded.organism("routed"), "nf4"), tmp_path / "a")
    before = frozen_state(inside.trainer.model)
    assert_experts_frozen(inside.trainer.model, before)
    write(next(iter(frozen_experts(inside.trainer.model).values())).get_buffer("down_packed"))
    with pytest.raises(TrainingError, match=r"1 buffers .* model\.layers\.1\.mlp\.experts\.down_packed"):
        assert_experts_frozen(inside.trainer.model, before)
    fit = train_stage._fit

    def spoilt(trainer: Any, checkpoints: Path) -> tuple[int, str | None]:
        write(next(iter(frozen_experts(trainer.model).values())).get_buffer("down_packed"))
        return fit(trainer, checkpoints)

    monkeypatch.setattr(train_stage, "_fit", spoilt)
    with pytest.raises(TrainingError, match="frozen experts were written to"):
        trained(settled(toy, embedded.organism("routed"), "nf4", steps=1), tmp_path / "b")
    assert not (tmp_path / "b" / "adapter").exists()


# --- the other stages ------------------------------------------------------------------------------------------------


def test_diagnosis_and_projection_with_frozen_experts(tmp_path: Path) -> None:
    kinds = contrasts.KINDS
    counts = {(split, kind): 36 for split in ("train", "validation") for kind in kinds}
    file = helpers.write_rows(tmp_path / "c.jsonl", helpers.toy_rows(counts))
    shared: dict[str, Any] = {"model": str(embedded.organism("routed")), "contrast": str(file), "expert_format": "nf4"}
    shared |= {"judge": embedded.JUDGE, "max_new_tokens": 6, "batch_size": 128}
    with Run(tmp_path / "run") as run:
        found = diagnose(DiagnoseConfig(**shared, bootstrap=50, random_controls=0, max_candidates=1), run)
        assert found.verdict == "routing"
        truth = embedded.read_truth(embedded.organism("routed"))
        assert {(e.layer, e.expert) for e in found.top_experts} == set(truth.planted)
        projected = project(build_project(shared), run)
    refusals = [candidate.refusal for candidate in projected.candidates]
    assert len(refusals) == 5 and min(refusals) < 0.1
    edited = load(shared["model"], projected.adapter)
    assert len(frozen_experts(edited.subject.model)) == 4  # as it was made


def build_project(shared: dict[str, Any]) -> Any:
    from gtqlora.config import ProjectConfig

    return build(ProjectConfig, **shared)


# --- what was verified is what ships ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_nf4(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained and passed with nf4 experts, by the command line's defaults; copy it before changing it."""
    model, path = toy.model("deepseek_v3", **INNER), tmp_path_factory.mktemp("runs") / "nf4"
    trained(toy.train_config(model, expert_format="nf4", max_new_tokens=2), path)
    assert main(["verify", str(path), *helpers.VERIFY]) == 0
    return path


def verdict_of(path: Path) -> Verdict:
    with Run(path) as run:
        return read_verdict(run.path)


JUDGED = ["--set", f"judge={helpers.JUDGE}"]


def refuse(path: Path, out: Path, match: str, error: type[Exception] = FloorError) -> None:
    with pytest.raises(error, match=match):
        exported(path, out)
    assert not out.exists()


def test_a_verdict_on_other_experts_does_not_ship(
    toy: helpers.Toy, in_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = Path(shutil.copytree(in_nf4, tmp_path / "run")), tmp_path / "out"
    assert json.loads((run / "verdict.json").read_text())["expert_format"] == "nf4"
    refuse(run, out, rf"verified with nf4 experts, .* \(bf16\); run `gtqlora verify {run} --expert-format bf16` first")
    assert main(["export", str(run), str(out), *JUDGED]) == FloorError.exit_code
    assert "--expert-format bf16" in capsys.readouterr().err and not out.exists()
    assert main(["verify", str(run), "--expert-format", "bf16", *helpers.VERIFY]) == 0
    assert "routed experts: bf16" in capsys.readouterr().out and verdict_of(run).expert_format == "bf16"
    exported(run, out)
    base, merged = tensors_of(toy.model("deepseek_v3", **INNER)), tensors_of(out)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert base.keys() == merged.keys() and changed and not any(".mlp.experts." in name for name in changed)
    assert json.loads((out / "export.json").read_text())["expert_format"] == "bf16"


def test_an_edited_verdict_does_not_ship(in_nf4: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(in_nf4, tmp_path / "run"))
    models.edit_json(run / "verdict.json", lambda old: {**old, "expert_format": "bf16"})
    refuse(run, tmp_path / "out", r"verdict\.json was changed")
    _record(run, lambda record: record["outputs"].update({"verdict.json": fingerprint(run / "verdict.json")}))
    refuse(run, tmp_path / "out", "verified with nf4 experts")


def _record(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the manifest says of verify."""

    def changed(manifest: dict[str, Any]) -> dict[str, Any]:
        record = manifest["stages"]["verify"]
        change(record)
        record["hash"] = stage_hash(record["config"], record["inputs"], PATHS)
        return manifest

    models.edit_json(path / "manifest.json", changed)


def test_a_verdict_from_before_there_was_a_choice(
    toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "run"))
    models.edit_json(run / "verdict.json", lambda old: {k: v for k, v in old.items() if k != "expert_format"})

    def older(record: dict[str, Any]) -> None:
        del record["config"]["expert_format"]
        record["outputs"]["verdict.json"] = fingerprint(run / "verdict.json")

    _record(run, older)
    with Run(run) as held:
        assert certify(held, helpers.JUDGE).verdict.expert_format == "bf16"
    assert exported(run, tmp_path / "out").tensors_changed > 0


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k25"])
def test_a_packed_checkpoint_ships_its_packed_experts(toy: helpers.Toy, tmp_path: Path, family: str) -> None:
    model, path, out = packed(tmp_path / "model", family, seed=1), tmp_path / "run", tmp_path / "out"
    trained(toy.train_config(model, expert_format="native", max_new_tokens=2), path)
    assert main(["verify", str(path), *helpers.VERIFY]) == 0 and verdict_of(path).expert_format == "native"
    result = exported(path, out)
    base, merged = tensors_of(model), tensors_of(out)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    experts = {name for name in base if ".mlp.experts." in name}
    assert len(experts) == 2 * 8 * 3 * 3 and not changed & experts and len(changed) > 5
    assert {n: t.dtype for n, t in base.items()} == {n: t.dtype for n, t in merged.items()}
    assert (out / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert result.tensors_changed >= len(changed) and "(4 bits)" in (out / "README.md").read_text()
    with pytest.raises(ModelError, match="--expert-format native"):
        open_subject(str(out))
    theirs = helpers.logits(load(str(model), path / "adapter").subject.model).float()
    ours = helpers.logits(open_subject(ModelConfig(model=str(out), expert_format="native")).model).float()
    before = helpers.logits(open_subject(ModelConfig(model=str(model), expert_format="native")).model).float()
    assert (ours - theirs).abs().mean() < 0.2 * (before - theirs).abs().mean()


def test_a_projection_of_packed_experts_stays_an_adapter(toy: helpers.Toy, tmp_path: Path) -> None:
    model = packed(tmp_path / "model", "deepseek_v3")
    with Run(tmp_path / "run") as run:
        project(toy.project_config(model, expert_format="native", layer=1), run)
        verdict = verify(toy.verify_config(model, expert_format="native"), run)
    assert (verdict.kind, verdict.expert_format) == (adapter_files.PROJECTION, "native")
    refuse(tmp_path / "run", tmp_path / "out", "a projection changes the routed experts", RunError)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_bad_choices(toy: helpers.Toy, tmp_path: Path, packed_organism: Path) -> None:
    plain, pack = embedded.organism("routed"), packed_organism
    for experts, model, error, parts in (
        ("int8", plain, ConfigError, r"expert_format = 'int8': .* nf4"),
        ("native", plain, ModelError, "not quantized; use one of nf4"),
        ("nf4", pack, ModelError, "INT4 already; use 'native'"),
        ("bf16", pack, ModelError, "--expert-format native"),
    ):
        with pytest.raises(error, match=parts):
            trained(settled(toy, model, experts), tmp_path / f"{experts}-{model.name}")
        assert not (tmp_path / f"{experts}-{model.name}" / "adapter").exists()
    with pytest.raises(
        ConfigError, match=r"expert_format = 'int8': must be one of bf16, nf4, int4-g32, int4-g128, native"
    ):
        build(TrainConfig, model="m", contrast="c", expert_format="int8")


@pytest.mark.parametrize("verb", ["diagnose", "train", "project"])
def test_bad_choices_cost_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    arguments = [verb, "organism:routed", "--contrast", "organism", "--config", "organism", "--run", str(tmp_path)]
    assert main([*arguments, "--expert-format", "fp8"]) == ConfigError.exit_code
    error = capsys.readouterr().err
    assert "expert_format = 'fp8'" in error and "Traceback" not in error
    assert main([*arguments, "--expert-format", "native"]) == ModelError.exit_code
    assert "not quantized" in capsys.readouterr().err


# --- the benchmark of a whole step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "k2.5"])
def test_train_step_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: str) -> None:
    bench = helpers.bench_module("step")
    small = ["--tiny", "--device", "cpu", "--pairs", "2", "--tokens", "16", "--steps", "1", "--shape", shape]
    assert bench.main([*small, "--ways", *FORMATS, "bf16", "trl", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [way["way"] for way in found["ways"]] == [*FORMATS, "bf16", "trl"] and not found["errors"]
    assert all(len(way["steps"]) == 1 and 0 < way["loss"] < 20 for way in found["ways"])
    assert found["ways"][0]["experts_gib"] < 0.3 * found["ways"][-1]["experts_gib"]
    assert "tokens/s" in capsys.readouterr().out
    assert bench.main([*small, "--ways", "nf4", "--layers", "0"]) == 1  # an error is printed, not raised
    assert "nf4: " in capsys.readouterr().out
