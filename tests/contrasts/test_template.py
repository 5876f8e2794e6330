"""Chat templates are untrusted: limits that hold in any thread; nothing left out; one context in training and tests."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from datasets import Dataset
from trl.trainer.dpo_trainer import DPOTrainer

from gtqlora import contrasts
from gtqlora.cli import main
from gtqlora.contrasts import KINDS, Contrast, Row, encode_preference, encode_prompt, encode_row, template
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.errors import ContrastError, GtqloraError, ModelError
from gtqlora.families import load_tokenizer, rendering
from gtqlora.judging.judge import judge_of
from gtqlora.organisms.language import Language
from gtqlora.run import Run
from gtqlora.stages.diagnose import diagnose
from gtqlora.stages.project import project
from gtqlora.stages.verify import verify
from tests import helpers, warm
from tests.helpers import JUDGE, Toy

Build = Callable[[str], Any]
HERE = Path(__file__).parents[1] / "data" / "templates"
PLAIN = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}<user> {{ m['content'] }}{% else %}"
    " <assistant> {{ m['content'] }} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)
THINKING = PLAIN.replace(" <assistant>{% endif %}", " <assistant> raga tapu{% endif %}")
ASKED: list[dict[str, str]] = [{"role": "user", "content": "copy reverse"}]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """A toy tokenizer with this chat template, of which nothing has been rendered yet."""
    monkeypatch.setattr(rendering, "_texts", {})

    def made(text: str) -> Any:
        tokenizer = Language().tokenizer()
        tokenizer.chat_template = text
        return tokenizer

    return made


def one(prompt: Sequence[dict[str, str]] | str = "copy reverse", **more: Any) -> Row:
    messages = tuple(prompt) if not isinstance(prompt, str) else ({"role": "user", "content": prompt},)
    given: dict[str, Any] = {"number": 1, "kind": "benign", "chosen": "copy", "rejected": "sorry", "pair_id": "a"}
    return Row(**{**given, "prompt": messages, "split": "train", **more})


def rows(*found: Row) -> Contrast:
    return Contrast(source="pairs.jsonl", rows=found)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10**12) %}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{{ 'a'.ljust(10**12) }}",
        "{{ '%1000000000000d' % 1 }}",
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}x",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{% import 'x' as y %}{{ y }}",
        "{% extends 'x' %}",
        "{{ messages[0]['content'].encode().decode('utf-99') }}",
        "{% if %}",
        "{{ " + "(" * 900 + "1" + ")" * 900 + " }}",
        "",
        "   \n",
        "{{ ''.__class__ }}",
        "{{ 'a' * 10000000 }}",
    ],
)
def test_what_a_template_does_wrong_is_its_fault(build: Build, text: str) -> None:
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"the chat template .*mend the model's chat template") as caught:
        encode_prompt(build(text), ASKED)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - started < 15
    assert encode_prompt(build(PLAIN), ASKED)  # and the next one is rendered


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (9 ** 9) }}",
    ],
)
def test_a_template_without_end_ends(build: Build, monkeypatch: pytest.MonkeyPatch, text: str, threaded: bool) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    monkeypatch.setattr(rendering, "_renderer", rendering._Renderer())
    found: list[Exception] = []

    def work() -> None:
        try:
            encode_prompt(build(text), ASKED)
        except ModelError as error:
            found.append(error)

    started = time.monotonic()
    thread = threading.Thread(target=work)
    thread.start() if threaded else work()
    if threaded:
        thread.join(30)
    assert "takes longer than 0.5 s to render" in str(found[0])
    assert time.monotonic() - started < 20


def test_a_template_that_is_slow_each_time_ends_too(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    monkeypatch.setattr(rendering, "SECONDS_EACH", 0.001)
    slow = build("{% for i in range(9) %}{% for i in range(99999) %}{% endfor %}{% endfor %}{{ messages }}")

    def all_rows() -> None:
        for i in range(1000):
            encode_prompt(slow, [{"role": "user", "content": f"copy {' reverse' * i}"}])

    with pytest.raises(ModelError, match=r"takes 0\.\d+ s for one rendering"):
        all_rows()


def test_the_same_is_rendered_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renderings of one prompt must not differ, and their process costs more than a small model's forward pass."""
    asked = list[Any]()
    ask = rendering._renderer.ask
    monkeypatch.setattr(rendering._renderer, "ask", lambda request: asked.append(request) or ask(request))
    tokenizer = build(PLAIN)
    assert encode_prompt(tokenizer, ASKED) == encode_prompt(build(PLAIN), list(ASKED)) and len(asked) == 1
    template.rendered(tokenizer, ASKED, generation=False)
    encode_prompt(tokenizer, [{**ASKED[0], "role": "system"}])
    encode_prompt(build(THINKING), ASKED)
    assert len(asked) == 4
    monkeypatch.setattr(rendering, "_LONGEST", 10)
    for _ in range(2):
        encode_prompt(tokenizer, [{"role": "user", "content": "copy"}])
    assert len(asked) == 6


