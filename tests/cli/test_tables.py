"""Tables in terminals of every width: columns wrap or come below the others, and every number is shown whole."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from gtqlora.cli import checked, printing, tables
from gtqlora.cli.figures import count, interval, size
from gtqlora.cli.layout import Sheet, draw, fit, wrap
from gtqlora.contrasts import ALL_KINDS, KINDS
from gtqlora.stages.inspect import Inspection, inspect
from gtqlora.stats import Interval
from tests.cli import found

KIMI = Path(__file__).parents[1] / "data" / "kimi_k25_config.json"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?|\d+")
WIDTHS = (60, 80, 200)
PIPE = 80
"""The width that a pipe has, where the environment names none."""


def numbers(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


@pytest.fixture(scope="module")
def kimi() -> Inspection:
    return inspect(str(KIMI))


@pytest.fixture(scope="module")
def sheets(kimi: Inspection) -> list[Sheet]:
    """Every table that the command line prints."""
    diagnosis, verdict = found.diagnosis(), found.verdict()
    assert verdict.ablation and verdict.factorial
    return [
        tables.parts(kimi),
        tables.rows_by_split(found.statistics(), "pairs.jsonl: 3,603,701 rows"),
        tables.twins(found.statistics().twins or {}),
        tables.interventions(diagnosis),
        *map(tables.components, diagnosis.kinds),
        tables.experts(diagnosis),
        tables.candidates(found.projected()),
        tables.held_out(verdict),
        tables.drift(verdict),
        tables.ablation(verdict.ablation),
        tables.mediation(verdict.mediation),
        tables.factorial(verdict.factorial),
        *(tables.edits(outcome.numbers) for outcome in found.outcomes().values()),
    ]


def test_kinds_stand_in_one_order_whatever_a_file_has() -> None:
    assert tuple(tables.KINDS) == ALL_KINDS
    verdict = found.verdict()
    sorted_by_name = replace(
        verdict, **{key: dict(sorted(getattr(verdict, key).items())) for key in ("table", "drift")}
    )
    for sheet in (tables.held_out(sorted_by_name), tables.drift(sorted_by_name)):
        assert list(sheet.column(0))[1:] == [tables.KINDS[kind] for kind in KINDS]


def test_an_expert_that_does_not_carry_it_says_so() -> None:
    assert list(tables.experts(found.diagnosis()).column(4))[1:] == ["computes it", "no", "yes"]


def test_no_table_is_left_out_of_these_tests(sheets: list[Sheet]) -> None:
    makers = {name for name in tables.__all__ if name != "floor_style"}
    assert len(makers) == len(sheets) - 2  # the demo's table and that of the components are here twice


@pytest.mark.parametrize("width", [40, *WIDTHS])
def test_every_column_is_shown_and_every_number_whole(sheets: list[Sheet], width: int) -> None:
    for sheet in sheets:
        console = Console(width=width, record=True, file=io.StringIO())
        draw(console, sheet)
        text = console.export_text()
        shown = [field for block in fit(sheet, width - 2) for index in block for field in sheet.column(index)]
        assert numbers(text) == numbers("\n".join([sheet.title, *shown, sheet.gloss])), sheet.title
        assert "…" not in text
        assert width < 60 or max(map(len, text.splitlines())) <= width


def test_wide_terminals_show_columns_beside_one_another_and_narrow_ones_most(sheets: list[Sheet]) -> None:
    for sheet in sheets:
        assert len(fit(sheet, 198)) == 1
        assert len(fit(sheet, 78)[0]) >= len(sheet.columns) - 2, sheet.title
        assert len(fit(sheet, 58)[0]) >= 3
        for width in range(1, 200):
            first, *others = fit(sheet, width)
            columns = [*first, *(index for block in others for index in list(block)[1:])]
            assert columns == list(range(len(sheet.columns)))
            assert all(next(iter(block)) == 0 for block in others)


def test_columns_for_which_there_is_no_room_come_below_with_the_names_of_the_rows() -> None:
    sheet = Sheet(
        title="T", columns=("kind", "before", "q"), rows=[("harmful", "0.5", "0.25")], total=("all", "1", "2")
    )
    console = Console(width=18, record=True, file=io.StringIO())
    draw(console, sheet)
    assert [line.split() for line in console.export_text().splitlines() if line.strip(" ─-")] == [
        *(["T"], ["kind", "before"], ["harmful", "0.5"], ["all", "1"]),
        *(["kind", "q"], ["harmful", "0.25"], ["all", "2"]),
    ]


def test_verify_repeats_the_guard_and_says_where_nothing_was_repaired(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = found.verdict()
    row = verdict.table["lookalike"]
    failed = replace(verdict, floor=replace(verdict.floor, verdict="fail"))
    repaired = replace(row, refusal_before=Interval(1, 0.9, 1, 90), drop=Interval(0.9, 0.8, 1, 90))
    printing.show_next(replace(failed, table={"lookalike": replace(repaired, gain=repaired.drop)}), Path("r"), None)
    assert capsys.readouterr().out == ""
    traded = replace(repaired, gain=Interval(0, -0.1, 0.1, 90))
    printing.show_next(replace(failed, table={"lookalike": traded}), Path("r"), None)
    said = " ".join(capsys.readouterr().out.split())
    assert said == "note: lookalike refusals became fewer, but answers not more: this edit repairs nothing"
    printing.show_next(
        replace(failed, table={"lookalike": replace(repaired, drop=Interval(0, -0.1, 0.1, 90))}), Path("r"), "collapse"
    )
    told = capsys.readouterr().out
    assert "stopped by its guard: collapse" in told and "not seen to repair any lookalike refusal" in told


SHOWN: dict[str, Callable[[], None]] = {
    "contrast check": lambda: checked.show_contrast(found.statistics(), "pairs.jsonl"),
    "diagnose": lambda: printing.show_diagnosis(found.diagnosis()),
    "train": lambda: printing.show_trained(found.trained(), Path("runs/one")),
    "train stopped": lambda: printing.show_trained(found.trained(stopped="routing collapse at step 150"), Path("r")),
    "project": lambda: printing.show_projected(found.projected()),
    "verify": lambda: printing.show_verdict(found.verdict()),
    "export": lambda: printing.show_exported(found.exported()),
    "demo": lambda: printing.show_demo(found.outcomes(), 113.4),
}


@pytest.mark.parametrize("verb", [*SHOWN, "inspect"])
def test_narrow_terminals_and_pipes_show_the_numbers_that_wide_ones_do(
    verb: str, kimi: Inspection, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show = SHOWN.get(verb) or partial(printing.show_inspection, kimi, asked_format=None)

    def printed(width: int | None) -> str:
        monkeypatch.delenv("COLUMNS", raising=False)
        if width:
            monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(found, "_fresh", iter(range(1, 10_000)))
        show()
        return capsys.readouterr().out

    wide = printed(200)
    assert numbers(wide)
    for width in (60, 80, None):
        narrow = printed(width)
        # all that wide ones show; the names of rows again where columns come below others
        assert numbers(narrow) >= numbers(wide) and numbers(narrow).keys() == numbers(wide).keys()
        assert "…" not in narrow and max(map(len, narrow.splitlines())) <= (width or PIPE)


def test_lines_break_behind_marks_in_names_and_never_in_numbers() -> None:
    assert wrap("model.layers.15.mlp.experts.0.gate_proj.weight_packed", 20) == [
        "model.layers.15.mlp.",
        "experts.0.gate_proj.",
        "weight_packed",
    ]
    assert wrap("0.988 [0.976, 0.997]", 14) == ["0.988", "[0.976, 0.997]"]
    assert wrap("0.988 [0.976, 0.997]", 20) == ["0.988 [0.976, 0.997]"]
    for text in ("1,026,408,209,408", "1.03 T", "594 GB", "-1.5e-05", "12/131", "[-0.976, 0.997]"):
        assert wrap(text, 1) == [text]


def test_big_counts_are_short_and_small_ones_exact() -> None:
    assert [count(n) for n in (0, 23_040, 999_999, 1_000_000, 999_950_000, 165_150_720, 1_026_408_209_408)] == [
        "0", "23,040", "999,999", "1.00 M", "1.00 B", "165 M", "1.03 T",
    ]  # fmt: skip
    assert [size(n) for n in (0, 999, 16_384, 999_999, 594_205_259_776)] == [
        "0 B",
        "999 B",
        "16.4 kB",
        "1.00 MB",
        "594 GB",
    ]


def test_intervals_have_one_style() -> None:
    assert interval(Interval(0.9876, 0.97, 1.0, 10)) == "0.988 [0.970, 1.000]"
    assert interval(Interval(-0.0001, -0.5, 0.0001, 10), 2) == "0.00 [-0.50, 0.00]"
    assert interval(None) == "-"
