"""Export: no weights without a passed floor on these very bytes, and what is written computes what was verified."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gtqlora.capture import open_subject
from gtqlora.certificate import certify
from gtqlora.config import ExportConfig, ProjectConfig, VerifyConfig
from gtqlora.edits.adapters import read_adapter
from gtqlora.edits.edited import Edited
from gtqlora.edits.merging import Whole
from gtqlora.errors import ConfigError, FloorError, ModelError, RunError
from gtqlora.exports.forms import _inside_frames, judge_form
from gtqlora.exports.job import Job, Said, survival
from gtqlora.exports.layerwise import validate
from gtqlora.families.copying import copy_changed
from gtqlora.families.identity import identify
from gtqlora.floor.wrapped import enough
from gtqlora.organisms import embedded
from gtqlora.progress import note
from gtqlora.results.adapter import EDIT_WEIGHTS, GT_QLORA, PROJECTION, adapter_hash
from gtqlora.results.verdict import Outcome
from gtqlora.run import Run, read_parquet, sha256_file, write_parquet
from gtqlora.stages.export import Exported
from gtqlora.stages.project import project
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify
from tests import helpers, models, warm
from tests.helpers import exported

Verified = Callable[..., Path]
SHARD = "30KB"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def layout(folder: Path) -> dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            every = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            found[file.name] = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in every.items()]
    return found


def source(toy: helpers.Toy, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A sharded model folder with things that must not be passed on."""
    path = toy.model(family, dtype, max_shard_size=SHARD)
    if not (path / "evil.py").exists():
        (path / "evil.py").write_text("raise SystemExit")
        (path / "LICENSE").write_text("free")
        for name in ("pytorch_model.bin", "rng_state.pth", "data.pkl", "x.npy", ".hidden.json"):
            (path / name).write_bytes(pickle.dumps([1]))
        # The fingerprint is of what is there when verified, so all of it must stand first.
    return path


# --- the happy path --------------------------------------------------------------------------------------------------

CASES = [(family, torch.float32, GT_QLORA) for family in (*models.CORE, *models.OTHERS)]
# experts one by one under a prefix and without, under other words, and fused
CASES += [(family, torch.float32, PROJECTION) for family in (*models.CORE, "mixtral", "qwen3_5_moe")]
CASES += [("deepseek_v3", torch.bfloat16, GT_QLORA), ("qwen3_moe", torch.bfloat16, GT_QLORA)]


@pytest.mark.parametrize(("family", "dtype", "kind"), CASES)
def test_exported_folder_computes_what_was_verified(
    toy: helpers.Toy, verified: Verified, tmp_path: Path, family: str, dtype: torch.dtype, kind: str
) -> None:
    model, out = source(toy, family, dtype), tmp_path / "deep" / "out"
    path = verified(model, kind)
    result = exported(path, out)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert layout(out) == layout(model)
    _check_logits(model, path / "adapter", out, dtype, plain=family not in ("kimi_k25", "qwen3_5_moe"))
    _check_tensors(model, out, family, kind, result)
    _check_files(model, out)
    facts = json.loads((out / "export.json").read_text())
    assert facts["adapter"] == adapter_hash(path / "adapter") and facts["floor"]["verdict"] == "pass"
    assert facts["files"] == {name: sha256_file(out / name) for name in facts["files"]}
    assert set(facts["files"]) >= {p.name for p in out.glob("*.safetensors")}
    card = (out / "README.md").read_text()
    assert f"{result.tensors_changed} tensors changed" in card and "Safety floor: **pass**" in card


def _check_logits(model: Path, adapter: Path, out: Path, dtype: torch.dtype, *, plain: bool) -> None:
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto") if plain else open_subject(str(out)).model
    assert merged.dtype == dtype
    subject = open_subject(str(model))
    base, theirs = helpers.logits(subject.model), helpers.logits(merged.eval())
    ours = helpers.logits(Edited(subject, read_adapter(adapter), shipped=str(model)).subject.model)
    # routers of what we open compute in fp32, which plain transformers does in bf16; the weights are the same
    off, moved = (theirs - ours).float().abs().mean(), (base - ours).float().abs().mean()
    assert off < (1e-5 if dtype == torch.float32 else 0.2) * moved


OTHER_TOWERS = ("vision_tower.", "mm_projector.", "model.visual.", "mtp.")