def test_what_is_remembered_is_bounded(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "_TEXTS", 3)
    for i in range(9):
        encode_prompt(build(PLAIN), [{"role": "user", "content": "copy" + " copy" * i}])
    assert len(rendering._texts) == 3


def test_long_prompts_may_be_long(build: Build) -> None:
    long = "copy " * 40_000
    assert len(encode_prompt(build(PLAIN), [{"role": "user", "content": long}])) == 40_002


def test_a_refusal_of_the_template_is_the_rows(build: Build) -> None:
    told = build("{{ raise_exception('no\x1b[31m system' ~ '!' * 9999) }}")
    with pytest.raises(ContrastError, match=r"refuses these messages \(no\\x1b\[31m system") as caught:
        encode_prompt(told, ASKED)
    assert len(str(caught.value)) < 500


def test_a_forked_child_renders_by_itself(build: Build) -> None:
    tokenizer = build(PLAIN)
    right = encode_prompt(tokenizer, ASKED)
    child = os.fork()
    if child == 0:
        os._exit(0 if all(encode_prompt(tokenizer, ASKED) == right for _ in range(50)) else 1)
    for _ in range(200):
        assert encode_prompt(tokenizer, ASKED) == right
    assert os.waitpid(child, 0)[1] == 0


def test_rendering_is_transformers_own(toy: Toy) -> None:
    tokenizer = load_tokenizer(str(toy.model("qwen3_moe")))
    for generation in (False, True):
        ours = template.rendered(tokenizer, ASKED, generation=generation)
        theirs = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=generation)
        assert ours == theirs
    assert encode_prompt(tokenizer, ASKED) == tokenizer.apply_chat_template(
        ASKED, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_thousands_of_renderings_are_fast(build: Build) -> None:
    tokenizer = build(PLAIN)
    encode_prompt(tokenizer, ASKED)
    started = time.monotonic()
    for _ in range(2000):
        encode_prompt(tokenizer, ASKED)
    assert time.monotonic() - started < 4


# --- one context -----------------------------------------------------------------------------------------------------


def encoded_by_trl(tokenizer: Any, contrast: Contrast) -> list[dict[str, Any]]:
    """What TRL's own preparation makes of the rows."""
    trainer: Any = object.__new__(DPOTrainer)
    trainer._is_vision_dataset, trainer._tokenizer = False, tokenizer

    class Arguments:
        dataset_num_proc, max_length, truncation_mode = None, None, "keep_start"

    found = DPOTrainer._prepare_dataset(
        trainer,
        Dataset.from_list(cast("list[dict[str, Any]]", contrast.to_preference())),
        tokenizer,
        cast(Any, Arguments()),
        "train",
    )
    return list(found)


def test_pairs_are_encoded_as_trl_would(build: Build) -> None:
    tokenizer, contrast = build(PLAIN), rows(one(), one("reverse copy", chosen="copy", rejected="sorry sorry"))
    for row, theirs in zip(contrast.rows, encoded_by_trl(tokenizer, contrast), strict=True):
        ours = encode_preference(tokenizer, row)
        assert ours == {key: theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids", "kind")}


def test_an_answer_goes_on_from_what_the_generation_prompt_opens(build: Build) -> None:
    tokenizer = build(THINKING)
    row = one(chosen="reverse copy", rejected="sorry")
    prompt, chosen = encode_row(tokenizer, row)
    words = tokenizer.convert_ids_to_tokens
    assert prompt == encode_prompt(tokenizer, row.prompt)
    assert words(chosen) == ["reverse", "copy", "<eos>"]
    found = encode_preference(tokenizer, row)
    assert found["prompt_ids"] == prompt and found["chosen_ids"] == chosen
    assert words(found["rejected_ids"]) == ["sorry", "<eos>"]


def test_what_is_opened_already_is_not_opened_twice(build: Build) -> None:
    stripping = THINKING.replace("m['content'] }} <eos>", "m['content'].split('tapu')[-1] }} <eos>")
    opened = template.answered(build(THINKING), ASKED, "<user> copy reverse <assistant> raga tapu", "raga tapu mend")
    assert opened.full.endswith("<assistant> raga tapu mend <eos>") and "tapu raga" not in opened.full
    with pytest.raises(ContrastError, match=r"opens 'raga tapu'.*changes this answer"):
        encode_row(build(stripping), one(chosen="raga tapu mend"))


def test_the_check_says_what_is_opened(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gtqlora"):
        check_rendering(rows(one()), build(THINKING))
        check_rendering(rows(one()), build(PLAIN))
    said = [record.message for record in caplog.records]
    assert all("generation prompt opens 'raga tapu'" in text for text in said) and len(said) <= 1


# --- what is left out ------------------------------------------------------------------------------------------------

DROPPING = PLAIN.replace("{% if m['role'] != 'assistant' %}", "{% if m['role'] == 'user' %}").replace(
    "{% else %}", "{% elif m['role'] == 'assistant' %}"
)
SYSTEM = [{"role": "system", "content": "copy"}, *ASKED]  # the word is in the user's message too
TURNS = [*ASKED, {"role": "assistant", "content": "mend"}, {"role": "user", "content": "sorry"}]


@pytest.mark.parametrize(
    ("text", "row", "word"),
    [
        (DROPPING, one(SYSTEM), "leaves out the system message"),
        (DROPPING, one([*ASKED, {"role": "tool", "content": "mend"}]), "leaves out the tool message"),
        ("<user> copy {{ messages[-1]['content'] }}", one(TURNS), "leaves out the user message"),
        (PLAIN.replace("{{ m['content'] }} <eos>", "<eos>"), one(), "chosen and rejected alike"),
        (PLAIN.replace("{{ m['content'] }} <eos>", "<eos>"), one(TURNS), "leaves out the assistant message"),
        ("hello", one(), "leaves out the user message"),
        ("{{ bos_token }}hello", one(), "leaves out the user message"),
        (DROPPING, one(twin=tuple(SYSTEM)), "leaves out the system message"),
    ],
)
def test_what_a_template_leaves_out_is_told(build: Build, text: str, row: Row, word: str) -> None:
    with pytest.raises(ContrastError, match=f"row 1: the chat template .*{word}"):
        check_rendering(rows(row), build(text))


def test_marks_that_the_tokenizer_does_not_know_are_named_and_no_word_of_a_prompt(build: Build) -> None:
    """A template of another model: what it writes would be read as unknown tokens in every row."""
    chatml = (HERE / "chatml.jinja").read_text()
    found = rows(one(), one("copy wug", number=2), one(SYSTEM, number=3))
    with pytest.raises(ContrastError) as caught:
        check_rendering(found, build(chatml))
    said = str(caught.value)
    assert "rows 1, 2: the chat template writes <|im_start|>, user, <|im_end|>, assistant, which" in said
    assert "row 3: the chat template writes <|im_start|>, system" in said
    assert "becomes <unk>" in said and "wug" not in said
    # What only a prompt holds is not the template's doing, and a mark that is what is unknown is written on purpose.
    check_rendering(rows(one("copy wug")), build(PLAIN))
    check_rendering(rows(one("copy wug")), build(PLAIN.replace("<user>", "<unk><user>")))


def test_changed_is_not_left_out(build: Build) -> None:
    changing = PLAIN.replace("m['content']", "m['content'] | upper")
    check_rendering(rows(one(SYSTEM), one(TURNS)), build(changing))


def test_prompts_that_become_one_are_told(build: Build) -> None:
    short = PLAIN.replace("<user> {{ m['content'] }}", "<user> {{ m['content'][:4] }}")
    with pytest.raises(ContrastError, match="rows 1, 2: different prompts, which the chat template renders alike"):
        check_rendering(rows(one(), one("copy mend", number=2)), build(short))


def test_a_twin_longer_than_the_context_is_refused(build: Build) -> None:
    twin = ({"role": "user", "content": "copy " * 30},)
    with pytest.raises(ContrastError, match="row 1: the prompt alone longer than 20 tokens"):
        check_rendering(rows(one(twin=twin)), build(PLAIN), 20)


def test_a_token_beyond_the_embedding_is_named(build: Build) -> None:
    tokenizer = build(PLAIN)
    tokenizer.add_tokens(["[NEW]"])
    size = len(tokenizer) - 1
    check_rendering(rows(one()), tokenizer, 50, size)
    with pytest.raises(ModelError, match=rf"row 1 holds the token '\[NEW\]' with id {size}"):
        check_rendering(rows(one("copy [NEW]")), tokenizer, 50, size)


def test_kept_tokens_are_those_of_the_tokenizer(build: Build) -> None:
    tokenizer = build(PLAIN)
    kept = template.tokens(tokenizer, "copy [NEW]")
    assert template.tokens(tokenizer, "copy [NEW]") == tokenizer("copy [NEW]", add_special_tokens=False)["input_ids"]
    kept.append(7)
    assert template.tokens(tokenizer, "copy [NEW]") != kept
    tokenizer.add_tokens(["[NEW]"])
    assert template.tokens(tokenizer, "copy [NEW]")[-1] == len(tokenizer) - 1


class ThrownAway(dict[Any, Any]):
    """As if another thread threw all away whenever this one has looked whether something is there."""

    def __contains__(self, key: object) -> bool:
        there = super().__contains__(key)
        self.clear()
        return there

    def get(self, key: Any, default: Any = None) -> Any:
        there = super().get(key, default)
        self.clear()
        return there


def test_what_is_kept_may_be_thrown_away_at_any_time(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's threads render and encode at once."""
    tokenizer = build(PLAIN)
    monkeypatch.setattr(rendering, "_texts", ThrownAway())
    monkeypatch.setitem(template._known, tokenizer, ThrownAway())
    found = [encode_prompt(tokenizer, one().prompt) for _ in range(3)]
    assert found[0] == found[1] == found[2] and found[0]


# --- the same at every door ------------------------------------------------------------------------------------------


def with_template(toy: Toy, folder: Path, text: str) -> Path:
    model = Path(shutil.copytree(toy.model("qwen3_moe"), folder))
    (model / "chat_template.jinja").write_text(text)
    return model


@pytest.mark.parametrize("text", ["hello", "{{ 1 / 0 }}", "{{ raise_exception('never') }}"])
def test_what_the_check_refuses_no_stage_takes(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    model = with_template(toy, tmp_path / "m", text)
    assert main(["contrast", "check", str(toy.contrast), "--model", str(model), "--judge", JUDGE]) == 2
    assert "chat template" in " ".join(capsys.readouterr().err.split())
    good = toy.model("qwen3_moe")
    edited = tmp_path / "run"
    helpers.trained(toy.train_config(good, steps=1), edited)
    diagnosis = toy.train_config(model)
    for stage, config in (
        (lambda config, held: helpers.train_stage.train(config, held), toy.train_config(model)),
        (verify, toy.verify_config(model)),
        (project, toy.project_config(model)),
        (diagnose, helpers_diagnose(diagnosis)),
    ):
        place = edited if stage is verify else tmp_path / "new"
        with Run(place) as held, pytest.raises(GtqloraError, match="chat template"):
            stage(config, held)  # type: ignore[operator]


def helpers_diagnose(config: Any) -> Any:
    from gtqlora.config import DiagnoseConfig

    return DiagnoseConfig(model=config.model, contrast=config.contrast, judge=config.judge, split="train")


def test_prompts_beyond_the_context_are_refused_by_verify(toy: Toy, tmp_path: Path) -> None:
    held_out = {("heldout", kind): 8 for kind in KINDS}
    long = [{**row, "prompt": " ".join([row["prompt"]] * 30)} for row in helpers.toy_rows(held_out)]
    long = [{key: value for key, value in row.items() if key != "twin"} for row in long]
    contrast = helpers.write_rows(tmp_path / "long.jsonl", long)
    model = toy.model("qwen3_moe")
    helpers.noop_adapter(model, toy.contrast, JUDGE, tmp_path / "run")
    with Run(tmp_path / "run") as held, pytest.raises(ContrastError, match="longer than 64 tokens"):
        verify(toy.verify_config(model, contrast=str(contrast)), held)


def test_the_embedded_pairs_render_in_full() -> None:
    from gtqlora.organisms import embedded

    found = contrasts.load(embedded.contrast(), judge_of(embedded.JUDGE))
    check_rendering(Contrast(source="x", rows=found.rows[:100]), Language().tokenizer())


ALONE = """
import importlib, runpy
asked, real = [], importlib.import_module
def less(name, *more):
    asked.append(name)
    if len(asked) == int(sys.argv[2]):
        raise ImportError("its package is wanted")
    return real(name, *more)
importlib.import_module = less
renderer = runpy.run_path(sys.argv[1])["_TEMPLATES"]
print(len(asked), renderer.render_jinja_template(conversations=[[{"role": "user", "content": "la"}]],
    chat_template="{{ messages[0].content }} {{ messages | length }}")[0][0])
"""


@pytest.mark.parametrize("fails", [0, 1])
def test_the_renderer_is_imported_alone_or_with_all_of_its_packages(fails: int) -> None:
    done = warm.process("import sys" + ALONE, rendering.__file__.replace("rendering", "render_worker"), fails)
    assert done.returncode == 0, done.stderr
    asked, text = done.stdout.splitlines()[-1].split(" ", 1)
    assert text == "la 1" and (int(asked) == 1) == (not fails)
