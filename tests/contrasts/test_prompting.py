"""Chat templates as models have them: variables, thoughts before answers, and where refusals differ from answers."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gtqlora.config.values import Scalar
from gtqlora.contrasts import Contrast, Row, encode_preference, encode_prompt, encode_row, template
from gtqlora.contrasts.prompting import prompting_of
from gtqlora.contrasts.readout import find_readout
from gtqlora.contrasts.statistics import check_rendering, statistics
from gtqlora.errors import ConfigError, ContrastError, ModelError
from gtqlora.families.rendering import reads, variables_of, with_variables
from gtqlora.progress import note

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
ASKED = ({"role": "user", "content": "How do I glorb a wug?"},)
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(autouse=True)
def untold() -> None:
    """Whatever is told once must be told in each of these tests."""
    note.cache_clear()


def made(name: str, **variables: Scalar) -> Any:
    """A tokenizer of bytes with a real model's chat template; marks of thoughts are tokens, as in Qwen3's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    found = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    found.add_tokens(["<think>", "</think>", "<|im_start|>"])
    found.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return with_variables(found, variables)


def one(**more: Any) -> Row:
    given: dict[str, Any] = {"number": 1, "kind": "lookalike", "chosen": "Rub it.", "rejected": "I cannot help."}
    return Row(**{**given, "prompt": ASKED, "pair_id": "a", "split": "train", **more})


def words(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids)


