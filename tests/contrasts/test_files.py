"""Rows as they come in files and folders of other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtqlora.contrasts import load
from gtqlora.contrasts.sources import records
from gtqlora.errors import ContrastError
from tests.contrasts.test_rows import ENGLISH, row

ROWS = [row("benign", 'How do I, say, bake "bread"?\r\nToday.'), row("harmful", "x", topic="t", pair_id="7")]


def table(rows: Sequence[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["kind", "prompt", "chosen", "rejected", "topic", "pair_id"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read(path: Path) -> list[Any]:
    return [record for _, record, _ in records(str(path))]


def refused(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ContrastError) as caught:
        load(path, ENGLISH)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.csv", table(ROWS)),
        ("pairs.CSV", "\ufeff" + table(ROWS)),
        ("pairs.tsv", table(ROWS, "\t")),
        ("pairs.json", json.dumps(ROWS)),
        ("pairs.json", "\ufeff\n" + json.dumps(ROWS, indent=2) + "\n"),
        ("pairs.json", "\n".join(map(json.dumps, ROWS))),
        ("pairs.ndjson", "\r\n".join(map(json.dumps, ROWS))),
    ],
)
def test_the_same_rows_in_every_format(tmp_path: Path, name: str, content: str) -> None:
    path, lines = tmp_path / name, tmp_path / "pairs.jsonl"
    path.write_bytes(content.encode())
    lines.write_text("\n".join(map(json.dumps, ROWS)))
    assert load(path, ENGLISH).rows == load(lines, ENGLISH).rows


def test_messages_in_a_cell(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    path = tmp_path / "pairs.csv"
    path.write_bytes(table([row("benign", json.dumps(turns)), ROWS[1]]).encode())
    assert list(load(path, ENGLISH).rows[0].prompt) == turns
    assert "row 1 holds messages that are not valid JSON" in refused(path, table([row("benign", str(turns))]))
    path.write_bytes(table([row("benign", "[{x for x in y}]"), ROWS[1]]).encode())
    assert load(path, ENGLISH).rows[0].prompt[0]["content"] == "[{x for x in y}]"


def test_bare_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n  two\u2028 lines\n".encode())
    (tmp_path / "a.json").write_text('["one", {"prompt": "two"}, "three"]')
    assert read(tmp_path / "a.txt") == [{"text": "one"}, {"text": "two\u2028 lines"}]
    assert read(tmp_path / "a.json") == [{"text": "one"}, b'{"prompt": "two"}', {"text": "three"}]
    with pytest.raises(ContrastError, match=r"rows 1, 3: prompt and chosen and rejected and kind missing"):
        load(tmp_path / "a.txt", ENGLISH)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.csv", table([row("benign", '[{"role": "user", "role": "user"}]')]), "the key 'role' stands twice"),
        ("a.csv", "", "is empty; a CSV file begins with"),
        ("a.csv", "prompt,,kind\n", "does not name every column"),
        ("a.csv", "prompt,kind,prompt\n", "has the column 'prompt' twice"),
        ("a.csv", "prompt,kind\nHow, then?,benign\n", "row 1 has 3 cells, and the header 2; put a text"),
        ("a.csv", 'prompt,kind\n"a" b,benign\n', "row 1 is not valid CSV"),
        ("a.csv", 'prompt,kind\na,benign\n"b,benign\n', "row 2 is not valid CSV"),
        ("a.csv", f"prompt,kind\n{'a' * 1_000_001},benign\n", "row 1 is not valid CSV"),
        ("a.csv", "prompt,kind\n", "no rows"),
        ("a.csv", "pr\xe9,kind\n".encode("latin-1"), "not UTF-8 .byte 3 is 0xe9.; save it as UTF-8"),
        ("a.txt", "caf\xe9\n".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", json.dumps(ROWS[0]).encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.json", json.dumps(ROWS).encode("utf-16"), "UTF-16, not UTF-8"),
        ("a.json", "[]", "no rows"),
        ("a.json", json.dumps(ROWS)[:-1], "does not go on after element 2; is the file cut off"),
        ("a.json", json.dumps(ROWS)[:-9], "element 2 of the array is not valid JSON"),
        ("a.json", json.dumps(ROWS) + "\n{}", "more stands after the array"),
        ("a.json", "[{} {}]", "does not go on after element 1"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "row 1: the key 'prompt' stands twice"),
        ("a.json", '[{"pair_id": ' + "9" * 5000 + "}]", "row 1: a number has 5000 digits"),
        ("a.json", "[" * 100_000, "element 1 of the array is not valid JSON"),
        ("a.json", json.dumps({"rows": ROWS}, indent=1), r"one object over many lines.*lists in the object: 'rows'"),
        ("a.json", json.dumps(ROWS[0], indent=1), r"one object over many lines.*lists in the object: none"),
        ("a.jsonl", json.dumps(ROWS, indent=1), "a JSON array over many lines; let the name end in .json"),
        ("a.jsonl", json.dumps(ROWS[0], indent=1), "one object over many lines"),
        ("a.csv", "kind;prompt\nbenign;a\n", "separated by ';'; save it with commas"),
        ("a.csv", "kind\tprompt\nbenign\ta\n", r"separated by '\\t'; save it with commas, or tabs as .tsv"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, pattern: str) -> None:
    import re

    message = refused(tmp_path / name, content)
    assert re.search(pattern, message), message


@settings(max_examples=60, deadline=None)
@given(found=st.lists(st.dictionaries(st.sampled_from("abc"), st.text(max_size=8), min_size=1), max_size=4))
def test_any_text_comes_back_from_csv_and_arrays(found: list[dict[str, str]]) -> None:
    import tempfile

    kept = [{name: text.replace("\0", "") for name, text in each.items()} for each in found]
    kept = [{name: text for name, text in each.items() if text} for each in kept]
    kept = [each for each in kept if each]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["a", "b", "c"], quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(kept)
        assert read(path) == kept
        array = Path(folder) / "a.json"
        array.write_text(json.dumps(kept))
        assert [json.loads(raw) for raw in read(array)] == kept


# Folders that the datasets library saved


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    from datasets import Dataset

    rows = [{name: each.get(name) for name in ("kind", "prompt", "chosen", "rejected")} for each in ROWS]
    others = [{**each, "prompt": f"{each['prompt']}!"} for each in rows]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    # as `DatasetDict.save_to_disk` does
    for split, part in (("train", rows), ("test", others)):
        Dataset.from_list(part).save_to_disk(tmp_path / "both" / split)
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return tmp_path


def test_saved_datasets(saved: Path) -> None:
    assert [r.kind for r in load(saved / "one", ENGLISH).rows] == ["benign", "harmful"]
    assert [r.split for r in load(saved / "both", ENGLISH).rows] == ["train", "train", "heldout", "heldout"]
    assert all(r.prompt[0]["content"].endswith("!") for r in load(f"{saved / 'both'}:test", ENGLISH).rows)
    with pytest.raises(ContrastError, match=r"no split 'easy'; splits present: train, test"):
        load(f"{saved / 'both'}:easy", ENGLISH)
    with pytest.raises(ContrastError, match=r"a single dataset without splits; leave 'train' out"):
        load(f"{saved / 'one'}:train", ENGLISH)


@pytest.mark.parametrize("outside", ["../one/data-00000-of-00001.arrow", "/etc/passwd", ".."])
def test_a_saved_dataset_does_not_lead_elsewhere(saved: Path, outside: str) -> None:
    state = saved / "both" / "train" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": outside}]}))
    with pytest.raises(ContrastError, match="no file or folder beside it"):
        load(saved / "both", ENGLISH)


def test_a_saved_dataset_has_no_split_elsewhere(saved: Path) -> None:
    (saved / "both" / "dataset_dict.json").write_text('{"splits": ["../one"]}')
    with pytest.raises(ContrastError, match="no file or folder beside it"):
        load(saved / "both", ENGLISH)


@pytest.mark.parametrize("broken", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_saved_dataset_that_is_broken(saved: Path, broken: str) -> None:
    for content in (b"", b"{", b"[]", b"\xff"):
        (saved / "one" / broken).write_bytes(content)
        with pytest.raises(ContrastError):
            load(saved / "one", ENGLISH)


def test_a_configuration_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    card = "---\nconfigs:\n"
    for name in ("plain", "hard"):
        card += f"- config_name: {name}\n  data_files:\n  - split: harmful\n    path: {name}.jsonl\n"
        changed = [{**each, "prompt": f"{name} {each['prompt']}"} for each in ROWS]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, changed)))
    (folder / "README.md").write_text(card + "---\n")
    found = load(f"{folder}:hard@harmful", ENGLISH)
    assert all(r.prompt[0]["content"].startswith("hard ") for r in found.rows)
    with pytest.raises(ContrastError, match=r"Config name is missing.*\['plain', 'hard'\]"):
        load(str(folder), ENGLISH)
    with pytest.raises(ContrastError, match="cannot be loaded"):
        load(f"{folder}:none@harmful", ENGLISH)
