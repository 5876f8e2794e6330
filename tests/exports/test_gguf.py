"""GGUF: what is written computes what transformers does, and an edited file is the merged model quantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gtqlora.capture import open_subject
from gtqlora.edits.merging import Projected
from gtqlora.exports.gguf.patch import Patch
from gtqlora.exports.gguf.reading import read_gguf
from gtqlora.exports.gguf.types import BY_NAME
from gtqlora.exports.gguf.values import rounded
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import Job
from gtqlora.exports.llama_cpp import logprobs
from gtqlora.organisms import embedded
from gtqlora.run import sha256_file
from tests import helpers, models
from tests.exports import ggml
from tests.exports.jobs import certified, job_on
from tests.helpers import exported

Verified = Callable[..., Path]
WIDE: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "q_lora_rank": 256},
    **{"kv_lora_rank": 256, "qk_nope_head_dim": 32, "v_head_dim": 64, "initializer_range": 0.05},
}
"""Rows are whole blocks of K types, but for the keys of MLA, as in real models."""
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def run(toy: helpers.Toy, verified: Verified) -> Path:
    return verified(toy.model("deepseek_v3", max_shard_size="30KB"))


# --- whole -----------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "kimi_k25": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "qwen3_next": {"mlp_only_layers": []},
    "qwen3_5_moe": {"initializer_range": 0.1},  # states of linear attention grow, and with them rounding
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0},
}


@pytest.mark.parametrize("family", [*MODELS, "yarn", "routed"])
def test_whole_file_computes_what_transformers_does(toy: helpers.Toy, run: Path, tmp_path: Path, family: str) -> None:
    if family == "routed":
        model = embedded.organism("routed")
    elif family == "yarn":
        model = models.save_tiny(tmp_path / "yarn", "deepseek_v3", rope_parameters=YARN)
    else:
        model = toy.model(family, **MODELS[family])
    Plan.of(job_on(model, run)).write(tmp_path / "whole.gguf", None)
    tokens = models.some_tokens(shape=(1, 12))
    found = torch.from_numpy(logprobs(tmp_path / "whole.gguf", tokens.tolist())[0])
    with torch.no_grad():
        wanted = open_subject(str(model)).model.float()(tokens).logits[0].double().log_softmax(-1)
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_file_has_the_checkpoints_own_values(
    toy: helpers.Toy, run: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = toy.model("qwen3_moe", dtype, mlp_only_layers=[])
    Plan.of(job_on(model, run)).write(tmp_path / "whole.gguf", None)
    raw, disk = ggml.tensors_of(read_gguf(tmp_path / "whole.gguf")), load_file(model / "model.safetensors")
    kinds = {name: kind.name for name, (kind, *_) in raw.items()}
    half = "BF16" if dtype is torch.bfloat16 else "F16"
    assert kinds["blk.1.attn_q.weight"] == kinds["blk.0.ffn_up_exps.weight"] == kinds["output.weight"] == half
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["blk.2.attn_norm.weight"] == "F32"
    for name, theirs in (
        ("attn_q", "self_attn.q_proj"),
        ("ffn_gate_inp", "mlp.gate"),
        ("attn_norm", "input_layernorm"),
    ):
        found = ggml.array(raw[f"blk.1.{name}.weight"])
        assert torch.equal(found.squeeze(), disk[f"model.layers.1.{theirs}.weight"].float())
    up = [disk[f"model.layers.2.mlp.experts.{expert}.up_proj.weight"].float() for expert in range(8)]
    assert torch.equal(ggml.array(raw["blk.2.ffn_up_exps.weight"]), torch.stack(up))


# --- in the user's own file ------------------------------------------------------------------------------------------


def changed_by(kind: str) -> Callable[[str], str]:
    """Matrices of one type, or each of another one, by its name."""

    def pick(name: str) -> str:
        if "_exps." in name:
            return "Q8_0"  # experts do not change, and this is fast
        return kind if kind != "mixed" else K_TYPES[sum(map(ord, name)) % len(K_TYPES)]

    return pick


@pytest.fixture(scope="module")
def wide(toy: helpers.Toy, run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job that is wide enough for K types, and a folder with its GGUF in F32, of the base and merged."""
    folder = tmp_path_factory.mktemp("wide")
    job = job_on(toy.model("deepseek_v3", **WIDE), run, edited=True)
    plan = Plan.of(job)
    plan.write(folder / "base.gguf", None)
    plan.write(folder / "merged.gguf", rounded)
    return job, folder


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "mixed"])
def test_edited_file_is_the_merged_model_quantized(wide: tuple[Job, Path], tmp_path: Path, kind: str) -> None:
    job, folder = wide
    base = ggml.quantize(folder / "base.gguf", tmp_path / "q.gguf", changed_by(kind))
    wanted = ggml.quantize(folder / "merged.gguf", tmp_path / "wanted.gguf", changed_by(kind))
    found = Patch.of(job, base)
    (tmp_path / "out").mkdir()
    kept = found.write(tmp_path / "out")
    assert found.exact and (tmp_path / "out" / "q.gguf").read_bytes() == wanted.read_bytes()
    assert base.read_bytes() != wanted.read_bytes()
    gates = {share for name, share in kept.items() if "ffn_gate_inp" in name}
    assert gates == {1.0} and len(kept) == 26
    assert (min(kept.values()) == 1) == (kind == "F32")
    if kind == "mixed":
        assert {info.kind.name for info in read_gguf(base).tensors.values()} == {"F32", *K_TYPES}


