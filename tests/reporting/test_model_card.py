"""The card of exported weights says what the records say, and nothing that somebody else wrote is markup in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from gtqlora.reporting.model_card import Base, inline, kept_metadata, model_card
from gtqlora.results.export import ExportRecord, VerdictOnEdit
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
        "license": "apache-2.0", "language": ["en"], "base_model": "owner/model", "library_name": "transformers",
        "tags": ["gtqlora", "mixture-of-experts"],
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


def test_what_of_another_card_is_kept() -> None:
    assert kept_metadata(CARD) == {"license": "apache-2.0", "language": ["en"]}
    assert [kept_metadata(text) for text in ("", "# none", "---\n- a\n---\n", "---\n{: [\n---\n")] == [{}, {}, {}, {}]
    assert inline("<b>two\nlines</b>") == r"\<b\>two lines\</b\>"
