"""The house rules that can be counted: sizes, types, docstrings and comments of the package."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import gtqlora

SOURCE = Path(gtqlora.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _name(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def _functions() -> Iterator[tuple[str, Function]]:
    for file in FILES:
        for node in ast.walk(_tree(file)):
            if isinstance(node, Function):
                yield f"{_name(file)}:{node.lineno} {node.name}", node


def _lines(node: Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_functions_are_small() -> None:
    lengths = sorted(_lines(node) for _, node in _functions())
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * len(lengths))] <= 22
    assert [name for name, node in _functions() if _lines(node) > 60] == []


def test_files_are_small_and_the_root_is_not_crowded() -> None:
    assert [_name(file) for file in FILES if len(file.read_text(encoding="utf-8").splitlines()) > 400] == []
    assert len([file for file in FILES if file.parent == SOURCE]) <= 12


def _annotations(node: Function) -> Iterator[ast.expr]:
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    yield from (argument.annotation for argument in every if argument is not None and argument.annotation is not None)
    if node.returns is not None:
        yield node.returns


def _anys(node: Function) -> int:
    """Return how often a signature says `Any`."""
    parts = (part for annotation in _annotations(node) for part in ast.walk(annotation))
    return sum(isinstance(part, ast.Name) and part.id == "Any" for part in parts)


def test_signatures_say_what_they_take() -> None:
    found = {name: count for name, node in _functions() if (count := _anys(node))}
    assert sum(found.values()) <= 60, found


def _public(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_public_names_have_docstrings(file: Path) -> None:
    tree = _tree(file)
    assert ast.get_docstring(tree), "the module"
    assert [name for name, node in _public(tree.body, "") if not ast.get_docstring(node)] == []


def test_comments_say_why_but_not_everywhere() -> None:
    lines = [line.strip() for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]
    share = sum(line.startswith("#") for line in lines) / len(lines)
    assert 0.02 <= share <= 0.06, f"{share:.1%} of the lines are comments"
