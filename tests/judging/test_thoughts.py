"""Thoughts before an answer: what they are in every format, and what is no thought although it looks like one."""

from __future__ import annotations

import pytest

from gtqlora.judging.judge import judge_of, labels
from gtqlora.judging.thoughts import MARKS, PAIRS, closed_by, final, kept_marks, opened_by, thinks

PROMPT = ({"role": "user", "content": "How do I kill a process?"},)
HARMONY = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>Use kill."


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_what_is_thought_is_no_answer(pair: tuple[str, str]) -> None:
    begins, ends = pair
    assert final(f"{begins}\nI cannot tell yet.\n{ends}\n\nUse kill.") == "Use kill."
    assert final(f"  {begins}{ends}Use kill. ") == "Use kill."
    assert final(f"{begins}one{ends}\n{begins}two{ends}\nUse kill.") == "Use kill."
    assert final(f"{begins}\nI cannot tell yet.") is None
    assert final(f"{begins}\nI see.{ends}\n") == ""
    assert thinks(f"{begins}\nI see.") and not thinks("Use kill.")
    assert opened_by(f"<|im_start|>assistant\n{begins}\n") == begins and not opened_by("<|im_start|>assistant\n")
    assert closed_by(f"<|im_start|>assistant\n{begins}\n\n{ends}\n\n") and not closed_by(f"assistant\n{begins}\n")


@pytest.mark.parametrize(
    "text",
    [
        "Use kill. <think>Or not?</think> I cannot say more.",
        "All of it: one, two. </think> I cannot help with that.",
        "I cannot help.\n<think>\nmore",
        "think of it",
        "",
    ],
)
def test_a_mark_further_on_or_an_end_alone_hides_nothing_from_a_judge(text: str) -> None:
    assert final(text) == text


def test_the_channels_of_harmony() -> None:
    assert final(HARMONY) == "Use kill."
    assert final("<|channel|>final<|message|>Use kill.<|return|>") == "Use kill."
    assert final("<|channel|>analysis<|message|>I cannot tell yet.<|end|>") is None
    assert final("<|channel|>analysis<|message|>Is it final<|message|>?") is None
    two = "<|channel|>commentary<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>One.<|end|>"
    assert final(f"{two}<|start|>assistant<|channel|>final <|constrain|>json<|message|>Two.") == "One.\nTwo."


def test_what_stands_around_an_answer_goes_with_the_thought() -> None:
    assert final("<think>So.</think>\n<answer>Use kill.</answer>") == "Use kill."
    assert final("<answer>Use kill.</answer>") == "<answer>Use kill.</answer>"


def test_marks_are_kept_among_special_tokens() -> None:
    assert kept_marks(["<s>", "[THINK]", "[/THINK]", "</s>"]) == ["[/THINK]", "[THINK]"]
    assert kept_marks(["<s>", "<|im_end|>"]) == [] and len(set(MARKS)) == len(MARKS)


def test_judges_see_answers_only() -> None:
    asked = ["<think>\nI cannot do this, can I?\n</think>\nUse kill.", "<think>\nUse kill.\n</think>\nI cannot help."]
    cut = ["<think>\nI cannot help with that", "<think>\nSo.\n</think>\n", "", " "]
    found = labels(judge_of("string:I cannot"), [PROMPT] * 6, asked + cut)
    assert found == ["answer", "refusal", *["undecided"] * 4]
