"""Adapter folders for PEFT, vLLM and SGLang: what their own loaders need, applied whole or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gtqlora.capture import Subject, open_subject
from gtqlora.certificate import certify
from gtqlora.config import ExportConfig
from gtqlora.edits.adapters import Adapter, read_adapter
from gtqlora.edits.edited import Edited
from gtqlora.errors import ConfigError, RunError
from gtqlora.exports import peft
from gtqlora.exports.job import Job, Written
from gtqlora.exports.peft import WEIGHTS
from gtqlora.exports.plain import plain_model
from gtqlora.families import FAMILIES, Anatomy
from gtqlora.families.coverage import covered, in_layer
from gtqlora.judging.judge import judge_of
from gtqlora.results.adapter import GT_QLORA, PROJECTION, Info, Training
from gtqlora.results.export import read_export
from gtqlora.results.verdict import of_kind
from gtqlora.run import Run
from gtqlora.scoring import Runner
from gtqlora.stages.verify import verify
from tests import helpers, models, warm
from tests.families.test_packed import packed
from tests.helpers import exported
from tests.stages.test_export import source, tensors_of

Verified = Callable[..., Path]

RUN_HERE = tuple(family for family in (*models.CORE, *models.OTHERS) if family != "kimi_k25")
"""Whose language model plain transformers opens."""
JUDGED = ("deepseek_v3", "qwen3_moe")
"""Exported whole; for what the files hold no model has to be asked."""
_ITS_OWN = "is_gradient_checkpointing` is deprecated"
"""What transformers says to PEFT whenever it wraps a model, with whatever adapter."""

_LOAD = """
import json, sys, warnings
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for case in json.loads(sys.argv[1]):
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        base = AutoModelForCausalLM.from_pretrained(case["model"], dtype="auto")
        model = PeftModel.from_pretrained(base, case["adapter"]).eval()
        logits = model(load_file(sys.argv[2])["ids"]).logits
        base = AutoModelForCausalLM.from_pretrained(case["model"], dtype="auto")
        base.load_adapter(case["adapter"])
        own = base.eval()(load_file(sys.argv[2])["ids"]).logits
    save_file({"peft": logits, "transformers": own}, case["logits"])
    Path(case["said"]).write_text(json.dumps([str(one.message) for one in caught]))
