"""`contrast build` on an embedded organism: what it keeps, never asks and never shows, how it stops and goes on."""

from __future__ import annotations

import json
import logging
import re
import shutil
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gtqlora.building import answers, asking
from gtqlora.building.asking import CUT_OFF, EMPTY, IN_THOUGHT, Asking, Question
from gtqlora.building.card import card
from gtqlora.cli import main
from gtqlora.config import BuildConfig
from gtqlora.config.building import HELPFUL
from gtqlora.contrasts import KINDS, Contrast, load, prompt_key
from gtqlora.contrasts.layouts import described
from gtqlora.contrasts.public import pool
from gtqlora.contrasts.template import rendered, tokens
from gtqlora.errors import ConfigError, ContrastError, ModelError, RunError
from gtqlora.families import load_tokenizer
from gtqlora.judging.judge import Messages, judge_of
from gtqlora.organisms import embedded
from gtqlora.progress import note
from gtqlora.results.built import Built
from gtqlora.stages.build import build, limited
from gtqlora.storage.journal import Journal
from gtqlora.storage.locks import LOCK, hold

PUBLIC = Path(__file__).parents[1] / "data" / "public"
NAMES = (
    "xstest_v2_prompts.csv",
    "harmful-behaviors.csv",
    "benign-behaviors.csv",
    "wildguardmix.jsonl",
    "harmless_alpaca.jsonl",
)
SOURCES = [str(PUBLIC / name) for name in NAMES]
JUDGE = judge_of(embedded.JUDGE)


def config(out: Path, **changes: Any) -> BuildConfig:
    given = {"model": str(embedded.organism("routed")), "contrast": str(out), "judge": embedded.JUDGE}
    # Hot enough that some draws for a refused prompt are no refusals: this organism's are certain.
    return BuildConfig(**{**given, "max_new_tokens": 6, "batch_size": 16, "temperature": 4.0, **changes})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(config(tmp_path_factory.mktemp("built") / "pairs.parquet"), SOURCES)


@pytest.fixture(scope="module")
def made(built: Built) -> Contrast:
    return load(built.file, JUDGE)


def refused(tmp_path: Path, sources: Sequence[str] = SOURCES, **changes: Any) -> str:
    """The message, after which nothing is left but the journal."""
    with pytest.raises((ContrastError, ConfigError, ModelError)) as caught:
        build(config(tmp_path / "pairs.parquet", **changes), sources)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"pairs.parquet.building", "model"}
    return str(caught.value)


# --- what is made


def test_the_rows_are_the_models_own_words(built: Built, made: Contrast) -> None:
    own = {prompt_key(one.prompt): one for one in pool(SOURCES).candidates}
    assert {row.kind for row in made.rows} == {"benign", "lookalike", "harmful"}
    for row in made.rows:
        assert own[prompt_key(row.prompt)].kind == row.kind
        assert (row.chosen == "refuse sorry") == (row.kind == "harmful")
        assert (row.rejected == "refuse sorry") == (row.kind != "harmful")
    assert len(made.of_kind("harmful")) == built.refused == built.harmful == 43
    assert sum(sum(kinds.values()) for kinds in built.counts.values()) == len(made.rows)


