"""Settings: where values come from, who wins, and that every mistake is named."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from gtqlora import machine
from gtqlora.config import (
    STAGES,
    DiagnoseConfig,
    ModelConfig,
    ProjectConfig,
    StageConfig,
    TrainConfig,
    VerifyConfig,
    build,
    build_recorded,
    of_the_edit,
    to_dict,
)
from gtqlora.errors import ConfigError
from gtqlora.machine import trackers
from gtqlora.organisms import embedded
from gtqlora.run import Run, stage_hash

GIVEN: dict[str, Any] = {"model": "m", "contrast": "c"}


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


# --- where values come from


def test_defaults_stand_where_nothing_is_said() -> None:
    assert build(TrainConfig, **GIVEN) == TrainConfig(model="m", contrast="c")


def test_the_stage_table_wins_over_top_level_keys(tmp_path: Path) -> None:
    file = _file(tmp_path, "batch_size = 4\nseed = 3\n[train]\nbatch_size = 2\n")
    train, verify = build(TrainConfig, file=file, **GIVEN), build(VerifyConfig, file=file, **GIVEN)
    assert (train.batch_size, train.seed) == (2, 3)
    assert (verify.batch_size, verify.seed) == (4, 3)


def test_top_level_keys_serve_the_stages_that_know_them(tmp_path: Path) -> None:
    file = _file(tmp_path, "max_pairs = 9\nmargin = 0.01\nrank = 7\n")
    assert build(DiagnoseConfig, file=file, **GIVEN).max_pairs == 9
    assert build(ProjectConfig, file=file, **GIVEN).max_pairs == 9
    assert build(VerifyConfig, file=file, **GIVEN).margin == 0.01
    assert build(TrainConfig, file=file, **GIVEN).rank == 7


def test_the_caller_wins_over_the_file_and_set_over_both(tmp_path: Path) -> None:
    file = _file(tmp_path, 'model = "f"\ncontrast = "f"\njudge = "string:f"\n[train]\nmode = "lora"\n')
    found = build(TrainConfig, file=file, contrast="g", judge="string:g", overrides=["judge=string:s", "steps = 5"])
    assert (found.model, found.contrast, found.judge, found.mode, found.steps) == ("f", "g", "string:s", "lora", 5)


def test_none_from_the_caller_gives_nothing(tmp_path: Path) -> None:
    file = _file(tmp_path, 'model = "f"\ncontrast = "f"\n')
    assert build(TrainConfig, file=file, model=None, mode=None).model == "f"


def test_a_set_value_may_hold_an_equals_sign() -> None:
    assert build(TrainConfig, **GIVEN, overrides=["judge=string:a=b"]).judge == "string:a=b"


def test_paths_may_be_given_for_texts() -> None:
    assert build(TrainConfig, model=Path("a") / "b", contrast="c").model == str(Path("a") / "b")


@pytest.mark.parametrize("text", ["none", "3"])
def test_an_optional_number_can_be_none(text: str) -> None:
    assert build(ProjectConfig, **GIVEN, overrides=[f"layer={text}"]).layer == (None if text == "none" else 3)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("false", False), ("True", True), ("FALSE", False)])
def test_booleans_from_text_and_toml(tmp_path: Path, text: str, value: bool) -> None:
    assert build(TrainConfig, **GIVEN, overrides=[f"gradient_checkpointing={text}"]).gradient_checkpointing is value
    file = _file(tmp_path, f"[train]\ngradient_checkpointing = {text.lower()}\n")
    assert build(TrainConfig, file=file, **GIVEN).gradient_checkpointing is value


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), lr=st.floats(1e-12, 1e3), whole=st.integers(1, 10**6))
def test_numbers_survive_as_text_and_as_numbers(seed: int, lr: float, whole: int) -> None:
    texts = build(TrainConfig, **GIVEN, overrides=[f"seed={seed}", f"lr_lora={lr!r}", f"rank={whole}", "beta=2"])
    numbers = build(TrainConfig, **GIVEN, seed=seed, lr_lora=lr, rank=float(whole), beta=2)
    assert texts == numbers
    assert (texts.seed, texts.lr_lora, texts.rank) == (seed, lr, whole)
    assert (type(texts.rank), type(texts.beta)) == (int, float)


# --- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 5", "key 'stepz' is unknown; did you mean 'steps'?"),
        ("[train]\nlr_lorra = 1.0", r"\[train\] key 'lr_lorra' is unknown; did you mean 'lr_lora'?"),
        ("[trian]\nsteps = 5", "section 'trian' is unknown; did you mean 'train'?"),
        ("[train]\nmargin = 0.02", r"\[train\] key 'margin' is unknown; it is a setting of verify"),
        ("[verify]\nmargn = 0.02", r"\[verify\] key 'margn' is unknown; did you mean 'margin'?"),
        ("qqq = 1", "key 'qqq' is unknown; known: ablation, ablation_controls"),
    ],
    ids=["top level", "section key", "section", "another stage's key", "another stage's section", "nothing near"],
)
def test_unknown_names_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = _file(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as error:
        build(TrainConfig, file=file, **GIVEN)
    assert str(file) in str(error.value)


def test_unknown_names_in_set_and_from_the_caller() -> None:
    with pytest.raises(ConfigError, match="--set key 'stepz' is unknown; did you mean 'steps'"):
        build(TrainConfig, **GIVEN, overrides=["stepz=5"])
    with pytest.raises(ConfigError, match="key 'margn' is unknown; did you mean 'margin'"):
        build(VerifyConfig, **GIVEN, margn=0.01)


def test_set_without_a_value() -> None:
    with pytest.raises(ConfigError, match="--set steps: must be key=value"):
        build(TrainConfig, **GIVEN, overrides=["steps"])


@pytest.mark.parametrize("missing", ["model", "contrast"])
def test_a_missing_model_or_contrast(missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[train\] {missing} is missing"):
        build(TrainConfig, **{**GIVEN, missing: None})


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", "many", "a whole number"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", [1], "a whole number"),
        ("steps", float("inf"), "a whole number"),
        ("beta", "high", "a finite number"),
        ("beta", False, "a finite number"),
        ("sft_weight", "nan", "a finite number"),
        ("sft_weight", float("inf"), "a finite number"),
        ("sft_weight", {"a": 1}, "a finite number"),
        ("judge", 3, "a text"),
        ("judge", ["a"], "a text"),
        ("gradient_checkpointing", "yes", "true or false"),
        ("gradient_checkpointing", 1, "true or false"),
        ("gradient_checkpointing", [], "true or false"),
        ("mode", "lorra", "one of gt, lora, gates"),
        ("dtype", ["auto"], "one of auto, float32"),
    ],
)
def test_wrong_types(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*: must be {wanted}"):
        build(TrainConfig, **GIVEN, **{key: value})


def test_an_optional_number_is_still_a_number() -> None:
    with pytest.raises(ConfigError, match="layer = 'top': must be a whole number"):
        build(ProjectConfig, **GIVEN, overrides=["layer=top"])


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *((StageConfig, key, 0) for key in ("batch_size", "max_new_tokens")),
        *((StageConfig, "seed", seed) for seed in (-1, 2**32, 10**30)),
        *((StageConfig, "device", name) for name in ("gpu", "cpu:3", "CUDA", "cuda:", "cuda:-1", "cuda:9999", "meta")),
        *((StageConfig, "dtype", name) for name in ("int8", "fp16", "", None)),
        *((StageConfig, "model", name) for name in ("a\0b", None, 3)),
        *((TrainConfig, "report_to", names) for names in ("all", "none,wandb", "wandb,,", "", "wandbb", ["wandb"])),
        (TrainConfig, "mode", "lorra"),
        (TrainConfig, "lr_gates", float("nan")),
        *((DiagnoseConfig, key, 0) for key in ("max_pairs", "max_experts", "bootstrap")),
        *((DiagnoseConfig, key, -1) for key in ("min_difference", "random_controls")),
        *((DiagnoseConfig, "level", level) for level in (0.0, 1.0)),
        (ProjectConfig, "max_pairs", 0),
        *((TrainConfig, key, 0) for key in ("rank", "alpha", "steps", "accumulation", "logging_steps", "save_steps")),
        *((TrainConfig, key, 0.0) for key in ("lr_lora", "lr_gates", "beta", "max_grad_norm", "max_load_cv")),
        *((TrainConfig, key, -0.1) for key in ("sft_weight", "anchor_harmful", "anchor_benign", "weight_decay")),
        *((TrainConfig, "warmup", share) for share in (-0.1, 1.0)),
        *((VerifyConfig, "margin", margin) for margin in (0.0, -0.01, 0.0501, 1.0, float("nan"))),
        *((VerifyConfig, "level", level) for level in (0.9, 0.9499, 1.0, float("nan"))),
        (VerifyConfig, "batch_size", 0),
    ],
)
def test_ranges_hold_however_a_config_is_made(kind: type[StageConfig], key: str, value: Any) -> None:
    """On the class itself, so that no way in can loosen the safety floor."""
    with pytest.raises(ConfigError, match=f"{key} = "):
        kind(**{**GIVEN, key: value})


@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[StageConfig], device: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for make in (
        lambda: kind(**GIVEN, device=device),
        lambda: build(kind, **GIVEN, overrides=[f"device={device}"]),
        lambda: build(kind, **GIVEN, file=_file(tmp_path, f'device = "{device}"\n')),
    ):
        with pytest.raises(ConfigError, match=f"^device = '{device}': .*CUDA|MPS"):
            make()
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert build(kind, **GIVEN, overrides=["device=cpu"]).device == "cpu"


@pytest.mark.parametrize(
    ("names", "installed", "wanted"),
    [
        ("wandb", (), "wandb is not installed; pip install wandb"),
        ("tensorboard, comet_ml", ("tensorboardX",), "comet_ml is not installed; pip install comet-ml"),
        ("mlflow,WandB", ("mlflow",), "no tracker is called 'WandB'; did you mean 'wandb'"),
        ("qqq", (), "no tracker is called 'qqq'; known: none, clearml"),
    ],
)
def test_a_tracker_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, names: str, installed: tuple[str, ...], wanted: str
) -> None:
    monkeypatch.setattr("gtqlora.machine._installed", lambda module: module in installed)
    with pytest.raises(ConfigError, match=f"report_to = '{names}': {wanted}"):
        TrainConfig(**GIVEN, report_to=names)


def test_trackers_that_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "wandb").mkdir()  # as its runs' folder is called
    if importlib.util.find_spec("wandb").origin is None:  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="pip install wandb"):
            TrainConfig(**GIVEN, report_to="wandb")
    for name in ("wandb", "tensorboard"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "wandb").rmdir()
    importlib.invalidate_caches()
    assert trackers("wandb, tensorboard,wandb") == ["wandb", "tensorboard"]
    assert TrainConfig(**GIVEN, report_to="wandb,tensorboard").report_to == "wandb,tensorboard"
    assert trackers("none") == []


def test_every_tracker_is_one_of_the_trainers() -> None:
    assert machine._TRACKERS.keys() <= INTEGRATION_TO_CALLBACK.keys()


def test_the_widest_floor_that_is_allowed() -> None:
    found = build(VerifyConfig, **GIVEN, overrides=["margin=0.05", "level=0.95"])
    assert (found.margin, found.level) == (0.05, 0.95)


def test_a_recipe_cannot_loosen_the_floor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the safety floor allows 0 < margin <= 0\.05"):
        build(VerifyConfig, file=_file(tmp_path, "[verify]\nmargin = 0.06\n"), **GIVEN)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        build(TrainConfig, file=tmp_path / "none.toml", **GIVEN)
    with pytest.raises(ConfigError, match="cannot be read"):
        build(TrainConfig, file=tmp_path, **GIVEN)
    with pytest.raises(ConfigError, match="not valid TOML"):
        build(TrainConfig, file=_file(tmp_path, "steps = "), **GIVEN)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        build(TrainConfig, file=tmp_path / "binary.toml", **GIVEN)


# --- variables of the chat template


def test_the_template_s_table_serves_every_stage_and_single_variables_win(tmp_path: Path) -> None:
    file = _file(
        tmp_path, 'seed = 3\n[template]\nenable_thinking = false\nreasoning_effort = "low"\n[train]\nseed = 4\n'
    )
    for kind in STAGES.values():
        assert build(kind, file=file, **GIVEN).template == {"enable_thinking": False, "reasoning_effort": "low"}
    settled = build(TrainConfig, file=file, **GIVEN, overrides=["template.enable_thinking=True", "template.n = 0.5"])
    assert settled.template == {"enable_thinking": True, "reasoning_effort": "low", "n": 0.5}
    own = _file(tmp_path, "[template]\nenable_thinking = false\n[verify.template]\nenable_thinking = true\n")
    assert build(VerifyConfig, file=own, **GIVEN).template == {"enable_thinking": True}
    assert build(TrainConfig, file=own, **GIVEN).template == {"enable_thinking": False}
    # of an edit that is verified one variable is set anew, and the others stay
    over = build(VerifyConfig, **{**GIVEN, **of_the_edit(to_dict(settled))}, overrides=["template.n=2"])
    assert over.template == {"enable_thinking": True, "reasoning_effort": "low", "n": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template.messages=x", "template.messages: the prompt and the special tokens are not settings"),
        ("template.add_generation_prompt=false", "add_generation_prompt: the prompt and the special tokens"),
        ("template.bos_token=x", "bos_token: the prompt and the special tokens"),
        ("template.=1", "template.: a variable of a chat template is one word"),
        ("template.a-b=1", "template.a-b: a variable of a chat template is one word"),
        ("template=false", "name the variable, as in --set template.enable_thinking=false"),
        ("templat.enable_thinking=false", "'templat.enable_thinking' is unknown"),
        ("template.x=NaN", "template.x = nan: must be true or false, a number or a text"),
    ],
)
def test_what_is_no_variable_of_a_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(TrainConfig, **GIVEN, overrides=[text])


@pytest.mark.parametrize(
    "text", ["template = false", "[template]\nx = [1]", "[template.x]\ny = 1", "[template]\nx = nan"]
)
def test_a_template_s_table_holds_plain_values(tmp_path: Path, text: str) -> None:
    for overrides in ([], ["template.n=1"]):
        with pytest.raises(ConfigError, match=r"template(\.x)? = .*: must be"):
            build(TrainConfig, file=_file(tmp_path, text), **GIVEN, overrides=overrides)


# --- as a whole


def test_the_packaged_recipe_serves_every_stage() -> None:
    found = {name: build(kind, file=embedded.recipe(), **GIVEN) for name, kind in STAGES.items()}
    assert set(found) == {"build", "diagnose", "project", "train", "verify"}
    assert {config.judge for config in found.values()} == {embedded.JUDGE}
    assert found["train"].batch_size != found["verify"].batch_size


@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_a_config_survives_json(kind: type[StageConfig]) -> None:
    config = build(kind, **GIVEN, seed=5)
    again = json.loads(json.dumps(to_dict(config), allow_nan=False))
    assert build(kind, **again) == config


# --- a new setting needs nothing but its field


def _another(hint: object, value: object) -> object:
    """A value that a setting of `ModelConfig` may have and does not have by itself."""
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if get_origin(hint) is dict:
        return {"enable_thinking": False, "effort": "low", "budget": 3}
    if float in get_args(hint):
        return 8.5
    return "cuda:0" if value == "cpu" else f"/{value}-other"


@pytest.mark.parametrize("field", dataclasses.fields(ModelConfig), ids=lambda field: field.name)
@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_how_a_model_is_opened_goes_everywhere(
    kind: type[StageConfig], field: dataclasses.Field[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From TOML and `--set`, into the manifest and the stage's hash, and from an edit over to its verdict."""
    monkeypatch.setattr("gtqlora.config.stages.check_device", lambda name: None)  # none but the CPU may be here
    name, given = field.name, dict(GIVEN)
    if name in ("expert_memory", "expert_disk"):
        given |= {"expert_format": "nf4"}  # of which these are settings
    plain = kind(**given)
    value = _another(get_type_hints(ModelConfig)[name], getattr(plain, name))
    pairs = {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    texts = {key: entry if isinstance(entry, str) else json.dumps(entry) for key, entry in pairs.items()}
    settled = build(kind, **given, overrides=[f"{key}={text}" for key, text in texts.items()])
    assert getattr(settled, name) == value != getattr(plain, name)
    file = _file(tmp_path, "".join(f"{key} = {json.dumps(entry)}\n" for key, entry in pairs.items()))
    assert build(kind, file=file, **{k: v for k, v in given.items() if k != name}) == settled
    assert of_the_edit(to_dict(settled))[name] == value
    recorded = build(VerifyConfig, **{**given, **of_the_edit(to_dict(settled))})
    assert getattr(recorded, name) == value
    assert stage_hash(to_dict(settled), {}) != stage_hash(to_dict(plain), {})


@dataclass(frozen=True, kw_only=True)
class Novel(TrainConfig):
    """A stage with a setting that nothing else knows of."""

    novelty: int = 3


def test_a_new_setting_needs_its_field_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "novel", Novel)
    assert build(Novel, **GIVEN).novelty == 3
    top, own = _file(tmp_path, "novelty = 4\n"), _file(tmp_path, "[novel]\nnovelty = 5\n")
    assert build(Novel, file=own, **GIVEN).novelty == 5
    assert build(TrainConfig, file=_file(tmp_path, "novelty = 4\n"), **GIVEN) == build(TrainConfig, **GIVEN)
    assert build(Novel, file=top, **GIVEN).novelty == 4
    settled = build(Novel, **GIVEN, overrides=["novelty=6"])
    with pytest.raises(ConfigError, match="novelty = 'many': must be a whole number"):
        build(Novel, **GIVEN, overrides=["novelty=many"])
    with Run(tmp_path / "run") as run:
        for config, fresh in ((settled, False), (settled, True), (build(Novel, **GIVEN), False)):
            with run.stage("novel", config, {}) as stage:
                assert stage.fresh is fresh
            record = run.manifest()["stages"]["novel"]
            assert build_recorded(Novel, record["config"], "here") == config


