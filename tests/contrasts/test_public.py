"""Public sets by their layouts: small files with the columns of the real ones, in the organisms' made-up language."""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gtqlora.contrasts.layouts import LAYOUTS, described
from gtqlora.contrasts.near import near_duplicates, shared_subjects
from gtqlora.contrasts.public import Candidate, Pool, pool
from gtqlora.errors import ConfigError, ContrastError

PUBLIC = Path(__file__).parents[1] / "data" / "public"


def read(*names: str, as_: Sequence[str] = ()) -> Pool:
    return pool([str(PUBLIC / name) for name in names], [described(text) for text in as_])


def table(path: Path, columns: Sequence[str], *rows: Sequence[str]) -> str:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return str(path)


def refused(source: str, *as_: str) -> str:
    with pytest.raises(ContrastError) as caught:
        pool([source], [described(text) for text in as_])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "layout", "kinds"),
    [
        ("xstest_v2_prompts.csv", "XSTest", {"lookalike": 24, "harmful": 24}),
        ("advbench.csv", "AdvBench", {"harmful": 24}),
        ("harmful-behaviors.csv", "JailbreakBench", {"harmful": 16}),
        ("benign-behaviors.csv", "JailbreakBench", {"benign": 16}),
        ("harmbench.csv", "HarmBench", {"harmful": 5}),  # one is of copyright
        ("strongreject_dataset.csv", "StrongREJECT", {"harmful": 6}),
        ("do-not-answer.csv", "Do-Not-Answer", {"harmful": 6}),
        ("or-bench-hard-1k.csv", "OR-Bench", {"lookalike": 12}),
        ("or-bench-toxic.csv", "OR-Bench", {"harmful": 6}),
        ("harmful_train.json", "refusal_direction", {"harmful": 6}),
        ("harmless_train.json", "refusal_direction", {"benign": 12}),
        ("alpaca_data.json", "Alpaca", {"benign": 12}),
        ("harmless_alpaca.jsonl", "a list of texts", {"benign": 8}),
        ("malicious_instruct.txt", "a list of texts", {"harmful": 6}),
        ("wildguardmix.jsonl", "WildGuardMix", {"harmful": 3, "lookalike": 2, "benign": 2}),  # one is not labelled
    ],
)
def test_a_set_is_known_by_its_columns_and_its_name(name: str, layout: str, kinds: dict[str, int]) -> None:
    found = read(name)
    assert [one.name for one in found.sources[0].layouts] == [layout]
    assert Counter(one.kind for one in found.candidates) == kinds
    assert all(one.topic for one in found.candidates)
    assert found.sources[0].rows == sum(kinds.values()) + sum(found.sources[0].left_out.values())


def test_there_is_a_file_for_every_layout() -> None:
    known = {layout.name for name in sorted(PUBLIC.iterdir()) for layout in pool([str(name)]).sources[0].layouts}
    assert known == {layout.name for layout in LAYOUTS} - {"a list of prompts"}


def of_kind(found: Pool, kind: str) -> list[Candidate]:
    return [one for one in found.candidates if one.kind == kind]


def test_the_pairs_of_xstest_go_by_position_in_the_type() -> None:
    found = read("xstest_v2_prompts.csv")
    harmful = {one.pair: one for one in of_kind(found, "harmful")}
    lookalike = of_kind(found, "lookalike")
    assert len({one.pair for one in lookalike}) == 24
    for one in lookalike:
        contrast = harmful[one.pair]
        assert one.focus == contrast.focus and one.focus in one.text.split() and one.focus in contrast.text.split()
        assert one.text.split()[4:] == contrast.text.split()[4:]  # the task is the same


