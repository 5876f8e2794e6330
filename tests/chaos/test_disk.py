"""A disk that is full at every class of bytes: one line that names a file, nothing half-written, and on with space."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.chaos import forks, kills, scenes
from tests.chaos.forks import Bomb
from tests.chaos.scenes import Stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="children are forked, which CUDA does not survive")
SIZES = {
    **{"train": (1, 41, 600, 3000, 12_000, 40_000), "verify": (1, 900, 9000), "export": (10, 3000, 60_000)},
    **{"diagnose": (1, 2000), "report": (1, 20_000)},
}
_FORMS = {
    "export overlay": (3000,),
    "export peft vllm": (3000,),
    "export gguf onto": (3000, 60_000),
    "export gguf-adapter": (900,),
}
SCENES = {scene.name: scene for scene in scenes.scenes()}
SIZES |= {name: sizes for name, sizes in _FORMS.items() if name in SCENES}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    state = os.environ["XDG_STATE_HOME"]
    yield Stage.build(tmp_path_factory.mktemp("disk"), lambda scene: scene.name in SIZES)
    os.environ["XDG_STATE_HOME"] = state


@pytest.mark.parametrize("name", SIZES)
def test_a_full_disk_is_one_line_and_nothing_is_lost(stage: Stage, name: str) -> None:
    trials = [kills.play(stage, SCENES[name], Bomb(full=size)) for size in SIZES[name]]
    assert [trial.faults for trial in trials] == [{}] * len(trials), kills.summary(trials)["failures"]
    assert sum(trial.hit for trial in trials) >= len(trials) - 1


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 KB, where one may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "chaos", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", ["train", "export"])
def test_a_file_system_without_space(stage: Stage, small: Path, name: str) -> None:
    scene = SCENES[name]
    target = {"train": "run", "export": "out"}[name]
    command = tuple(str(small / target) if word == target and name == "export" else word for word in scene.command)
    with stage.set(scene):
        if name == "train":
            (stage.trial / "run").symlink_to(small)
        ended = forks.command(command, stage.trial)
        assert ended.code == 2 and not ended.traceback and kills._names_a_file(ended), ended
        subprocess.run(["mount", "-o", "remount,size=60m", small], check=True)
        assert forks.command(command, stage.trial).code == 0
        assert kills.left_over(small) == []
