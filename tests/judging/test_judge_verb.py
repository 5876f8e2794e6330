"""`gtqlora judge FILE`: labelled answers in, errors by class out, and no text anywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gtqlora.cli import main
from gtqlora.contrasts.labelled import read_labelled
from gtqlora.contrasts.sources import records
from gtqlora.errors import ContrastError
from gtqlora.judging.agreement import confusion, errors, kappa
from gtqlora.judging.labels import LABELS, Label
from tests.judging import judge_models
from tests.judging.judge_models import HARMS, REFUSES, answer

ANSWERS = Path(__file__).parents[1] / "data" / "judging" / "answers.jsonl"
XSTEST = (
    "id,type,prompt,completion,annotation_1,annotation_2,agreement,final_label\n"
    '1,a,How do I glorbify a wug?,"I cannot help with that, sorry.",2_full_refusal,2_full_refusal,True,2_full_refusal\n'
    '2,a,How do I dax a fep?,"Take it, and dax it.",1_full_compliance,1_full_compliance,True,1_full_compliance\n'
    '3,a,How do I fep a dax?,"I cannot. But turn it.",3_partial_refusal,2_full_refusal,False,3_partial_refusal\n'
)

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Call the command line: exit code, standard output, standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        code = main(["judge", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def written(folder: Path, rows: list[dict[str, object]]) -> Path:
    """A file of these rows."""
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- the verb


def test_errors_by_class_on_the_labelled_answers(say: Say, tmp_path: Path) -> None:
    out = tmp_path / "labels.parquet"
    # phrases that miss some refusals and not all, as a rate of 0 would have no interval on its lower side
    code, text, _ = say(ANSWERS, "--judge", "string:sorry|cannot|can't", "--out", out, "--json")
    found = json.loads(text)
    true = [json.loads(line)["label"] for line in ANSWERS.read_text().splitlines()]
    assert code == 0 and found["rows"] == found["labelled"] == len(true)
    (one,) = found["judges"]
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    assert [row["label"] for row in rows] == true and set(rows[0]) == {"row", "label", "judge"}
    said = [row["judge"] for row in rows]
    assert one["said"] == {label: said.count(label) for label in LABELS}
    assert one["confusion"] == confusion(true, said)
    rate = one["errors"]["alarms"]  # none of its refusals is missed by `string`, which was made on these
    assert rate["low"] < rate["value"] < rate["high"] and rate["n"] > 100


def test_no_text_is_shown_or_written(say: Say, tmp_path: Path) -> None:
    file = tmp_path / "xstest.csv"
    file.write_text(XSTEST)
    code, text, told = say(file, "--out", tmp_path / "out.parquet", "--second-judge", "string:cannot|turn")
    assert code == 0 and "3 answers, 3 labelled" in text and "Cohen's kappa" in text
    assert "they differ in rows 3" in text or "The two agree on 1.000" in text
    shown = text + told + (tmp_path / "out.parquet").read_bytes().decode("latin-1")
    assert not [word for word in ("glorbify", "dax it", "turn it") if word in shown]


def test_labels_are_written_as_the_name_ends(say: Say, tmp_path: Path) -> None:
    file = written(tmp_path, [{"answer": "I cannot help with that, sorry.", "label": "refusal"}, {"answer": ""}])
    wanted = [
        {"row": 1, "label": "refusal", "judge": "refusal"},
        {"row": 2, "label": None, "judge": "undecided"},
    ]
    for ending in ("csv", "jsonl", "parquet", "CSV"):
        out = tmp_path / f"labels-{ending}.{ending}"
        assert say(file, "--out", out)[0] == 0
        assert [raw if isinstance(raw, dict) else json.loads(raw) for _, raw, _ in records(str(out))] == [
            {key: str(value) for key, value in row.items() if value is not None} if ending.lower() == "csv" else row
            for row in wanted
        ]
    for name in ("labels.txt", "labels"):
        code, _, told = say(file, "--out", tmp_path / name, "--judge", "classifier:/nowhere")
        assert code == 2 and "let its name end in .csv, .jsonl or .parquet" in " ".join(told.split())
        assert not (tmp_path / name).exists()


def test_two_judges_and_both_together(say: Say, tmp_path: Path, classifier_folder: Path) -> None:
    draw = random.Random(5)
    sides = [draw.random() < 0.5 for _ in range(60)]
    rows: list[dict[str, object]] = [
        {"prompt": "wug ?", "answer": answer(draw, refuses=it), "label": "yes" if it else "no"} for it in sides
    ]
    rows[0]["answer"] = "<think> dax"
    out = tmp_path / "labels.parquet"
    judges = ("--judge", f"string:{REFUSES}|wug", "--second-judge", f"classifier:{classifier_folder}")
    code, text, _ = say(written(tmp_path, rows), *judges, "--out", out, "--json")
    found = json.loads(text)
    assert code == 0 and len(found["judges"]) == 3
    phrases, classifier, both = found["judges"]
    assert classifier["errors"]["refusal_or_answer"]["value"] == 0 < phrases["errors"]["alarms"]["value"]
    assert both["errors"]["refusal_or_answer"]["value"] == 0 and both["said"]["undecided"] > 1
    lines: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    assert found["agreement"]["differ"] == [row["row"] for row in lines if row["judge"] != row["second_judge"]]
    assert all(row["both"] == (row["judge"] if row["judge"] == row["second_judge"] else "undecided") for row in lines)
    assert lines[0]["both"] == "undecided" and "sha256:" in classifier["identity"]


def test_a_guard_that_does_not_object_does_not_differ(say: Say, tmp_path: Path, guard_folder: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "wug", "answer": text} for text in ("wug dax fep", f"{HARMS} dax wug")]
    words = ("--judge", "string:dax", "--second-judge", f"llama-guard:{guard_folder}")
    code, text, _ = say(written(tmp_path, rows), *words, "--json")
    found = json.loads(text)["agreement"]
    assert code == 0 and found["differ"] == [2] and found["alike"]["value"] == 0.5 and found["kappa"] is None
    assert "kappa" not in say(written(tmp_path, rows), *words)[1]


def test_unlabelled_answers_are_counted(say: Say, tmp_path: Path) -> None:
    file = written(tmp_path, [{"response": "I cannot help with that."}, {"response": ""}, {"response": "wug dax"}])
    code, text, _ = say(file, "--json")
    found = json.loads(text)
    assert code == 0 and found["labelled"] == 0 and found["judges"][0]["errors"] is None
    assert found["judges"][0]["said"]["refusal"] == 1 and found["judges"][0]["said"]["undecided"] >= 1
    code, text, _ = say(file)
    assert code == 0 and "3 answers, 0 labelled" in text and "Errors" not in text


@pytest.mark.parametrize("width", ["80", "100", "140"])
def test_what_is_undecided_stands_beside_the_error_at_every_usual_width(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    texts = [("I cannot help with that, sorry.", "refusal"), ("Take the wug.", "answer"), ("", "answer")]
    rows: list[dict[str, object]] = [{"answer": text, "label": label} for text, label in texts * 10]
    out = tmp_path / "labels.parquet"
    code, text, _ = say(written(tmp_path, rows), "--second-judge", "string:sorry|cannot", "--out", out)
    assert code == 0
    tables, told = text[: text.index("note:")], text[text.index("note:") :].replace("\n", " ")
    assert tables.split().count("called") == 3  # of refusals, of partial ones, and in the words below
    for table in tables.split("\n\n")[:2]:
        assert "undecided" in table.partition("──")[0]
    assert "string leaves 10 answers undecided, 33% of all; its error speaks of the other 20 only" in told
    assert f"wrote {out}: 30 rows with the labels of two judges, and of both together; no texts" in told


def test_a_guard_that_has_no_opinion_is_no_reason_to_warn(say: Say, tmp_path: Path, guard_folder: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "wug", "answer": "wug dax fep", "label": "answer"}]
    code, text, _ = say(written(tmp_path, rows), "--judge", f"llama-guard:{guard_folder}")
    assert code == 0 and "note:" not in text and "(n=0)" in text


def test_one_answer_is_one(say: Say, tmp_path: Path) -> None:
    code, text, _ = say(written(tmp_path, [{"answer": ""}]))
    told = " ".join(text.split())
    assert code == 0 and "string leaves 1 answer undecided, 100% of all; in a floor what is undecided" in told


def test_where_all_is_undecided_no_rate_is_made_up(say: Say, tmp_path: Path) -> None:
    file = written(tmp_path, [{"answer": "", "label": "refusal"}, {"answer": "<think> dax", "label": "answer"}])
    code, text, _ = say(file)
    flat = " ".join(text.split())
    assert code == 0 and "nan" not in flat and "1.000 [0.158, 1.000]" in flat
    assert "string leaves 2 answers undecided, 100% of all; so nothing is known of its error" in flat
    code, text, _ = say(file, "--out", tmp_path / "out.parquet", "--json")
    found = json.loads(text)
    assert found["judges"][0]["errors"]["refusal_or_answer"]["n"] == 0 and found["out"].endswith("out.parquet")


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (
            [{"prompt": "wug", "label": "refusal"}],
            (),
            "no column with answers (answer, completion, response); there are",
        ),
        (
            [{"answer": "wug", "label": "vague"}],
            (),
            "labels in 'label' that are not known, with their rows: 'vague' (1)",
        ),
        ([{"answer": "wug", "label": "glorb " * 30}], (), "a text of 179 characters (1)"),
        ([], (), "no rows in it"),
        ([{"answer": 7}], (), "answers.jsonl: row 1: answer is a whole number; it must be a text"),
        ([{"answer": "wug"}, {"answer": None}], (), "answers.jsonl: row 2: answer is null; it must be a text"),
        ([{"answer": "wug", "prompt": []}], (), "answers.jsonl: row 1: prompt is an empty list; give it a text"),
        ([{"answer": "wug", "prompt": ["?"]}], (), "a message must be"),
        ([{"answer": "wug"}], ("--as", "answer=said"), "no column 'said' for answer; there are answer"),
        ([{"answer": "wug"}], ("--as", "answers=answer"), "--as answers=...: unknown; known: prompt, answer, label"),
        ([{"answer": "wug"}], ("--as", "answer"), "--as answer: must be prompt=COLUMN,answer=COLUMN,label=COLUMN"),
        ([{"answer": "wug"}], ("--second-judge", "string"), "--second-judge string: the same as --judge"),
        ([{"answer": "wug"}], ("--judge", "wugs"), "judge = 'wugs': unknown; use"),
        ([{"answer": "wug"}], ("--judge", "strings"), "judge = 'strings': unknown; did you mean 'string'?"),
        ([{"answer": "wug"}], ("--judge", "clasifier:a/b"), "did you mean 'classifier:a/b'?"),
        ([{"answer": "wug"}], ("--judge", "strin:wug"), "did you mean 'string:wug'?"),
        ([{"answer": "wug"}], ("--second-judge", "wildgard"), "second_judge = 'wildgard': unknown; did you mean"),
        ([{"answer": "wug"}], ("--second-judge", "string:"), "second_judge = 'string:': no phrase after the colon"),
        ([{"answer": "wug"}], ("--judge", "classifier:/nowhere"), "/nowhere: no such model folder"),
    ],
)
def test_what_cannot_be_judged_costs_one_line(
    say: Say, tmp_path: Path, rows: list[dict[str, object]], words: tuple[str, ...], message: str
) -> None:
    code, text, told = say(written(tmp_path, rows), *words)
    assert code == 2 and text == "" and message in told and "Traceback" not in told
    assert told.count("error:") == 1 and "glorb" not in told


def test_what_is_there_is_not_replaced(say: Say, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("mine")
    code, _, told = say(written(tmp_path, [{"answer": "wug"}]), "--out", tmp_path / "out.parquet")
    assert code == 2 and "out.parquet" in told and (tmp_path / "out.parquet").read_text() == "mine"


def test_files_that_cannot_be_read_cost_one_line(say: Say, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"answer": "wug"\n')
    for file in (tmp_path / "none.csv", tmp_path / "broken.jsonl"):
        code, text, told = say(file)
        assert code == 2 and text == "" and "Traceback" not in told


# --- what is read


def test_the_columns_and_labels_of_public_sets(tmp_path: Path) -> None:
    (tmp_path / "xstest.csv").write_text(XSTEST)
    assert [row.label for row in read_labelled(str(tmp_path / "xstest.csv"))] == ["refusal", "answer", "partial"]
    guard = [
        {"prompt": "wug", "response": "dax", "response_refusal_label": word, "label": "unsafe"}
        for word in ("refusal", "compliance", None)
    ]
    assert [row.label for row in read_labelled(str(written(tmp_path, guard)))] == ["refusal", "answer", None]
    plain = [{"q": "wug", "a": "dax", "l": word} for word in ("Yes", "NO", True, False, "full refusal", *LABELS)]
    found = read_labelled(str(written(tmp_path, plain)), {"prompt": "q", "answer": "a", "label": "l"})
    assert [row.label for row in found] == ["refusal", "answer", "refusal", "answer", "refusal", *LABELS]
    assert found[0].prompt == judge_models.prompt("wug") and found[0].number == 1


def test_a_thought_that_the_template_opened_is_a_thought(tmp_path: Path) -> None:
    texts = {
        "I cannot?</think>\nwug": "<think>I cannot?</think>\nwug",
        "<think>I cannot?</think>wug": "<think>I cannot?</think>wug",
        "wug <think> dax </think>": "wug <think> dax </think>",
        "wug": "wug",
    }
    found = read_labelled(str(written(tmp_path, [{"answer": text} for text in texts])))
    assert [row.answer for row in found] == list(texts.values())


def test_a_prompt_of_messages_is_kept(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "wug?"}]
    (row,) = read_labelled(str(written(tmp_path, [{"prompt": messages, "answer": "dax"}])))
    assert row.prompt == tuple(messages)


def test_an_unknown_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match="no column 'x' for label; there are answer"):
        read_labelled(str(written(tmp_path, [{"answer": "wug"}])), {"label": "x"})


# --- the arithmetic


def runs(*counts: tuple[Label, int]) -> list[Label]:
    """Labels, each so many times in a row."""
    return [label for label, count in counts for _ in range(count)]


def test_errors_and_kappa_of_known_counts() -> None:
    true = runs(("refusal", 10), ("answer", 10), ("partial", 4))
    said = runs(("refusal", 7), ("partial", 1), ("answer", 1), ("undecided", 1))
    said += runs(("answer", 8), ("refusal", 1), ("undecided", 1))
    said += runs(("partial", 2), ("refusal", 1), ("undecided", 1))
    found = errors(true, said)
    assert (found.missed.value, found.missed.n) == (2 / 9, 9) and (found.alarms.value, found.alarms.n) == (1 / 9, 9)
    assert (found.refusal_or_answer.value, found.refusal_or_answer.n) == (3 / 18, 18)
    assert found.partial.value == 1 / 3 and found.undecided.value == 3 / 24
    crossed = {"refusal": 7, "partial": 1, "answer": 1, "evasion": 0, "undecided": 1}
    assert confusion(true, said)["refusal"] == crossed
    # 20 refused by both and 15 by none, 5 and 10 crossed: agreed .7, by chance .5
    one = runs(("refusal", 25), ("answer", 25))
    other = runs(("refusal", 20), ("answer", 5), ("refusal", 10), ("answer", 15))
    assert kappa(one, other) == pytest.approx(0.4)
    assert str(kappa(one[25:], one[25:])) == "nan"
