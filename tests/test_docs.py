"""The docs against the code: commands parse, files and settings exist, old words are gone, the README is short."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from gtqlora.cli.app import app
from gtqlora.config import RENAMED, STAGES
from gtqlora.families import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gtqlora"  # and not what is installed: pages and sources of one tree belong together
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
ARCHITECTURE = (DOCS / "architecture.md").read_text()


def pages() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fenced(page: Path) -> str:
    """The lines inside of a page's code blocks."""
    return "\n".join(re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE))


def prose(page: Path) -> str:
    """A page without its code blocks: what was printed once keeps the words of its day."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    """Each `gtqlora ...` that stands in a code block, or whole between backticks, with its page."""
    for page in PAGES:
        found = re.findall(r"^(?:.*&& )?gtqlora (.+)$", fenced(page), re.MULTILINE)
        found += re.findall(r"`gtqlora ([^`\s]+ [^`]+)`", prose(page))  # a verb alone is only mentioned
        yield from ((page.name, command) for command in found)


COMMANDS = sorted(set(commands()))


def test_there_are_commands_on_several_pages() -> None:
    assert len(COMMANDS) >= 15
    assert {page for page, _ in COMMANDS} >= {"README.md", "guide.md", "experts.md", "hardening.md"}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_verbs_and_flags_exist(page: str, command: str) -> None:
    app.parse_args(shlex.split(command, comments=True), print_error=False, exit_on_error=False)


@pytest.mark.parametrize("command", ["verify runs/mine --silencing 8", "silence runs/mine", "train MODEL"])
def test_a_command_that_does_not_exist_does_not_parse(command: str) -> None:
    """So the test above can fail."""
    with pytest.raises(CycloptsError):
        app.parse_args(shlex.split(command), print_error=False, exit_on_error=False)


SETTINGS = {field.name for config in STAGES.values() for field in fields(config)}


@pages()
def test_settings_exist(page: Path) -> None:
    text = page.read_text()
    # what follows the dot is a variable of some model's chat template
    named = re.findall(r"--set (?!template\.)(\w+)", text) + re.findall(r"`(\w+) = [^`]+`", text)
    assert not set(named) - SETTINGS


def test_the_page_of_settings_is_what_the_dataclasses_say() -> None:
    written = (DOCS / "settings.md").read_text()
    page = runpy.run_path(str(ROOT / "bench" / "settings.py"))["page"]()
    assert written == page, "docs/settings.md is out of date: run python bench/settings.py > docs/settings.md"


def test_the_page_of_settings_has_every_default_of_every_stage() -> None:
    shared, *stages = re.split(r"^## ", (DOCS / "settings.md").read_text().partition("## ")[2], flags=re.MULTILINE)
    for (stage, config), text in zip(STAGES.items(), stages, strict=True):
        assert text.startswith(f"{stage}\n")
        rows = dict(re.findall(r"^\| `(\w+)` \| `?(.+?)`? \| .+ \| .+ \|$", shared + text, re.MULTILINE))
        for field in fields(config):
            needed = field.default is MISSING and field.default_factory is MISSING
            default = field.default if field.default_factory is MISSING else field.default_factory()
            expected = "(must be given)" if needed else str(default)
            assert rows[field.name].lower() == expected.lower(), (stage, field.name)


@pages()
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pages()
def test_scripts_exist_and_take_their_flags(page: Path) -> None:
    for script, rest in re.findall(r"python (bench/\w+\.py)([^`\n]*)", page.read_text()):
        source = (ROOT / script).read_text()
        for neighbour in re.findall(r"\b(scale|step)\.parse\(", source):  # whose flags it takes
            source += (ROOT / "bench" / f"{neighbour}.py").read_text()
        assert not [flag for flag in re.findall(r"--[\w-]+", rest) if f'"{flag}"' not in source], script


# --- words

_OLD = re.compile(
    r"silenc(?:ed|ing)|\btap(?:s|ped)?\b|workpiece|give[ _]back|given back|gives back|\bcensus\b|--experts\b"
    r"|\w*(?:quantis|localis|normalis|orthogonalis|optimis|generalis)\w*|\bteachers? run",
    re.IGNORECASE,
)
"""What is called otherwise now, see the glossary, and spellings that are not ours."""
_KEPT = {
    "docs/claims.md": 1,
    "src/gtqlora/config/reading.py": len(RENAMED) - 1,
    "src/gtqlora/cli/settings.py": 1,
    "src/gtqlora/judging/english.py": 1,  # what a refusal may say of itself
    "src/gtqlora/judging/wordings/english_words.py": 1,  # one tells somebody to do it to a screw or a maple
}
"""How many lines still name old words, beside the new ones."""
TEXTS = [*PAGES, *(file for kind in ("py", "j2", "js", "css", "cu") for file in sorted(SOURCE.rglob(f"*.{kind}")))]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_old_words_are_gone(file: Path) -> None:
    text = prose(file) if file.suffix == ".md" else file.read_text()
    lines = [line for line in text.splitlines() if _OLD.search(line)]
    assert len(lines) <= _KEPT.get(str(file.relative_to(ROOT)), 0), lines


def test_the_glossary_is_short_and_sorted() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\* \| .+\. \|$", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert 15 <= len(words) <= 25
    assert words == sorted(words)


# --- the README


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 1000


def test_the_support_matrix_is_of_the_families_that_are_known() -> None:
    rows = re.findall(r"^\| `(\w+)`.* \| yes \| yes \| yes.* \| yes \|$", README.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted({name.removesuffix("_text") for name in FAMILIES})


# --- the architecture


def test_every_room_is_named() -> None:
    rooms = [f"{path.name}/" for path in SOURCE.iterdir() if (path / "__init__.py").exists()]
    files = [path.name for path in SOURCE.glob("*.py")]
    assert not [name for name in rooms + files if f"`{name}`" not in ARCHITECTURE]


def test_files_of_the_architecture_exist() -> None:
    named = set(re.findall(r"`([\w/]+\.py|(?:\w+/)+)`", ARCHITECTURE)) - {"src/gtqlora/"}
    here = {path.name for path in SOURCE.rglob("*.py")} | {f"{path.name}/" for path in SOURCE.rglob("*")}
    missing = [name for name in named if not (SOURCE / name).exists() and not (ROOT / name).exists()]
    assert not [name for name in missing if name not in here]


def test_eight_files_are_to_be_read_first() -> None:
    order = re.findall(r"^\| (\d) \| `([\w/.]+)` \|", ARCHITECTURE, re.MULTILINE)
    assert [int(number) for number, _ in order] == list(range(1, 9))
    assert not [file for _, file in order if not (SOURCE / file).is_file()]