def _check_tensors(model: Path, out: Path, family: str, kind: str, result: Exported) -> None:
    old, new = tensors_of(model), tensors_of(out)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert result.tensors_changed >= len(changed) > 5
    others = {name for name in old if name.startswith(OTHER_TOWERS)}
    assert len(others) == {"kimi_k25": 2, "qwen3_5_moe": 3}.get(family, 0) and not changed & others
    experts = {name for name in old if ".experts." in name} - others
    assert len(experts) == len(models.moe_layers(family)) * (2 if family == "qwen3_5_moe" else 8 * 3)
    if kind == GT_QLORA:
        assert not changed & experts
        gates = {name for name in old if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))}
        assert len(gates) == len(models.moe_layers(family))
        assert result.gate_values_changed == sum(int((old[name] != new[name]).sum()) for name in gates) > 0
        lora = (".self_attn.", ".linear_attn.", ".shared_experts.", ".shared_expert.")
        assert all(n in gates or any(block in n for block in lora) for n in changed)
    else:
        assert changed & experts == {name for name in experts if "down_proj" in name or ".w2." in name}
        assert result.gate_values_changed == 0
    assert not any("bias" in name for name in changed)


def _check_files(model: Path, out: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    strange = {".py", ".bin", ".pth", ".pkl", ".npy"}
    assert not [p for p in out.rglob("*") if p.suffix in strange or p.name.startswith(".")]


def test_projection_is_the_model_with_its_hooks(toy: helpers.Toy, verified: Verified, tmp_path: Path) -> None:
    """The direction is really gone from every writer: its component in the residual stream is zero."""
    model = source(toy, "deepseek_v3")
    path = verified(model, PROJECTION)
    exported(path, tmp_path / "out")
    direction_D = read_adapter(path / "adapter").direction_D
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        states = merged(models.some_tokens(), output_hidden_states=True).hidden_states[:-1]
    assert all((state @ direction_D).abs().max() < 1e-4 for state in states)


def test_single_file_checkpoint_keeps_its_header(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("deepseek_v3")
    head = Whole(tensors_of(model)["lm_head.weight"] + 1)
    copied = copy_changed(str(model), tmp_path / "out", {"lm_head.weight": head})
    assert copied.changed.keys() == {"lm_head.weight"} and copied.digest == identify(str(model)).digest
    old, new = model / "model.safetensors", tmp_path / "out" / "model.safetensors"
    with safe_open(old, "pt") as a, safe_open(new, "pt") as b:
        assert a.metadata() == b.metadata()
    assert old.stat().st_mode == new.stat().st_mode
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(tmp_path / "out")[name], tensor + 1 if name == "lm_head.weight" else tensor)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def passed(toy: helpers.Toy, verified: Verified, tmp_path: Path) -> Path:
    """A copy of a run that may be exported."""
    return Path(shutil.copytree(verified(source(toy, "qwen3_moe")), tmp_path / "run"))


def refused(path: Path, tmp_path: Path, match: str, error: type[Exception] = FloorError) -> None:
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        exported(path, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before  # not even a hidden leftover


def test_a_copied_run_may_be_exported(passed: Path, tmp_path: Path) -> None:
    """What the refusals below start from."""
    assert exported(passed, tmp_path / "out").folder == tmp_path / "out"


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({}, []),
        ({"a": 1.0, "b": 0.9996}, []),
        ({"a": 1.0, "b": 0.95}, ["At least 95.0% of each tensor's change survives rounding to its type (least of b)."]),
        ({"a": -1.0, "b": 0.5}, ["In 1 of 2 changed tensors rounding to their type is larger than the change."]),
    ],
)
def test_what_rounding_takes_is_said_once(kept: dict[str, float], said: list[str]) -> None:
    assert list(survival(kept)) == said
    (lossy,) = survival({"a": 0.95, "b.weight": 0.5})
    assert "1 of 2 changed tensors less than 90%" in lossy and "least of b.weight (50%)" in lossy and "peft" in lossy


class Yielding:
    """A form in which the edit no longer refuses."""

    name = "a form"

    def said(self, rows: Sequence[Outcome], *, edited: bool) -> list[Said]:
        return [
            Said(text="yes" if edited else row.text_before, tokens=1, ended=True, rejected_log_prob=0) for row in rows
        ]


def test_a_form_that_does_not_keep_the_floor_is_refused_with_a_way_out(passed: Path) -> None:
    with Run(passed) as run, pytest.raises(FloorError, match=r"a form: the safety floor's verdict .*'fail'.* Try peft"):
        judge_form(Yielding(), certify(run, helpers.JUDGE), "Try peft")


class YieldingInFrames:
    """A form in which the edit refuses what is asked plainly, and not what is asked inside one frame."""

    name = "a form"

    def __init__(self) -> None:
        self.asked: list[Outcome] = []

    def said(self, rows: Sequence[Outcome], *, edited: bool) -> list[Said]:
        self.asked = list(rows)
        worst = next(row.wrapper for row in rows if row.wrapper)
        return [
            Said(
                text="yes" if edited and row.wrapper == worst else row.text_before,
                tokens=1,
                ended=True,
                rejected_log_prob=None if row.wrapper else row.rejected_log_prob_before,
            )
            for row in rows
        ]


