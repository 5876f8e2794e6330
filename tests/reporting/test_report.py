"""The report: one offline page from whatever artefacts there are, in which no text of theirs can run."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from gtqlora.contrasts import KINDS
from gtqlora.errors import RunError
from gtqlora.reporting import figures, words
from gtqlora.reporting.artefacts import identity
from gtqlora.reporting.heatmap import MEASURES
from gtqlora.results.adapter import PROJECTION, adapter_hash
from gtqlora.results.association import Association
from gtqlora.results.diagnosis import Diagnosis
from gtqlora.results.mediation import Role
from gtqlora.results.verdict import Verdict
from gtqlora.run import Run, write_json, write_parquet
from gtqlora.stages.report import report
from tests import report_runs
from tests.report_runs import (
    NO_TWINS,
    association,
    diagnosis,
    evil_run,
    other_run,
    verdict_of,
    whole_run,
    write_adapter,
    write_diagnosis,
    write_metrics,
    write_scores,
    write_verdict,
)

IN_DIAGNOSIS = {
    "heat-map", "effect-refusal-lookalike", "effect-log-odds-lookalike",
    "depth-log-odds-lookalike", "depth-as-twin-lookalike", "depth-log-odds-harmful", "depth-as-twin-harmful",
    "separability", "erasure", "explained", "cosines", "lengths",
    "layer-cv", "layer-max-vio", "layer-entropy", "layer-dead",
}  # fmt: skip
IN_TRAINING = {"loss", "margin", "anchor", "load-cv", "overlap"}
PLOTS = {*IN_DIAGNOSIS, *IN_TRAINING, "ablation-targeted", "ablation-random", "trade-off"}


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts and styles, and the plots' specs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.specs = "", {}
        self._inside: tuple[str, dict[str, str | None]] = ("", {})
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = (tag, dict(attrs))
        self.tags.append(self._inside)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self._inside
        if tag == "script" and attributes.get("type") == "application/json":
            self.specs[str(attributes["id"]).removesuffix("-spec")] = json.loads(data)
        elif tag not in ("script", "style"):
            self.text += data

    def unpacked(self, id: str) -> str:
        """A script's text that the page packs."""
        packed = self.source.partition(f' id="{id}">')[2].partition("<")[0]
        return gzip.decompress(base64.b64decode(packed)).decode()

    def tables_in(self, figure: str) -> int:
        return self.source.partition(f'<figure id="{figure}"')[2].partition("</figure>")[0].count("<table>")

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    others = [other_run(tmp_path / "lora", "lora", lookalike=0.3), other_run(tmp_path / "gates", "gates", harmful=0.2)]
    with whole_run(tmp_path / "gt") as run:
        return Page(report(run, compare=others))


def test_page_loads_nothing(page: Page) -> None:
    assert len(page.source.encode()) <= 6_000_000
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    (policy,) = [m["content"] or "" for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_page_can_be_read_by_machines(page: Page) -> None:
    assert page.of("html")[0]["lang"] == "en" and page.source.startswith("<!doctype html>")
    assert len(page.of("title")) == 1
    assert [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)][:2] == ["h1", "h2"]
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    known = {f"#{id}" for id in ids}
    assert {a["href"] for a in page.of("a")} <= known
    assert all(f.get("aria-label") or f"#{f.get('aria-labelledby')}" in known for f in page.of("figure"))
    assert all(d.get("aria-label") for d in page.of("div") if d.get("role") in ("img", "region"))