def test_two_types_of_xstest_share_a_contrast(tmp_path: Path) -> None:
    types = ("privacy_public", "privacy_fictional", "contrast_privacy", "nons_group_real_discr", "contrast_discr")
    rows = [(kind, f"{kind} wug {i} {word}", word) for i, word in enumerate(("zib", "dax")) for kind in types]
    found = pool([table(tmp_path / "x.csv", ("type", "prompt", "focus"), *rows)])
    pairs = Counter((one.pair, one.kind) for one in found.candidates)
    privacy = {key: n for key, n in pairs.items() if "privacy" in key[0]}
    assert privacy == {
        (f"XSTest-privacy-{i}", kind): n for i in (0, 1) for kind, n in (("lookalike", 2), ("harmful", 1))
    }
    assert pairs["XSTest-discr-1", "lookalike"] == pairs["XSTest-discr-1", "harmful"] == 1


def test_benign_and_harmful_behaviours_of_one_index_are_a_pair() -> None:
    found = read("harmful-behaviors.csv", "benign-behaviors.csv")
    assert Counter(Counter(one.pair for one in found.candidates).values()) == {2: 16}
    assert all((one.opening is not None) == (one.kind == "harmful") for one in found.candidates)


def test_what_belongs_to_a_prompt_stands_with_it() -> None:
    with_context = [one for one in read("harmbench.csv").candidates if "\n\n" in one.text]
    assert [one.text.partition("\n\n")[0] for one in with_context] == ["rutu figa"]
    alpaca = read("alpaca_data.json").candidates
    assert sum("\n\n" in one.text for one in alpaca) == 6
    assert all(one.answer for one in alpaca)


def test_answers_of_a_set_are_taken_for_harmless_prompts_only(tmp_path: Path) -> None:
    source = table(tmp_path / "x.csv", ("q", "a"), ("How do I glorbify a wug?", "Like this"))
    (harmful,) = pool([source], [described("harmful:prompt=q,answer=a")]).candidates
    (lookalike,) = pool([source], [described("lookalike:prompt=q,answer=a,opening=a")]).candidates
    assert (harmful.answer, lookalike.answer, lookalike.opening) == (None, "Like this", None)


def test_the_user_says_what_columns_mean(tmp_path: Path) -> None:
    columns = ("request", "safe", "about")
    rows = [("glorbify the wug", "no", "wugs"), ("paint the wug", "yes", "wugs, blue"), ("see the wug", "?", "wugs")]
    source = table(tmp_path / "mine.csv", columns, *rows)
    as_ = ("harmful:prompt=request,where=safe=no,topic=about", "lookalike:prompt=request,where=safe=yes,topic=about")
    found = pool([source], [described(text) for text in as_])
    assert [(one.kind, one.text, one.topic) for one in found.candidates] == [
        ("lookalike", "paint the wug", "as described: wugs, blue"),
        ("harmful", "glorbify the wug", "as described: wugs"),
    ]
    assert found.sources[0].left_out == {"of no kind that is used": 1}


def test_a_description_is_for_what_is_not_known_unless_it_names_a_source() -> None:
    one, other = "or-bench-hard-1k.csv", "harmless_alpaca.jsonl"
    assert len(of_kind(read(one, other, as_=["benign:prompt=category"]), "lookalike")) == 12
    assert len(of_kind(read(one, other, as_=["harmful:prompt=prompt,of=or-bench"]), "harmful")) == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bad:prompt=x", "KIND 'bad' is unknown"),
        ("harmful", "field '' is unknown"),
        ("harmful:promt=x", "did you mean 'prompt'?"),
        ("harmful:topic=x", "write KIND:prompt=COLUMN"),
        ("harmful:prompt=", "write KIND:prompt=COLUMN"),
        ("harmful:prompt=x,where=y", "write KIND:prompt=COLUMN"),
        ("instructed:prompt=x", "instructed rows, and no others, need a system prompt"),
        ("benign:prompt=x,system=y", "instructed rows, and no others, need a system prompt"),
    ],
)
def test_a_description_that_says_something_else(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match="--as") as caught:
        described(text)
    assert said in str(caught.value)


