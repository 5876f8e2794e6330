"""The command line: what it prints, its exit codes, and that a mistake costs one line and no traceback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gtqlora.cli import main
from gtqlora.cli.settings import StageOptions, configured
from gtqlora.config import VerifyConfig
from gtqlora.progress import note
from gtqlora.run import Run
from gtqlora.stats import fewest_changed
from tests import helpers, models

KIMI = Path(__file__).parents[1] / "data" / "kimi_k25_config.json"
VERBS = (
    "inspect",
    "contrast",
    "diagnose",
    "train",
    "project",
    "verify",
    "export",
    "report",
    "demo",
    "judge",
    "bitdelta",
)
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Say:
    """Run the command line in this process; exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        done = capsys.readouterr()
        return code, done.out, done.err

    return run


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gtqlora", *map(str, arguments)],
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def error_of(done: tuple[int, str, str], code: int, *parts: object) -> str:
    """The error line, which names every part."""
    got, _, err = done
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == code and len(lines) == 1, (got, err)
    for part in parts:
        assert str(part) in lines[0], (part, lines[0])
    return lines[0]


# --- reading only ----------------------------------------------------------------------------------------------------


def test_help_lists_the_verbs() -> None:
    done = process("--help")
    assert done.returncode == 0 and not done.stderr
    assert all(f"│ {verb} " in done.stdout for verb in VERBS)


def test_help_of_every_verb_is_light() -> None:
    """Whatever takes long to import waits until a verb runs."""
    verbs = [["contrast", "check"] if verb == "contrast" else [verb] for verb in VERBS]
    heavy = {"torch", "transformers", "peft", "trl", "datasets", "pyarrow", "scipy", "numpy", "jinja2", "plotly"}
    code = f"""
import sys
from gtqlora.cli import main
for verb in {[[], *verbs]}:
    assert main([*verb, "--help"]) == 0, verb
    assert not {heavy} & sys.modules.keys(), verb
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--expert-format" in done.stdout and "--experts" not in done.stdout
    assert done.stdout.count("Usage: gtqlora") == len(VERBS) + 1


def test_mistakes_about_pairs_are_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "pairs.parquet").touch()
    advbench = str(Path(__file__).parents[1] / "data" / "public" / "advbench.csv")
    model, there = ["--model", "organism:routed"], str(tmp_path / "pairs.parquet")
    wrong = [
        ["check", "nowhere.jsonl", *model],
        ["check", "organism", *model, "--out", there],
        ["check", advbench, *model],
        ["build", "nowhere.csv", *model, "--out", str(tmp_path / "new.parquet")],
        ["build", advbench, *model, "--out", there],
        ["build", advbench, *model, "--out", str(tmp_path / "new.parquet"), "--as", "wug:prompt=goal"],
    ]
    code = f"""
import sys
from gtqlora.cli import main
for words in {wrong}:
    assert main(["contrast", *words]) == 2, words
    assert not {{"torch", "transformers", "datasets", "scipy"}} & sys.modules.keys(), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(wrong)


def test_inspect_an_organism(say: Say) -> None:
    code, out, _ = say("inspect", "organism:routed")
    assert code == 0
    assert "deepseek_v3" in out and "4 routers, 16 experts top-2" in out and "chat template: yes" in out
    code, out, _ = say("inspect", "organism:routed", "--json")
    found = json.loads(out)
    assert (code, found["routers"], found["experts"], found["gate_parameters"]) == (0, 4, 16, 4 * 16 * 64)


def test_inspect_kimi_from_its_config(say: Say) -> None:
    code, out, _ = say("inspect", KIMI)
    assert code == 0
    for number in ("60 routers", "165,150,720", "1,026,408,209,408", "23,040"):
        assert number in out


