"""Adapters: exactly the intended weights train, nothing else moves, and a fresh process computes the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.trainer import dpo_trainer

from gtqlora.capture import open_subject
from gtqlora.edits import adapters, edited, trainer, wrapping
from gtqlora.errors import RunError, TrainingError
from gtqlora.families import FAMILIES, bind
from gtqlora.results.adapter import EDIT_WEIGHTS, adapter_hash
from tests import helpers, models, warm

CASES = [(family, mode, torch.float32) for family in models.CORE for mode in ("gt", "lora", "gates")]
CASES += [(family, "gt", torch.bfloat16) for family in models.CORE]
CASES += [(family, "gt", torch.float32) for family in models.OTHERS]
# Counted by hand for 3 layers, the first dense in most: attention in all, of hybrid models full in one and linear in
# two, and shared experts where there is a router.
PROJECTIONS = {
    **dict.fromkeys(("deepseek_v3", "kimi_k25", "glm4_moe_lite"), 3 * 5 + 2 * 3),
    **dict.fromkeys(("qwen3_moe", "mixtral", "olmoe"), 3 * 4),
    **dict.fromkeys(("glm4_moe", "qwen2_moe"), 3 * 4 + 2 * 3),
    "qwen3_next": 4 + 2 * 3 + 2 * 3,
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), 4 + 2 * 5 + 3 * 3),
}
Case = tuple[str, str, torch.dtype]


def identity(case: Case) -> str:
    return "-".join(map(str, case)).replace("torch.", "")


class Fitted:
    """One finished training: states around it, logits, and its adapter on disk."""

    def __init__(self, toy: helpers.Toy, case: Case, path: Path) -> None:
        family, mode, dtype = case
        self.model = toy.model(family, dtype)
        inside = helpers.Inside.start(toy.train_config(self.model, mode=mode, steps=3), path)
        self.trainer, self.anatomy = inside.trainer, inside.trainer.anatomy
        self.before = inside.state()
        self.names = set(wrapping.trainable(self.trainer.model))
        assert inside.fit() == (3, None)
        self.after = inside.state()
        self.adapter = inside.save()
        self.edited = helpers.logits(self.trainer.model)


@pytest.fixture(scope="module")
def fitted(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Fitted]:
    made: dict[str, Fitted] = {}

    def get(case: Case) -> Fitted:
        if identity(case) not in made:
            made[identity(case)] = Fitted(toy, case, tmp_path_factory.mktemp(identity(case)))
        return made[identity(case)]

    return get


every_case = pytest.mark.parametrize("case", CASES, ids=identity)


def owners(names: set[str], marker: str) -> set[str]:
    return {name.removeprefix("base_model.model.").partition(marker)[0] for name in names if marker in name}


@every_case
def test_exactly_the_intended_modules_train(fitted: Callable[[Case], Fitted], case: Case) -> None:
    it, mode = fitted(case), case[1]
    lora, gates = owners(it.names, ".lora_"), owners(it.names, ".modules_to_save.")
    assert len(lora) == (0 if mode == "gates" else PROJECTIONS[case[0]])
    assert gates == (set() if mode == "lora" else {f"model.layers.{i}.mlp.gate" for i in models.moe_layers(case[0])})
    blocks = (".self_attn.", ".linear_attn.", ".shared_experts.", ".shared_expert.")
    assert all(any(block in path for block in blocks) for path in lora)
    assert len(it.names) == 2 * len(lora) + len(gates)


@every_case
def test_each_group_has_its_rate_and_gates_are_fp32(fitted: Callable[[Case], Fitted], case: Case) -> None:
    it, mode = fitted(case), case[1]
    assert it.trainer.optimizer is not None
    names = {id(p): name for name, p in it.trainer.model.named_parameters()}
    groups = [
        (group["initial_lr"], {wrapping.is_gate(names[id(p)]) for p in params}, {p.dtype for p in params})
        for group in it.trainer.optimizer.param_groups
        if (params := group["params"])
    ]
    lora, gates = (1e-2, {False}, {torch.float32}), (1e-2, {True}, {torch.float32})
    assert groups == {"gt": [lora, gates], "lora": [lora], "gates": [gates]}[mode]


def test_what_else_a_router_has_stays_frozen() -> None:
    """PEFT trains all of a module that it copies; a family says which of its router's parameters train."""
    model = models.tiny_model("qwen3_moe")
    anatomy = bind(model, FAMILIES["qwen3_moe"])
    for path in anatomy.routers:
        model.get_submodule(path).register_parameter("bias", torch.nn.Parameter(torch.zeros(8)))
    with wrapping.peft_targets_kept():
        wrapped: Any = get_peft_model(model, wrapping.lora_config(anatomy, mode="gt", rank=4, alpha=8))
    with pytest.raises(TrainingError, match=r"2 trained tensors differ.*gate\.modules_to_save\.default\.bias"):
        wrapping.assert_trains_exactly(wrapped, anatomy, mode="gt", rank=4)
    wrapping.freeze_rest_of_routers(wrapped, anatomy)
    wrapping.assert_trains_exactly(wrapped, anatomy, mode="gt", rank=4)
    wrapping.assert_bias_frozen(wrapped, anatomy)
    wrapped.get_submodule(f"base_model.model.{anatomy.routers[1]}.modules_to_save.default").bias.data += 1
    with pytest.raises(TrainingError, match=rf"{anatomy.routers[1]}\.bias moved"):
        wrapping.assert_bias_frozen(wrapped, anatomy)