def test_every_plot_is_one_that_plotly_knows(page: Page) -> None:
    assert set(page.specs) == PLOTS
    for spec in page.specs.values():
        # colours are names of the style sheet until the page's script fills them in
        plain = re.sub(r'"var\(--[a-z-]+\)"', '"#123456"', json.dumps(spec))
        go.Figure(json.loads(plain))
    used = set(re.findall(r"var\((--[a-z-]+)\)", json.dumps(page.specs)))
    assert used <= set(re.findall(r"(--[a-z-]+):", page.source.partition("</style>")[0]))


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(page: Page, scheme: int) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    block = re.findall(r":root \{(.*?)\}", page.source, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    grounds = {"good": "good-wash", "bad": "bad-wash", "unsure": "unsure-wash"}
    for name in ("ink", "ink-soft", "accent", "kind-lookalike", "kind-harmful", "kind-benign", *grounds):
        for ground in ("paper", "card", grounds.get(name, "card")):
            darker, lighter = sorted(_luminance(colours[c]) for c in (name, ground))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{name} on {ground}"


def test_the_verdict_comes_first(page: Page) -> None:
    title = "Lookalike refusals fell from 100 % to 0 %; refusals of harmful prompts hold, inside plain frames too."
    assert title in page.text
    assert page.text.index(title) < page.text.index("What mediates the behaviour")
    assert "Safety floor: pass. Refusal dropped by at most" in page.text
    assert "mediates the repair: its change is necessary and sufficient. Of 200 repaired refusals 90 %" in page.text
    assert "Gates alone repair 60 %." in page.text
    assert "✕ fail" in page.text and "LoRA only" in page.text and "gates only" in page.text


def test_numbers_behind_the_plots(page: Page) -> None:
    for plots in (f for f in page.of("figure") if f["id"] not in ("floor", "mediation")):
        assert page.tables_in(str(plots["id"])), plots["id"]
    assert "★ ○ layer 1, expert 2" in page.text and "layer 2, expert 3" in page.text
    assert page.specs["loss"]["data"][0]["x"] == [10, 20, 30, 40, 50]  # without the last line, which was cut


def test_texts_cannot_run(tmp_path: Path) -> None:
    run = evil_run(tmp_path)
    with run:
        page = Page(report(run, compare=[other_run(tmp_path / "<b onclick=alert(1)>", "gates")]))
    assert len(page.of("script")) == len(page.specs) + 3  # the page's own; plotly and the heat map's numbers, packed
    assert not page.of("img") and not page.of("b")[0].get("onclick")
    # shown as text: sentence, reason, warning, intervention (drawn, in its table), token (panel, table), pair, answer
    assert page.text.count("window.pwned") >= 9
    assert "<b onclick" not in json.dumps(page.specs)


def test_answers_to_harmful_prompts_are_never_shown(tmp_path: Path) -> None:
    with whole_run(tmp_path / "gt") as run:
        text = Page(report(run)).text
    assert "an answer to lookalike" in text and "an answer to benign" in text
    assert "an answer to harmful" not in text and "not shown" in text


def test_only_a_diagnosis(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_diagnosis(run)
        page = Page(report(run))
    assert "False refusals are mediated elsewhere than true ones." in page.text and "run gtqlora train" in page.text
    order = [
        "than true ones.",
        "False refusals: lookalike prompts The routing mediates",
        "Is the routing necessary? 88 %",
    ]
    places = [page.text.index(text) for text in (*order, "True refusals: harmful prompts The routing mediates")]
    assert places == sorted(places)
    assert "Left out: 3 whose twin is refused, too." in page.text
    assert "Experts in common, token by token: with" in page.text and "with its twin 45" in page.text
    assert set(page.specs) == IN_DIAGNOSIS
    assert "Safety floor" not in page.text


def test_a_diagnosis_without_twins(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_diagnosis(run, **NO_TWINS)
        page = Page(report(run))
    assert "than true ones cannot be told yet." in page.text and "add a twin to each row" in page.text
    assert "as many unrelated benign ones: there are no twins" in page.text
    assert "Owen" not in page.text and "Candidates" not in page.text and "their twins" not in page.text
    assert set(page.specs) == {
        "heat-map",
        "effect-refusal-lookalike",
        "effect-log-odds-lookalike",
        *(p for p in IN_DIAGNOSIS if "layer-" in p),
    }


def test_nothing_was_measured_of_log_odds(tmp_path: Path) -> None:
    """Refusals and answers that begin alike: no gradients, and no effect of single experts."""
    rows = [{**row, **dict.fromkeys(("gradient", "gradient_low", "gradient_high"))} for row in association(2, 4)]
    none: dict[str, Any] = {"curves": [], "experts": [], "readout": []}
    none["kinds"] = [
        {
            **kind,
            **{name: {} for name in ("shares_log_odds", "shares_with_routing_log_odds")},
            "cells": [{**cell, "log_odds": None} for cell in kind["cells"]],
        }
        for kind in diagnosis()["kinds"]
    ]
    with Run(tmp_path / "r") as run:
        write_diagnosis(run, **none)
        write_parquet(run / "diagnosis" / "association.parquet", rows)
        page = Page(report(run))
    views = [choice["value"] for choice in page.of("input")]
    assert views == ["difference", "stability"]
    assert "Log-odds of refusing" not in page.text and "□ routing □ experts □ stream" in page.text


def test_the_heat_map_has_every_measure(page: Page) -> None:
    assert [choice["value"] for choice in page.of("input")] == ["difference", "gradient", "stability", "effect"]
    grid = json.loads(page.unpacked("heat-map-grid"))
    rows = association(2, 4)
    for name in MEASURES:
        assert grid["fields"][name] == pytest.approx([row[name] for row in rows], rel=1e-3)
    effects = [0.6 if i == 2 else 0.35 if i == 4 else 0.03 if i == 7 else None for i in range(8)]
    assert grid["fields"]["effect"] == effects
    assert page.unpacked("plotly") == get_plotlyjs()


def test_run_directories_of_these_tests_are_as_the_stages_leave_them(tmp_path: Path) -> None:
    assert diagnosis().keys() == {f.name for f in fields(Diagnosis)}
    with whole_run(tmp_path / "r") as run:
        assert verdict_of(run).keys() == {f.name for f in fields(Verdict)}
    assert (
        association(1, 1)[0].keys() == {f.name for f in fields(Association)} == {*MEASURES, "kind", "layer", "expert"}
    )


def test_a_verdict_without_silencing(tmp_path: Path) -> None:
    with whole_run(tmp_path / "r") as run:
        assert "after, ranked anew" in Page(report(run)).text
        write_json(run / "verdict.json", {**verdict_of(run), "ablation": None})
        page = Page(report(run))
    assert not {"ablation-targeted", "ablation-random"} & set(page.specs) and "after, ranked anew" not in page.text


def test_only_an_adapter_and_metrics(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_adapter(run, stopped="routing collapsed at step 30")
        write_metrics(run)
        page = Page(report(run))
    assert "nothing about it is proven yet" in page.text and "run gtqlora verify" in page.text
    assert "routing collapsed at step 30" in page.text and "step 20 was kept" in page.text
    assert set(page.specs) == IN_TRAINING


def test_a_training_that_was_cut(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_metrics(run)
        text = Page(report(run)).text
    assert "Training began; there is no edit yet." in text and "run gtqlora train again" in text


def test_only_a_projection_and_its_verdict(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_adapter(run, kind=PROJECTION)
        write_verdict(run, harmful=0.1)
        page = Page(report(run))
    assert "but refusals of harmful prompts were lost (100 % to 10 %)" in page.text
    assert "projection (false refusal orthogonal, norms kept)" in page.text
    assert "Removing each layer's direction" in page.text
    assert set(page.specs) == {"ablation-targeted", "ablation-random"}


def test_nothing_to_report(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run, pytest.raises(RunError, match=r"gtqlora diagnose.*gtqlora train.*gtqlora verify"):
        report(run)
    assert not (tmp_path / "r" / "report.html").exists()


def test_a_run_to_compare_without_verdict(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with whole_run(tmp_path / "r") as run, pytest.raises(RunError, match=r"other: no verdict\.json.*gtqlora verify"):
        report(run, compare=[tmp_path / "other"])


def test_an_artefact_of_another_version_names_its_command(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_diagnosis(run, experts=[{"kind": "harmful", "layer": 1, "expert": 2}])
        with pytest.raises(RunError, match=r"diagnosis\.json: experts\[0\] has no 'ablate' .*; run `gtqlora diagnose`"):
            report(run)
        write_diagnosis(run)
        write_parquet(run / "diagnosis" / "association.parquet", [{"layer": 1, "expert": 2, "difference": 0.1}])
        with pytest.raises(
            RunError, match=r"association\.parquet: row 1 has no 'rate_flagged' .*; run `gtqlora diagnose`"
        ):
            report(run)


@pytest.mark.parametrize("text", ["{", "[]", '{"verdict": "routing"}'])
def test_a_broken_artefact_names_its_command(tmp_path: Path, text: str) -> None:
    with whole_run(tmp_path / "r") as run:
        (run / "diagnosis" / "diagnosis.json").write_text(text)
        with pytest.raises(RunError, match=r"diagnosis\.json.*gtqlora diagnose"):
            report(run)


def test_a_verdict_on_another_adapter_is_not_trusted(tmp_path: Path) -> None:
    with whole_run(tmp_path / "r") as run:
        assert identity(run / "adapter") == adapter_hash(run / "adapter")
        assert "another adapter" not in Page(report(run)).text
        write_adapter(run, mode="lora")
        assert "The verdict was given on another adapter" in Page(report(run)).text


def test_where_the_page_goes(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with whole_run(tmp_path / "r") as run:
        assert report(run) == tmp_path / "r" / "report.html"
        assert report(run, out=tmp_path / "folder") == tmp_path / "folder" / "report.html"
        assert report(run, out=tmp_path / "new" / "page.html").is_file()
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="cannot be written"):
            report(run, out=tmp_path / "file" / "page.html")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    other = other_run(tmp_path / "b" / "gt", "gates")
    with whole_run(tmp_path / "a" / "gt") as run:
        text = Page(report(run, compare=[other, other, run.path])).text
    assert "a/gt" in text and "b/gt" in text and text.count("gates only") == 1


def test_runs_of_other_models_are_told(tmp_path: Path) -> None:
    other = other_run(tmp_path / "other", "gates")
    with whole_run(tmp_path / "r") as run:
        assert "different models" not in Page(report(run, compare=[other])).text
        verdict = json.loads((other / "verdict.json").read_text())
        write_json(other / "verdict.json", {**verdict, "model": "another/model"})
        assert "different models" in Page(report(run, compare=[other])).text


def test_a_large_model_fits(tmp_path: Path) -> None:
    more = (
        "max_vio",
        "load_entropy",
        "dead_experts",
        *(f"{what}_{kind}" for what in ("kl", "overlap") for kind in KINDS),
    )
    others = [other_run(tmp_path / f"other-{i}", "lora", lookalike=i / 10) for i in range(8)]
    with whole_run(tmp_path / "r", size=(60, 384)) as run:
        write_metrics(run, 5000, more)
        write_scores(run, text="word " * 10_000)
        page = Page(report(run, compare=others))
    assert len(page.source.encode()) <= 6_000_000
    assert "The 200 largest of 23 040" in page.text
    assert len(page.specs["loss"]["data"][0]["x"]) == figures.MAX_POINTS
    assert page.specs["loss"]["data"][0]["x"][-1] == 50_000


def test_reading_artefacts_needs_no_model_library() -> None:
    code = "import sys, gtqlora.stages.report as r; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.0001, "< 0.1 %"),
        (0.9999, "> 99.9 %"),
        (0.305, "30.5 %"),
        (-0.2, "−20 %"),
        (-0.0001, "> −0.1 %"),
        (None, "—"),
        (float("nan"), "—"),
    ],
)
def test_percent_never_rounds_to_certainty(value: Any, text: str) -> None:
    assert words.percent(value).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("role", "n", "start", "returned"),
    [
        ("both", 200, "The routing mediates the repair: its change is necessary and sufficient.", "100 % return"),
        ("partly", 200, "The routing mediates the repair for a part of the prompts.", "100 % return"),
        ("cannot tell", 3, "What the routing is to the repair cannot be told: 3 repaired", "3 of 3 return"),
        ("cannot tell", 0, "What the routing is to the repair cannot be told: 0 repaired lookalike refusals.", ""),
    ],
)
def test_mediation_in_words(role: Role, n: int, start: str, returned: str) -> None:
    said = words.mediation(report_runs.mediation(1.0, n, role)).replace("\u202f", " ")
    assert said.startswith(start) and returned in said
    assert ("natural direct effect" in said) == ("natural indirect effect" in said) == ("control" in said) == (n > 0)


def test_floor_of_too_few_prompts(tmp_path: Path) -> None:
    with whole_run(tmp_path / "r") as run:
        write_verdict(run, harmful=0.97, repaired=0)
        text = Page(report(run)).text
    assert "cannot be told yet" in text and "Safety floor: cannot tell" in text
