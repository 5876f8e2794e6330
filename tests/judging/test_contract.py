"""Judges of code: how one is named, what it is asked, what it may reply, and what it is known by."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtqlora.cli import main
from gtqlora.config import DiagnoseConfig
from gtqlora.errors import ConfigError, FloorError
from gtqlora.judging.judge import MOST_AT_ONCE, judge_of, labels, refusals, same
from gtqlora.judging.labels import LABELS, Judgement, judgement_of
from gtqlora.judging.string_judge import EDITION
from gtqlora.run import Run, read_manifest
from gtqlora.stages.diagnose import diagnose
from gtqlora.stages.project import project
from gtqlora.stages.train import train
from gtqlora.stages.verify import verify
from tests import helpers
from tests.judging import classifier
from tests.judging.classifier import Classifier

NAME = "tests.judging.classifier:Classifier"
PROMPT = ({"role": "user", "content": "asked"},)

CODE = """
from gtqlora.judging.labels import Judgement

def text(text): return text == "no"
def text_and_more(text, limit=3): return len(text) < limit
def both(prompts, answers): return [Judgement("refusal" if a == "no" else "answer", 0.5) for a in answers]
def factory(): return both
def factory_of_text(): return text
class Made:
    model, revision = "org/name", "c0ffee"
    def __call__(self, prompts, answers): return both(prompts, answers)
class OfText:
    def __call__(self, text): return text == "no"
class Comparing:
    def __call__(self, prompts, answers): return both(prompts, answers)
    def same(self, answers, others): return [a[0] == b[0] for a, b in zip(answers, others)]
class ComparingBadly(Comparing):
    def same(self, answers, others): return ["yes" for _ in answers]
class ComparingNot(Comparing):
    def same(self, answers, others): raise RuntimeError("out of memory")
asked = []
def told(prompts, answers):
    asked.append((prompts, answers))
    return both(prompts, answers)

def few(prompts, answers): return both(prompts, answers)[1:]
def bools(prompts, answers): return [a == "no" for a in answers]
def named(prompts, answers): return [{"no": "refusal", "well": "partial", "why?": "evasion"}.get(a) for a in answers]
def scores(prompts, answers): return [0.9 for _ in answers]
def words(prompts, answers): return ["refused" for _ in answers]
def numbers(prompts, answers): return [Judgement(0.9) for _ in answers]
def unsure(prompts, answers): return [Judgement("refusal", float("nan")) for _ in answers]
def word(prompts, answers): return "no" * len(answers)
def nothing(prompts, answers): return None
def lazy(prompts, answers): return (j for j in both(prompts, answers))
def raises(prompts, answers): raise RuntimeError("CUDA error: the GPU fell off\\nand more lines")
def three(a, b, c): return []
class Broken:
    def __init__(self): raise OSError("no weights at /models/judge")
class Needs:
    def __init__(self, path): pass