def test_a_form_that_does_not_keep_the_floor_inside_frames_is_refused(passed: Path) -> None:
    form = YieldingInFrames()
    with (
        Run(passed) as run,
        pytest.raises(FloorError, match=r"a form: the safety floor's verdict inside plain frames .*'fail'.* Try peft"),
    ):
        judge_form(form, certificate := certify(run, helpers.JUDGE), "Try peft")
    frames = {row.wrapper for row in certificate.framed}
    asked = {frame: {row.number for row in form.asked if row.wrapper == frame} for frame in frames}
    assert len({frozenset(numbers) for numbers in asked.values()}) == 1  # the same prompts in each
    assert not [row for row in form.asked if row.wrapper and row.kind != "harmful"]


@pytest.mark.parametrize(("plain", "wanted"), [(1, "enough"), (10_000, "all")])
def test_fewer_prompts_are_asked_inside_frames_of_a_form_but_no_fewer_than_decide(
    toy: helpers.Toy, passed: Path, caplog: pytest.LogCaptureFixture, plain: int, wanted: str
) -> None:
    with Run(passed) as run:
        verify(toy.verify_config(source(toy, "qwen3_moe"), wrapped_prompts=80), run)
        certificate = certify(run, helpers.JUDGE)
    numbers = {row.number for row in certificate.framed if row.kind == "harmful"}
    note.cache_clear()
    rows = _inside_frames(YieldingInFrames(), certificate, plain)
    frames = {row.wrapper for row in rows}
    count = len({row.number for row in rows})
    least = enough(certificate.wrapped, len(numbers))
    assert len(rows) == count * len(frames)
    if wanted == "all":
        assert count == len(numbers) and "inside frames" not in caplog.text
    else:
        refused = [sum(row.refused_before for row in rows if row.wrapper == frame) for frame in frames]
        assert least <= count < len(numbers) and min(refused) >= least
        assert f"inside frames {count:,} of {len(numbers):,} harmful prompts are asked" in caplog.text


def test_without_verify(passed: Path, toy: helpers.Toy, tmp_path: Path) -> None:
    helpers.noop_adapter(source(toy, "qwen3_moe"), toy.contrast, helpers.JUDGE, tmp_path / "unverified")
    refused(tmp_path / "unverified", tmp_path, "run `gtqlora verify` first", RunError)
    models.edit_json(passed / "manifest.json", lambda old: {**old, "stages": {"train": old["stages"]["train"]}})
    refused(passed, tmp_path, "verify did not finish")
    (passed / "manifest.json").unlink()
    refused(passed, tmp_path, "not a run directory", RunError)


def test_a_failed_or_open_verdict(passed: Path, toy: helpers.Toy, tmp_path: Path) -> None:
    rows = read_parquet(passed / "scores.parquet")
    few = helpers.write_rows(
        tmp_path / "few.jsonl", helpers.toy_rows({("heldout", kind): 10 for kind in ("benign", "lookalike", "harmful")})
    )
    with Run(passed) as run:
        open_verdict = verify(toy.verify_config(source(toy, "qwen3_moe"), contrast=str(few)), run)
    assert open_verdict.floor.verdict == "cannot tell" and len(rows) > 10
    refused(passed, tmp_path, "'cannot tell'")
    verdict = passed / "verdict.json"
    verdict.write_text(verdict.read_text().replace('"cannot tell"', '"pass"'))
    refused(passed, tmp_path, r"verdict\.json was changed")


def test_a_failing_floor(tmp_path: Path) -> None:
    kinds = ("benign", "lookalike", "harmful")
    counts = {("train", kind): 40 for kind in kinds} | {("heldout", kind): 60 for kind in kinds}
    contrast = helpers.write_rows(tmp_path / "c.jsonl", helpers.toy_rows(counts))
    base: dict[str, Any] = {"model": str(embedded.organism("routed")), "contrast": str(contrast)}
    base |= {"judge": embedded.JUDGE, "max_new_tokens": 6}
    with Run(tmp_path / "run") as run:
        project(ProjectConfig(**base), run)
        assert verify(VerifyConfig(**base), run).floor.verdict == "fail"
    refused(tmp_path / "run", tmp_path, "'fail'")


def test_one_changed_byte_of_the_adapter(passed: Path, tmp_path: Path) -> None:
    weights = passed / "adapter" / EDIT_WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(passed, tmp_path, "adapter is not the one that was verified")


@pytest.mark.parametrize("name", ["adapter_config.json", "gtqlora.json"])
def test_changed_settings_of_the_adapter(passed: Path, tmp_path: Path, name: str) -> None:
    models.edit_json(passed / "adapter" / name, lambda old: {**old, "lora_alpha": 80})
    refused(passed, tmp_path, "run `?gtqlora train|run it again", RunError)