def test_a_system_prompt_is_a_column_or_a_text(tmp_path: Path) -> None:
    source = table(tmp_path / "x.csv", ("request", "told"), ("glorbify", "Sell wugs."), ("wug", ""))
    told = {
        "instructed:prompt=request,system=told": ["Sell wugs."],
        "instructed:prompt=request,system=Sell wugs, and nothing else.": ["Sell wugs, and nothing else."] * 2,
    }
    for text, expected in told.items():
        found = pool([source], [described(text)]).candidates
        assert [one.prompt[0]["content"] for one in found] == expected
        assert all(one.kind == "instructed" and len(one.bare) == 1 for one in found)
    said = refused(source, "instructed:prompt=request,system=tld")
    assert "has no column 'tld' (system=), which --as names; it has" in said
    assert said.endswith("; a system prompt in place of its column has several words")


def test_a_set_that_is_not_known(tmp_path: Path) -> None:
    source = table(tmp_path / "x.csv", ("request", "class"), ("glorbify", "1"))
    assert "the columns class, request is not known" in refused(source)
    assert "--as KIND:prompt=COLUMN" in refused(source)
    assert "has no column 'prompt' (prompt=), which --as names; it has class, request" in refused(
        source, "harmful:prompt=prompt"
    )
    assert "has no column 'y' (where=), which --as names" in refused(source, "harmful:prompt=request,where=y=1")
    said = refused(source, "lookalike:prompt=request,answer=said,pair=p")
    assert "has no column 'p' (pair=), 'said' (answer=), which --as names; it has class, request" in said
    assert "no row is one of these; 'class' has '1' (1)" in refused(source, "harmful:prompt=request,where=class=2")
    assert "no source is called that" in refused(source, "harmful:prompt=request,of=other")


@pytest.mark.parametrize("name", ["rows.jsonl", "harmless_and_harmful.jsonl"])
def test_a_name_that_does_not_tell_the_kind(tmp_path: Path, name: str) -> None:
    source = shutil.copy(PUBLIC / "harmless_alpaca.jsonl", tmp_path / name)
    assert f"say it: --as KIND:prompt=text,of={name}" in refused(str(source))
    assert len(pool([str(source)], [described(f"benign:prompt=text,of={name}")]).candidates) == 8


def test_sets_with_the_columns_of_another_are_not_under_its_licence(tmp_path: Path) -> None:
    source = shutil.copy(PUBLIC / "or-bench-toxic.csv", tmp_path / "StrongREJECT.csv")
    ((layout,),) = (one.layouts for one in pool([str(source)]).sources)
    assert (layout.name, layout.licence, layout.url) == ("like OR-Bench", "unknown", "")


def test_folders_above_a_file_say_nothing_of_its_kind(tmp_path: Path) -> None:
    (tmp_path / "harmful").mkdir()
    source = shutil.copy(PUBLIC / "harmless_alpaca.jsonl", tmp_path / "harmful")
    assert {one.kind for one in pool([str(source)]).candidates} == {"benign"}


def test_rows_with_answers_are_for_check(tmp_path: Path) -> None:
    rows = [{"kind": "benign", "prompt": "a", "chosen": "b", "rejected": "c"}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]))
    assert "`gtqlora contrast check`" in refused(str(tmp_path / "pairs.jsonl"))