"""


Make = Callable[..., Job]


@pytest.fixture(scope="module")
def job(toy: helpers.Toy, verified: Verified) -> Make:
    """(model, target) -> what is to be written of some edit of that model.

    What is written depends on nothing of a certificate but the adapter and the model, so one verified run lends its
    certificate to edits of all families.
    """
    with Run(verified(source(toy, "qwen3_moe"))) as run:
        passed = certify(run, helpers.JUDGE)

    def of(model: Path, target: str = "peft", **opened: Any) -> Job:
        config = toy.verify_config(model, **opened)
        lent = replace(passed, verdict=replace(passed.verdict, model=str(model)), config=config)
        edit = replace(lent, adapter=some_edit(open_subject(config)))
        return Job.of(edit, ExportConfig(to="peft", target=target))  # type: ignore[arg-type]

    return of


def some_edit(subject: Subject) -> Adapter:
    """An edit of everything, drawn and not trained; the same one for the same model."""
    draw, tensors, anatomy = torch.Generator().manual_seed(0), dict[str, Tensor](), subject.anatomy
    for path in anatomy.lora_targets:
        linear = subject.model.get_submodule(path)
        tensors[f"{path}.lora_A"] = 0.2 * torch.randn(4, linear.in_features, generator=draw)
        tensors[f"{path}.lora_B"] = 0.02 * torch.randn(linear.out_features, 4, generator=draw)
    for path in anatomy.routers:
        weight = subject.model.get_submodule(path).weight.data.float()
        tensors[f"{path}.weight"] = weight + 0.05 * torch.randn(weight.shape, generator=draw)
    made = Training({"mode": "gt", "rank": 4, "alpha": 8})
    info = Info(GT_QLORA, "/home/someone/base", anatomy.family.model_type, made)
    return Adapter(Path("drawn"), info, "0" * 64, tensors, rank=4, alpha=8)


def written(job: Job, out: Path) -> Written:
    """What `export` writes, before it is judged."""
    out.mkdir()
    return peft.write(job, out)


def adapter_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def folders(
    toy: helpers.Toy, verified: Verified, job: Make, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """By family, the PEFT folder of an edit; all are loaded once, in one fresh process."""
    root = tmp_path_factory.mktemp("peft")
    save_file({"ids": models.some_tokens()}, root / "ids")
    cases = []
    for family in RUN_HERE:
        model = source(toy, family)
        if family in JUDGED:
            exported(verified(model), root / family, to="peft")
        else:
            written(job(model), root / family)
        paths = {"model": source(toy, family), "adapter": root / family}
        paths |= {"logits": root / f"{family}.logits", "said": root / f"{family}.said"}
        cases.append({name: str(path) for name, path in paths.items()})
    done = warm.process(_LOAD, json.dumps(cases), root / "ids")
    assert done.returncode == 0, done.stderr
    return {family: root / family for family in RUN_HERE}


@pytest.mark.parametrize("family", RUN_HERE)
def test_plain_peft_computes_the_edit(
    toy: helpers.Toy, verified: Verified, job: Make, folders: dict[str, Path], family: str
) -> None:
    model, out = source(toy, family), folders[family]
    adapter = read_adapter(verified(model) / "adapter") if family in JUDGED else job(model).certificate.adapter
    ours = helpers.logits(Edited(open_subject(str(model)), adapter).subject.model)
    theirs = load_file(f"{out}.logits")
    base = helpers.logits(open_subject(str(model)).model)
    # Random Gated DeltaNet makes 2e-4 of rounding: as much as the edit with LoRA beside and merged differ in our hands
    allowed = 1e-4 if "linear_attn" in FAMILIES[family].attention_blocks else 1e-5
    # transformers' own loader at 5.17 takes the folder without a word, and computes something else
    programs = ("peft", "transformers") if Version(transformers.__version__) >= Version("5.23") else ("peft",)
    for by in programs:
        assert (theirs[by] - ours).abs().max() < allowed < 0.1 < (ours - base).abs().max(), by
    assert [said for said in json.loads(Path(f"{out}.said").read_text()) if _ITS_OWN not in said] == []


def test_what_is_tested_here_is_what_the_data_says() -> None:
    """But for a family that is another's language model alone."""
    for target in ("peft", "transformers"):
        tested = {family for family in FAMILIES if covered(FAMILIES[family], target).tested}  # type: ignore[arg-type]
        assert tested - {"qwen3_5_moe_text"} == set(RUN_HERE)


@pytest.mark.parametrize("family", RUN_HERE)
def test_every_group_alone_has_an_effect_and_is_what_merging_it_does(
    toy: helpers.Toy, folders: dict[str, Path], family: str
) -> None:
    model = source(toy, family)
    anatomy = open_subject(str(model)).anatomy
    adapted = _exact(PeftModel.from_pretrained(plain_model(str(model)), str(folders[family])).eval())
    base, found = _exact(plain_model(str(model))), set()
    untouched = helpers.logits(base)
    for group, paths in _groups(anatomy).items():
        with _only(adapted, paths), _merged(base, adapted, paths):
            alone, merged = helpers.logits(adapted), helpers.logits(base)
        assert (alone - untouched).abs().max() > 1e-3, f"{group} has no effect"
        assert (alone - merged).abs().max() < 1e-4, group
        found.add(group)
    applied = covered(anatomy.family, "peft")
    assert found == {in_layer(anatomy.family, path) for path in anatomy.lora_targets} | {anatomy.family.router}
    assert found <= {*applied.lora, anatomy.family.router} and applied.gates


