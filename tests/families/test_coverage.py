"""What programs apply of an adapter: the data is complete, what would be lost is named, and training can be for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from gtqlora.capture import open_subject
from gtqlora.config import Target
from gtqlora.edits.adapters import read_adapter
from gtqlora.edits.edited import Edited
from gtqlora.edits.merging import plan
from gtqlora.edits.wrapping import Parts, check_trains
from gtqlora.errors import ConfigError, RunError
from gtqlora.families import FAMILIES, Anatomy, TensorNames, bind
from gtqlora.families.coverage import check_covered, covered, in_layer
from gtqlora.run import Run
from gtqlora.stages.verify import verify
from tests import helpers, models

TARGETS: tuple[Target, ...] = get_args(Target)
MLA = ("deepseek_v3", "kimi_k25", "glm4_moe_lite")


def anatomy_of(family: str) -> Anatomy:
    return bind(models.tiny_model(family), FAMILIES[family])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_an_entry_for_every_target(family: str, target: Target) -> None:
    known = FAMILIES[family]
    found = covered(known, target)
    assert set(found.lora) <= {*known.attention, *known.shared}
    assert any(letter.isdigit() for letter in found.source), "which version?"
    assert found.tested == (target == "llama.cpp" or (target in ("transformers", "peft") and family != "kimi_k25"))
    if target in ("transformers", "peft") and family != "kimi_k25":
        assert set(found.lora) == {*known.attention, *known.shared} and found.gates


@pytest.mark.parametrize("family", models.FAMILIES)
def test_groups_are_those_of_real_modules(family: str) -> None:
    anatomy = anatomy_of(family)
    groups = {in_layer(anatomy.family, path) for path in anatomy.lora_targets}
    assert groups <= {*anatomy.family.attention, *anatomy.family.shared}
    assert {in_layer(anatomy.family, path) for path in anatomy.routers} == {anatomy.family.router}
    for target in TARGETS:
        kept, every = Parts.of(anatomy, "gt", target), covered(anatomy.family, target)
        assert {in_layer(anatomy.family, path) for path in kept.lora} == groups & set(every.lora)
        assert kept.gates == (anatomy.routers if every.gates else ())


@pytest.mark.parametrize("family", MLA)
def test_what_a_program_ignores_is_named_with_what_to_do(family: str) -> None:
    anatomy = anatomy_of(family)
    with pytest.raises(RunError, match=r"kv_a_proj_with_mqa, self_attn\.kv_b_proj.*deepseek2\.cpp.*--for llama\.cpp"):
        check_covered(anatomy.family, "llama.cpp", anatomy.lora_targets, gates=True)
    with pytest.raises(RunError, match=r"mlp\.gate of .*SGLang"):
        check_covered(anatomy.family, "sglang", anatomy.shared if family != "kimi_k25" else (), gates=True)
    for target in TARGETS:
        kept = Parts.of(anatomy, "gt", target)
        check_covered(anatomy.family, target, kept.lora, gates=bool(kept.gates))


def test_kv_b_is_lost_in_vllm_and_not_in_sglang() -> None:
    anatomy = anatomy_of("deepseek_v3")
    kv_b = [path for path in anatomy.lora_targets if path.endswith("kv_b_proj")]
    check_covered(anatomy.family, "sglang", kv_b, gates=False)
    with pytest.raises(RunError, match=r"vllm applies no adapter to self_attn\.kv_b_proj of deepseek_v3"):
        check_covered(anatomy.family, "vllm", kv_b, gates=True)


def test_a_program_without_adapters_for_a_family_is_not_offered_for_training() -> None:
    with pytest.raises(RunError, match=r"export it merged$"):
        check_covered(FAMILIES["kimi_k25"], "vllm", ["model.layers.0.self_attn.o_proj"], gates=False)
    with pytest.raises(ConfigError, match="applies no adapters of kimi_k25"):
        check_trains(FAMILIES["kimi_k25"], "gt", "vllm")


@pytest.mark.parametrize(("family", "target"), [("qwen3_moe", "sglang"), ("glm4_moe", "vllm")])
def test_gates_alone_for_a_program_that_ignores_them(family: str, target: Target) -> None:
    check_trains(FAMILIES[family], "gt", target)
    with pytest.raises(ConfigError, match=r"no changed routers.*nothing else"):
        check_trains(FAMILIES[family], "gates", target)


# --- training for a program ------------------------------------------------------------------------------------------


def trained(toy: helpers.Toy, path: Path, family: str, target: Target | None, **changes: Any) -> Path:
    helpers.trained(toy.train_config(toy.model(family), target=target, **changes), path)
    return path


@pytest.fixture(scope="module")
def for_llama_cpp(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(toy, tmp_path_factory.mktemp("for") / "run", "deepseek_v3", "llama.cpp")


def test_only_what_the_program_applies_trains(toy: helpers.Toy, for_llama_cpp: Path) -> None:
    names = helpers.weights(for_llama_cpp / "adapter")
    family = FAMILIES["deepseek_v3"]
    lora = {in_layer(family, name.removesuffix(".lora_A")) for name in names if name.endswith(".lora_A")}
    assert lora == {"self_attn.o_proj", *family.shared}
    assert sum(name.endswith("mlp.gate.weight") for name in names) == 2
    assert read_adapter(for_llama_cpp / "adapter").info.target == "llama.cpp"


def test_an_edit_for_a_program_goes_on_to_verify_and_export(
    toy: helpers.Toy, for_llama_cpp: Path, tmp_path: Path
) -> None:
    model = toy.model("deepseek_v3")
    with Run(for_llama_cpp) as run:
        assert verify(toy.verify_config(model), run).floor.verdict == "pass"
    helpers.exported(for_llama_cpp, tmp_path / "out")
    adapter = read_adapter(for_llama_cpp / "adapter")
    lively = helpers.logits(Edited(open_subject(str(model)), adapter).subject.model)
    shipped = helpers.logits(Edited(open_subject(str(model)), adapter, shipped=str(model)).subject.model)
    merged = helpers.logits(open_subject(str(tmp_path / "out")).model)
    base = helpers.logits(open_subject(str(model)).model)
    assert torch.equal(merged, shipped) and (merged - lively).abs().max() < 1e-4 < (merged - base).abs().max()
    changed, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(model / "model.safetensors")
    assert not [n for n in old if "kv_" in n and not torch.equal(old[n], changed[n])]


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.gate.weight", "model.layers.2.self_attn.o_proj.lora_B"])
def test_a_truncated_adapter_is_still_an_error(toy: helpers.Toy, for_llama_cpp: Path, lost: str) -> None:
    adapter = read_adapter(for_llama_cpp / "adapter")
    fewer = replace(adapter, tensors={name: t for name, t in adapter.tensors.items() if name != lost})
    for shipped in (None, str(toy.model("deepseek_v3"))):
        with pytest.raises(RunError, match="does not fit the model"):
            Edited(open_subject(str(toy.model("deepseek_v3"))), fewer, shipped=shipped)


def test_an_adapter_without_its_gates_is_an_error(toy: helpers.Toy, tmp_path: Path) -> None:
    adapter = read_adapter(trained(toy, tmp_path / "run", "qwen3_moe", None, steps=1) / "adapter")
    fewer = replace(adapter, tensors={name: t for name, t in adapter.tensors.items() if ".lora_" in name})
    with pytest.raises(RunError, match="does not fit the model"):
        Edited(open_subject(str(toy.model("qwen3_moe"))), fewer)


def test_the_target_is_part_of_the_settings(toy: helpers.Toy, tmp_path: Path) -> None:
    path = trained(toy, tmp_path / "run", "qwen3_moe", "sglang", steps=2)
    assert not [name for name in helpers.weights(path / "adapter") if name.endswith("gate.weight")]
    again = helpers.trained(toy.train_config(toy.model("qwen3_moe"), target="sglang", steps=2), path)
    assert again.fresh
    with pytest.raises(RunError, match='made with target = "sglang" and not none'):
        helpers.trained(toy.train_config(toy.model("qwen3_moe"), steps=2), path)


def test_adapters_of_before_have_no_target(toy: helpers.Toy, tmp_path: Path) -> None:
    path = trained(toy, tmp_path / "run", "qwen3_moe", None, steps=1) / "adapter"
    models.edit_json(path / "gtqlora.json", _without_target)
    adapter = read_adapter(path)
    assert adapter.info.target is None
    Edited(open_subject(str(toy.model("qwen3_moe"))), adapter)


def _without_target(info: dict[str, Any]) -> dict[str, Any]:
    del info["details"]["config"]["target"]
    return info


def test_an_unknown_target_on_record_is_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    path = trained(toy, tmp_path / "run", "qwen3_moe", None, steps=1) / "adapter"
    info = json.loads((path / "gtqlora.json").read_text())
    info["details"]["config"]["target"] = "ollama"
    (path / "gtqlora.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match="'ollama'"):
        Edited(open_subject(str(toy.model("qwen3_moe"))), read_adapter(path))


def test_a_changed_target_on_record_does_not_fit_the_tensors(toy: helpers.Toy, for_llama_cpp: Path) -> None:
    adapter = read_adapter(for_llama_cpp / "adapter")
    details = replace(adapter.info.details, config={**adapter.info.details.config, "target": None})
    with pytest.raises(RunError, match="does not fit the model"):
        Edited(
            open_subject(str(toy.model("deepseek_v3"))), replace(adapter, info=replace(adapter.info, details=details))
        )


def test_gates_alone_for_sglang_are_refused_before_anything_is_loaded(toy: helpers.Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--for \(target\) = 'sglang': it applies no changed routers"):
        trained(toy, tmp_path / "run", "qwen3_moe", "sglang", mode="gates")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_tensor_that_the_target_ignores_is_one_too_many(for_llama_cpp: Path) -> None:
    adapter, model = read_adapter(for_llama_cpp / "adapter"), models.tiny_model("deepseek_v3")
    more = {**adapter.tensors, "model.layers.0.self_attn.kv_b_proj.lora_A": torch.zeros(4, 16)}
    anatomy = bind(model, FAMILIES["deepseek_v3"])
    with pytest.raises(RunError, match="kv_b_proj"):
        plan(replace(adapter, tensors=more), anatomy, TensorNames(model, anatomy.family))