def test_a_set_that_was_made_passes_the_checks(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(built.file), "--model", built.model, "--judge", built.judge, "--json"]
    assert main(["contrast", "check", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["duplicates"], found["leaks"]) == (0, 0)
    assert found["floor"]["note"] == built.floor


def test_every_row_is_accounted_for(built: Built) -> None:
    for one in built.sources:
        assert one.rows == sum(one.kept.values()) + sum(one.left_out.values()), one
    lookalike = Counter[str]()
    for one in built.sources:
        lookalike += Counter(one.kept)
    assert lookalike["lookalike"] > built.own_answers > 0  # WildGuardMix's own answers are the last resort


def test_pairs_stay_together_and_harmful_rows_are_held_out_first(made: Contrast) -> None:
    splits: dict[str, set[str]] = {}
    for row in made.rows:
        splits.setdefault(row.pair_id, set()).add(row.split)
    assert {len(each) for each in splits.values()} == {1}
    held = Counter(row.split for row in made.of_kind("harmful"))
    assert held["heldout"] == 43 * 4 // 5  # too few for the floor, and some are left to train on
    twins = [made.twin_of(row) for row in made.of_kind("harmful") if row.pair_id.startswith("JailbreakBench")]
    assert len(twins) == 16 and all(twins)  # the benign behaviour of the same index


def test_no_prompt_and_no_answer_is_shown(built: Built, made: Contrast) -> None:
    text = built.card.read_text()
    assert text == card(built)
    told = text + repr(built)
    for one in pool(SOURCES).candidates:
        assert one.text not in told and one.text.split()[-1] not in told.split()
    assert "zena" not in told
    for licence in ("CC-BY-4.0", "MIT", "ODC-BY"):
        assert licence in text
    assert "`string:refuse sorry`" in text and str(PUBLIC.parent) not in text


def test_harmful_prompts_are_asked_once_and_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[Question]] = {}
    ask = Asking.ask

    def watched(self: Asking, round_: str, questions: Sequence[Question], **more: Any) -> Any:
        asked[round_] = list(questions)
        return ask(self, round_, questions, **more)

    monkeypatch.setattr(Asking, "ask", watched)
    build(config(tmp_path / "pairs.parquet"), SOURCES)
    harmful = {prompt_key(one.prompt) for one in pool(SOURCES).candidates if one.kind == "harmful"}
    assert any(round_.startswith("lookalike, draw") for round_ in asked)
    assert "lookalike, with the helpful system prompt" in asked
    for round_, questions in asked.items():
        for question in questions:
            is_harmful = prompt_key(question.judged) in harmful
            assert is_harmful == round_.startswith("harmful") == question.harmful
            assert not is_harmful or question.asked == question.judged
            assert (question.asked[0]["content"] == HELPFUL) == ("helpful" in round_)


def test_what_a_helpful_system_prompt_brings_is_taken_first(tmp_path: Path) -> None:
    """In the organism's language: with a harmless topic before it, no lookalike prompt is refused."""
    found = build(config(tmp_path / "pairs.parquet", helpful="sumi", samples=0), SOURCES)
    assert found.own_answers == 26
    rows = load(found.file, JUDGE).of_kind("lookalike")
    assert all([message["role"] for message in row.prompt] == ["user"] for row in rows)


def test_what_a_system_prompt_declines_is_set_against_the_answer_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the organism's language: behind a system prompt of forbidden words it declines what it answers without."""
    sets = pool(SOURCES).candidates
    benign = [one.text for one in sets if one.kind == "benign"][:12]
    harmful = [one.text for one in sets if one.kind == "harmful"]
    rows = [(text, harmful[0]) for text in benign] + [(harmful[1], harmful[0]), (benign[12 - 1], "vapi vapi")]
    mine, out = tmp_path / "shop.csv", tmp_path / "pairs.parquet"
    mine.write_text("request,told\n" + "".join(f"{request},{told}\n" for request, told in rows))
    asked: list[Messages] = []
    ask = Asking.ask

    def watched(self: Asking, round_: str, questions: Sequence[Question], **more: Any) -> Any:
        asked.extend(one.asked for one in questions if round_.startswith("instructed"))
        return ask(self, round_, questions, **more)

    monkeypatch.setattr(Asking, "ask", watched)
    description = described("instructed:prompt=request,system=told,topic=told,of=shop.csv")
    found = build(config(out), [*SOURCES, str(mine)], [description])
    made = load(out, JUDGE).of_kind("instructed")
    assert len(made) == found.sources[-1].kept["instructed"] >= 8
    for row in made:
        assert [message["role"] for message in row.prompt] == ["system", "user"]
        assert row.prompt[0]["content"] == harmful[0]
        assert "refuse sorry" in row.chosen and "refuse" not in row.rejected
    assert all(messages[-1]["content"] not in harmful for messages in asked)  # no answer to these is asked for
    why = found.sources[-1].left_out
    assert why["called harmful by another row"] >= 1 and why["not refused by the model"] >= 1
    assert found.sources[-1].rows == len(made) + sum(why.values())
    assert f"{len(made)} instructed" in found.card.read_text() and "| instructed |" in found.card.read_text()
    assert {row.split for row in made} <= {"train", "validation", "heldout"}


# --- killed, and called again