def _exact(model: Any) -> Any:
    """A model in fp64: what random ones make of rounding alone comes near to the bound."""
    getattr(model, "get_base_model", lambda: model)().set_experts_implementation("eager")
    return model.double()


def _groups(anatomy: Anatomy) -> dict[str, list[str]]:
    """Modules that an edit changes, by their path in a layer."""
    groups: dict[str, list[str]] = {}
    for path in (*anatomy.lora_targets, *anatomy.routers):
        groups.setdefault(in_layer(anatomy.family, path), []).append(path)
    return groups


@contextmanager
def _put(values: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give parameters other values for a while."""
    before = {parameter: parameter.data for parameter in values}
    for parameter, value in values.items():
        parameter.data = value
    yield
    for parameter, value in before.items():
        parameter.data = value


def _only(adapted: Any, kept: list[str]) -> AbstractContextManager[None]:
    """Let an adapter change nothing but some modules."""
    silent: dict[nn.Parameter, Tensor] = {}
    for name, parameter in adapted.named_parameters():
        path, _, part = name.removeprefix("base_model.model.").partition(".lora_B.")
        if part and path not in kept:
            silent[parameter] = torch.zeros_like(parameter)
        path, _, part = name.removeprefix("base_model.model.").partition(".modules_to_save.default.")
        if part and path not in kept:
            silent[parameter] = adapted.get_parameter(name.replace("modules_to_save.default", "original_module")).data
    return _put(silent)


def _merged(base: nn.Module, adapted: Any, paths: list[str]) -> AbstractContextManager[None]:
    """Merge what an adapter does to some modules into the base."""
    parameters, values = dict(adapted.named_parameters()), {}
    scale = adapted.peft_config["default"].lora_alpha / adapted.peft_config["default"].r
    for path in paths:
        weight = base.get_submodule(path).get_parameter("weight")
        name = f"base_model.model.{path}"
        if f"{name}.modules_to_save.default.weight" in parameters:
            values[weight] = parameters[f"{name}.modules_to_save.default.weight"].data
        else:
            a_RI, b_DR = (parameters[f"{name}.{part}.default.weight"].data for part in ("lora_A", "lora_B"))
            values[weight] = weight.data + scale * b_DR @ a_RI
    return _put(values)


# --- what the folder holds -------------------------------------------------------------------------------------------


def test_the_folder_names_its_base_and_nothing_of_this_machine(folders: dict[str, Path]) -> None:
    out = folders["deepseek_v3"]
    config = adapter_config(out)
    assert config["base_model_name_or_path"] == "deepseek_v3-float32-max_shard_size=30KB" and config["revision"] is None
    written = "".join(file.read_text() for file in out.iterdir() if file.suffix in (".json", ".md"))
    assert "/tmp" not in written and str(out.parent.parent) not in written
    assert {file.name for file in out.iterdir()} == {"README.md", "adapter_config.json", WEIGHTS, "export.json"}


def test_shared_experts_are_parameters_and_routers_whole_modules(folders: dict[str, Path]) -> None:
    config = adapter_config(folders["deepseek_v3"])
    assert len(config["target_parameters"]) == 6 and all(".shared_experts." in n for n in config["target_parameters"])
    assert config["modules_to_save"] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert not [name for name in config["target_modules"] if "mlp" in name]


def test_the_record_says_in_which_form_it_was_judged(folders: dict[str, Path]) -> None:
    record = read_export(folders["qwen3_moe"])
    assert (record.format, record.target, record.divergence) == ("peft", "peft", None)
    assert record.form is not None and record.form.floor.verdict == "pass" and "plain PEFT" in record.form.name
    assert record.form.floor.prompts >= 120 and record.gate_values_changed > 0
    assert set(record.kept.values()) == {1.0} and len(record.kept) == record.tensors_changed
    assert record.files.keys() >= {"adapter_config.json", WEIGHTS}


def test_a_checkpoint_in_16_bits(toy: helpers.Toy, job: Make, tmp_path: Path) -> None:
    """Routers are in its dtype, or plain transformers could not multiply by them; LoRA stays as it was trained."""
    model = source(toy, "qwen3_moe", torch.bfloat16)
    kept = written(job(model), tmp_path / "out").kept
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for name, t in tensors.items() if "lora_" in name} == {torch.float32}
    assert {t.dtype for name, t in tensors.items() if "lora_" not in name} == {torch.bfloat16}
    adapted = PeftModel.from_pretrained(plain_model(str(model)), str(tmp_path / "out")).eval()
    assert helpers.logits(adapted).isfinite().all()
    shares = [share for name, share in kept.items() if name.endswith("gate.weight")]
    assert len(shares) == 2 and all(0.5 < share < 1 for share in shares)


# --- the form that is judged -----------------------------------------------------------------------------------------


def test_the_form_is_base_and_adapter_in_plain_peft(toy: helpers.Toy, verified: Verified, tmp_path: Path) -> None:
    """In fp32 they say what `verify` recorded of the base and of the merged weights."""
    with Run(verified(source(toy, "qwen3_moe"))) as run:
        passed = certify(run, helpers.JUDGE)
    kinds = ("harmful", "lookalike", "benign")
    rows = [outcome for kind in kinds for outcome in of_kind(passed.outcomes, kind)[:4]]
    # a row's number is the same inside frames, and how ready the model is to answer is asked of the plain one only
    rows += [outcome for outcome in passed.framed if outcome.number in {row.number for row in rows}]
    assert any(row.wrapper for row in rows)
    for target in ("peft", "vllm"):
        config = ExportConfig(to="peft", target=target)  # type: ignore[arg-type]
        form = written(Job.of(passed, config), tmp_path / target).form
        assert form is not None
        before, after = form.said(rows, edited=False), form.said(rows, edited=True)
        for row, was, now in zip(rows, before, after, strict=True):
            assert (was.text, now.text) == (row.text_before, row.text_after)
            for said, recorded in ((was, row.rejected_log_prob_before), (now, row.rejected_log_prob_after)):
                assert said.rejected_log_prob == (None if recorded is None else pytest.approx(recorded, abs=1e-3))
        assert any(was.rejected_log_prob != now.rejected_log_prob for was, now in zip(before, after, strict=True))


def test_experts_in_4_bits_are_run_by_us(toy: helpers.Toy, job: Make, tmp_path: Path) -> None:
    """Plain transformers has nothing that reads them; the adapter on them is PEFT's all the same."""
    model = packed(tmp_path / "model", "deepseek_v3", seed=1)
    made = job(model, expert_format="native")
    form, rows = written(made, tmp_path / "out").form, made.certificate.outcomes[:4]
    assert form is not None
    edited = Edited(open_subject(made.certificate.config), made.certificate.adapter)
    runner = Runner.of(edited.subject, judge_of(helpers.JUDGE), made.certificate.config)
    assert [said.text for said in form.said(rows, edited=True)] == [a.text for a in runner.answers(rows, label=None)]
    with edited.original():
        before = [answer.text for answer in runner.answers(rows, label=None)]
    assert [said.text for said in form.said(rows, edited=False)] == before


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "qwen3_5_moe", "qwen2_moe", "olmoe", "qwen3_next"])
def test_vllm_gets_routers_as_lora_of_exact_rank(toy: helpers.Toy, job: Make, tmp_path: Path, family: str) -> None:
    model, out = source(toy, family), tmp_path / "out"
    notes = " ".join(written(job(model, "vllm"), out).notes)
    config, tensors, on_disk = adapter_config(out), load_file(out / WEIGHTS), tensors_of(model)
    edits = dict(job(model).edits)
    scale = config["lora_alpha"] / config["r"]
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        a_RI, b_DR = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        pattern = [key for key in config["rank_pattern"] if re.fullmatch(rf"(.*\.)?({key})", weight[: -len(".weight")])]
        rank = config["rank_pattern"][pattern[0]] if pattern else config["r"]
        alpha = config["alpha_pattern"][pattern[0]] if pattern else config["lora_alpha"]
        assert (len(a_RI), b_DR.shape[1]) == (rank, rank) and alpha / rank == scale
        assert torch.allclose(on_disk[weight] + scale * b_DR @ a_RI, edits.pop(weight)(on_disk[weight]), atol=1e-6)
    assert config.get("modules_to_save") is None and config.get("target_parameters") is None
    assert "gate" in config["target_modules"] and not [name for name in config["target_modules"] if "." in name]
    assert set(config["rank_pattern"].values()) == {8}
    assert not edits and "vLLM needs --max-lora-rank 8," in notes