@pytest.mark.parametrize("through", ["F16", "BF16"])
def test_a_file_quantized_from_half_precision_is_recognized(
    wide: tuple[Job, Path], tmp_path: Path, through: str
) -> None:
    job, folder = wide
    files = {}
    for name in ("base", "merged"):
        half = ggml.quantize(folder / f"{name}.gguf", tmp_path / "half.gguf", changed_by(through))
        whole = ggml.quantize(half, tmp_path / f"{name}.gguf", changed_by("Q8_0"))
        files[name] = whole
    (tmp_path / "out").mkdir()
    Patch.of(job, files["base"]).write(tmp_path / "out")
    assert (tmp_path / "out" / "base.gguf").read_bytes() == files["merged"].read_bytes()


def test_with_an_importance_matrix_only_what_changes_is_quantized_without_it(
    wide: tuple[Job, Path], tmp_path: Path
) -> None:
    job, folder = wide
    base = ggml.quantize(folder / "base.gguf", tmp_path / "q.gguf", changed_by("Q4_K"), imatrix=True)
    wanted = ggml.quantize(folder / "merged.gguf", tmp_path / "wanted.gguf", changed_by("Q4_K"))
    patch = Patch.of(job, base)
    (tmp_path / "out").mkdir()
    patch.write(tmp_path / "out")
    notes = patch.notes()
    assert not patch.exact and "importance matrix" in " ".join(notes)
    before, after = ggml.tensors_of(read_gguf(base)), ggml.tensors_of(read_gguf(tmp_path / "out" / "q.gguf"))
    without = ggml.tensors_of(read_gguf(wanted))
    assert all(after[name] == (without if name in patch.changed else before)[name] for name in after)


def test_split_files_are_edited_in_place(wide: tuple[Job, Path], tmp_path: Path) -> None:
    job, folder = wide
    (tmp_path / "out").mkdir()
    first = ggml.split(folder / "base.gguf", tmp_path, 3)
    Patch.of(job, first).write(tmp_path / "out")
    assert ggml.tensors_of(read_gguf(tmp_path / "out" / first.name)) == ggml.tensors_of(
        read_gguf(folder / "merged.gguf")
    )
    for file in read_gguf(first).files:
        start = min(info.offset for info in read_gguf(first).tensors.values() if info.file == file)
        assert (tmp_path / "out" / file.name).read_bytes()[:start] == file.read_bytes()[:start]
        assert (tmp_path / "out" / file.name).stat().st_size == file.stat().st_size


def _fused(raw: dict[str, ggml.Raw], names: list[str], name: str, dim: int) -> dict[str, ggml.Raw]:
    """The tensors with some of them put into one, along a dimension."""
    parts = [ggml.array(raw[each]) for each in names]
    whole = torch.cat(parts, dim)
    made = (BY_NAME["F32"], tuple(whole.shape), whole.numpy().tobytes())
    return {each: data for each, data in raw.items() if each not in names} | {name: made}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "qwen3_next"])
def test_files_of_other_converters_have_fused_tensors(toy: helpers.Toy, run: Path, tmp_path: Path, family: str) -> None:
    plan = Plan.of(job_on(toy.model(family, **MODELS[family]), run, edited=True))
    made = {}
    for name, change in (("base", None), ("merged", rounded)):
        plan.write(tmp_path / "plain.gguf", change)
        given = read_gguf(tmp_path / "plain.gguf")
        raw = ggml.tensors_of(given)
        for layer in range(3):
            raw = _fuse_layer(raw, f"blk.{layer}")
        made[name] = ggml.save(tmp_path / f"{name}.gguf", given.metadata, raw)
        (tmp_path / "plain.gguf").unlink()
    (tmp_path / "out").mkdir()
    Patch.of(plan.checkpoint.edited, made["base"]).write(tmp_path / "out")
    assert (tmp_path / "out" / "base.gguf").read_bytes() == made["merged"].read_bytes()


