"""Two judges at once: what both say stands, what they differ in is undecided, and a guard only objects."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest

from gtqlora.config import TrainConfig, VerifyConfig, build, is_code, must_be_named
from gtqlora.config.judges import absolute, is_loopback
from gtqlora.errors import ConfigError
from gtqlora.judging import trust
from gtqlora.judging.judge import labels, same
from gtqlora.judging.labels import LABELS, UNDECIDED
from gtqlora.judging.pair import judges_of

PROMPT = ({"role": "user", "content": "asked"},)
CODE = """
def named(prompts, answers): return [a.split()[0] for a in answers]
def second(prompts, answers): return [a.split()[1] for a in answers]
class Guard:
    objects_only = True
    def __call__(self, prompts, answers): return ["answer" if "unsafe" in a else None for a in answers]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module with judges that read their label in the answer itself."""
    (tmp_path / "paired_judges.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "paired_judges", raising=False)
    return tmp_path


def test_both_must_say_the_same() -> None:
    judge = judges_of("paired_judges:named", "paired_judges:second")
    pairs = list(product(LABELS, repeat=2))
    answers = [f"{one} {other}" for one, other in pairs]
    prompts = [PROMPT] * len(pairs)
    assert judge.labels_by(prompts, answers) == pairs
    assert labels(judge, prompts, answers) == [one if one == other else UNDECIDED for one, other in pairs]
    assert judge.name == "paired_judges:named + paired_judges:second"
    assert judge.identity == f"{judge.judges[0].identity} + {judge.judges[1].identity}"
    assert judge.is_code and not judge.by_phrases and len(judge.judges) == 2


def test_one_name_gives_one_judge() -> None:
    judge = judges_of("string")
    assert judge.by_phrases and not judge.is_code and judge.judges == (judge,) and judge.identity.startswith("string ")
    assert judge.labels_by([PROMPT], [""]) == [(UNDECIDED,)] and judge.joint(("partial",)) == "partial"


def test_a_guard_vetoes_and_else_leaves_the_other_judge_its_label() -> None:
    judge = judges_of("paired_judges:named", "paired_judges:Guard")
    answers = [
        f"{label} {word}" for label in ("refusal", "answer", "partial", "undecided") for word in ("safe", "unsafe")
    ]
    said = labels(judge, [PROMPT] * len(answers), answers)
    assert said == ["refusal", UNDECIDED, "answer", "answer", "partial", UNDECIDED, UNDECIDED, UNDECIDED]
    assert judge.judges[1].objects_only and not judge.judges[0].objects_only
    assert labels(judge, [PROMPT], ["<think> unsafe"]) == [UNDECIDED]


def test_whether_answers_are_the_same_is_told_by_the_first() -> None:
    judge = judges_of("gtqlora.judging.final_answer:FinalAnswer", "string")
    assert same(judge, ["It is 12."], ["The result: 12"]) == [True]


def test_what_is_wrong_with_the_second_is_reported_as_its() -> None:
    judge = judges_of("paired_judges:named", "paired_judges:second")
    with pytest.raises(ConfigError, match=r"^second_judge = 'paired_judges:second': it failed: IndexError"):
        judge.labels_by([PROMPT], ["refusal"])
    with pytest.raises(ConfigError, match=r"^judge = 'paired_judges:named': it replied 'wug'"):
        judge.labels_by([PROMPT], ["wug refusal"])


# --- names


def config(**settings: object) -> VerifyConfig:
    return VerifyConfig(model="m", contrast="c", **settings)  # type: ignore[arg-type]


def test_the_second_judge_is_a_setting(tmp_path: Path) -> None:
    assert config().second_judge is None
    assert config(second_judge="string:no").second_judge == "string:no"
    with pytest.raises(ConfigError, match="second_judge = 'string': the same as judge"):
        config(second_judge="string")
    with pytest.raises(ConfigError, match=r"tells safe from unsafe.*set second_judge to it"):
        config(judge="llama-guard:x/y")
    assert config(second_judge="llama-guard:x/y").second_judge == "llama-guard:x/y"


@pytest.mark.parametrize("judge", ["paired_judges:named", "chat:https://example.org/v1#m"])
@pytest.mark.parametrize("key", ["judge", "second_judge"])
def test_a_recipe_names_neither_code_nor_a_server_elsewhere(tmp_path: Path, judge: str, key: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[verify]\n{key} = "{judge}"\n')
    with pytest.raises(ConfigError, match=f"only if this call says so; .*--set {key}={judge}"):
        build(VerifyConfig, file=recipe, model="m", contrast="c")
    found = build(VerifyConfig, overrides=[f"{key}={judge}"], model="m", contrast="c")
    assert getattr(found, key) == judge


@pytest.mark.parametrize(
    "judge",
    [
        "classifier:org/name",
        "wildguard",
        "chat:http://127.0.0.1:8080#m",
        "chat:http://localhost",
        "chat:http://[::1]:1",
    ],
)
def test_a_recipe_may_name_models_and_servers_of_this_machine(tmp_path: Path, judge: str) -> None:
    (tmp_path / "recipe.toml").write_text(f'judge = "{judge}"\n')
    assert build(TrainConfig, file=tmp_path / "recipe.toml", model="m", contrast="c").judge == judge
    assert not is_code(judge) and not must_be_named(judge)


@pytest.mark.parametrize(
    "url",
    ["http://127.evil.example", "http://localhost.evil.example", "http://127.0.0.1@evil.example", "http://[", "no"],
)
def test_what_merely_looks_local_is_elsewhere(url: str) -> None:
    assert not is_loopback(url)
    assert must_be_named(f"chat:{url}")


def test_a_server_elsewhere_is_remembered_for_the_run_it_was_named_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    judge = "chat:https://example.org#m"
    trust.remember(tmp_path / "run", judge)
    assert trust.is_remembered(tmp_path / "run", judge) and not trust.is_remembered(tmp_path / "other", judge)
    with pytest.raises(ConfigError, match=r"prompts, answers and a key would be sent.*--set second_judge="):
        trust.check_named(judge, "manifest.json", key="second_judge")


def test_a_local_models_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert absolute("classifier:weights?refusal=NO") == f"classifier:{tmp_path / 'weights'}?refusal=NO"
    assert absolute("wildguard:./other") == f"wildguard:{tmp_path / 'other'}"
    for name in ("wildguard", "string:weights", "classifier:org/name", "chat:http://localhost", "my.module:weights"):
        assert absolute(name) == name
