"""A run whose original and edited models are served: by llama.cpp from GGUF files, one process each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gtqlora.config import VerifyConfig
from gtqlora.config.addresses import SERVER_KEY
from gtqlora.exports import llama_server
from gtqlora.exports.gguf.values import rounded
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.llama_server import serving
from tests import helpers
from tests.exports.jobs import certified


@dataclass(frozen=True)
class Setting:
    """A verified run, and the servers of its two models."""

    run: Path
    model: Path
    toy: helpers.Toy
    before: str
    after: str

    def config(self, **changes: Any) -> VerifyConfig:
        """Settings of `verify` that ask the servers."""
        names = {"served_before": f"{self.before}#base", "served_after": f"{self.after}#edited"}
        asked = {"generate_with": self.before, **names, "ablation": 0, "mediation_prompts": 0, "wrapped_prompts": 8}
        return self.toy.verify_config(self.model, **{**asked, **changes})


@pytest.fixture(scope="session")
def served_run(
    toy: helpers.Toy, verified: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setting]:
    """Both models of a run in llama.cpp; copy the run before changing it."""
    folder, model = tmp_path_factory.mktemp("served"), toy.model("glm4_moe")
    run = Path(shutil.copytree(verified(model), folder / "run"))
    plan = Plan.of(certified(run))
    for name, change in (("base", None), ("edited", rounded)):
        plan.write(folder / f"{name}.gguf", change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_server.secrets, "token_hex", lambda: "sesame")  # one key for both
        patch.setenv(SERVER_KEY, "sesame")
        with serving(folder / "base.gguf", context=512) as base, serving(folder / "edited.gguf", context=512) as edited:
            yield Setting(run, model, toy, *(f"http://{s._host}:{s._port}" for s in (base, edited)))