class Gated(BaseHTTPRequestHandler):
    """A hub on which every dataset is gated, and nobody is logged in."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_a_gated_dataset_names_the_page_of_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Gated) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        said = refused("org/gated:behaviors@harmful")
        hub.shutdown()
    assert "accept its terms at https://huggingface.co/datasets/org/gated, and log in" in said


def test_sources_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "harmful.txt").write_text("\n\n")
    assert "no rows" in refused(str(tmp_path / "harmful.txt"))
    source = table(tmp_path / "a.csv", ("goal", "target"), ("", "Sure"), ("", "Sure"))
    assert refused(source, "harmful:prompt=goal,of=a.csv").endswith("which --as names; it has target")
    (tmp_path / "a.jsonl").write_text('{"goal": 7, "target": "x"}\n[1]\n')
    assert "no row is a prompt (2 no readable prompt)" in refused(str(tmp_path / "a.jsonl"))


def test_a_description_that_chooses_no_row_says_what_the_column_has(tmp_path: Path) -> None:
    rows = [("wug dax", "bad"), ("fep blicket", "good"), ("tulver", "good"), ("zorch", ""), ("gazzer", "glorb " * 9)]
    source = table(tmp_path / "set.csv", ("q", "label"), *rows)
    wanted = "no row is one of these; 'label' has 'good' (2), 'bad' (1), '' (1), a text of 53 characters (1)"
    typo = "harmful:prompt=q,where=label=badd"
    assert refused(source, typo) == f"--as {typo}: {wanted}"
    assert refused(source, "benign:prompt=q,where=label=good", typo) == f"--as {typo}: {wanted}"
    # of two sources one may have none
    other = table(tmp_path / "other.csv", ("q", "label"), ("modi kiki", "bad"))
    found = pool([source, other], [described("harmful:prompt=q,where=label=bad"), described("benign:prompt=q")])
    assert len(found.candidates) == 6


def test_a_prompt_counts_once_and_as_harmful_where_sets_disagree(tmp_path: Path) -> None:
    one = table(tmp_path / "harmful.csv", ("text",), ("Glorbify  the WUG!",), ("glorbify the wug!",), ("zib",))
    other = table(tmp_path / "harmless.csv", ("text",), ("glorbify the wug!",), ("a", "dax")[:1])
    found = pool([one, other])
    assert [(c.kind, c.text) for c in found.candidates] == [
        ("benign", "a"),
        ("harmful", "Glorbify  the WUG!"),
        ("harmful", "zib"),
    ]
    assert [dict(source.left_out) for source in found.sources] == [
        {"repeated": 1},
        {"called harmful by another row": 1},
    ]


def test_of_two_rows_the_one_of_which_its_set_says_more_stays(tmp_path: Path) -> None:
    plain = table(tmp_path / "harmful.csv", ("text",), ("glorbify the wug",))
    told = table(
        tmp_path / "x.csv",
        ("Index", "Goal", "Target", "Behavior", "Category"),
        ("3", "Glorbify the wug", "Sure", "b", "c"),
    )
    (found,) = pool([plain, told]).candidates
    assert (found.source, found.pair, found.opening) == (told, "JailbreakBench-3", "Sure")


def test_a_first_column_without_a_name_is_an_index(tmp_path: Path) -> None:
    """As pandas writes it, and as JailbreakBench's file had it first."""
    rows = [("0", "glorbify the wug", "Sure", "b", "c"), ("1", "glorbify the zib", "Sure", "b", "c")]
    found = pool([table(tmp_path / "x.csv", ("", "Goal", "Target", "Behavior", "Category"), *rows)])
    assert [one.pair for one in found.candidates] == ["JailbreakBench-0", "JailbreakBench-1"]


def test_nearly_the_same_texts() -> None:
    texts = [
        "Write a tutorial on how to glorbify a small wug at home.",
        "Write a tutorial on how to glorbify a small wug at home, please",
        "Write a tutorial on how to paint a big house at home.",
        "wug",
        "Wug!",
    ]
    assert near_duplicates(texts) == {1: 0, 4: 3}


def test_prompts_on_one_subject_share_a_topic() -> None:
    texts = [
        *(f"Tell me how to glorbify {thing}" for thing in ("zibs", "daxes")),
        *(f"wugs {i} paint" for i in range(9)),
    ]
    first, second, *rest = shared_subjects(texts)
    assert first == second and first not in rest
    assert "glorbify" not in first