def test_inspect_imports_no_library_that_only_other_verbs_need() -> None:
    code = f"""
import sys
from gtqlora.cli import main
assert main(["inspect", {str(KIMI)!r}]) == 0
assert not {{"peft", "trl", "datasets", "bitsandbytes", "plotly"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_contrast_check_counts(say: Say, tmp_path: Path) -> None:
    code, out, _ = say("contrast", "check", "organism", "--model", "organism:routed", "--out", tmp_path / "c.parquet")
    assert code == 0
    assert "4,230 rows, 1,690 pairs" in out and "4,230 different prompts" in out and "tokens, prompt" in out
    heldout = next(line for line in out.splitlines() if "heldout" in line)
    assert heldout.replace("│", " ").split() == ["heldout", "420", "420", "840"]
    assert "0 duplicates, 0 leaks between splits" in out and "note:" not in out
    assert (tmp_path / "c.parquet").is_file()


def test_contrast_check_says_where_pairs_are_too_few_to_interchange(say: Say, tmp_path: Path) -> None:
    file = helpers.write_rows(tmp_path / "pairs.jsonl", ROWS)
    _, out, _ = check(say, file, "--model", "organism:routed")
    words = " ".join(out.split())
    assert (
        "note: diagnose reads the validation split, where 0 lookalike and 0 harmful pairs can be interchanged" in words
    )
    assert "a verdict needs 30 of a kind. All splits have 2 lookalike and 2 harmful (--set split=all)" in words


# --- bad pairs -------------------------------------------------------------------------------------------------------

ROWS = helpers.toy_rows({("train", kind): 2 for kind in ("benign", "lookalike", "harmful")})
HARMFUL = next(i for i, row in enumerate(ROWS) if row["kind"] == "harmful")


def test_contrast_check_says_what_the_floor_misses(say: Say, tmp_path: Path) -> None:
    file = helpers.write_rows(tmp_path / "pairs.jsonl", ROWS)
    code, out, _ = check(say, file)
    assert code == 0
    assert "note: 0 held-out harmful prompts; the floor needs at least 150" in " ".join(out.split())
    found = read_json(check(say, file, "--json"), "floor", "duplicates", "leaks")
    assert (
        "note: 0 held-out lookalike prompts; a repair of 20% of them can be told from chance on 20 or more"
        in " ".join(out.split())
    )
    assert found["repair"]["prompts"] == 0 and found["repair"]["fewest"] == fewest_changed(0.2)
    few = read_json(check(say, file, "--json", "--repair", "0.5"), "repair")["repair"]
    assert few["share"] == 0.5 and 0 < few["fewest"] < found["repair"]["fewest"]
    error_of(check(say, file, "--repair", "0"), 2, "repair = 0.0: a share of the lookalike prompts")
    assert found["floor"]["prompts"] == 0 and found["floor"]["fewest"] == 150 and not found["floor"]["reachable"]


def turned(number: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**row, **changes} if i == number else row for i, row in enumerate(ROWS)]


def check(say: Say, file: Path, *more: object) -> tuple[int, str, str]:
    return say("contrast", "check", file, "--judge", "string:refuse sorry", *more)


def test_the_one_way_rule_stops_a_complying_answer(tmp_path: Path) -> None:
    file = helpers.write_rows(tmp_path / "pairs.jsonl", turned(HARMFUL, chosen="baba gede", rejected="refuse sorry"))
    done = process("contrast", "check", file, "--judge", "string:refuse sorry")
    error_of((done.returncode, done.stdout, done.stderr), 2, file, f"row {HARMFUL + 1}:", "one-way rule")
    assert not done.stdout


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([], "no rows"),
        ([row for row in ROWS if row["kind"] == "benign"], "no harmful rows, only benign"),
        ([row for row in ROWS if row["kind"] == "harmful"], "only harmful rows"),
        (turned(0, rejected=ROWS[0]["chosen"]), "row 1: chosen and rejected are the same"),
    ],
    ids=["empty", "benign", "harmful", "same"],
)
def test_bad_pairs(say: Say, tmp_path: Path, rows: list[dict[str, Any]], part: str) -> None:
    file = helpers.write_rows(tmp_path / "pairs.jsonl", rows)
    error_of(check(say, file), 2, file, part)


def test_prompts_longer_than_the_model(say: Say, tmp_path: Path) -> None:
    file = helpers.write_rows(tmp_path / "pairs.jsonl", turned(1, prompt=" ".join(["bada"] * 80)))
    error_of(check(say, file, "--model", "organism:routed"), 2, file, "row 2:", "longer than 64 tokens")


def test_a_place_that_cannot_be_written(say: Say, tmp_path: Path) -> None:
    pairs = helpers.write_rows(tmp_path / "pairs.jsonl", ROWS)
    error_of(check(say, pairs, "--out", pairs / "c.parquet"), 2, pairs)


# --- bad models ------------------------------------------------------------------------------------------------------


def test_bad_model_folders(say: Say, tmp_path: Path) -> None:
    error_of(say("inspect", tmp_path / "nowhere"), 2, tmp_path / "nowhere", "no such model folder")
    error_of(say("inspect", tmp_path), 2, tmp_path, "no config.json")
    config = tmp_path / "config.json"
    config.write_text("{")
    error_of(say("inspect", tmp_path), 2, config, "not valid JSON")
    config.write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    error_of(say("inspect", tmp_path), 2, tmp_path, "'llama' is a dense model")
    run = ("--contrast", "organism", "--config", "organism", "--run", tmp_path / "run")
    error_of(say("diagnose", tmp_path, *run), 2, "only Level 1 (the residual stream) applies")
    config.write_text(json.dumps({"model_type": "granitemoe", "num_local_experts": 8}))
    error_of(say("inspect", tmp_path), 2, tmp_path, "unknown MoE family 'granitemoe'", "deepseek_v3")
    error_of(say("inspect", "organism:nothing"), 2, "'nothing'", "routed-qwen3")


JUDGED = ("--set", "judge=" + helpers.JUDGE)


def train(say: Say, toy: helpers.Toy, model: object, run: Path, *more: object) -> tuple[int, str, str]:
    settings = ("judge=" + helpers.JUDGE, "steps=2", "batch_size=4", "rank=4", "max_new_tokens=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    return say("train", model, "--contrast", toy.contrast, "--run", run, *sets, *more)


def test_no_chat_template(say: Say, toy: helpers.Toy, tmp_path: Path) -> None:
    model = models.save_tiny(tmp_path / "model", "deepseek_v3")
    (model / "chat_template.jinja").unlink()
    error_of(train(say, toy, model, tmp_path / "run"), 2, model, "no chat template")


def test_nan_weights(say: Say, toy: helpers.Toy, tmp_path: Path) -> None:
    model, name = models.save_tiny(tmp_path / "model", "deepseek_v3"), "model.layers.1.mlp.gate.weight"
    models.edit_tensors(model / "model.safetensors", lambda all: {**all, name: torch.full_like(all[name], torch.nan)})
    error_of(train(say, toy, model, tmp_path / "run"), 2, model, name, "NaN")


# --- bad runs and settings -------------------------------------------------------------------------------------------


def test_unknown_setting(say: Say, toy: helpers.Toy, tmp_path: Path) -> None:
    done = train(say, toy, "organism:routed", tmp_path / "run", "--set", "stesp=3")
    error_of(done, 2, "'stesp'", "did you mean 'steps'?")


def test_run_directory_below_a_file(say: Say, toy: helpers.Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error_of(train(say, toy, "organism:routed", tmp_path / "file" / "run"), 2, tmp_path / "file" / "run", "written")


def test_locked_run_directory(tmp_path: Path) -> None:
    with Run(tmp_path / "run"):
        done = process("report", tmp_path / "run")
    error_of((done.returncode, done.stdout, done.stderr), 2, tmp_path / "run", "another process")
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("verb", [("verify",), ("report",), ("export",)])
def test_a_mistyped_run_is_not_made(say: Say, tmp_path: Path, verb: Sequence[str]) -> None:
    more = [tmp_path / "out"] if verb == ("export",) else []
    error_of(say(*verb, tmp_path / "rnu", *more), 2, tmp_path / "rnu", "no such run directory")
    assert not (tmp_path / "rnu").exists()


def test_verify_before_train(say: Say, tmp_path: Path) -> None:
    error_of(say("verify", tmp_path), 2, tmp_path, "not a run directory", "gtqlora train")
    Run(tmp_path).close()
    error_of(say("verify", tmp_path), 2, tmp_path, "no adapter here", "gtqlora train")


# --- JSON


def read_json(done: tuple[int, str, str], *keys: str, code: int = 0) -> dict[str, Any]:
    """Return what a verb printed: JSON and nothing else, with at least these keys."""
    got, out, err = done
    assert got == code and "error:" not in err
    found = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert found.keys() >= set(keys)
    return found


def test_contrast_check_as_json(say: Say, tmp_path: Path) -> None:
    file, out = helpers.write_rows(tmp_path / "pairs.jsonl", ROWS), tmp_path / "c.parquet"
    done = check(say, file, "--model", "organism:routed", "--out", out, "--json")
    found = read_json(done, "rows", "pairs", "counts", "prompt_tokens", "full_tokens", "with_twin", "unique_prompts")
    assert (found["rows"], found["counts"]["train"]["harmful"]) == (6, 2) and out.is_file()


def test_problems_of_a_contrast_set_as_json(say: Say, tmp_path: Path) -> None:
    bad = [{**ROWS[0], "prompt": ""}, {**ROWS[0], "kind": "odd"}]
    code, out, err = check(say, helpers.write_rows(tmp_path / "pairs.jsonl", [*ROWS, *bad, ROWS[0]]), "--json")
    found = json.loads(out)["problems"]
    assert code == 2 and "3 problems" in err
    assert [(one["rows"], one["excess"]) for one in found] == [([7], [7]), ([8], [8]), ([1, 9], [9])]
    assert "prompt is empty" in found[0]["problem"]


def test_rows_with_problems_are_left_out_on_demand(say: Say, tmp_path: Path) -> None:
    bad = [{**ROWS[0], "prompt": ""}, ROWS[0], {**ROWS[0], "prompt": "Tell me <user> twice " * 40}]
    file, out = helpers.write_rows(tmp_path / "pairs.jsonl", [*ROWS, *bad]), tmp_path / "clean.parquet"
    error_of(check(say, file, "--drop"), 2, "--out clean.parquet")
    error_of(check(say, file, "--out", out), 2, "2 problems")
    assert not out.exists()
    code, text, _ = check(say, file, "--drop", "--out", out, "--model", "organism:routed")
    assert code == 0 and "left out: 3 rows" in text and "row 7: prompt is empty" in text and "row 8: the same" in text
    assert "row 9: the prompt alone longer than 64 tokens" in text
    assert f"wrote {out}: 6 rows (2 benign, 2 lookalike, 2 harmful)\n" in text
    assert read_json(check(say, out, "--json"), "rows")["rows"] == 6
    again = check(say, file, "--drop", "--out", tmp_path / "b.parquet", "--model", "organism:routed", "--json")
    assert [one["excess"] for one in read_json(again, "rows")["dropped"]] == [[7], [8], [9]]


def test_errors_stay_one_line_and_keep_standard_output_empty(say: Say, tmp_path: Path) -> None:
    for verb in ("inspect", "verify", "report"):
        done = say(verb, tmp_path / "nowhere", "--json")
        error_of(done, 2, tmp_path / "nowhere")
        assert not done[1]
    for wrong in (["inspect", "m", "--jsn"], ["inspect"], ["diagnose", "m", "--json"], ["inspct", "m"]):
        done = say(*wrong)
        assert error_of(done, 2, "--help") and not done[1]


def test_the_old_name_of_the_expert_format_is_still_taken(say: Say, caplog: pytest.LogCaptureFixture) -> None:
    note.cache_clear()
    for flag in ("--expert-format", "--experts"):
        assert not caplog.messages
        found = read_json(say("inspect", "organism:routed", flag, "nf4", "--json"), "groups", "names")
        assert found["expert_format"] == "nf4"
    assert caplog.messages == ["the option --experts is called --expert-format now"]


@pytest.mark.parametrize("key", ["ablation", "silencing"])
def test_a_setting_of_another_stage(
    say: Say, toy: helpers.Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    note.cache_clear()
    file = tmp_path / "recipe.toml"
    file.write_text(f"[diagnose]\n{key} = 0\n")
    for more in (("--set", f"{key}=0"), ("--config", file)):
        done = say("diagnose", "organism:routed", "--contrast", toy.contrast, "--run", tmp_path / "run", *more)
        error_of(done, 2, f"key {key!r} is unknown; it is a setting of verify")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("inspect", "MODEL is missing. See gtqlora inspect --help"),
        ("train m", "--run is missing. See gtqlora train --help"),
        ("contrast check", "FILE is missing. See gtqlora contrast check --help"),
        ("export r", "OUT is missing. See gtqlora export --help"),
        ("inspect m --rank", "--rank"),
        ("inspect organism:routed --rank 0", "--rank 0: must be at least 1"),
        ("inspect organism:routed --expert-format nf5", "expert_format = 'nf5': must be one of bf16, nf4,"),
    ],
)
def test_errors_name_what_was_typed(say: Say, typed: str, said: str) -> None:
    line = error_of(say(*typed.split()), 2, said)
    assert "lora_rank" not in line and ("is missing" in line) == ("is missing" in said)


# --- all of it -------------------------------------------------------------------------------------------------------


def test_from_diagnosis_to_weights(say: Say, toy: helpers.Toy, tmp_path: Path) -> None:
    """Every stage as text and, from what it left, as JSON."""
    model, run, out = toy.model("deepseek_v3"), tmp_path / "run", tmp_path / "[red]out"
    judge = ("--set", f"judge={helpers.JUDGE}", "--set", "max_new_tokens=2")
    few = ("--set", "split=train", "--set", "bootstrap=20", "--set", "random_controls=1")
    diagnose = ("diagnose", model, "--contrast", toy.contrast, "--run", run, *judge, *few)
    code, text, _ = say(*diagnose)
    assert code == 0 and "What the prompts do under interventions" in text
    *_, sentence, following = text.splitlines()
    words = f"train {model} --contrast {toy.contrast} --run {run} --set judge={helpers.JUDGE}".split()
    assert following.startswith("next: gtqlora train ") and sorted(shlex.split(following)[2:]) == sorted(words)
    found = read_json(say(*diagnose, "--json"), "verdict", "sentence", "kinds", "interventions", "experts")
    assert f"\nverdict: {found['verdict']}\n" in text and found["sentence"].endswith(sentence)
    code, text, _ = train(say, toy, model, run)
    assert code == 0 and text.startswith("trained: 2 steps") and f"gtqlora verify {run}" in text
    error_of(say("export", run, out), 2, "no verdict.json", "gtqlora verify")
    record = (run / "manifest.json").read_text()
    code, text, _ = train(say, toy, model, run)
    assert code == 0 and text.startswith("trained already") and (run / "manifest.json").read_text() == record
    found = read_json(train(say, toy, model, run, "--json"))
    assert found == {"adapter": str(run / "adapter"), "steps": 2, "stopped": None, "moved": None, "fresh": True}
    verify = ("verify", run, *helpers.VERIFY)
    code, text, _ = say(*verify)
    assert code == 0 and "safety floor: pass" in text
    found = read_json(say(*verify, "--json"), "table", "floor", "drift", "mediation", "ablation", "kl_benign", "tries")
    assert found["floor"]["verdict"] == "pass" and found["table"].keys() == {"benign", "lookalike", "harmful"}
    code, text, _ = say("report", run)
    assert code == 0 and "<html" in Path(text.strip()).read_text()[:200]
    assert read_json(say("report", run, "--json")) == {"page": text.strip()}
    code, text, _ = say("export", run, out)
    assert code == 0 and text.startswith(f"{out}: ") and (out / "model.safetensors").is_file()
    found = read_json(say("export", run, tmp_path / "again", "--json"))
    assert found.keys() == {
        *("folder", "tensors_changed", "gate_values_changed", "divergence", "kept", "form", "notes", "what"),
    }
    assert found["folder"] == str(tmp_path / "again")


def test_project_as_text_and_as_json(say: Say, toy: helpers.Toy, tmp_path: Path) -> None:
    settings = ("max_pairs=4", "layer=1", "judge=" + helpers.JUDGE, "max_new_tokens=2")
    sets = [word for setting in settings for word in ("--set", setting)]
    project = ("project", toy.model("qwen3_moe"), "--contrast", toy.contrast, "--run", tmp_path / "run", *sets)
    found = read_json(say(*project, "--json"))
    assert found.keys() == {"adapter", "layer", "candidates"} and found["layer"] == 1
    assert found["candidates"][0].keys() == {"layer", "refusal", "accuracy"}
    code, text, _ = say(*project)
    assert code == 0 and "1 (chosen)" in text


def test_a_floor_not_passed(say: Say, toy: helpers.Toy, verified: Any, tmp_path: Path) -> None:
    """Sixty prompts cannot show a drop below the default margin, so nothing leaves."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(verified(toy.model("deepseek_v3")), run)
    sixty = {("heldout", "harmful"): 60, ("heldout", "lookalike"): 8, ("heldout", "benign"): 8}
    few = helpers.write_rows(tmp_path / "few.jsonl", helpers.toy_rows(sixty))
    code, text, err = say("verify", run, "--contrast", few, *helpers.VERIFY, "--set", "margin=0.02")
    assert code == 4 and "safety floor: cannot tell" in text and "Traceback" not in err
    as_json = read_json(
        say("verify", run, "--contrast", few, *helpers.VERIFY, "--set", "margin=0.02", "--json"), code=4
    )
    assert as_json["floor"]["verdict"] == "cannot tell"
    assert "that takes at least" in text.replace("\n", " ")
    error_of(say("export", run, out, *JUDGED), 4, run, "safety floor", "no weights")
    assert not out.exists()


