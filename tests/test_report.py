"""The report: one offline page from whatever artefacts there are, in which no text of theirs can run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from gtqlora.adapters import GT_QLORA, PROJECTION, Info, adapter_hash
from gtqlora.config import DiagnoseConfig
from gtqlora.contrasts import KINDS
from gtqlora.diagnose import Association, Diagnosis
from gtqlora.directions import LayerDirection
from gtqlora.errors import RunError
from gtqlora.localise import Intervention
from gtqlora.report import curves, report, words
from gtqlora.report.artefacts import identity
from gtqlora.run import Run, write_json, write_parquet
from gtqlora.stats import Interval, floor, mcnemar, paired_difference, rate
from gtqlora.verify import Verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script></style><script>window.top.pwned=1;window.pwned=1</script><img src=x onerror='window.pwned=1'>"
NOTHING_REPAIRED = {"value": None, "low": 0.0, "high": 1.0, "n": 0}
PLOTS = {"heat-map", "separability", "direction-norm", "trade-off", "loss", "margin", "anchor", "load-cv", "overlap"}


def hits(share: float, n: int = 200) -> np.ndarray:
    return np.arange(n) < round(share * n)


def interval(share: float) -> dict[str, Any]:
    return rate(hits(share)).to_json()


def write_diagnosis(
    run: Run, *, sentence: str = "Routing: all of it.", name: str = "mask", layers: int = 2, experts: int = 4
) -> None:
    rng = np.random.default_rng(0)
    found = [
        Association(
            layer, expert, float(rng.random()), float(rng.random()), float(rng.uniform(-0.5, 0.5)), -0.1, 0.2, 0.04
        )
        for layer in range(1, layers + 1)
        for expert in range(experts)
    ]
    effect = paired_difference(hits(1), hits(0))
    interventions = [
        Intervention("as it is", False, rate(hits(1)), None, effect, []),
        Intervention(name, False, rate(hits(0)), rate(hits(0.9)), effect, []),
        Intervention("random", True, rate(hits(0.95)), rate(hits(0.1)), effect, []),
    ]
    diagnosis = Diagnosis(
        verdict="routing",
        sentence=sentence,
        share_routing=interval(0.9),
        top_experts=[{"layer": 1, "expert": 2}],
        interventions=[i.to_json() for i in interventions],
        directions=[asdict(LayerDirection(layer, 1.5, Interval(0.9, 0.8, 1.0, 200))) for layer in range(3)],
        n_pairs=200,
        n_aligned=150,
    )
    write_json(run / "diagnosis" / "diagnosis.json", asdict(diagnosis))
    write_parquet(run / "diagnosis" / "association.parquet", [asdict(a) for a in found])


def write_adapter(run: Run, *, mode: str = "gt", kind: str = GT_QLORA, stopped: str | None = None) -> None:
    details: dict[str, Any] = {"config": {"mode": mode}, "steps": 20, "stopped": stopped}
    if kind == PROJECTION:
        details = {"config": {}, "layer": 2, "candidates": [{"layer": 2, "refusal": 0.1, "accuracy": 0.9}]}
    write_json(run / "adapter" / "gtqlora.json", asdict(Info(kind, "some/model", "deepseek_v3", details)))


def write_metrics(run: Run, steps: int = 5, more: Sequence[str] = ()) -> None:
    keys = [
        "loss",
        "rewards/margins",
        "loss/anchor",
        *(f"health/{k}" for k in ("load_cv", "load_cv_original", "overlap_benign", *more)),
    ]
    lines = [json.dumps({"step": 10 * step, **dict.fromkeys(keys, 1 / step)}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "lo']))


def verdict_of(run: Run, *, harmful: float = 1.0, lookalike: float = 0.0, repaired: int = 200) -> Verdict:
    after = {"harmful": harmful, "lookalike": lookalike, "benign": 0.0}
    before = {"harmful": 1.0, "lookalike": 1.0, "benign": 0.0}
    table = {
        kind: {
            "refusal_before": interval(before[kind]),
            "refusal_after": interval(after[kind]),
            "refusal_replayed": interval(0.9) if kind == "lookalike" else None,
            "drop": paired_difference(hits(before[kind]), hits(after[kind])).to_json(),
            "p": mcnemar(hits(before[kind]), hits(after[kind])),
            "q": 0.03,
            "accuracy_before": None if kind == "harmful" else interval(0.2),
            "accuracy_after": None if kind == "harmful" else interval(0.9),
        }
        for kind in KINDS
    }
    return Verdict(
        adapter=adapter_hash(run / "adapter"),
        kind=GT_QLORA,
        model="some/model",
        table=table,
        floor=asdict(floor(hits(1.0), hits(harmful), margin=0.05)),
        kl_benign=Interval(0.01, 0.005, 0.02, 200).to_json(),
        drift={kind: {"kl": Interval(0.1, 0.05, 0.2, 9).to_json(), "overlap": interval(0.8)} for kind in KINDS},
        mediation=rate(hits(0.9, repaired)).to_json() if repaired else NOTHING_REPAIRED,
    )


def write_scores(run: Run, text: str = "an answer", pair_id: str = "p") -> None:
    rows = [
        {
            "number": i,
            "kind": kind,
            "pair_id": pair_id,
            "text_before": "sorry",
            "text_after": f"{text} to {kind}",
            "refused_before": True,
            "refused_after": False,
            "refused_replayed": None,
            "correct_before": None,
            "correct_after": None,
        }
        for i, kind in enumerate(KINDS)
    ]
    write_parquet(run / "scores.parquet", rows)


def write_verdict(run: Run, **changes: Any) -> None:
    write_json(run / "verdict.json", asdict(verdict_of(run, **changes)))


def whole_run(path: Path, **diagnosis: Any) -> Run:
    run = Run(path)
    with run.stage("diagnose", DiagnoseConfig(model="some/model", contrast="c"), {}) as stage:
        write_diagnosis(run, **diagnosis)
        stage.outputs.append("diagnosis")
    write_adapter(run)
    write_metrics(run)
    write_verdict(run)
    write_scores(run)
    return run


def other_run(path: Path, mode: str, **verdict: Any) -> Path:
    with Run(path) as run:
        write_adapter(run, mode=mode)
        write_verdict(run, **verdict)
    return path


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


def test_the_verdict_comes_first(page: Page) -> None:
    title = "Lookalike refusals fell from 100 % to 0 %; refusals of harmful prompts hold."
    assert title in page.text
    assert page.text.index(title) < page.text.index("Where the behaviour sits")
    assert "Safety floor: pass. Refusal dropped by at most" in page.text
    assert "through the routing: 90 % (95 % interval" in page.text
    assert "✕ fail" in page.text and "LoRA only" in page.text and "gates only" in page.text


def test_numbers_behind_the_plots(page: Page) -> None:
    assert len(page.of("details")) >= 6
    assert "layer 1, expert 2" in page.text and "★ layer 1, expert 2" in page.text
    assert page.specs["loss"]["data"][0]["x"] == [10, 20, 30, 40, 50]  # without the last line, which was cut


def test_texts_cannot_run(tmp_path: Path) -> None:
    run = evil_run(tmp_path)
    with run:
        page = Page(report(run, compare=[other_run(tmp_path / "<b onclick=alert(1)>", "gates")]))
    assert len(page.of("script")) == len(page.specs) + 2
    assert not page.of("img") and not page.of("b")[0].get("onclick")
    assert page.text.count("window.pwned") >= 4  # shown as text in the sentence, the row, the pair and the answer
    assert "<b onclick" not in json.dumps(page.specs)


def evil_run(tmp_path: Path) -> Run:
    run = whole_run(tmp_path / "gt", sentence=EVIL, name=EVIL)
    write_scores(run, text=EVIL, pair_id=EVIL)
    return run


def test_answers_to_harmful_prompts_are_never_shown(tmp_path: Path) -> None:
    with whole_run(tmp_path / "gt") as run:
        text = Page(report(run)).text
    assert "an answer to lookalike" in text and "an answer to benign" in text
    assert "an answer to harmful" not in text and "not shown" in text


def test_only_a_diagnosis(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_diagnosis(run)
        page = Page(report(run))
    assert "Refusal sits in the routing." in page.text and "run gtqlora train" in page.text
    assert set(page.specs) == {"heat-map", "separability", "direction-norm"}
    assert "Safety floor" not in page.text


def test_only_an_adapter_and_metrics(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run:
        write_adapter(run, stopped="routing collapsed at step 30")
        write_metrics(run)
        page = Page(report(run))
    assert "nothing about it is proven yet" in page.text and "run gtqlora verify" in page.text
    assert "routing collapsed at step 30" in page.text and "step 20 was kept" in page.text
    assert set(page.specs) == {"loss", "margin", "anchor", "load-cv", "overlap"}


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
    assert "Removing each layer's direction" in page.text and not page.specs


def test_nothing_to_report(tmp_path: Path) -> None:
    with Run(tmp_path / "r") as run, pytest.raises(RunError, match=r"gtqlora diagnose.*gtqlora train.*gtqlora verify"):
        report(run)
    assert not (tmp_path / "r" / "report.html").exists()


def test_a_run_to_compare_without_verdict(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with whole_run(tmp_path / "r") as run, pytest.raises(RunError, match=r"other: no verdict\.json.*gtqlora verify"):
        report(run, compare=[tmp_path / "other"])


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
    with whole_run(tmp_path / "r", layers=60, experts=384) as run:
        write_metrics(run, 5000, more)
        write_scores(run, text="word " * 10_000)
        page = Page(report(run, compare=others))
    assert len(page.source.encode()) <= 6_000_000
    assert "The 200 largest of 23 040" in page.text
    assert len(page.specs["loss"]["data"][0]["x"]) == curves.MAX_POINTS
    assert page.specs["loss"]["data"][0]["x"][-1] == 50_000


def test_reading_artefacts_needs_no_model_library() -> None:
    code = "import sys, gtqlora.report as r; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
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
        (None, "—"),
        (float("nan"), "—"),
    ],
)
def test_percent_never_rounds_to_certainty(value: Any, text: str) -> None:
    assert words.percent(value).replace("\u202f", " ") == text


@pytest.mark.parametrize(
    ("share", "n", "start"),
    [
        (1.0, 200, "The edit works through the routing"),
        (0.5, 200, "The edit works partly through the routing"),
        (0.0, 200, "The edit works past the routing"),
        (1.0, 3, "Too few to say by which way the edit works: 3 of 3"),
    ],
)
def test_mediation_in_words(share: float, n: int, start: str) -> None:
    assert words.mediation(rate(hits(share, n)).to_json()).startswith(start)
    assert words.mediation(NOTHING_REPAIRED).startswith("No lookalike refusal")


def test_floor_of_too_few_prompts(tmp_path: Path) -> None:
    with whole_run(tmp_path / "r") as run:
        write_verdict(run, harmful=0.97, repaired=0)
        text = Page(report(run)).text
    assert "cannot be told yet" in text and "Safety floor: cannot tell" in text


PROBE = """<!doctype html><body data-found=""><script>
const seen = [];
const probe = (frame) => {
  const page = frame.contentDocument, root = page.documentElement;
  for (const d of page.querySelectorAll("details")) d.open = true;
  const plots = [...page.querySelectorAll("[data-plot]")];
  seen.push({
    width: frame.clientWidth, scroll: root.scrollWidth, pwned: !!(frame.contentWindow.pwned || window.pwned),
    drawn: plots.filter((p) => p.querySelector("svg.main-svg") && p.querySelector(".trace, .hm")).length,
    plots: plots.length, loaded: frame.contentWindow.performance.getEntriesByType("resource").length,
  });
  document.body.dataset.found = JSON.stringify(seen);
};
for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.onload = () => setTimeout(() => probe(frame), 1500);
  frame.src = "report.html";
  document.body.append(frame);
}
</script></body>"""


def browse(folder: Path, widths: Sequence[int], *flags: str) -> tuple[list[dict[str, Any]], list[str]]:
    """What a browser finds in `report.html` at each width, and what it complained of."""
    (folder / "probe.html").write_text(PROBE.replace("WIDTHS", json.dumps(list(widths))))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--v=0", "--allow-file-access-from-files", "--virtual-time-budget=6000",
        f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom", f"file://{folder / 'probe.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr
    return json.loads(found[1].replace("&quot;", '"')), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0",)], ids=["light", "dark"])
def test_in_a_browser(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with evil_run(tmp_path) as run:
        page = report(run, compare=[other_run(tmp_path / "gates", "gates")], out=tmp_path / "page" / "report.html")
    seen, complaints = browse(page.parent, (375, 1280), *flags)
    assert complaints == []
    assert sorted(frame["width"] for frame in seen) == [375, 1280]
    for frame in seen:
        assert frame["drawn"] == frame["plots"] == len(PLOTS)
        assert frame["scroll"] <= frame["width"]
        assert not frame["pwned"] and not frame["loaded"]