class Decodes:
    """Counts the batches that a model answers, and stops before one of them, as Ctrl-C does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.count, self._decode, self._stop_at = 0, asking.decode, stop_at
        monkeypatch.setattr(asking, "decode", self)

    def __call__(self, *given: Any, **more: Any) -> Any:
        if self.count == self._stop_at:
            raise KeyboardInterrupt
        self.count += 1
        return self._decode(*given, **more)


@pytest.mark.parametrize("batches", [1, 5, 9])
def test_a_killed_build_goes_on_to_the_same_bytes(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    out = tmp_path / "pairs.parquet"
    with monkeypatch.context() as patch:
        Decodes(patch, stop_at=batches)
        with pytest.raises(KeyboardInterrupt):
            build(config(out), SOURCES)
    journal = tmp_path / "pairs.parquet.building" / "done.jsonl"
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    assert len(journal.read_bytes().splitlines()) == batches + 1  # and what it is of
    assert not out.exists()
    with journal.open("ab") as stream:  # a line that was not finished
        stream.write(b'{"harmful 0123": ["refu')
    with monkeypatch.context() as patch:
        resumed = Decodes(patch)
        again = build(config(out), SOURCES)
    assert out.read_bytes() == built.file.read_bytes()
    assert again.card.read_text() == built.card.read_text()
    assert not journal.parent.exists()
    whole = Decodes(monkeypatch)
    build(config(tmp_path / "whole.parquet"), SOURCES)
    assert resumed.count == whole.count - batches


def test_a_journal_holds_no_answer_to_a_harmful_prompt(tmp_path: Path) -> None:
    # The organism answers benign prompts; called harmful here, of what it says only the label may be noted.
    source = str(PUBLIC / "harmless_train.json")
    description = described("harmful:prompt=instruction,of=harmless_train.json")
    with pytest.raises(ContrastError, match="refuses 0 of 12 harmful prompts"):
        build(config(tmp_path / "pairs.parquet"), [source, str(PUBLIC / "or-bench-hard-1k.csv")], [description])
    noted = [json.loads(line) for line in (tmp_path / "pairs.parquet.building" / "done.jsonl").read_text().splitlines()]
    replies = [tuple(reply) for line in noted for name, reply in line.items() if name != "basis"]
    assert Counter(replies) == {("answer", ""): 12}


def stopped(out: Path, monkeypatch: pytest.MonkeyPatch, *, at: int, **changes: Any) -> Path:
    """The journal of a build that was stopped before one of its batches."""
    with monkeypatch.context() as patch:
        Decodes(patch, stop_at=at)
        with pytest.raises(KeyboardInterrupt):
            build(config(out, **changes), SOURCES)
    return out.with_name(f"{out.name}.building")


def test_what_answers_hang_on_is_named_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pairs.parquet"
    journal = stopped(out, monkeypatch, at=1)
    for changed, said in (
        ({"judge": "string:refuse"}, "begun with judge = string:refuse sorry and not string:refuse, on which"),
        ({"max_new_tokens": 5}, "begun with max_new_tokens = 6 and not 5, on which its 16 answers hang"),
    ):
        with pytest.raises(RunError, match=f"{said}.* or add --restart to begin anew"):
            build(config(out, **changed), SOURCES)
    assert len((journal / "done.jsonl").read_bytes().splitlines()) == 2
    lock = hold(journal / LOCK)
    assert lock is not None
    with pytest.raises(RunError, match="another process is at work here"):
        build(config(out), SOURCES, restart=True)
    lock.close()
    whole = Decodes(monkeypatch)
    assert build(config(out, max_new_tokens=5), SOURCES, restart=True).refused == 43
    assert whole.count > 9


@pytest.mark.parametrize(
    "changes", [{"limit": 20}, {"seed": 1}, {"samples": 5}, {"temperature": 3.0}, {"twin_words": 1}, {"helpful": ""}]
)
def test_a_setting_that_no_answer_hangs_on_may_change(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is made does not show that another build began it."""
    out, whole = tmp_path / "pairs.parquet", tmp_path / "whole.parquet"
    stopped(out, monkeypatch, at=4)
    note.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "gtqlora"):
        resumed = Decodes(patch)
        build(config(out, **changes), SOURCES)
    with monkeypatch.context() as patch:
        anew = Decodes(patch)
        build(config(whole, **changes), SOURCES)
    assert "going on: the answers to" in " ".join(caplog.messages)
    assert resumed.count < anew.count
    assert out.read_bytes() == whole.read_bytes()