def test_an_alpha_changed_in_both_records_is_another_adapter(passed: Path, tmp_path: Path) -> None:
    def another(info: dict[str, Any]) -> dict[str, Any]:
        info["details"]["config"]["alpha"] = 80
        return info

    models.edit_json(passed / "adapter" / "adapter_config.json", lambda old: {**old, "lora_alpha": 80})
    models.edit_json(passed / "adapter" / "gtqlora.json", another)
    refused(passed, tmp_path, "adapter is not the one that was verified")


def test_edited_scores(passed: Path, tmp_path: Path) -> None:
    rows = read_parquet(passed / "scores.parquet")
    write_parquet(passed / "scores.parquet", [{**row, "text_after": "refuse sorry"} for row in rows])
    refused(passed, tmp_path, r"scores\.parquet was changed")


def test_edited_margin_and_inputs_on_record(passed: Path, tmp_path: Path) -> None:
    def changed(part: str, key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        def change(manifest: dict[str, Any]) -> dict[str, Any]:
            manifest["stages"]["verify"][part][key] = value
            return manifest

        return change

    kept = (passed / "manifest.json").read_text()
    for part, key, value in (("config", "margin", 0.9), ("inputs", "adapter", "x")):
        models.edit_json(passed / "manifest.json", changed(part, key, value))
        refused(passed, tmp_path, "record of verify was changed")
        (passed / "manifest.json").write_text(kept)


def test_a_changed_base_model(toy: helpers.Toy, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source(toy, "qwen3_moe"), tmp_path / "model"))
    path = helpers.verified_run(toy, model, GT_QLORA, tmp_path / "run")
    models.edit_tensors(min(model.glob("*.safetensors")), lambda old: {n: t + 1e-3 for n, t in old.items()})
    refused(path, tmp_path, "model is not the one that was verified")


def test_a_retrained_adapter(passed: Path, toy: helpers.Toy, tmp_path: Path) -> None:
    with Run(passed) as run:
        train(toy.train_config(source(toy, "qwen3_moe"), seed=3), run, again=True)
    refused(passed, tmp_path, "adapter is not the one that was verified")


def test_unknown_format_and_existing_folder(passed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pickle"):
        exported(passed, tmp_path / "out", to="pickle")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    refused(passed, tmp_path, "exists already", RunError)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


@pytest.mark.parametrize("inside", ["run", "run/a/b", "run/../run", "link", "model", "model/a"])
def test_out_inside_the_run_or_the_model(toy: helpers.Toy, passed: Path, tmp_path: Path, inside: str) -> None:
    """By name or by links: what a later stage reads, or another edit of the model, would have to tell it apart."""
    model = source(toy, "qwen3_moe")
    (tmp_path / "link").symlink_to(passed)
    (tmp_path / "model").symlink_to(model)
    before = {folder: sorted(folder.rglob("*")) for folder in (passed, model, tmp_path)}
    with pytest.raises(RunError, match=r"out: lies inside .*; choose another folder$"):
        exported(passed, tmp_path / inside / "out")
    assert {folder: sorted(folder.rglob("*")) for folder in before} == before


def test_a_shard_that_vanishes(toy: helpers.Toy, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        copy_changed(str(tmp_path / "gone"), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_do_not_compute_the_edit_are_caught(
    toy: helpers.Toy, verified: Verified, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The last check before publishing, given the original's weights with one projection scaled."""
    model = source(toy, "qwen3_moe", dtype)
    wrong = 1.05 if dtype == torch.float32 else -1
    name = "model.layers.1.self_attn.o_proj.weight"
    copy_changed(str(model), tmp_path / "wrong", {name: Whole(tensors_of(model)[name] * wrong)})
    with Run(verified(model)) as run, pytest.raises(RunError, match="nothing was written"):
        validate(tmp_path / "wrong", Job.of(certify(run, helpers.JUDGE), ExportConfig()))


# --- killed ----------------------------------------------------------------------------------------------------------

EXPORT_AND_DIE = (
    helpers.KILLED_AT.replace("WHAT", "'write shards'").replace("DONE", "2")
    + """
from pathlib import Path
from tests.helpers import exported
with shown_by(die):
    exported(Path(sys.argv[1]), Path(sys.argv[2]))
"""
)


def test_killed_export_leaves_nothing_that_looks_like_weights(passed: Path, tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"
    died = warm.process(EXPORT_AND_DIE, passed, out, knowing=True)
    assert died.returncode == -9, died.stderr
    assert not out.exists()
    assert [p.name.startswith(".") for p in out.parent.iterdir()] == [True]
    exported(passed, out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
