"""Write the page of all settings from the dataclasses: defaults, values that they take, and what they mean.

    python bench/settings.py > docs/settings.md

What a number may be is not written down a second time: a value below every range is tried, and the refusal says it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, replace
from typing import Literal, get_args, get_origin, get_type_hints

from gtqlora.config import STAGES, ModelConfig, StageConfig
from gtqlora.errors import ConfigError

TITLE = """\
# All settings

Written by `python bench/settings.py > docs/settings.md` from the dataclasses in `src/gtqlora/config`; change it there.
A setting is given in a recipe (`--config FILE`), at its top for every stage that has it or in a stage's own section
such as `[train]`, or by `--set` as in `--set steps=400`, which wins; `template` is a section of its own, or
`--set template.enable_thinking=false`. [The guide](guide.md) says what the stages do.
"""
SHARED = "Every stage has these too; a stage whose default differs lists it again below."
_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
# Least of all: every range that a number has is bounded from below, so this is outside of it.
_OUTSIDE = -1


def meanings(kind: type[ModelConfig]) -> dict[str, str]:
    """Return what each setting means by its name, from the docstrings of a config and the configs it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        block = re.search(r"Attributes:\n(.*?)(?:\n\s*\n|\Z)", base.__doc__ or "", re.DOTALL)
        for names, text in re.findall(r"^ {8}([\w, ]+): (.*(?:\n {12}.*)*)", block[1] if block else "", re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def allowed(kind: type[StageConfig], name: str) -> str:
    """Return the values that a setting takes: its literal's, or its type with the range that its config refuses by."""
    hint = get_type_hints(kind)[name]
    plain = (
        hint if get_origin(hint) in (Literal, dict) else next((p for p in get_args(hint) if p is not type(None)), hint)
    )
    optional = ", or `none`" if plain is not hint else ""
    if get_origin(hint) is dict:
        return "a table of names with true or false, numbers and texts"
    if get_origin(plain) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(plain)) + optional
    parts = [_WORDS[plain] + optional]
    return ": ".join(parts + ([bounds] if plain in (int, float) and (bounds := _bounds(kind, name)) else []))


def _bounds(kind: type[StageConfig], name: str) -> str:
    try:
        replace(kind(model="model", contrast="pairs"), **{name: _OUTSIDE})
    except ConfigError as error:
        return str(error).partition(": ")[2].removeprefix("must be ")
    return ""


def _default(field: Field[object]) -> str:
    if field.default_factory is not MISSING:
        return "`{}`"
    value = field.default
    if value is MISSING:
        return "(must be given)"
    return f"`{str(value).lower() if value is None or isinstance(value, bool) else value}`"


def _table(kind: type[StageConfig], names: list[str]) -> Iterator[str]:
    known, said = {field.name: field for field in fields(kind)}, meanings(kind)
    yield "| setting | default | values | meaning |\n|---|---|---|---|"
    for name in names:
        cells = (f"`{name}`", _default(known[name]), allowed(kind, name), said[name])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Return the whole page, with a table of the shared settings and one for each stage."""
    lines = [TITLE, "## Every stage", "", SHARED, ""]
    lines += _table(StageConfig, [field.name for field in fields(StageConfig)])
    for stage, kind in STAGES.items():
        lines += ["", f"## {stage}", "", f"{(kind.__doc__ or '').splitlines()[0]}", ""]
        lines += _table(kind, list(kind.__annotations__))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
