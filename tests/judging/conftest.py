"""Tiny judges, trained once a session, and a server that speaks OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.judging import judge_models
from tests.judging.chat_server import ChatServer


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier in hub layout; copy it before changing it."""
    return judge_models.save_classifier(tmp_path_factory.mktemp("judges") / "classifier")


@pytest.fixture(scope="session")
def wildguard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that speaks WildGuard's form."""
    folder = tmp_path_factory.mktemp("judges") / "wildguard"
    return judge_models.save_guard(folder, judge_models.wildguard_text, judge_models.wildguard_words)


@pytest.fixture(scope="session")
def guard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that says safe or unsafe."""
    folder = tmp_path_factory.mktemp("judges") / "guard"
    return judge_models.save_guard(folder, judge_models.guard_text, judge_models.guard_words)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """A server on this machine."""
    with ChatServer() as running:
        yield running