def test_the_two_rates_are_their_own(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = helpers.Inside.start(toy.train_config(toy.model("deepseek_v3"), lr_lora=1e-30, lr_gates=1e-2), tmp_path)
    before = inside.state()
    inside.fit()
    moved = {name for name, tensor in inside.state().items() if not torch.allclose(tensor, before[name], atol=1e-8)}
    assert moved
    assert all(wrapping.is_gate(name) for name in moved)


@every_case
def test_only_what_trains_moves(fitted: Callable[[Case], Fitted], case: Case) -> None:
    it = fitted(case)
    moved = {name for name, tensor in it.after.items() if not torch.equal(tensor, it.before[name])}
    assert moved == it.names  # all of it moves, and not a bit of the rest: no buffer, no expert, no original gate
    has_bias = FAMILIES[case[0]].correction_bias is not None
    assert has_bias == any("e_score_correction_bias" in name for name in it.after)


@every_case
def test_switched_off_it_is_the_base_model_bit_for_bit(fitted: Callable[[Case], Fitted], case: Case) -> None:
    it = fitted(case)
    base = helpers.logits(open_subject(str(it.model)).model)
    with it.trainer.model.disable_adapter():
        assert torch.equal(helpers.logits(it.trainer.model), base)
    assert not torch.equal(it.edited, base)


LOAD_ALL = """
import json, sys
from safetensors.torch import save_file
from gtqlora.edits.edited import load
from tests.helpers import logits
found = {}
for name, model, adapter in json.load(open(sys.argv[1])):
    edited = load(model, adapter)
    found[name] = logits(edited.subject.model)
    with edited.original():
        found[name + "-off"] = logits(edited.subject.model)
save_file(found, sys.argv[2])
"""


def test_fresh_process_computes_the_trainers_logits(fitted: Callable[[Case], Fitted], tmp_path: Path) -> None:
    todo = [(identity(case), str(fitted(case).model), str(fitted(case).adapter)) for case in CASES]
    (tmp_path / "todo.json").write_text(json.dumps(todo))
    done = warm.process(LOAD_ALL, tmp_path / "todo.json", tmp_path / "logits.safetensors", knowing=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits.safetensors")
    for case in CASES:
        it = fitted(case)
        assert torch.equal(found[identity(case)], it.edited), case
        assert torch.equal(found[identity(case) + "-off"], helpers.logits(open_subject(str(it.model)).model)), case


@every_case
def test_adapter_holds_the_trained_weights_and_nothing_else(fitted: Callable[[Case], Fitted], case: Case) -> None:
    it = fitted(case)
    on_disk = helpers.weights(it.adapter)
    for part in ("lora_A", "lora_B"):
        assert {name.removesuffix(f".{part}") for name in on_disk if part in name} == owners(it.names, ".lora_")
    gates = {name for name in on_disk if name.endswith("mlp.gate.weight")}
    assert len(gates) == len(owners(it.names, ".modules_to_save."))
    for name in gates:
        live = it.after[f"base_model.model.{name}".replace(".gate.", ".gate.modules_to_save.default.")]
        assert on_disk[name].dtype == torch.float32 and torch.equal(on_disk[name], live)
    assert sorted(p.name for p in it.adapter.iterdir()) == [
        "adapter_config.json",
        "edit.safetensors",
        "gtqlora.json",
    ]


# --- guards around wrapping ------------------------------------------------------------------------------------------


def started(toy: helpers.Toy, path: Path, family: str = "deepseek_v3") -> helpers.Inside:
    return helpers.Inside.start(toy.train_config(toy.model(family)), path)


def check(inside: helpers.Inside, mode: str = "gt") -> None:
    wrapping.assert_trains_exactly(inside.trainer.model, inside.trainer.anatomy, mode=mode, rank=4)  # type: ignore[arg-type]


def test_a_module_too_many_or_missing_is_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = started(toy, tmp_path)
    check(inside)
    experts = inside.trainer.model.get_parameter("base_model.model.model.layers.1.mlp.experts.down_proj")
    experts.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"experts\.down_proj"):
        check(inside)
    experts.requires_grad_(False)
    shared = "base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_A.default.weight"
    inside.trainer.model.get_parameter(shared).requires_grad_(False)
    with pytest.raises(TrainingError, match=r"shared_experts\.up_proj"):
        check(inside)


def test_gates_that_are_not_fp32_are_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = started(toy, tmp_path)
    gate = next(p for name, p in wrapping.trainable(inside.trainer.model).items() if wrapping.is_gate(name))
    gate.data = gate.data.bfloat16()
    with pytest.raises(TrainingError, match="fp32"):
        check(inside)


def test_a_moved_correction_bias_is_refused(toy: helpers.Toy, tmp_path: Path) -> None:
    inside = started(toy, tmp_path)
    wrapping.assert_bias_frozen(inside.trainer.model, inside.trainer.anatomy)
    wrapper = next(iter(wrapping.routers_of(inside.trainer.model).values()))
    wrapper.modules_to_save["default"].get_buffer("e_score_correction_bias")[0] += 1e-6
    with pytest.raises(TrainingError, match="e_score_correction_bias"):
        wrapping.assert_bias_frozen(inside.trainer.model, inside.trainer.anatomy)


def test_without_our_guard_peft_would_train_routed_experts(toy: helpers.Toy) -> None:
    """The reason for `peft_targets_kept`; if PEFT mends peft#3711 this fails and the guard can go."""
    from peft import get_peft_model

    subject = open_subject(str(toy.model("deepseek_v3")))
    config = wrapping.lora_config(subject.anatomy, mode="lora", rank=4, alpha=8)
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        trained = wrapping.trainable(get_peft_model(subject.model, config))
    assert any(".experts." in name for name in trained)


def test_without_our_guard_trl_would_hash_every_weight(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for `weights_unhashed`; if TRL no longer hashes for data in memory this fails and the guard can go."""
    hashed: list[object] = []
    monkeypatch.setattr(dpo_trainer, "hash_module", lambda module: hashed.append(module) or "")
    config = toy.train_config(toy.model("qwen3_moe"), steps=1)
    helpers.Inside.start(config, tmp_path / "guarded")
    assert hashed == []
    monkeypatch.setattr(trainer, "weights_unhashed", nullcontext)
    inside = helpers.Inside.start(config, tmp_path / "unguarded")
    assert hashed == [inside.trainer.model]


# --- loading what does not fit ---------------------------------------------------------------------------------------


@pytest.fixture
def copied(fitted: Callable[[Case], Fitted], tmp_path: Path) -> tuple[Path, Path]:
    it = fitted(("deepseek_v3", "gt", torch.float32))
    return it.model, shutil.copytree(it.adapter, tmp_path / "adapter")


def change_weights(adapter: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = helpers.weights(adapter)
    change(tensors)
    save_file(tensors, adapter / EDIT_WEIGHTS)


def test_adapter_of_another_family_is_refused(copied: tuple[Path, Path], toy: helpers.Toy) -> None:
    with pytest.raises(RunError, match="made for deepseek_v3"):
        edited.load(str(toy.model("qwen3_moe")), copied[1])


def test_adapter_of_another_shape_is_refused(copied: tuple[Path, Path], toy: helpers.Toy) -> None:
    for key, value in {"num_hidden_layers": 2, "hidden_size": 64, "n_routed_experts": 4}.items():
        other = toy.model("deepseek_v3", torch.float32, **{key: value})
        with pytest.raises(RunError, match="does not fit the model"):
            edited.load(str(other), copied[1])


def test_missing_or_extra_tensors_are_refused(copied: tuple[Path, Path]) -> None:
    model, adapter = copied
    gate = next(name for name in helpers.weights(adapter) if name.endswith("mlp.gate.weight"))
    saved = {}
    change_weights(adapter, lambda tensors: saved.update({gate: tensors.pop(gate)}))
    with pytest.raises(RunError, match=gate):
        edited.load(str(model), adapter)
    change_weights(adapter, lambda tensors: tensors.update({**saved, "lm_head.weight": torch.ones(2)}))
    with pytest.raises(RunError, match="lm_head"):
        edited.load(str(model), adapter)


def test_a_correction_bias_has_no_place_in_an_adapter(copied: tuple[Path, Path]) -> None:
    model, adapter = copied
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    change_weights(adapter, lambda tensors: tensors.update({bias: torch.ones(8)}))
    with pytest.raises(RunError, match=bias):
        edited.load(str(model), adapter)


def test_unreadable_adapters_are_refused(copied: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = copied
    weights = adapter / EDIT_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"edit\.safetensors: cannot be read"):
        edited.load(str(model), adapter)
    weights.unlink()
    with pytest.raises(RunError, match=r"no edit\.safetensors"):
        edited.load(str(model), adapter)
    with pytest.raises(RunError, match=r"gtqlora\.json"):
        edited.load(str(model), tmp_path)


# --- an adapter is what we write, and nothing that other loaders open -----------------------------------------------


ANOTHER_STRENGTH: dict[str, object] = {
    "alpha_pattern": {".*": 1e-6},
    "rank_pattern": {"q_proj": 1},
    "use_rslora": True,
    "use_dora": True,
    "fan_in_fan_out": True,
    "bias": "all",
    "lora_alpha": 8e-6,
    "r": 8000,
    "peft_type": "LORA",
    "base_model_name_or_path": "another",
    "megatron_config": {},
    "task_type": None,
}


@pytest.mark.parametrize(("key", "value"), ANOTHER_STRENGTH.items(), ids=str)
def test_settings_are_key_by_key_what_we_write(copied: tuple[Path, Path], key: str, value: object) -> None:
    model, adapter = copied
    models.edit_json(adapter / "adapter_config.json", lambda old: {**old, key: value})
    with pytest.raises(RunError, match=rf"'{key}' is not what"):
        edited.load(str(model), adapter)


@pytest.mark.parametrize("text", ["[]", "null", "7", "{", "\x00", '{"r": ' + "9" * 5000 + "}", "[" * 100_000])
@pytest.mark.parametrize("name", ["adapter_config.json", "gtqlora.json"])
def test_settings_that_are_none(copied: tuple[Path, Path], name: str, text: str) -> None:
    model, adapter = copied
    (adapter / name).write_text(text)
    with pytest.raises(RunError):
        edited.load(str(model), adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [("details", []), ("details", {"config": 3}), ("kind", ["gt-qlora"]), ("kind", "other"), ("base", None), ("x", 1)],
    ids=str,
)
def test_info_of_another_type(copied: tuple[Path, Path], key: str, value: object) -> None:
    model, adapter = copied
    models.edit_json(adapter / "gtqlora.json", lambda old: {**old, key: value})
    with pytest.raises(RunError, match=r"gtqlora\.json"):
        edited.load(str(model), adapter)


def test_another_rank_of_the_tensors_and_another_alpha_on_both_records(copied: tuple[Path, Path]) -> None:
    model, adapter = copied
    change_weights(adapter, lambda old: old.update({n: t[:2].clone() for n, t in old.items() if n.endswith("lora_A")}))
    with pytest.raises(RunError, match="the rank is 4"):
        edited.load(str(model), adapter)


def test_strange_files_and_links_in_an_adapter(copied: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = copied
    (adapter / "more.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"more\.safetensors, which is no part"):
        edited.load(str(model), adapter)
    (adapter / "more.safetensors").unlink()
    weights = adapter / EDIT_WEIGHTS
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="a link"):
        edited.load(str(model), adapter)


def test_plain_peft_does_not_open_an_adapter(copied: tuple[Path, Path]) -> None:
    """Nor when the settings are made to look like PEFT's: names and files are not."""
    model, adapter = copied
    plain = open_subject(str(model)).model
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(plain, str(adapter))
    models.edit_json(adapter / "adapter_config.json", lambda old: {**old, "peft_type": "LORA"})
    with pytest.raises((OSError, ValueError)):
        PeftModel.from_pretrained(plain, str(adapter))


def test_merged_it_is_the_edit_rounded_and_switched_off_the_original(
    fitted: Callable[[Case], Fitted],
) -> None:
    for case in (("deepseek_v3", "gt", torch.float32), ("kimi_k25", "gt", torch.bfloat16)):
        it = fitted(case)
        subject = open_subject(str(it.model))
        base = helpers.logits(subject.model)
        shipped = edited.Edited(subject, adapters.read_adapter(it.adapter), shipped=str(it.model))
        ours = helpers.logits(subject.model)
        assert not torch.equal(ours, base)
        off, moved = (ours - it.edited).float().abs().mean(), (base - it.edited).float().abs().mean()
        assert off < (1e-5 if case[2] == torch.float32 else 0.2) * moved
        with shipped.original():
            assert torch.equal(helpers.logits(subject.model), base)
        assert torch.equal(helpers.logits(subject.model), ours)
        gate = subject.model.get_parameter("model.layers.1.mlp.gate.weight")
        assert torch.equal(gate, gate.to(case[2]).float())  # as the checkpoint's dtype holds it


def test_gates_and_lora_are_in_place_one_without_the_other(fitted: Callable[[Case], Fitted]) -> None:
    it = fitted(("deepseek_v3", "gt", torch.float32))
    tensors = helpers.weights(it.adapter)
    adapter = adapters.read_adapter(it.adapter)
    for shipped in (None, str(it.model)):
        whole = edited.Edited(open_subject(str(it.model)), adapter, shipped=shipped)
        assert whole.parts is not None
        assert len(whole.parts.gates) == sum(name.endswith("gate.weight") for name in tensors)
        assert len(whole.parts.lora) == sum(name.endswith(".lora_A") for name in tensors)
        both = helpers.logits(whole.subject.model)
        for part, kept in (("gates", whole.gates_only), ("lora", whole.lora_only)):
            # by hand: the adapter with the other part's tensors as they are before training
            still = _without(tensors, it.model, "lora" if part == "gates" else "gates")
            alone = edited.Edited(open_subject(str(it.model)), replace(adapter, tensors=still), shipped=shipped)
            with kept():
                assert torch.equal(helpers.logits(whole.subject.model), helpers.logits(alone.subject.model))
                assert not torch.equal(helpers.logits(whole.subject.model), both)
        assert torch.equal(helpers.logits(whole.subject.model), both)


def _without(tensors: dict[str, torch.Tensor], model: Path, part: str) -> dict[str, torch.Tensor]:
    if part == "lora":
        return {name: t * 0 if name.endswith(".lora_B") else t for name, t in tensors.items()}
    base = open_subject(str(model)).model
    return {name: base.get_parameter(name).data if name.endswith("gate.weight") else t for name, t in tensors.items()}


def test_the_hash_sees_every_byte_that_matters(copied: tuple[Path, Path]) -> None:
    adapter = copied[1]
    seen = {adapter_hash(adapter)}
    change_weights(adapter, lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1e-3))
    seen.add(adapter_hash(adapter))
    models.edit_json(adapter / "adapter_config.json", lambda old: {**old, "lora_alpha": 9})
    seen.add(adapter_hash(adapter))
    assert len(seen) == 3