def _fuse_layer(raw: dict[str, ggml.Raw], layer: str) -> dict[str, ggml.Raw]:
    if f"{layer}.ffn_gate_exps.weight" in raw:
        names = [f"{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        raw = _fused(raw, names, f"{layer}.ffn_gate_up_exps.weight", 1)
    if f"{layer}.attn_q.weight" in raw:
        return _fused(raw, [f"{layer}.attn_{part}.weight" for part in "qkv"], f"{layer}.attn_qkv.weight", 0)
    if f"{layer}.attn_gate.weight" in raw:  # two groups of queries, keys, values and gates
        *qkv, gate = (ggml.array(raw.pop(f"{layer}.attn_{part}.weight")) for part in ("qkv", "gate"))
        grouped = torch.cat([part.view(2, -1, part.shape[1]) for part in (*qkv[0].split((16, 16, 32)), gate)], 1)
        name = "ssm_in"
    else:
        keys, values = (ggml.array(raw.pop(f"{layer}.attn_{part}_b.weight")) for part in "kv")
        grouped, name = torch.cat([keys.mT, values], 1), "attn_kv_b"
    whole = grouped.reshape(-1, grouped.shape[-1])
    return {**raw, f"{layer}.{name}.weight": (BY_NAME["F32"], tuple(whole.shape), whole.numpy().tobytes())}


# --- through the stage -----------------------------------------------------------------------------------------------


def test_export_writes_either_and_judges_it_in_llama_cpp(run: Path, tmp_path: Path) -> None:
    whole = exported(run, tmp_path / "whole", to="gguf")
    Plan.of(certified(run)).write(tmp_path / "users.gguf", None)
    onto = exported(run, tmp_path / "onto", to="gguf", onto=str(tmp_path / "users.gguf"))
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == ["README.md", "export.json", "model.gguf"]
    assert sorted(path.name for path in (tmp_path / "onto").iterdir()) == ["README.md", "export.json", "users.gguf"]
    assert (tmp_path / "whole" / "model.gguf").read_bytes() == (tmp_path / "onto" / "users.gguf").read_bytes()
    for result in (whole, onto):
        assert result.form is not None and result.form.floor.verdict == "pass" and "llama.cpp" in result.form.name
        assert result.tensors_changed == len(result.kept) == 26 and result.gate_values_changed > 100
        # the words of the model are read in llama.cpp as in transformers: there is no note that says otherwise
        assert not any("tokenizer" in note for note in result.notes)
    facts = json.loads((tmp_path / "onto" / "export.json").read_text())
    assert facts["files"] == {"users.gguf": sha256_file(tmp_path / "onto" / "users.gguf")}


def test_projection_of_fused_experts_is_the_same_in_both(toy: helpers.Toy, run: Path, tmp_path: Path) -> None:
    job = job_on(toy.model("qwen3_5_moe", **MODELS["qwen3_5_moe"]), run)
    away = Projected(torch.nn.functional.normalize(torch.ones(32), dim=0), norm_preserving=True)
    writers = [job.names.whole(f"{path}.weight") for path in job.anatomy.residual_writers]
    stacks = [job.names.whole(f"{layer.experts}.down_proj") for layer in job.anatomy.moe]
    job = replace(job, edits=dict.fromkeys([*writers, *stacks], away))
    plan = Plan.of(job)
    plan.write(tmp_path / "base.gguf", None)
    plan.write(tmp_path / "merged.gguf", rounded)
    for name in ("base", "merged"):
        ggml.quantize(tmp_path / f"{name}.gguf", tmp_path / f"{name}-q.gguf", lambda _: "Q8_0")
    (tmp_path / "out").mkdir()
    patch = Patch.of(job, tmp_path / "base-q.gguf")
    patch.write(tmp_path / "out")
    assert {f"blk.{n}.ffn_down_exps.weight" for n in range(3)} < patch.changed.keys()
    assert (tmp_path / "out" / "base-q.gguf").read_bytes() == (tmp_path / "merged-q.gguf").read_bytes()