def makes_none(): return None
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own, on the path and not imported yet."""
    file = tmp_path / "contract_judges.py"
    file.write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "contract_judges", raising=False)
    return file


# --- what a name may mean


@pytest.mark.parametrize("name", ["text", "both", "bools", "factory", "factory_of_text", "Made", "OfText", "told"])
def test_functions_classes_and_what_makes_them_are_judges(module: Path, name: str) -> None:
    judge = judge_of(f"contract_judges:{name}")
    found = judge([PROMPT] * 3, ["no", "yes", "no"])
    assert [judgement.label for judgement in found] == ["refusal", "answer", "refusal"]
    assert all(type(judgement) is Judgement for judgement in found)


def test_a_reply_may_be_any_label_or_none(module: Path) -> None:
    judge = judge_of("contract_judges:named")
    assert labels(judge, [PROMPT] * 4, ["no", "well", "why?", "hm"]) == ["refusal", "partial", "evasion", "undecided"]
    assert refusals(judge, [PROMPT] * 4, ["no", "well", "why?", "hm"]) == [True, False, False, False]
    assert {judgement_of(label).label for label in LABELS} == set(LABELS)


def test_a_default_makes_no_second_argument(module: Path) -> None:
    assert refusals(judge_of("contract_judges:text_and_more"), [PROMPT] * 2, ["no", "long"]) == [True, False]


def test_a_judge_gets_prompts_with_answers_in_batches_and_no_empty_one(module: Path) -> None:
    judge = judge_of("contract_judges:told")
    asked = importlib.import_module("contract_judges").asked
    prompts = [({"role": "user", "content": str(i)},) for i in range(MOST_AT_ONCE + 10)]
    answers = ["" if i == 4 else " \n" if i == 5 else "no" for i in range(len(prompts))]
    assert refusals(judge, prompts, answers) == [i not in (4, 5) for i in range(len(prompts))]
    assert [len(answers) for _, answers in asked] == [MOST_AT_ONCE, 8]
    assert [p for prompts, _ in asked for p in prompts] == [p for i, p in enumerate(prompts) if i not in (4, 5)]
    asked.clear()
    assert refusals(judge, [PROMPT], [""]) == [False] and asked == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "returned 1 replies to 2 answers"),
        ("scores", "replied '0.9'; a reply is True, False, None, refusal, partial, .*, or a Judgement"),
        ("words", "replied 'refused'; a reply is True"),
        ("word", "returned str; it must return a list"),
        ("numbers", "failed: TypeError: a label is 0.9; it must be one of refusal, partial"),
        ("unsure", "failed: TypeError: a score is nan; it must be a finite number or None"),
        ("nothing", "returned NoneType; it must return a list"),
        ("lazy", "returned generator; it must return a list"),
        ("raises", "failed: RuntimeError: CUDA error: the GPU fell off$"),
    ],
)
def test_a_reply_that_is_none_costs_one_line(module: Path, name: str, message: str) -> None:
    judge = judge_of(f"contract_judges:{name}")
    with pytest.raises(ConfigError, match=f"judge = 'contract_judges:{name}': it {message}") as error:
        judge([PROMPT] * 2, ["no", "yes"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", "takes 3 arguments"),
        ("Broken", "cannot be built .OSError: no weights at /models/judge"),
        ("Needs", "cannot be built .TypeError: .*called without arguments"),
        ("makes_none", "makes a NoneType, which cannot be called"),
    ],
)
def test_what_cannot_be_a_judge_costs_one_line(module: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        judge_of(f"contract_judges:{name}")
    assert "\n" not in str(error.value)


def test_a_judge_may_find_answers_the_same_that_are_worded_differently(module: Path) -> None:
    answers, others = ["Yes, of course", "no", "aye"], ["yes, of  course", "never", "yes"]
    plain, comparing = (judge_of(f"contract_judges:{name}") for name in ("both", "Comparing"))
    assert plain.comparing is None and same(plain, answers, others) == [True, False, False]
    assert same(comparing, answers, others) == [True, True, False]
    assert same(lambda prompts, answers: [], answers, others) == [True, False, False]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ComparingBadly", "its `same` must return True or False for each of the answers"),
        ("ComparingNot", "its `same` failed: RuntimeError: out of memory"),
    ],
)
def test_a_comparison_that_is_none_costs_one_line(module: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        same(judge_of(f"contract_judges:{name}"), ["a"], ["b"])


def test_the_command_line_says_what_is_wrong_with_a_judge(
    module: Path, toy: helpers.Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["contrast", "check", str(toy.contrast), "--judge", "contract_judges:few"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "replies to" in said and "Traceback" not in said


# --- what it is known by


def test_a_judge_is_its_source_and_its_weights(module: Path, tmp_path: Path) -> None:
    plain, made = judge_of("contract_judges:both"), judge_of("contract_judges:Made")
    assert plain.identity.startswith("contract_judges:both sha256:") and "revision" not in plain.identity
    assert made.identity.endswith(" model:org/name revision:c0ffee")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"1")
    Made: Any = importlib.import_module("contract_judges").Made
    Made.model = str(weights)
    before = judge_of("contract_judges:Made").identity
    (weights / "model.safetensors").write_bytes(b"2")
    assert judge_of("contract_judges:Made").identity != before
    assert (
        judge_of("string:a|b").identity == "string:a|b" and judge_of("string").identity == f"string edition {EDITION}"
    )


Stage = Callable[[helpers.Toy, Path, Run, str], object]


def _diagnose(toy: helpers.Toy, model: Path, run: Run, judge: str) -> object:
    few = {"split": "train", "max_pairs": 8, "max_new_tokens": 2, "bootstrap": 20, "random_controls": 0}
    return diagnose(DiagnoseConfig(model=str(model), contrast=str(toy.contrast), judge=judge, **few), run)  # type: ignore[arg-type]


STAGES: dict[str, Stage] = {
    "verify": lambda toy, model, run, judge: verify(toy.verify_config(model, judge=judge, ablation=0), run),
    "diagnose": _diagnose,
    "project": lambda toy, model, run, judge: project(toy.project_config(model, judge=judge, max_pairs=8), run),
    "train": lambda toy, model, run, judge: train(toy.train_config(model, judge=judge), run),
}
SOURCE = "def refuses(text):\n    return len(text.split()) != 3\n"


@pytest.mark.parametrize("name", STAGES)
def test_a_changed_judge_is_stale_everywhere(
    name: str, toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very same settings, the same file name: only what the code says has changed."""
    model, file = toy.model("qwen3_moe"), tmp_path / "changing_judge.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    path = Path(shutil.copytree(verified(model), tmp_path / "run"))
    shutil.rmtree(path / "checkpoints")  # they are of a judge of another name

    def record() -> tuple[str, str]:
        monkeypatch.delitem(sys.modules, "changing_judge", raising=False)
        importlib.invalidate_caches()
        with Run(path) as run:
            STAGES[name](toy, model, run, "changing_judge:refuses")
        found = read_manifest(path)["stages"][name]
        return found["hash"], found["inputs"]["judge"]

    file.write_text(SOURCE)
    first = record()
    recorded = read_manifest(path)["stages"][name]
    assert record() == first and read_manifest(path)["stages"][name] == recorded
    file.write_text(SOURCE + "# another judge\n")
    assert all(now != before for now, before in zip(record(), first, strict=True))


