"""A thinking model's chat template at every stage, with thinking on and off: on an organism that has Qwen3's.

In the organism's language the word <assistant> stands for the closed thought: with thinking on the prompt ends before
it, and the template writes it before every answer of a conversation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gtqlora.certificate import certify
from gtqlora.cli import main
from gtqlora.cli.settings import StageOptions, same_prompts
from gtqlora.config import STAGES, DiagnoseConfig, ExportConfig, build, of_the_edit
from gtqlora.contrasts import encode_prompt, load
from gtqlora.contrasts.readout import find_readout
from gtqlora.edits.edited import load as load_edited
from gtqlora.errors import ConfigError, ContrastError
from gtqlora.exports.job import Job
from gtqlora.exports.llama_cpp import LlamaCpp
from gtqlora.families import load_tokenizer
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.results.adapter import read_info
from gtqlora.results.diagnosis import Diagnosis
from gtqlora.results.export import read_export
from gtqlora.run import Run
from gtqlora.stages.diagnose import diagnose
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify
from tests import helpers
from tests.helpers import Toy

QWEN3 = (Path(__file__).parents[1] / "data" / "templates" / "qwen3.jinja").read_text()
_IN_TOY_WORDS = {
    r"'<|im_start|>' + message.role + '\n'": "'<user> ' if message.role == 'user' else ''",
    r"'<think>\n' + thought.text + '\n</think>\n\n' +": "' ' + thought.text + ' <assistant> ' +",
    r"'<|im_end|>\n'": "'' if message.role == 'user' else ' <eos>'",
    r"'<|im_start|>assistant\n'": "''",
    r"'<think>\n\n</think>\n\n'": "'  <assistant> '",
}
OFF, ON = {"enable_thinking": False}, dict[str, Any]()


def thinking(model: Path, folder: Path) -> Path:
    """A copy of a toy model with Qwen3's chat template in toy words."""
    text = QWEN3
    for theirs, ours in _IN_TOY_WORDS.items():
        assert theirs in text
        text = text.replace(theirs, ours)
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "validation"][: 3 * 34]
    return helpers.write_rows(tmp_path_factory.mktemp("contrast") / "c.jsonl", rows)


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking(embedded.organism("routed"), tmp_path_factory.mktemp("thinking") / "model")


@pytest.mark.parametrize("variables", [ON, OFF], ids=["thinking", "not thinking"])
def test_single_experts_are_named_whatever_stands_before_answers(
    organism: Path, contrast: Path, variables: dict[str, Any], tmp_path: Path
) -> None:
    config = build(
        DiagnoseConfig,
        file=embedded.recipe(),
        model=organism,
        contrast=contrast,
        random_controls=0,
        max_candidates=6,
        template=variables,
    )
    tokenizer = load_tokenizer(str(organism), variables)
    rows = load(contrast, judge_of(config.judge)).rows
    assert tokenizer.convert_ids_to_tokens(find_readout(tokenizer, rows).tokens) == ["refuse"]
    ends = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, rows[0].prompt))[-1]
    assert (ends == "<assistant>") == (variables == OFF)
    with Run(tmp_path / "run") as run:
        found: Diagnosis = diagnose(config, run)
        assert run.manifest()["stages"]["diagnose"]["config"]["template"] == variables
    truth = embedded.read_truth(embedded.organism("routed"))
    assert found.readout == ["refuse"] and found.verdict == truth.verdict
    assert {(e.layer, e.expert) for e in found.causal_experts} == set(truth.planted)


# --- the settings, from the command line to the model card -----------------------------------------------------------


