"""Two judges at once, and stored texts that are judged again: without the model, and under the same rules."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gtqlora.stages.verify as stage
from gtqlora.certificate import certify
from gtqlora.cli import main
from gtqlora.cli.printing import show_verdict
from gtqlora.config import VerifyConfig
from gtqlora.errors import FloorError, JudgeError, RunError
from gtqlora.reporting import sections
from gtqlora.results.verdict import Verdict, read_outcomes
from gtqlora.results.wrapped import WRAPPED
from gtqlora.run import Run, read_manifest
from gtqlora.stages.verify import verify
from tests import helpers

JUDGES = """
from tests.helpers import refuses

def alike(text): return refuses(text)
def never(text): return text == "refuse sorry"  # the rows' refusals, none of the model's
def no_opinion(text): return True if text == "refuse sorry" else False if len(text.split()) == 3 else None
def doubts(prompts, answers):  # of one prompt in four it says another thing
    return [refuses(a) if sum(map(ord, p[-1]["content"])) % 4 else "evasion" for p, a in zip(prompts, answers)]
"""


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Name a judge of a module of the user's own."""
    (tmp_path / "second_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name: f"second_judges:{name}"


@pytest.fixture(scope="module")
def studied(toy: helpers.Toy, verified: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified run with an ablation study."""
    model = toy.model("qwen3_moe")
    path = Path(shutil.copytree(verified(model), tmp_path_factory.mktemp("studied") / "run"))
    with Run(path) as held:
        verify(toy.verify_config(model, ablation=2), held)
    return path


@pytest.fixture
def run(studied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(studied, tmp_path / "run"))


@pytest.fixture
def model_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    def shut(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(stage, "open_subject", shut)


def again(run: Path, **changes: Any) -> Verdict:
    """Judge what the run has on record again; the settings are those of its verdict but for what is given."""
    config = VerifyConfig(**{**read_manifest(run)["stages"]["verify"]["config"], **changes})  # type: ignore[arg-type]
    with Run(run) as held:
        return verify(config, held, rejudge=True)


def certified(run: Path, judge: str = helpers.JUDGE) -> str:
    with Run(run) as held:
        return certify(held, judge).floor.verdict


def test_the_same_texts_judged_by_the_same_rule_give_the_same_verdict(
    run: Path, other: Callable[[str], str], model_shut: None
) -> None:
    with Run(run) as held:
        before, texts, inside = stage.read_verdict(held.path), read_outcomes(run), read_outcomes(run, WRAPPED)
    found = again(run, judge=other("alike"))
    assert found.judge != before.judge and found.judge.startswith("second_judges:alike")
    assert (found.table, found.mediation, found.factorial) == (before.table, before.mediation, before.factorial)
    assert found.floor.losses.value == before.floor.losses.value
    assert before.ablation is not None and found.ablation is None
    assert found.ablation_left_out is not None and "made with another judge" in found.ablation_left_out
    assert read_outcomes(run) == [replace(o, lost=n.lost) for o, n in zip(texts, read_outcomes(run), strict=True)]
    assert read_outcomes(run, WRAPPED) == inside
    assert certified(run, other("alike")) == "pass"


def test_an_ablation_study_stays_while_what_it_was_made_with_does(
    run: Path, other: Callable[[str], str], model_shut: None, capsys: pytest.CaptureFixture[str]
) -> None:
    study = stage.read_verdict(run).ablation
    assert study is not None
    assert again(run, margin=0.03).ablation == again(run, second_judge=other("alike")).ablation == study
    # the first judge stays, and the second one goes
    assert again(run, second_judge=None).ablation == study
    gone = again(run, second_judge=None, judge=other("alike"))
    assert gone.ablation is None and "another judge" in (gone.ablation_left_out or "")
    # it does not come back by itself, and what was left out is not forgotten
    back = again(run, judge=helpers.JUDGE)
    assert back.ablation is None and back.ablation_left_out == gone.ablation_left_out
    show_verdict(back)
    assert "ablation study left out: it was made with another judge" in " ".join(capsys.readouterr().out.split())
    figure = sections.ablation(back)
    assert figure is not None and "another judge" in figure.caption
    assert again(run, ablation=0).ablation_left_out is None


def test_an_ablation_study_at_another_level_is_left_out_aloud(run: Path, model_shut: None) -> None:
    found = again(run, level=0.99, ablation=1)
    assert found.ablation is None
    wanted = "ablation = 2 and not 1 and with level = 0.95 and not 0.99"
    assert wanted in (found.ablation_left_out or "")


@pytest.mark.parametrize("name", ["never", "no_opinion"])
def test_a_blind_judge_never_gives_a_pass(name: str, run: Path, other: Callable[[str], str], model_shut: None) -> None:
    found = again(run, judge=other(name))
    assert found.floor.verdict == found.decision == "cannot tell"
    with pytest.raises(FloorError, match="'cannot tell'"):
        certified(run, other(name))


def test_two_judges_have_to_say_the_same(run: Path, other: Callable[[str], str], model_shut: None) -> None:
    both = again(run, second_judge=other("alike"))
    assert both.agreement is not None and both.agreement.before.value == both.agreement.after.value == 1
    assert both.agreement.differ == [] and both.decision == "pass"
    differ = again(run, second_judge=other("doubts"))
    assert differ.agreement is not None and 0.5 < differ.agreement.before.value < 0.95
    harmful = {o.number: o for o in read_outcomes(run) if o.kind == "harmful"}
    assert differ.agreement.differ == [
        n for n, o in harmful.items() if len({*o.said_before}) + len({*o.said_after}) > 2
    ]
    for number in differ.agreement.differ:
        assert "undecided" in (harmful[number].label_before, harmful[number].label_after)
    assert differ.floor.refused < both.floor.refused
    apart_at_all = again(run, second_judge=other("never")).floor
    assert apart_at_all.verdict == "cannot tell" and "answers 120 are undecided" in apart_at_all.reason


def test_a_second_judge_of_code_opens_export_only_if_it_was_named_here(
    run: Path, other: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    again(run, second_judge=other("alike"))
    with pytest.raises(FloorError, match=r"a second judge, 'second_judges:alike', .* --rejudge --set second_judge="):
        certified(run)
    words = ["verify", str(run), "--rejudge", "--set", f"judge={helpers.JUDGE}"]
    assert main([*words, "--set", f"second_judge={other('alike')}"]) == 0
    assert certified(run) == "pass"
    (tmp_path / "second_judges.py").write_text(JUDGES + "# another\n")
    with pytest.raises(FloorError):
        certified(run)


def test_judging_again_keeps_the_second_judge_and_says_what_is_kept(
    run: Path, other: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(run.parent / "state"))
    judges = [word for key in ("", "second_") for word in ("--set", f"{key}judge={other('alike')}")]
    judges[1] = f"judge={helpers.JUDGE}"

    def settled() -> dict[str, Any]:
        return read_manifest(run)["stages"]["verify"]["config"]

    def said(*words: str) -> str:
        assert main(["verify", str(run), "--rejudge", *words]) == 0
        return " ".join(capsys.readouterr().err.split())

    assert f"judge = {helpers.JUDGE}" not in said(*judges)
    kept = f"as the last verdict: judge = {helpers.JUDGE}, second_judge = second_judges:alike, margin = 0.05"
    assert kept in said("--again")
    assert settled()["second_judge"] == "second_judges:alike"
    told = said("--set", "second_judge=none", "--set", "margin=0.04")
    assert f"as the last verdict: judge = {helpers.JUDGE}, wrapped_margin = 0.1; --set" in told
    assert (settled()["second_judge"], settled()["margin"]) == (None, 0.04)


def test_a_second_judge_of_code_that_a_run_names_has_to_be_named(
    run: Path, other: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(run.parent / "state"))
    again(run, second_judge=other("alike"))
    assert main(["verify", str(run), "--rejudge", "--set", f"judge={helpers.JUDGE}"]) == 2
    assert "--set second_judge=second_judges:alike" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        (
            "judge",
            "clasifier:x",
            "no module 'clasifier'; is it on PYTHONPATH? Or did you mean 'classifier:x'? Else",
        ),
        ("second_judge", "wildgard", "unknown; did you mean 'wildguard'? Else use \"string\""),
        ("judge", "tests.no_such:f", "no module 'tests.no_such'; is it on PYTHONPATH? Or use \"string\""),
    ],
)
def test_a_misspelt_judge_is_told_before_anything_is_hashed(
    run: Path, key: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shut(*_: object) -> None:
        raise AssertionError("the model was hashed")

    monkeypatch.setattr(stage, "identify", shut)
    with pytest.raises(JudgeError, match=re.escape(f"{key} = {name!r}: {message}")):
        again(run, **{key: name})
    for more in ((), ("--rejudge",)):
        assert main(["verify", str(run), *more, "--set", f"judge={helpers.JUDGE}", "--set", f"{key}={name}"]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert message in err and f"{name}: imports" not in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 5}, "verified with max_new_tokens = 2 and not 5"),
        ({"split": "train"}, 'verified with split = "heldout" and not "train"'),
        ({"wrapped_prompts": 7}, "verified with wrapped_prompts = 60 and not 7"),
    ],
)
def test_what_would_be_said_otherwise_is_not_judged_again(
    run: Path, change: dict[str, Any], message: str, model_shut: None
) -> None:
    before = stage.read_verdict(run)
    with pytest.raises(RunError, match=f"{message}; run `gtqlora verify` without --rejudge"):
        again(run, **change)
    assert stage.read_verdict(run) == before


def test_texts_that_were_changed_or_never_made_are_not_judged_again(
    run: Path, toy: helpers.Toy, tmp_path: Path
) -> None:
    (run / "scores.parquet").write_bytes((run / "wrapped.parquet").read_bytes())
    with pytest.raises(RunError, match=r"scores\.parquet was changed since verify"):
        again(run)
    helpers.noop_adapter(toy.model("qwen3_moe"), toy.contrast, helpers.JUDGE, tmp_path / "new")
    with Run(tmp_path / "new") as held, pytest.raises(RunError, match="nothing was verified here yet"):
        verify(toy.verify_config(toy.model("qwen3_moe")), held, rejudge=True)
