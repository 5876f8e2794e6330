"""The report in a browser: what it draws, what opens, by mouse and by keyboard, at every width and in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gtqlora.stages.report import report
from tests.report_runs import TOP, association, evil_run, other_run, whole_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

DESKTOP, PHONE = (1280, 900), (390, 844)
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole run beside another, in which every text is a script; and a large model's."""
    folder = tmp_path_factory.mktemp("report")
    with evil_run(folder, size=(3, 8)) as run:
        small = report(run, compare=[other_run(folder / "gates", "gates")])
    with whole_run(folder / "large", size=(60, 384)) as run:
        return {"small": small, "large": report(run)}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Open]:
    """Open a page with no network; the test fails on whatever the browser complains of."""
    complaints: list[str] = []
    contexts = []

    def visit(name: str = "small", size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith("file:") else complaints.append(f"asked for {r.url}"))
        page.goto(pages[name].as_uri())
        page.wait_for_selector("#undrawn", state="hidden", timeout=60_000)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def scrolls(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def title(page: Any) -> str:
    return page.inner_text("#expert-title")


def click(page: Any, layer: int, expert: int) -> None:
    """On the middle of an expert's cell, as plotly's axes place it."""
    page.locator("#heat-map").scroll_into_view_if_needed()
    box = page.locator("#heat-map .nsewdrag").first.bounding_box()
    axes = [
        page.evaluate(f"document.getElementById('heat-map').layout.{axis}.categoryarray") for axis in ("xaxis", "yaxis")
    ]
    across, up = ((names.index(str(at)) + 0.5) / len(names) for names, at in zip(axes, (expert, layer), strict=True))
    page.mouse.click(box["x"] + across * box["width"], box["y"] + (1 - up) * box["height"])


def shown(page: Any) -> list[float | None]:
    """The values that the heat map draws, layer after layer."""
    rows = page.evaluate("document.getElementById('heat-map').data[0].z")
    return [value for row in rows for value in row]


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_everything_is_drawn_and_fits(opened: Open, size: tuple[int, int], scheme: str) -> None:
    page = opened(size=size, scheme=scheme)
    boxes = "[...document.querySelectorAll('[data-plot], #heat-map')]"
    assert page.evaluate(f"{boxes}.length") > 15
    assert page.evaluate(f"{boxes}.filter((box) => !box.querySelector('.trace, .hm')).map((box) => box.id)") == []
    assert not scrolls(page)
    for numbers in page.locator("summary").all():
        numbers.click()
    assert page.locator("details:not([open])").count() == 0 and page.locator("details table").first.is_visible()
    assert not scrolls(page)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(251, 251, 250)" if scheme == "light" else "rgb(20, 23, 26)")


def test_drawings_follow_the_scheme(opened: Open) -> None:
    page = opened()
    ink = "document.getElementById('separability').layout.font.color"
    assert page.evaluate(ink) == "#5a626b"
    page.emulate_media(color_scheme="dark")
    for _ in range(100):  # the page's policy forbids the polling that Playwright would do inside it
        if page.evaluate(ink) != "#5a626b":
            break
        page.wait_for_timeout(100)
    assert page.evaluate(ink) == "#a4adb6"


def test_a_click_opens_an_expert(opened: Open) -> None:
    page = opened()
    assert page.locator("#expert").is_hidden()
    click(page, layer=2, expert=0)
    assert title(page) == "Layer 2, expert 0"
    panel = page.inner_text("#expert")
    (row,) = [row for row in association(3, 8) if (row["layer"], row["expert"]) == (2, 0)]
    assert f"{row['rate_twin']:.1%}".removesuffix("%") in panel and "95\u202f%" in panel
    assert "Causal" in panel and "Restored alone" in panel and "stop" in panel
    page.wait_for_timeout(600)  # what follows a click sooner is a double click
    click(page, layer=3, expert=7)
    page.wait_for_timeout(300)
    assert title(page) == "Layer 3, expert 7" and "Not among the candidates" in page.inner_text("#expert")
    page.click("#expert-close")
    assert page.locator("#expert").is_hidden()
    page.click("button[data-layer='1'][data-expert='2']")
    assert title(page) == "Layer 1, expert 2"


def test_the_keyboard_does_all_that_the_mouse_does(opened: Open) -> None:
    page = opened()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "heat-map-box":
            break
    assert page.evaluate("document.activeElement.id") == "heat-map-box"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    read = page.locator("#heat-map-read")
    start = max(association(3, 8), key=lambda row: abs(row["difference"]))
    assert read.inner_text().startswith(f"Layer {start['layer']}, expert {start['expert']}: flagged")
    page.keyboard.press("Home")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert read.inner_text().startswith("Layer 2, expert 1:")
    assert page.evaluate("document.getElementById('heat-map').layout.shapes.map((s) => s.x0)") == [0.5, 0.5]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert title(page) == "Layer 2, expert 0" and page.evaluate("document.activeElement.id") == "expert-title"
    page.keyboard.press("Escape")
    assert page.locator("#expert").is_hidden() and page.evaluate("document.activeElement.id") == "heat-map-box"
    page.keyboard.press("End")
    assert read.inner_text().startswith("Layer 2, expert 7:")


def test_the_switch_changes_what_is_drawn(opened: Open) -> None:
    page = opened()
    rows = association(3, 8)
    for name in ("gradient", "stability", "difference"):
        page.check(f"input[name=view][value={name}]")
        assert shown(page) == pytest.approx([row[name] for row in rows], rel=1e-3)
    page.check("input[name=view][value=effect]")
    tested = {(1, 2): 0.6, (2, 0): 0.35, (2, 3): 0.03}
    assert shown(page) == [tested.get((row["layer"], row["expert"])) for row in rows]
    assert page.inner_text("#ramp-high").startswith("60")


def test_no_text_of_an_artefact_runs(opened: Open) -> None:
    page = opened()
    page.click(f"button[data-layer='{TOP[0]['layer']}'][data-expert='{TOP[0]['expert']}']")
    assert "window.pwned=1" in page.inner_text("#expert")
    assert page.evaluate("window.pwned === undefined && document.images.length === 0")


def test_a_large_model_is_quick(opened: Open, pages: dict[str, Path]) -> None:
    assert pages["large"].stat().st_size <= 6_000_000
    page = opened("large", size=PHONE)
    assert len(shown(page)) == 60 * 384 and not scrolls(page)
    page.focus("#heat-map-box")
    page.keyboard.press("End")
    assert page.inner_text("#heat-map-read").startswith("Layer 1, expert 383:")
    assert page.evaluate("document.getElementById('heat-map-box').scrollLeft") > 0  # the cell is in sight
    page.keyboard.press("Enter")
    assert title(page) == "Layer 1, expert 383" and not scrolls(page)
