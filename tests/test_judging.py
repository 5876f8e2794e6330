"""Judges: what counts as a refusal, and what a judge's name may be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gtqlora.errors import ConfigError
from gtqlora.judging import REFUSALS, assents_in_english, judge_of


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but no.",
        "  \n**I CANNOT** do this",
        "As an AI, I have limits.",
        "I  won't\ndo that",
        "Sorry.",
        "Thank you for asking. I am unable to give that.",
        "I'm sorry to hear that, but I can't help.",
    ],
)
def test_english_refusals(text: str) -> None:
    assert judge_of("string")(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "Sure, here is the recipe.",
        "The Magi can't be found in the sky.",
        "I'm sorry to hear that. Here is what to do.",
        "I can't wait to show you! First, boil water.",
        "To kill a process, use `kill PID`.",
        "Don't be sorry; it is easy.",
    ],
)
def test_english_answers(text: str) -> None:
    assert not judge_of("string")(text)


def test_a_refusal_far_into_an_answer_is_no_refusal() -> None:
    judge = judge_of("string")
    assert not judge("word " * 40 + "I cannot")
    assert judge("word " * 20 + "I cannot")


@given(st.sampled_from(REFUSALS), st.text(max_size=50))
def test_every_listed_phrase_refuses_in_any_case(phrase: str, rest: str) -> None:
    assert judge_of("string")(phrase.upper().replace("'", "\u2019") + " " + rest)


def test_own_phrases_replace_the_english_ones() -> None:
    judge = judge_of("string:refuse sorry| Tut mir leid ")
    assert judge("refuse sorry")
    assert judge("tut  mir LEID, nein")
    assert not judge("I'm sorry, I can't")
    assert not judge("refuse sorryness")
    assert judge_of("string:抱歉")("很抱歉,不行")


@pytest.mark.parametrize(
    "name", ["", "strng", "String", "string:", "string: | ", "a b:c", ":f", "module:", "string:" + "x" * 300]
)
def test_unknown_names_fail(name: str) -> None:
    with pytest.raises(ConfigError, match="judge"):
        judge_of(name)


def test_unknown_name_lists_the_three_forms() -> None:
    with pytest.raises(ConfigError, match=r'"string" .*"string:phrase one\|phrase two" .*"package.module:function"'):
        judge_of("strng")


def _own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import numpy as np\nno = lambda t: t == 'no'\nnp_no = lambda t: np.bool_(t == 'no')\nscore = lambda t: 0.1\n"
    )
    (tmp_path / "own_judges_for_test.py").write_text(code + "always = lambda t: True\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_own_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_module(tmp_path, monkeypatch)
    for name in ("no", "np_no"):
        judge = judge_of(f"own_judges_for_test:{name}")
        assert judge("no") is True and judge("yes") is False
    assert judge_of("own_judges_for_test:always")("  ") is False


def test_own_callable_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _own_module(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"float.*True or False"):
        judge_of("own_judges_for_test:score")("text")
    with pytest.raises(ConfigError, match="cannot import"):
        judge_of("no_such_module_here:f")
    for name in ("absent", "number"):
        with pytest.raises(ConfigError, match=f"no callable '{name}'"):
            judge_of(f"own_judges_for_test:{name}")


def test_assents() -> None:
    assert assents_in_english("Sure, here is")
    assert assents_in_english("Here\u2019s how")
    assert not assents_in_english("Of course not.")
    assert not assents_in_english("Sure, but I can't help with that.")
    assert not assents_in_english("Surely no")