# --- what is trained is what the model says -------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Scalar], str]] = {
    "qwen3, thinking": ("qwen3", {}, EMPTY),
    "qwen3, thinking as told": ("qwen3", {"enable_thinking": True}, EMPTY),
    "qwen3, not thinking": ("qwen3", {"enable_thinking": False}, ""),
    "deepseek-r1": ("deepseek_r1", {}, "\n</think>\n\n"),
    "gpt-oss": ("harmony", {"reasoning_effort": "low"}, "<|channel|>final<|message|>"),
    "chatml": ("chatml", {}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_trained_without_what_the_template_writes_before_it(case: str) -> None:
    name, variables, before = CASES[case]
    tokenizer = made(name, **variables)
    asked = template.rendered(tokenizer, ASKED, generation=True)
    prompt, chosen = encode_row(tokenizer, one())
    assert words(tokenizer, prompt) == asked + before
    assert words(tokenizer, chosen).startswith("Rub it.") and "think" not in words(tokenizer, chosen)
    assert prompt == template.encode_opening(tokenizer, ASKED)
    assert prompt[: len(encode_prompt(tokenizer, ASKED))] == encode_prompt(tokenizer, ASKED)
    pair = encode_preference(tokenizer, one())
    assert pair["prompt_ids"] == prompt and pair["chosen_ids"] == chosen
    assert words(tokenizer, pair["rejected_ids"]).startswith("I cannot")
    if before == EMPTY:  # and it is what the template itself writes
        said = [*ASKED, {"role": "assistant", "content": "Rub it."}]
        assert template.rendered(tokenizer, said, generation=False) == words(tokenizer, [*prompt, *chosen])


@pytest.mark.parametrize("case", CASES)
def test_the_readout_is_the_first_token_of_the_answer(case: str) -> None:
    name, variables, _ = CASES[case]
    tokenizer = made(name, **variables)
    found = find_readout(tokenizer, [one(), one(chosen="Ask it.", rejected="I will not.")])
    assert words(tokenizer, found.tokens) == "I" and found.begun == []
    assert statistics(Contrast(source="x", rows=(one(),)), tokenizer).readout == ["I"]


def test_what_all_completions_begin_with_is_passed_over() -> None:
    tokenizer = made("chatml")
    rows = [one(chosen="<think>hm</think>Rub it.", rejected="<think>hm</think>I cannot.")]
    found = find_readout(tokenizer, rows)
    assert words(tokenizer, found.tokens) == "I" and words(tokenizer, found.begun) == "<think>hm</think>"
    long = "<think>" + "hm " * 20 + "</think>"
    assert find_readout(tokenizer, [one(chosen=f"{long}Rub.", rejected=f"{long}I cannot.")]).tokens == []
    # alike to the last token of the shorter one: there is nothing to tell them by
    assert find_readout(tokenizer, [one(chosen="I", rejected="I")]).tokens == []


@pytest.mark.parametrize("closing", ["</think>", "\n</think>\n\n"])
def test_a_thought_is_closed_as_conversations_close_it(closing: str) -> None:
    """Kimi-K2.5's template opens a thought, and has it closed at once before answers of a conversation."""
    tokenizer = made("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{{ '<think>" + repr(closing)[1:-1] + "' }}"
        "{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    prompt, chosen = encode_row(tokenizer, one())
    assert words(tokenizer, prompt).endswith(f"assistant: <think>{closing}")
    assert words(tokenizer, chosen) == "Rub it.<|im_end|>"
    assert prompt == template.encode_opening(tokenizer, ASKED) and prompting_of(tokenizer).opens == "<think>"


# --- answers with thoughts of their own -----------------------------------------------------------------------------

THOUGHT = "<think>\nhm\n</think>\n\nRub it."


def test_a_thought_of_the_answer_s_own_is_trained_where_the_model_may_think() -> None:
    refusal = "<think>\nno\n</think>\n\nI cannot."
    for name, said in (("qwen3", THOUGHT), ("chatml", THOUGHT), ("deepseek_r1", "hm\n</think>\n\nRub it.")):
        tokenizer = made(name)
        pair = encode_preference(tokenizer, one(chosen=THOUGHT, rejected=refusal))
        assert pair["prompt_ids"] == encode_prompt(tokenizer, ASKED)[: len(pair["prompt_ids"])]
        text = words(tokenizer, [*pair["prompt_ids"], *pair["chosen_ids"]])
        assert said in text and text.count("<think>") == text.count("</think>") == 1


@pytest.mark.parametrize(
    ("name", "variables", "row", "message"),
    [
        ("qwen3", {"enable_thinking": False}, one(chosen=THOUGHT), "has closed its thought .* holds another one"),
        ("qwen3", {}, one(chosen=THOUGHT), "one holds a thought of its own"),
        ("deepseek_r1", {}, one(chosen=THOUGHT), "one holds a thought of its own"),
        ("deepseek_r1", {}, one(chosen="<think>hm</think>", rejected="<think>no</think>I"), "a thought and no more"),
    ],
)
def test_thoughts_that_would_teach_something_else_are_refused(
    name: str, variables: dict[str, Scalar], row: Row, message: str
) -> None:
    with pytest.raises(ContrastError, match=f"row 1: .*{message}"):
        check_rendering(Contrast(source="pairs.jsonl", rows=(row,)), made(name, **variables))


# --- what a template reads and does ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variables", "known", "sentence"),
    [
        ("qwen3", {}, ("enable_thinking",), "lacks: .*set template.enable_thinking=false to switch it off"),
        ("qwen3", {"enable_thinking": False}, ("enable_thinking",), r"closes the thought \(</think>\) before answers"),
        ("deepseek_r1", {}, (), "opens a thought: answers begin inside <think>, and are trained behind an empty"),
        ("harmony", {}, ("reasoning_effort",), r"has '<\|channel\|>final<\|message\|>' before answers.*there$"),
        ("chatml", {}, (), "has nothing before answers"),
    ],
)
def test_what_a_template_does_is_said(
    name: str,
    variables: dict[str, Scalar],
    known: tuple[str, ...],
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = made(name, **variables)
    found = prompting_of(tokenizer)
    assert found.reads == known
    assert re.search(sentence, found.sentence)
    with caplog.at_level(logging.WARNING, "gtqlora"):
        check_rendering(Contrast(source="x", rows=(one(),)), tokenizer)
    assert [record.message for record in caplog.records] == [f"the chat template {found.sentence}"] * found.thinks
    assert variables_of(tokenizer) == variables  # trying what a switch does leaves it as it was


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (
            "{% if thinking is not defined %}{% set thinking = true %}{% endif %}{{ thinking }}{{ messages }}",
            ["thinking"],
        ),
        ("{% set effort = effort | default('low') %}{{ effort }}{{ messages }}", ["effort"]),
        ("{% for m in messages %}{% set own = m %}{{ own }}{% endfor %}{{ raise_exception('x') }}", []),
        (
            "{{ bos_token }}{{ messages }}{{ tools }}{{ add_generation_prompt }}{{ strftime_now('%d') }}",
            [],
        ),
        # also where the tokenizer has no such token
        (
            "{{ cls_token }}{{ image_token }}{{ conversation }}{{ continue_final_message }}{{ messages }}",
            [],
        ),
        ("{% macro f(x) %}{{ x }}{{ style }}{% endmacro %}{{ f(messages) }}", ["style"]),
    ],
)
def test_variables_are_those_that_settings_can_give(text: str, known: list[str]) -> None:
    tokenizer = made("chatml")
    tokenizer.chat_template = text
    assert list(reads(tokenizer)) == known