@pytest.fixture(scope="module")
def model(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking(toy.model("qwen3_moe"), tmp_path_factory.mktemp("toy") / "model")


def test_what_an_edit_is_trained_with_goes_to_its_verdict_and_its_card(toy: Toy, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Run(run) as held:
        train(toy.train_config(model, template=OFF), held)
    info = read_info(run / "adapter")
    assert info.template == OFF and of_the_edit(info.config)["template"] == OFF
    assert main(["verify", str(run), *helpers.VERIFY]) == 0
    assert json.loads((run / "manifest.json").read_text())["stages"]["verify"]["config"]["template"] == OFF
    edited = load_edited(str(model), run / "adapter").subject.tokenizer
    asked = [{"role": "user", "content": "copy reverse"}]
    assert encode_prompt(edited, asked) == encode_prompt(load_tokenizer(str(model), OFF), asked)
    assert main(["export", str(run), str(tmp_path / "out"), "--set", f"judge={helpers.JUDGE}"]) == 0
    assert "chat template's `enable_thinking=false`" in (tmp_path / "out" / "README.md").read_text()
    assert "enable_thinking" in (tmp_path / "out" / "chat_template.jinja").read_text()
    out = tmp_path / "peft"  # asked again, in plain PEFT
    assert main(["export", str(run), str(out), "--to", "peft", "--set", f"judge={helpers.JUDGE}"]) == 0
    made = read_export(out)
    assert made.form is not None and any("`enable_thinking=false`" in note for note in made.notes)
    with Run(run) as held:
        inside = LlamaCpp.of(Job.of(certify(held, helpers.JUDGE), ExportConfig(to="gguf")), out)
    assert encode_prompt(inside._tokenizer, asked) == encode_prompt(edited, asked)
    original = (model / "chat_template.jinja").read_bytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == original


def test_the_next_command_asks_in_the_same_way() -> None:
    options = StageOptions(contrast="c", settings=["template.enable_thinking=false", "steps=3", " template.n = 2"])
    assert same_prompts(options) == ["--contrast", "c", "--set", options.settings[0], "--set", options.settings[2]]  # type: ignore[index]


def test_the_recipes_of_thinking_models_switch_thinking_off() -> None:
    for file, name in (("qwen3_30b_a3b", "enable_thinking"), ("kimi_k25", "thinking")):
        recipe = helpers.ROOT / "recipes" / f"{file}.toml"
        for kind in STAGES.values():
            settled = build(kind, file=recipe, model="m", contrast="c", overrides=["device=cpu"])
            assert settled.template == {name: False}


def test_another_way_of_asking_is_another_verdict(toy: Toy, model: Path, tmp_path: Path) -> None:
    """With thinking on the toy model is asked elsewhere, so that what it says must be found out anew."""
    helpers.noop_adapter(model, toy.contrast, helpers.JUDGE, tmp_path / "run")
    with Run(tmp_path / "run") as held:
        verify(toy.verify_config(model, template=OFF), held)
        first = held.manifest()["stages"]["verify"]["hash"]
        scores = (tmp_path / "run" / "scores.parquet").read_bytes()
        verify(toy.verify_config(model), held)
        assert held.manifest()["stages"]["verify"]["hash"] != first
    assert (tmp_path / "run" / "scores.parquet").read_bytes() != scores


def test_training_learns_the_same_answers_with_thinking_on(toy: Toy, model: Path, tmp_path: Path) -> None:
    """What stands before answers is no part of them, so that the two trainings are one to the last bit."""
    found = []
    for name, variables in (("on", ON), ("off", OFF)):
        with Run(tmp_path / name) as held:
            train(toy.train_config(model, template=variables), held)
        found.append(load_file(tmp_path / name / "adapter" / "edit.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(bool((found[0][key] == found[1][key]).all()) for key in found[0])


def test_rows_beyond_max_length_are_refused_before_a_step(toy: Toy, tmp_path: Path) -> None:
    rows = helpers.toy_rows({("train", kind): 2 for kind in ("benign", "lookalike", "harmful")})
    rows[1]["prompt"] = " ".join([rows[1]["prompt"]] * 2)
    del rows[1]["twin"]
    file = helpers.write_rows(tmp_path / "pairs.jsonl", rows)
    config = toy.train_config(toy.model("qwen3_moe"), contrast=str(file), max_length=16)
    with Run(tmp_path / "run") as held, pytest.raises(ContrastError, match=r"row 2: the prompt .* longer than 16 tok"):
        train(config, held)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_misspelt_variable_stops_a_stage_before_the_model_is_loaded(
    toy: Toy, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gtqlora.capture.subject.load_model", lambda *_a, **_k: pytest.fail("was loaded"))
    with Run(tmp_path / "run") as held, pytest.raises(ConfigError, match="did you mean 'enable_thinking'"):
        train(toy.train_config(model, template={"enable_thinkin": False}), held)


# --- contrast check and inspect ---------------------------------------------------------------------------------------

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Said:
    def called(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), " ".join(err.split())

    return called


def checked(say: Said, toy: Toy, model: Path, *more: object) -> tuple[int, str, str]:
    return say("contrast", "check", toy.contrast, "--model", model, "--judge", helpers.JUDGE, *more)


def test_the_check_says_where_answers_begin_and_by_what_refusals_are_told(say: Said, toy: Toy, model: Path) -> None:
    code, out, err = checked(say, toy, model)
    assert code == 0 and "variables that `template` can set: enable_thinking" in out
    assert "chat template: has '<assistant>' before answers" in out
    assert "set template.enable_thinking=false to switch it off" in out
    assert "refusals are told from answers by the token 'refuse'" in out
    assert "tokens that prompt and answer may have: 64" in out
    assert "lookalike rejected refusal 24 of 24" in out
    code, out, err = checked(say, toy, model, "--set", "template.enable_thinking=false", "--set", "max_length=20")
    assert code == 0 and "has nothing before answers" in out and "may have: 20" in out and "lacks" not in err
    code, _, err = checked(say, toy, model, "--set", "template.enable_thinkng=false")
    assert code == 2 and "did you mean 'enable_thinking'?" in err
    code, _, err = checked(say, toy, model, "--set", "max_length=12")
    assert code == 2 and "longer than 12 tokens; shorten, drop, or raise `max_length`" in err
    code, _, err = say("contrast", "check", toy.contrast, "--judge", helpers.JUDGE, "--set", "max_length=12")
    assert code == 2 and "give --model, too" in err


def test_the_check_reads_a_recipe(say: Said, toy: Toy, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[template]\nenable_thinking = false\n[train]\nmax_length = 30\n")
    code, out, _ = checked(say, toy, model, "--config", recipe)
    assert code == 0 and "has nothing before answers" in out and "may have: 30" in out


def test_the_check_as_json(toy: Toy, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["contrast", "check", str(toy.contrast), "--model", str(model), "--judge", helpers.JUDGE, "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["template"]["reads"] == ["enable_thinking"] and found["readout"] == ["refuse"]
    assert found["template"]["switch"] == "template.enable_thinking=false" and found["max_length"] == 64
    told = {"kind": "lookalike", "column": "rejected", "meant": "refusal", "rows": 24, "agreeing": 24}
    assert {**told, "labels": {"refusal": 24}} in found["agreement"]


def test_what_neither_judge_nor_diagnosis_could_tell_is_noted(say: Said, tmp_path: Path) -> None:
    rows = helpers.toy_rows({("train", kind): 8 for kind in ("benign", "lookalike", "harmful")})
    for i, row in enumerate(rows):
        if row["kind"] == "lookalike":  # refusals that the judge does not know, and that begin as answers do
            row["rejected"] = f"{row['chosen'].split()[0]} decline"
        elif row["kind"] == "harmful":
            row["chosen"], row["rejected"] = "refuse sorry", f"refuse {i} copy"
    file = helpers.write_rows(tmp_path / "pairs.jsonl", rows)
    check = ("contrast", "check", file, "--model", "organism:routed", "--judge", "string:refuse sorry")
    code, out, _ = say(*check)
    assert code == 0
    assert "note: the judge takes only 0 of 8 lookalike `rejected` for a refusal" in out
    assert "note: refusals and answers begin with the same tokens, so that diagnose has no log-odds" in out


def test_inspect_says_what_the_template_does(say: Said, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say("inspect", model)
    assert code == 0 and "chat template: yes" in out and "chat template: has '<assistant>' before answers" in out
    assert "variables that `template` can set: enable_thinking" in out
    assert main(["inspect", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompting"]["reads"] == ["enable_thinking"]
