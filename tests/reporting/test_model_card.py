"""The card of exported weights says what the records say, and nothing that somebody else wrote is markup in it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from gtqlora.config.export import FORMATS
from gtqlora.reporting.model_card import Base, inline, kept_metadata, model_card, names_base, with_base
from gtqlora.results.export import ExportRecord, FormVerdict, VerdictOnEdit
from gtqlora.results.verdict import HeldOut, Verdict, read_verdict
from gtqlora.stats import floor
from tests import report_runs

CARD = "---\nlicense: apache-2.0\ntags: [chat]\nlanguage:\n- en\n---\n# A model\n"


def _verdict(folder: Path) -> Verdict:
    with report_runs.whole_run(folder) as run:
        return read_verdict(run.path)


def _record(verdict: Verdict) -> ExportRecord:
    given = VerdictOnEdit(finished="now", verdict="pass", reason="", judge="string", shipped=True)
    return ExportRecord(
        base="model",
        base_fingerprint="f",
        ancestors=["first", "second"],
        spent=0.0123,
        adapter=verdict.adapter,
        expert_format=verdict.expert_format,
        judge="a *judge*",
        prompts=HeldOut(source="pairs.jsonl", fingerprint="abc", split="heldout"),
        floor=floor([True] * 200, [True] * 200, margin=0.05),
        lost={},
        tries=3,
        verdicts=[replace(given, verdict="fail"), given],
        tensors_changed=7,
        gate_values_changed=9,
        divergence=0.0,
        versions={},
        files={},
    )


def test_the_card_tells_what_was_measured(tmp_path: Path) -> None:
    verdict = _verdict(tmp_path / "run")
    text = model_card(verdict, _record(verdict), Base(metadata=kept_metadata(CARD), hub_id="owner/model"))
    head = yaml.safe_load(text.split("---")[1])
    assert head == {
        "license": "apache-2.0", "language": ["en"], "base_model": "owner/model", "base_model_relation": "finetune",
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gtqlora", "mixture-of-experts"],
    }  # fmt: skip
    assert "7 tensors changed, routed experts untouched." in text and "Edited before: first." in text
    assert "Safety floor: **pass**" in text and "- Judge: a \\*judge\\*" in text
    assert "2 verdicts on this edit, among them fail; 3 edits judged on these prompts" in text
    assert "at most 1.23% may be lost" in text and "gtqlora.experts" not in text
    row = verdict.table["lookalike"]
    assert f"| lookalike | 200 | {row.refusal_before.value:.1%} ({row.refusal_before.low:.1%}" in text
    assert text.count("not measured") == 1  # nobody expects an answer to a harmful prompt


def test_packed_experts_and_projections_are_told(tmp_path: Path) -> None:
    verdict = replace(_verdict(tmp_path / "run"), kind="projection", expert_format="native")
    text = model_card(verdict, _record(verdict), Base(packed_by_us=True))
    assert "routed experts projected." in text and "import gtqlora.experts" in text and "(4 bits)" in text
    assert "base_model" not in text


def _tokens(card: str) -> Iterator[Token]:
    """The body of a card as a renderer of Markdown with tables sees it."""
    body = card.split("---\n", 2)[2]
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        yield from (token, *(token.children or ()))


def test_how_it_was_made_and_what_it_was_made_from(tmp_path: Path) -> None:
    verdict = _verdict(tmp_path / "run")
    record = replace(
        _record(verdict),
        revision="c" * 40, trained_on="7" * 64, recipe={"rank": 8, "mode": "gt"}, versions={"gtqlora": "0.2.0"},
        notes=["The index has to go with it."],
    )  # fmt: skip
    text = model_card(verdict, record, Base(hub_id="owner/model"))
    assert f"Base: owner/model, at revision {'c' * 40} (digest of its files f)." in text
    assert f"trained it: sha256 {'7' * 64}" in text and "verified it: sha256 abc" in text
    assert 'Settings: rank = 8, mode = "gt"' in text and "gtqlora 0.2.0" in text
    assert "- The index has to go with it." in text
    assert "single-turn, greedy answers" in text and "export --check" in text
    titles = [token.content for token in _tokens(text) if token.type == "inline" and token.level == 1]
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        *("## Safety floor", "## Before and after", "## Good to know", "## How to load it", "## How it was made"),
        "## Limits",
    ]
    assert len(titles) > 6


@pytest.mark.parametrize(
    ("to", "target", "relation", "line"),
    [
        ("safetensors", None, "finetune", 'from_pretrained("FOLDER", dtype="auto")'),
        ("peft", "peft", "adapter", 'PeftModel.from_pretrained(base, "FOLDER")'),
        (
            "peft",
            "vllm",
            "adapter",
            "vllm serve owner/model --enable-lora --lora-modules edit=FOLDER --max-lora-rank 16\n",
        ),
        ("peft", "sglang", "adapter", "--model-path owner/model --enable-lora --lora-paths edit=FOLDER"),
        ("gguf", None, "quantized", "llama-server -m 'a b-00001-of-00002.gguf'"),
        ("gguf-adapter", None, "adapter", "llama-server -m BASE.gguf --lora 'a b-00001-of-00002.gguf'"),
    ],
)
def test_every_form_says_how_it_is_loaded(
    tmp_path: Path, to: str, target: str | None, relation: str, line: str
) -> None:
    verdict = _verdict(tmp_path / "run")
    files = {"a b-00002-of-00002.gguf": "0", "a b-00001-of-00002.gguf": "1"}
    record = replace(_record(verdict), format=to, target=target, files=files, rank=16)
    text = model_card(verdict, record, Base(hub_id="owner/model"))
    assert yaml.safe_load(text.split("---")[1])["base_model_relation"] == relation
    blocks = [token.content for token in _tokens(text) if token.type == "fence"]
    assert any(line in block for block in blocks)
    # every word in capitals is explained
    local = model_card(verdict, record, Base())
    assert "RANK" not in text and all(
        ("FOLDER is this folder" in each) == ("FOLDER" in blocks[0]) for each in (text, local)
    )
    assert ("BASE is the folder" in local) == (to == "peft")
    assert to in FORMATS and ("applies all of the edit" in text) == (relation == "adapter")


def test_an_overlay_is_not_offered_to_servers(tmp_path: Path) -> None:
    verdict = _verdict(tmp_path / "run")
    for name, served in (("zz-overlay-01.safetensors", False), ("model.safetensors", True)):
        text = model_card(verdict, replace(_record(verdict), files={name: "0"}), Base())
        assert ("vllm serve" in text) is served and ("must keep its name" in text) is not served


def test_a_form_that_was_judged_has_its_own_table(tmp_path: Path) -> None:
    verdict = _verdict(tmp_path / "run")
    form = FormVerdict(name="GGUF Q4_K in llama.cpp", floor=verdict.floor, lost={}, table=verdict.table)
    text = model_card(verdict, replace(_record(verdict), format="gguf", form=form, divergence=None), Base())
    assert "GGUF Q4\\_K in llama.cpp: safety floor **" in text and "that these were made from" in text
    assert [token.type for token in _tokens(text)].count("table_open") == 2


def test_tables_list_kinds_in_one_order(tmp_path: Path) -> None:
    """A verdict that was read has its kinds by the alphabet, and one that was just given has not."""
    verdict = _verdict(tmp_path / "run")
    given = {kind: verdict.table[kind] for kind in ("lookalike", "harmful", "benign")}
    record = replace(_record(verdict), form=FormVerdict(name="x", floor=verdict.floor, lost={}, table=given))
    text = model_card(replace(verdict, table=dict(sorted(given.items()))), record, Base())
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["| prompts", "| benign", "| lookalike", "| harmful"] * 2


def test_code_in_a_note_is_code(tmp_path: Path) -> None:
    verdict = _verdict(tmp_path / "run")
    note = "It loads with `llama-server -m a_b.gguf --lora c.gguf`; not `<b>x</b>` or `a|b`, nor ` alone."
    tokens = list(_tokens(model_card(verdict, replace(_record(verdict), notes=[note]), Base())))
    (line,) = [t for t in tokens if t.type == "inline" and t.content.startswith("It loads")]
    read = [(t.type, t.content) for t in line.children or ()]
    assert ("code_inline", "llama-server -m a_b.gguf --lora c.gguf") in read
    assert "".join(content for _, content in read) == note.replace("`", "", 2) and "html_inline" not in dict(read)


def test_a_base_is_named_in_a_card_that_is_there() -> None:
    named = with_base(CARD, "owner/model", "gguf")
    assert yaml.safe_load(named.split("---")[1]) == {
        "base_model": "owner/model", "base_model_relation": "quantized",
        "license": "apache-2.0", "tags": ["chat"], "language": ["en"],
    }  # fmt: skip
    assert named.endswith(CARD.removeprefix("---\n")) and not names_base(CARD) and names_base(named)
    bare = with_base("# Mine\n", "owner/model", "peft")
    assert names_base(bare) and bare.endswith("---\n# Mine\n")


EVIL = "x`|\n# a\n```\n<script>alert(1)</script>[l](http://e)![i](http://e)\x1b[2J**b** $(reboot)'; reboot; '"


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("target", [None, "vllm", "sglang"])
def test_nothing_that_somebody_else_wrote_is_markup(tmp_path: Path, to: str, target: str | None) -> None:
    verdict = replace(_verdict(tmp_path / "run"), model=f"/models/{EVIL}")
    record = replace(
        _record(verdict), format=to, target=target, base=EVIL, base_fingerprint=EVIL, ancestors=[EVIL, EVIL],
        judge=EVIL, revision=EVIL, trained_on=EVIL, recipe={EVIL: EVIL}, notes=[EVIL], kept={EVIL: 0.3}, adapter=EVIL,
        versions={EVIL: EVIL}, files={f"{EVIL}.gguf": "0"}, prompts=HeldOut(source=EVIL, fingerprint=EVIL, split=EVIL),
        form=FormVerdict(name=EVIL, floor=verdict.floor, lost={}, table={EVIL: verdict.table["lookalike"]}),
    )  # fmt: skip
    plain = replace(_record(verdict), format=to, target=target, form=replace(record.form, name="x", table={}))  # type: ignore[type-var]
    evil, good = (list(_tokens(model_card(verdict, each, Base(hub_id=EVIL)))) for each in (record, plain))
    assert not {token.type for token in evil} & {"html_inline", "html_block", "link_open", "image"}
    code = {token.content for token in evil if token.type == "code_inline"}
    assert code <= {token.content for token in good if token.type == "code_inline"}
    for kind in ("heading_open", "fence"):
        assert [t.type for t in evil].count(kind) - [t.type for t in good].count(kind) in (0, 1)  # "Good to know"
    assert all("\x1b" not in token.content for token in evil)
    for token in evil:
        for line in token.content.splitlines() if token.type == "fence" and token.info == "sh" else ():
            assert "reboot" not in shlex.split(line)


def test_what_of_another_card_is_kept() -> None:
    assert kept_metadata(CARD) == {"license": "apache-2.0", "language": ["en"]}
    assert [kept_metadata(text) for text in ("", "# none", "---\n- a\n---\n", "---\n{: [\n---\n")] == [{}, {}, {}, {}]
    assert inline("<b>two\nlines</b>") == r"\<b\>two lines\</b\>"