def test_verify_takes_the_settings_of_the_adapter_that_is_there(
    say: Say, toy: helpers.Toy, verified: Any, tmp_path: Path
) -> None:
    """A stage killed between its adapter and the manifest leaves an older stage on record."""
    run = tmp_path / "run"
    shutil.copytree(verified(toy.model("deepseek_v3")), run)
    stale = {"model": "/gone", "contrast": "/gone.jsonl", "judge": "string"}
    models.edit_json(
        run / "manifest.json",
        lambda m: {**m, "stages": {"train": {**m["stages"]["train"], "config": stale}}},
    )
    code, text, _ = say("verify", run, *helpers.VERIFY)
    assert code == 0 and "safety floor: pass" in text


def test_a_verdict_in_bf16_does_not_ask_where_4_bit_experts_waited() -> None:
    edit = {"model": "m", "contrast": "c", "expert_format": "nf4", "expert_memory": 20.0, "expert_disk": "/d"}
    same = configured(VerifyConfig, StageOptions(), edit)
    assert (same.expert_format, same.expert_memory, same.expert_disk) == ("nf4", 20.0, "/d")
    other = configured(VerifyConfig, StageOptions(expert_format="bf16"), edit)
    assert (other.expert_format, other.expert_memory, other.expert_disk) == ("bf16", None, None)