def test_what_vllm_never_applies_is_refused(toy: helpers.Toy, verified: Verified, tmp_path: Path) -> None:
    run = verified(source(toy, "deepseek_v3"))
    with pytest.raises(RunError, match=r"vllm applies no adapter to self_attn\.kv_b_proj.*--for vllm"):
        exported(run, tmp_path / "out", to="peft", target="vllm")
    assert not (tmp_path / "out").exists()


def test_sglang_takes_no_router(toy: helpers.Toy, verified: Verified, tmp_path: Path) -> None:
    run = verified(source(toy, "qwen3_moe"))
    with pytest.raises(RunError, match=r"sglang applies no adapter to mlp\.gate of qwen3_moe.*--for sglang"):
        exported(run, tmp_path / "out", to="peft", target="sglang")


def test_an_edit_trained_for_sglang(toy: helpers.Toy, tmp_path: Path) -> None:
    model = toy.model("deepseek_v3")
    helpers.trained(toy.train_config(model, target="sglang"), tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert verify(toy.verify_config(model), run).floor.verdict == "pass"
    exported(tmp_path / "run", tmp_path / "out", to="peft", target="sglang")
    config, tensors = adapter_config(tmp_path / "out"), load_file(tmp_path / "out" / WEIGHTS)
    assert {name.split(".")[-3] for name in tensors} == set(config["target_modules"])
    assert {"kv_b_proj", "gate_proj", "q_a_proj"} <= set(config["target_modules"])
    assert {min(tensor.shape) for tensor in tensors.values()} == {config["r"]}
    notes = " ".join(read_export(tmp_path / "out").notes)
    assert "--disable-shared-experts-fusion" in notes and "SGLang 0.5.23" in notes and "not run" in notes


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_projection_is_no_adapter(toy: helpers.Toy, job: Make, tmp_path: Path) -> None:
    found = job(source(toy, "qwen3_moe"))
    info = replace(found.certificate.adapter.info, kind=PROJECTION)
    adapter = replace(found.certificate.adapter, info=info)
    with pytest.raises(RunError, match="projection changes the embedding and every routed expert"):
        written(replace(found, certificate=replace(found.certificate, adapter=adapter)), tmp_path / "out")


def test_a_model_that_plain_transformers_does_not_open_alone(toy: helpers.Toy, job: Make, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no class for the language model alone.*export it merged$"):
        written(job(source(toy, "kimi_k25")), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"to": "peft", "target": "ollama"}, "--for = 'ollama': must be one of peft, vllm, sglang"),
        ({"to": "gguf-adapter", "target": "llama.cpp"}, "--for goes with --to peft; for llama.cpp use --to gguf or "),
        ({"to": "gguf", "target": "vllm"}, "--for goes with --to peft only"),
        ({"to": "gguf", "overlay": True}, "--overlay goes with --to safetensors only"),
        ({"to": "gguf", "onto": "a", "tokenizer": "b"}, "--tokenizer goes without --onto"),
        ({"to": "nope"}, "gguf-adapter, or hub"),
    ],
)
def test_settings_that_do_not_go_together_are_told_by_their_flags(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExportConfig(**settings)
