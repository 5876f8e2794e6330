"""GGUF adapters, in llama.cpp itself: what the table of coverage says is applied is, and equals the merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gtqlora.capture import open_subject
from gtqlora.edits.adapters import read_adapter
from gtqlora.edits.edited import Edited
from gtqlora.edits.merging import LowRank, Whole
from gtqlora.errors import ModelError, RunError
from gtqlora.exports.gguf.values import Checkpoint
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.gguf_adapter import factors_of, of_full_rank, write, write_adapter
from gtqlora.exports.job import Job
from gtqlora.exports.llama_cpp import distributions, logprobs
from gtqlora.exports.llama_server import serving
from gtqlora.families.coverage import covered, in_layer
from gtqlora.families.llama_cpp.layout import Layout
from gtqlora.results.adapter import PROJECTION
from tests import helpers, models
from tests.exports import ggml
from tests.exports.jobs import certified, job_on

Verified = Callable[..., Path]
Change = LowRank | Whole
_LINEAR = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
PLAIN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "kimi_k25": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "qwen3_moe": {"mlp_only_layers": []},
    # with narrower heads linear attention divides by so little that rounding shows
    "qwen3_next": {"mlp_only_layers": [], **_LINEAR},
    "qwen3_5_moe": _LINEAR,
}
"""Families with what llama.cpp has only one way of."""
NEVER = ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa")
"""Projections of MLA that an adapter of matrices could name."""


@pytest.fixture(scope="module")
def run(toy: helpers.Toy, verified: Verified) -> Path:
    """A run of a family that llama.cpp applies whole adapters of."""
    return verified(toy.model("glm4_moe"))


def changes(job: Job, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Change]]:
    """Random edits: group of tensors -> path of a matrix -> what happens to it."""
    draw, found = torch.Generator().manual_seed(0), dict[str, dict[str, Change]]()
    for path in job.anatomy.lora_targets:
        rows, columns = weights[f"{path}.weight"].shape
        a, b = (torch.randn(shape, generator=draw) for shape in ((3, columns), (rows, 3)))
        found.setdefault(in_layer(job.anatomy.family, path), {})[path] = LowRank(a, 0.03 * b)
    for path in job.anatomy.routers:
        gate = weights[f"{path}.weight"]
        edit = Whole(gate + 0.3 * torch.randn(gate.shape, generator=draw))
        found.setdefault(job.anatomy.family.router, {})[path] = edit
    return found


def written(job: Job, edits: Mapping[str, Change], path: Path) -> Path:
    """The adapter of these edits."""
    own = replace(job, edits={job.names.whole(f"{name}.weight"): edit for name, edit in edits.items()})
    layout, checkpoint = Layout.of(own.model, own.names), Checkpoint.of(own)
    made = [one for one in layout.made.values() if one.sources & own.edits.keys()]
    write_adapter(path, layout.architecture, {one.name: factors_of(checkpoint, one) for one in made})
    return path


@torch.no_grad()
def merged_logprobs(subject: Any, edits: Mapping[str, Change], tokens: Tensor) -> NDArray[np.float64]:
    weights = {name: subject.get_parameter(f"{name}.weight") for name in edits}
    before = {name: weight.data for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data = edits[name](before[name], slice(None))
    found = subject(tokens).logits[0].double().log_softmax(-1).numpy()
    for name, weight in weights.items():
        weight.data = before[name]
    return found


@pytest.mark.parametrize("family", PLAIN)
def test_each_group_alone_has_its_effect_and_equals_the_merge(
    toy: helpers.Toy, run: Path, tmp_path: Path, family: str
) -> None:
    model = toy.model(family, **PLAIN[family])
    job, tokens = job_on(model, run), models.some_tokens(1, shape=(1, 8))
    subject = open_subject(str(model)).model
    groups = changes(job, {name: p.data for name, p in subject.named_parameters()})
    applied = covered(job.anatomy.family, "llama.cpp")
    assert applied.gates and set(applied.lora) & set(groups)
    # Random Gated DeltaNet adds up differently from processor to processor: without any edit 2e-4 between both programs
    allowed = 5e-4 if "linear_attn" in job.anatomy.family.attention_blocks else 1e-4
    asked = [group for group in groups if group in (*applied.lora, job.anatomy.family.router, *NEVER)]
    adapters = [written(job, groups[group], tmp_path / f"{number}.gguf") for number, group in enumerate(asked)]
    Plan.of(job).write(tmp_path / "base.gguf", None)
    with serving(tmp_path / "base.gguf", adapters=adapters, context=9) as server:
        base = distributions(server, tokens.tolist(), [0.0] * len(asked))[0]
        for number, group in enumerate(asked):
            scales = [float(number == other) for other in range(len(asked))]
            found = distributions(server, tokens.tolist(), scales)[0]
            wanted = merged_logprobs(subject, groups[group], tokens)
            assert abs(wanted - base).max() > 0.01, group
            # llama.cpp takes an adapter of MLA without a word, and never applies it
            assert abs(found - (base if group in NEVER else wanted)).max() < allowed, group


def test_more_experts_than_inputs_put_the_identity_on_the_other_side() -> None:
    change = torch.randn(8, 3)
    factors = of_full_rank(change)
    assert factors.a_RI.shape == (3, 3) and torch.equal(factors.b_DR @ factors.a_RI, change)


# --- the format ------------------------------------------------------------------------------------------------------


def base_of(run: Path, folder: Path) -> Path:
    Plan.of(certified(run)).write(folder / "base.gguf", None)
    return folder / "base.gguf"


def test_export_writes_an_adapter_that_is_the_edit(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = helpers.exported(run, out, to="gguf-adapter")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "adapter.gguf", "export.json", "out"]
    assert result.form is not None and result.form.name == "GGUF adapter on F32 in llama.cpp"
    assert result.form.floor.verdict == "pass" and "--lora adapter.gguf" in result.notes[0]
    inside = result.form.wrapped
    assert inside is not None and inside.verdict == "pass" and min(row.asked for row in inside.wrappers) >= 60
    model, tokens = (
        json.loads((run / "manifest.json").read_text())["stages"]["verify"]["config"]["model"],
        [[9, 10, 11]],
    )
    subject = open_subject(model)
    edited = Edited(subject, read_adapter(run / "adapter"), shipped=model).subject.model
    with torch.no_grad():
        wanted = edited(torch.tensor(tokens)).logits[0].double().log_softmax(-1).numpy()
    base = base_of(run, tmp_path)
    found, before = logprobs(base, tokens, out / "adapter.gguf")[0], logprobs(base, tokens)[0]
    assert abs(found - wanted).max() < 1e-4 < abs(before - wanted).max()


def test_it_is_judged_on_the_users_own_file(run: Path, tmp_path: Path) -> None:
    base = ggml.quantize(base_of(run, tmp_path), tmp_path / "mine.gguf", lambda _name: "Q8_0")
    result = helpers.exported(run, tmp_path / "out", to="gguf-adapter", base=str(base))
    assert result.form is not None and result.form.name == "GGUF adapter on Q8_0 in llama.cpp"
    assert "-m mine.gguf" in result.notes[0]


def test_a_gguf_of_another_model_is_refused(toy: helpers.Toy, run: Path, tmp_path: Path) -> None:
    other = toy.model("glm4_moe", seed=1)
    Plan.of(job_on(other, run)).write(tmp_path / "other.gguf", None)
    with pytest.raises(ModelError, match=r"other\.gguf: tensor .* is not the base's"):
        helpers.exported(run, tmp_path / "out", to="gguf-adapter", base=str(tmp_path / "other.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf"]


def test_what_llama_cpp_would_lose_is_refused(toy: helpers.Toy, run: Path, tmp_path: Path) -> None:
    job = job_on(toy.model("deepseek_v3"), run)
    adapter = job.certificate.adapter
    trained = {f"{path}.lora_A": torch.zeros(1) for path in job.anatomy.lora_targets}
    of_mla = replace(adapter, tensors=trained)
    with pytest.raises(RunError, match=r"q_a_proj.* of deepseek_v3 .*export it merged.* --for llama.cpp"):
        write(replace(job, certificate=replace(job.certificate, adapter=of_mla)), tmp_path / "out")
    projection = replace(adapter, info=replace(adapter.info, kind=PROJECTION))
    with pytest.raises(RunError, match="a projection changes"):
        write(replace(job, certificate=replace(job.certificate, adapter=projection)), tmp_path / "out")
    assert not list(tmp_path.iterdir())
