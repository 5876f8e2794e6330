"""Shared by all tests: one thread, and the expensive runs made once.

Libraries are imported where they are used: the process that only hands tests out to workers needs none of them.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import warm

if TYPE_CHECKING:
    from tests import helpers

# Two workers and dozens of processes import the same: what is compiled, and assertions rewritten, is kept beside it.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
warnings.filterwarnings("ignore", category=UserWarning, module="peft|torch")


_HERE = Path(__file__).parent
_LONGEST = ("chaos", "stages", "ranks", "exports", "bitdelta", "experts", "edits", "organisms")
"""Rooms whose files take longest. They come first, so that no worker is left with one when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    items.sort(key=lambda item: _LONGEST.index(room) if (room := item.path.parent.name) in _LONGEST else len(_LONGEST))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    warm.quiet()


@pytest.fixture(scope="session", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What stays the same as long as the tests run is made once."""
    from gtqlora.judging import trust
    from tests import models

    models.KEPT_IN = tmp_path_factory.mktemp("models")
    anew, known = trust._hash_of, cache(trust._hash_of)
    # that of a judge in here is of hundreds of files
    trust._hash_of = lambda source, judge: (known if _HERE in source.parents else anew)(source, judge)


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> None:
    """Every training and every verdict looks for garbage; what is there before a file's tests begin is none."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def user_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What gtqlora remembers for a user must not come from, or go to, whoever runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> helpers.Toy:
    """Tiny models of every family and a small contrast set in their language."""
    from gtqlora.floor import ledger
    from tests import helpers

    found = helpers.Toy(tmp_path_factory.mktemp("toy"))
    _SHARED.append(found.contrast.parent / ledger.NAME)
    return found


_SHARED: list[Path] = []
"""Ledgers beside pairs that many tests share."""


@pytest.fixture(autouse=True)
def own_tries(user_state: None) -> None:
    """A pass must not hang on how many tries the tests before made on the same prompts."""
    from gtqlora.floor import ledger
    from gtqlora.storage.user_state import folder

    state = folder()
    for file in (*_SHARED, *([state / ledger.NAME, ledger.of_edits(state)] if state else [])):
        file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def verified(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(model folder, kind of edit) -> a run directory, trained and verified once; copy it before changing it."""
    from tests import helpers

    made: dict[tuple[str, str], Path] = {}

    def run_of(model: Path, kind: str = "gt-qlora") -> Path:
        key = (str(model), kind)
        if key not in made:
            made[key] = helpers.verified_run(toy, model, kind, tmp_path_factory.mktemp("verified"))
        return made[key]

    return run_of