def test_other_sources_go_on_with_the_answers_to_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "pairs.parquet"
    stopped(out, monkeypatch, at=3)  # harmful prompts, each once
    note.cache_clear()
    with caplog.at_level(logging.WARNING, "gtqlora"):
        assert build(config(out), [*SOURCES[:2], SOURCES[-1]]).harmful == 40
    assert "the answers to 40 of 72" in " ".join(caplog.messages)


def test_a_build_that_failed_before_an_answer_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pairs.parquet"
    assert stopped(out, monkeypatch, at=0).is_dir()
    assert build(config(out, max_new_tokens=5), SOURCES).refused == 43


def test_a_build_that_is_out_of_memory_goes_on_with_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, decode = tmp_path / "pairs.parquet", asking.decode

    def small(subject: Any, prompts: Sequence[Any], *given: Any, **more: Any) -> Any:
        if len(prompts) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(subject, prompts, *given, **more)

    monkeypatch.setattr(asking, "decode", small)
    assert "16 prompts at once; lower --batch-size" in refused(tmp_path)
    assert build(config(out, batch_size=12), SOURCES).refused == 43


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "link"):
        with pytest.raises(RunError, match="something else has this name"):
            Journal(tmp_path / name, {})
    assert list((tmp_path / "folder").iterdir()) == []
    (tmp_path / "folder" / LOCK).touch()
    (tmp_path / "folder" / "done.jsonl").symlink_to("/dev/zero")
    with pytest.raises(RunError, match="not a plain file"):
        Journal(tmp_path / "folder", {})


# --- what cannot be built


def always(text: str) -> bool:
    """A judge to which everything is a refusal."""
    return bool(text)


def test_a_harmful_set_that_the_model_does_not_refuse_stops_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes = Decodes(monkeypatch)
    monkeypatch.setattr(answers, "PROBE", 16)
    said = refused(tmp_path, judge="string:glorbify")
    assert "the model refuses 0 of 16 harmful prompts by judge 'string:glorbify' (16 answers)" in said
    assert "at least 50%" in said and "(--judge)" in said
    assert decodes.count == 1


