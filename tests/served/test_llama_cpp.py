"""`verify` with llama.cpp's server: the same verdict, told for what it is, and nothing that rests on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gtqlora.certificate import certify
from gtqlora.errors import ConfigError, FloorError, ModelError
from gtqlora.results.verdict import HISTORY, VERDICT, read_outcomes, read_verdict
from gtqlora.run import SERVED, Run
from gtqlora.stages.verify import verify
from tests import helpers
from tests.served.conftest import Setting


@pytest.fixture
def run(served_run: Setting, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(served_run.run, tmp_path / "run"))


def test_the_answers_are_those_of_the_model_here(served_run: Setting, run: Path) -> None:
    with Run(run) as held:
        verdict = verify(served_run.config(), held)
        again = verify(served_run.config(), held)
    assert verdict == again == read_verdict(run / SERVED)
    here, there = read_outcomes(run), read_outcomes(run / SERVED)
    print(verdict.served)
    assert [(o.text_before, o.text_after) for o in there] == [(o.text_before, o.text_after) for o in here]
    assert not list((run / SERVED).glob("answers-*"))
