"""Shared by all tests: one thread, and the expensive runs made once."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from gtqlora.floor import ledger
from gtqlora.storage.user_state import folder as user_folder
from tests import helpers

torch.set_num_threads(1)
gc.freeze()  # every training collects garbage once; the imported modules are none
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=UserWarning, module="peft|torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def user_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What gtqlora remembers for a user must not come from, or go to, whoever runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> helpers.Toy:
    """Tiny models of every family and a small contrast set in their language."""
    found = helpers.Toy(tmp_path_factory.mktemp("toy"))
    _SHARED.append(found.contrast.parent / ledger.NAME)
    return found


_SHARED: list[Path] = []
"""Ledgers beside pairs that many tests share."""


@pytest.fixture(autouse=True)
def own_tries(user_state: None) -> None:
    """A pass must not hang on how many tries the tests before made on the same prompts."""
    state = user_folder()
    for file in (*_SHARED, *([state / ledger.NAME] if state else [])):
        file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def verified(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(model folder, kind of edit) -> a run directory, trained and verified once; copy it before changing it."""
    made: dict[tuple[str, str], Path] = {}

    def run_of(model: Path, kind: str = "gt-qlora") -> Path:
        key = (str(model), kind)
        if key not in made:
            made[key] = helpers.verified_run(toy, model, kind, tmp_path_factory.mktemp("verified"))
        return made[key]

    return run_of