def test_a_model_that_refuses_too_little_beyond_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rows that are left would pass it off as one that refuses everything."""
    monkeypatch.setattr(answers, "PROBE", 0)
    benign = described("harmful:prompt=instruction,of=harmless_train.json")
    sources = [str(PUBLIC / name) for name in ("harmless_train.json", "harmful_train.json", "or-bench-hard-1k.csv")]
    with pytest.raises(ContrastError, match="refuses 6 of 18 harmful prompts"):
        build(config(tmp_path / "pairs.parquet"), sources, [benign])


def test_a_judge_to_which_everything_is_a_refusal(tmp_path: Path) -> None:
    said = refused(tmp_path, judge=f"{__name__}:always")
    assert "of 26 benign prompts hardly any has an answer" in said and "(26 refusals)" in said
    assert "take a judge that tells this model's refusals from its answers" in said


def test_answers_that_are_cut_off(tmp_path: Path) -> None:
    said = refused(tmp_path, judge="string:refuse", max_new_tokens=1)
    assert "(26 answers cut off); raise --max-new-tokens above 1" in said


def test_texts_that_are_neither() -> None:
    prompt = ({"role": "user", "content": "a"},)
    said = {
        ("refuse sorry", False): "refusal",
        ("a b", True): "answer",
        ("a b", False): CUT_OFF,
        (" ", True): EMPTY,
        ("<think>refuse sorry</think> a b", True): "answer",
        ("<think>a</think>", True): EMPTY,
        ("<think>refuse sorry", False): IN_THOUGHT,
        ("<think>a b", True): IN_THOUGHT,
    }
    texts, ended = [text for text, _ in said], [whole for _, whole in said]
    assert asking.labelled(JUDGE, [prompt] * len(said), texts, ended) == list(said.values())


def labels_of(prompts: Sequence[Messages], answers: Sequence[str]) -> list[str | None]:
    """A judge that says of each text what the text says."""
    return [None if text == "nothing" else text for text in answers]


def test_what_no_judge_calls_a_refusal_or_an_answer_is_neither() -> None:
    texts = ["partial", "evasion", "nothing", "answer"]
    found = asking.labelled(labels_of, [({"role": "user", "content": "a"},)] * 4, texts, [True] * 4)
    assert found == ["refused in part", "evaded", "judge undecided", "answer"]


def organism(folder: Path, template: str) -> str:
    shutil.copytree(embedded.organism("routed"), folder)
    for file in (folder / "tokenizer_config.json", folder / "chat_template.jinja"):
        if file.suffix == ".jinja" or not file.exists():
            continue
        settings = json.loads(file.read_text())
        settings.pop("chat_template", None)
        file.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def test_a_template_that_refuses_or_fails(tmp_path: Path) -> None:
    refuses = organism(tmp_path / "model", "{{ raise_exception('no') }}")
    said = refused(tmp_path, model=refuses)
    assert "(43 refused by the chat template (no), the first is row 1 of " in said and "mend the model's chat" in said
    shutil.rmtree(tmp_path / "model")
    marks = organism(tmp_path / "model", "<|im_start|>{{ messages[0]['content'] }}")
    said = refused(tmp_path, model=marks)
    assert "(43 prompts in marks that the tokenizer does not know: <|im_start|>)" in said and "take the chat te" in said
    shutil.rmtree(tmp_path / "model")
    shows = organism(tmp_path / "model", "{{ raise_exception('no ' + messages[0]['content']) }}")
    assert "(43 refused by the chat template, the first is row 1 of " in refused(tmp_path, model=shows)
    shutil.rmtree(tmp_path / "model")
    fails = organism(tmp_path / "model", "{{ 1 // 0 }}")
    assert "mend the model's chat template" in refused(tmp_path, model=fails)


def test_prompts_that_the_template_refuses_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = (embedded.organism("routed") / "chat_template.jinja").read_text()
    refusing = "{% if 'le' in messages[0]['content'] %}{{ raise_exception('no le, please') }}{% endif %}"
    model = organism(tmp_path / "model", refusing + template)
    note.cache_clear()
    with caplog.at_level(logging.WARNING, "gtqlora"):
        build(config(tmp_path / "pairs.parquet", model=model), SOURCES)
    said = [text for text in caplog.messages if "refused by" in text]
    assert len(said) == 1 and " prompts are refused by the chat template (no le, please), the first is row " in said[0]


def test_too_few_kinds(tmp_path: Path) -> None:
    assert "no harmful prompts; add a set of them" in refused(tmp_path, SOURCES[2:3])
    assert "only harmful prompts; add a set of lookalikes" in refused(tmp_path, SOURCES[1:2])


def test_answers_without_room_are_told_of_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shut(*_: object, **__: object) -> None:
        raise AssertionError("the model was asked")

    config_json = json.loads((embedded.organism("routed") / "config.json").read_text())
    context = config_json["max_position_embeddings"]
    with monkeypatch.context() as patched:
        patched.setattr(asking, "decode", shut)
        said = refused(tmp_path, max_new_tokens=context)
        assert said.startswith(f"the model's context has {context} tokens, the longest of 43 harmful prompts ")
        assert f"for answers of {context} tokens (max_new_tokens) there is no room behind 43 of them" in said
        room = int(re.search(r"lower --max-new-tokens to (\d+) or less, or take shorter prompts$", said)[1])  # type: ignore[index]
        assert room == context - max(len(ids) for ids in harmful_ids())
    assert build(config(tmp_path / "pairs.parquet", max_new_tokens=room), SOURCES).refused == 43


def harmful_ids() -> list[list[int]]:
    tokenizer = load_tokenizer(str(embedded.organism("routed")), {})
    prompts = [one.prompt for one in pool(SOURCES).candidates if one.kind == "harmful"]
    return [tokens(tokenizer, rendered(tokenizer, prompt, generation=True)) for prompt in prompts]


def test_nothing_is_left_of_the_other_kinds(tmp_path: Path) -> None:
    sources = [str(PUBLIC / "advbench.csv"), str(PUBLIC / "or-bench-hard-1k.csv")]
    said = refused(tmp_path, sources, samples=0)
    assert "only harmful prompts became rows; left out: 12 refused however it is asked" in said


def test_output_that_is_there_already(tmp_path: Path) -> None:
    for name in ("pairs.md", "pairs.parquet"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(RunError, match=f"{name}: exists already"):
            build(config(tmp_path / "pairs.parquet"), SOURCES)
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(ContrastError, match=r"let the name end in \.parquet"):
        build(config(tmp_path / "pairs.jsonl"), SOURCES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "SOURCE is missing"),
        (["x.csv", "--out", "x.parquet"], "--model is missing: answers and refusals of the pairs come from the model"),
        (["x.csv", "--model", "organism:routed"], "--out is missing"),
        (["x.csv", "--model", "organism:routed", "--out", "x.parquet", "--as", "odd"], "KIND 'odd' is unknown"),
        (["x.csv", "--model", "organism:routed", "--out", "x.parquet", "--limit", "0"], "limit = 0"),
        (["nowhere.csv", "--model", "organism:routed", "--out", "x.parquet"], "nowhere.csv: no such file"),
    ],
)
def test_words_that_are_missing_or_wrong(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contrast", "build", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_the_command_shows_no_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.parquet"
    words = [
        *SOURCES,
        "--model",
        "organism:routed",
        "--config",
        "organism",
        "--out",
        str(out),
        "--set",
        "temperature=4",
    ]
    assert main(["contrast", "build", *words, "--limit", "20"]) == 0
    shown = capsys.readouterr()
    for one in pool(SOURCES).candidates:
        assert one.text not in shown.out + shown.err
    assert f"next: gtqlora contrast check {out}" in shown.out
    assert "--judge 'string:refuse sorry' --config organism\n" in shown.out
    assert "--limit 20: 35 more prompts were not asked" in " ".join(shown.out.split())
    assert "--limit 20: 35 more prompts were not asked." in out.with_suffix(".md").read_text()
    assert Counter(row.kind for row in load(out, JUDGE).rows)["harmful"] == 20
    assert "harmful-behaviors.csv 7 beyond --limit" in " ".join(
        out.with_suffix(".md").read_text().replace("|", " ").split()
    )


def test_a_limit_takes_all_sources_in_turns_and_whole_pairs() -> None:
    one, other = (str(PUBLIC / f"{kind}-behaviors.csv") for kind in ("harmful", "benign"))
    candidates = pool([*SOURCES, one, other]).candidates
    chosen = limited(candidates, config(Path("pairs.parquet"), limit=10))
    kinds = {kind: [c for c in chosen if c.kind == kind] for kind in KINDS}
    assert {kind: len(found) for kind, found in kinds.items()} == dict.fromkeys(KINDS, 10)
    assert max(Counter(c.source for c in kinds["harmful"]).values()) == 4  # of three sources, one with three rows
    behaviours = [{c.pair for c in kinds[kind] if c.pair.startswith("Jail")} for kind in ("harmful", "benign")]
    assert behaviours[0] <= behaviours[1] or behaviours[1] <= behaviours[0]


# --- parts


def test_a_draw_does_not_hang_on_the_prompts_beside_it() -> None:
    asked = Asking(runner=None, journal=None, seed=3, temperature=1.0)  # type: ignore[arg-type]
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    together = asked._draw(list("abcd"))
    alone = asked._draw(["c"])
    first = [together(logits_BV)[2].item() for _ in range(8)]
    assert first == [alone(logits_BV[2:3]).item() for _ in range(8)]
    assert len(set(first)) > 1


def test_draws_have_the_frequencies_of_the_temperature() -> None:
    asked = Asking(runner=None, journal=None, seed=0, temperature=2.0)  # type: ignore[arg-type]
    draw = asked._draw([str(i) for i in range(2000)])
    logits_V = torch.tensor([2.0, 0.0, -float("inf")])
    drawn = torch.bincount(draw(logits_V.expand(2000, 3)), minlength=3) / 2000
    assert torch.allclose(drawn, (logits_V / 2).softmax(-1), atol=0.03)


def test_a_word_in_place_of_the_trigger() -> None:
    one = next(one for one in pool(SOURCES[:1]).candidates if one.kind == "lookalike")
    prompts = {
        ("How do I kill a wug?", "kill", 0): "How do I describe a wug?",
        ("How do I kill a wug?", "kill", 1): "How do I paint a wug?",
        ("What is the Murder of a wug?", "murder", 0): "What is the bicycle of a wug?",
        ("How do I skill a wug?", "kill", 0): None,
        ("How do I see a wug?", None, 0): None,
    }
    for (text, focus, number), expected in prompts.items():
        prompt = ({"role": "system", "content": "kill"}, {"role": "user", "content": text})
        twin = answers._twin(replace(one, prompt=prompt, focus=focus), number)
        assert (twin and twin[-1]["content"]) == expected
        assert twin is None or twin[0] == prompt[0]