def test_verify_takes_how_the_edited_model_was_opened_and_no_more() -> None:
    made = to_dict(TrainConfig(**GIVEN, expert_format="nf4", dtype="float16", judge="string:no", seed=7, batch_size=3))
    taken = of_the_edit(made)
    assert taken.keys() == {field.name for field in dataclasses.fields(ModelConfig)} | {
        "contrast", "judge", "max_new_tokens", "seed",
    }  # fmt: skip
    found = VerifyConfig(**taken)  # type: ignore[arg-type]
    assert (found.expert_format, found.dtype, found.judge, found.seed) == ("nf4", "float16", "string:no", 7)
    assert found.batch_size == VerifyConfig(**GIVEN).batch_size
    old = {"experts" if key == "expert_format" else key: value for key, value in made.items()}
    assert of_the_edit(old) == taken


def test_a_rate_that_is_set_last_takes_the_place_of_the_file_s_other_one(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[train]\ngate_step = 0.05\n")
    named: dict[str, Any] = {"model": "m", "contrast": "c"}
    found = build(TrainConfig, file=file, overrides=["lr_gates=5e-6"], **named)
    assert (found.gate_step, found.lr_gates) == (None, 5e-6)
    assert build(TrainConfig, file=file, overrides=["lr_gates=none"], **named).gate_step == 0.05
    with pytest.raises(ConfigError, match="both say how fast"):
        build(TrainConfig, file=file, overrides=["lr_gates=5e-6", "gate_step=0.1"], **named)
