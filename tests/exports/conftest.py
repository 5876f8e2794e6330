"""An exported folder and the run that it came from, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import helpers


@dataclass(frozen=True)
class Export:
    """A run, and the folder that was exported of it."""

    run: Path
    out: Path


@pytest.fixture(scope="session")
def first_export(toy: helpers.Toy, verified: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Merged weights in several shards; copy before changing."""
    folder = tmp_path_factory.mktemp("exported")
    run = Path(shutil.copytree(verified(toy.model("qwen3_moe", max_shard_size="100KB")), folder / "run"))
    helpers.exported(run, folder / "out")
    return Export(run, folder / "out")


@pytest.fixture
def export(first_export: Export, tmp_path: Path) -> Export:
    """A copy of both."""
    run, out = (Path(shutil.copytree(path, tmp_path / path.name)) for path in (first_export.run, first_export.out))
    return Export(run, out)