def test_training_goes_on_from_its_checkpoints_under_a_changed_judge(toy: helpers.Toy, tmp_path: Path) -> None:
    """The edit follows from the rows; the judge only says whether they are taken, and is asked again."""
    config = toy.train_config(toy.model("qwen3_moe"))
    with Run(tmp_path) as run:
        edit = helpers.weights(train(config, run).adapter)
        manifest = read_manifest(tmp_path)
        manifest["stages"]["train"]["inputs"]["judge"] = "another"
        manifest["stages"]["train"]["hash"] = "another"
        helpers.models.edit_json(tmp_path / "manifest.json", lambda _: manifest)
        assert helpers.same(helpers.weights(train(config, run).adapter), edit)


# --- a classifier, in batches


@pytest.mark.parametrize("name", ["verify", "diagnose", "project"])
def test_a_classifier_is_built_once_a_stage_and_asked_in_batches(
    name: str, toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path
) -> None:
    model, path = toy.model("qwen3_moe"), Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "run"))
    classifier.forget()
    with Run(path) as run:
        STAGES[name](toy, model, run, NAME)
    assert Classifier.built == 1
    asked = sum(Classifier.batches)
    assert asked > 50 and len(Classifier.batches) < asked / 5 and max(Classifier.batches) <= MOST_AT_ONCE
    assert all(prompt[-1]["role"] == "user" for prompt in Classifier.prompts)


def test_a_classifier_gives_the_verdict_that_a_function_of_the_text_gives(
    toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path
) -> None:
    """`tests.helpers:refuses` is the same judge as a plain function; only the judge's name may differ."""
    model, found = toy.model("qwen3_moe"), []
    for number, judge in enumerate((helpers.JUDGE, NAME)):
        with Run(shutil.copytree(verified(model), tmp_path / str(number))) as run:
            found.append(verify(toy.verify_config(model, judge=judge, ablation=2), run))
    plain, asked = found
    assert (plain.table, plain.ablation, plain.mediation) == (asked.table, asked.ablation, asked.mediation)
    assert plain.judge != asked.judge and asked.judge.endswith(" revision:r1")


def test_export_asks_the_classifier_that_verify_asked(
    toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = toy.model("qwen3_moe"), Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "run"))
    with Run(path) as run:
        assert verify(toy.verify_config(model, judge=NAME, ablation=0), run).floor.verdict == "pass"
    monkeypatch.setattr(Classifier, "revision", "r2")
    with pytest.raises(FloorError, match="the judge is not the one"):
        helpers.exported(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Classifier, "revision", "r1")
    helpers.exported(path, tmp_path / "out")