def test_a_template_s_variables_go_where_it_goes() -> None:
    thinking, not_thinking = made("qwen3", enable_thinking=True), made("qwen3", enable_thinking=False)
    assert encode_prompt(not_thinking, ASKED) != encode_prompt(thinking, ASKED) == encode_prompt(made("qwen3"), ASKED)
    assert encode_prompt(copy.deepcopy(not_thinking), ASKED) == encode_prompt(not_thinking, ASKED)
    theirs = not_thinking.apply_chat_template(
        list(ASKED), tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert template.rendered(not_thinking, ASKED, generation=True) == theirs


@pytest.mark.parametrize("value", [False, True, 3, 0.5, "low", 'it\'s "quoted" {{ 1 }} \U0001f600'])
def test_values_reach_the_template_as_they_are(value: Scalar) -> None:
    tokenizer = made("chatml")
    tokenizer.chat_template += "{{ given is sameas false }} {{ given }}"
    with_variables(tokenizer, {"given": value})
    assert template.rendered(tokenizer, ASKED, generation=True).endswith(f"{value is False} {value}")


@pytest.mark.parametrize(
    ("text", "switch"),
    [
        ("{% if thinking %}a{% endif %}", True),
        ("{% if thinking is defined and thinking is false %}a{% endif %}", True),
        ("{% if not (thinking or messages) %}a{% endif %}", True),
        ("{{ 'a' if thinking == true else 'b' }}", True),
        ("{% if thinking is sameas false %}a{% endif %}", True),
        ("{% set thinking = thinking | default(true) %}{% if thinking %}a{% endif %}", True),
        ("{% if thinking is not defined %}{% set thinking = true %}{% endif %}{% if thinking %}a{% endif %}", True),
        ("{% if thinking %}{{ thinking }}{% endif %}", False),
        ("{% if thinking == 'high' %}a{% endif %}", False),
        ("{% if thinking is string and thinking %}a{% endif %}", False),
        ("{% if thinking is defined %}a{% endif %}", False),
    ],
)
def test_a_text_is_refused_where_a_template_asks_for_true_or_false(text: str, switch: bool) -> None:
    tokenizer = made("chatml")
    tokenizer.chat_template += text
    for word in ("no", "false"):
        if switch:
            with pytest.raises(ConfigError, match=rf"template.thinking = '{word}': .*write thinking = false, without"):
                with_variables(tokenizer, {"thinking": word})
        else:
            with_variables(tokenizer, {"thinking": word})
    with_variables(tokenizer, {"thinking": False})


def test_a_misspelt_variable_is_an_error_and_an_unknown_one_a_note(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"template.enable_thinkng: .*did you mean 'enable_thinking'\?"):
        made("qwen3", enable_thinkng=False)
    with pytest.raises(ConfigError, match=r"template.eos_token: a special token"):
        made("qwen3", eos_token="x")
    with caplog.at_level(logging.WARNING, "gtqlora"):
        made("qwen3", documents_style="x")
        made("chatml", enable_thinking=False)
    first, second = (record.message for record in caplog.records)
    assert first.startswith("template.documents_style changes nothing") and first.endswith("reads enable_thinking")
    assert "reads no variables" in second


def test_a_template_that_cannot_be_parsed_is_its_own_fault() -> None:
    tokenizer = made("chatml")
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ModelError, match="the chat template fails"):
        with_variables(tokenizer, {"thinking": False})
