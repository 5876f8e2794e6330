"""Commands killed at a spread of their file-system changes, and on a disk that is full at every class of bytes.

Nothing is half-written, and the same command goes on. `python -m tests.chaos kills` and `disk` do it for hours.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gtqlora.config.export import FORMATS
from tests.chaos import forks, kills, scenes
from tests.chaos.forks import Bomb
from tests.chaos.scenes import Scene, Stage

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="children are forked, which CUDA does not survive")
SPREAD = {"train": 5, "train over a certified edit": 6, "verify": 4, "verify again": 3, "export": 5, "report": 2}
"""Kills in the test run, of which every third is the middle of a write."""
SCENES = {scene.name: scene for scene in scenes.scenes()}
SPREAD |= dict.fromkeys(("export overlay", "export peft vllm", "export gguf onto", "export gguf-adapter"), 2)
SIZES = {
    **{"train": (1, 41, 600, 3000, 12_000, 40_000), "verify": (1, 900, 9000), "export": (10, 3000, 60_000)},
    **{"diagnose": (1, 2000), "report": (1, 20_000)},
}
"""Bytes of a file at which the disk is full."""
_FORMS = {
    "export overlay": (3000,),
    "export peft vllm": (3000,),
    "export gguf onto": (3000, 60_000),
    "export gguf-adapter": (900,),
}
SIZES |= {name: sizes for name, sizes in _FORMS.items() if name in SCENES}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    state = os.environ["XDG_STATE_HOME"]
    built = Stage.build(tmp_path_factory.mktemp("chaos"), lambda scene: scene.name in SPREAD.keys() | SIZES)
    yield built
    built.commands.close()
    os.environ["XDG_STATE_HOME"] = state


def spread(count: int, changes: int) -> list[Bomb]:
    """Kills from the first change to the last one, all signals and a torn write among them."""
    found = [Bomb(change=1 + round(i * (changes - 1) / max(count - 2, 1))) for i in range(count - 1)]
    found[1::3] = [Bomb(change=bomb.change, signal=signal.SIGINT) for bomb in found[1::3]]
    found[2::3] = [Bomb(change=bomb.change, signal=signal.SIGTERM) for bomb in found[2::3]]
    return [*found, Bomb(size=3000)]


@pytest.mark.parametrize("name", SPREAD)
def test_killed_anywhere_nothing_is_broken_or_lost(stage: Stage, name: str) -> None:
    scene = SCENES[name]
    changes, _ = kills.measure(stage, scene)
    trials = [kills.play(stage, scene, bomb) for bomb in spread(SPREAD[name], changes)]
    assert [trial.faults for trial in trials] == [{}] * len(trials), kills.summary(trials)["failures"]
    assert sum(trial.hit for trial in trials) >= len(trials) - 1


def test_a_training_killed_again_and_again_ends_as_if_undisturbed(stage: Stage) -> None:
    scene = SCENES["train"]
    with stage.set(scene):
        for change in (28, 12, 40, 20, 50):
            assert forks.command(scene.command, stage.trial, Bomb(change=change)).killed
        assert stage.commands(scene.command).code == 0
        assert stage.held(scene) == stage.expected["train"]
        assert kills.left_over(stage.trial) == []


def test_ctrl_c_says_what_stays(stage: Stage) -> None:
    scene = SCENES["train"]
    with stage.set(scene):
        ended = forks.command(scene.command, stage.trial, Bomb(change=60, signal=signal.SIGINT))
    assert ended.code == 130 and "finished artefacts stay" in ended.output


# --- full disks --------------------------------------------------------------------------------------------------


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


# --- the instrument itself: it must see what it is there for -------------------------------------------------------


def test_faults_are_seen(stage: Stage) -> None:
    scene = SCENES["export"]
    with stage.set(scene):
        run = stage.trial / "run"
        assert kills.unreadable(stage.trial) == [] and kills.left_over(stage.trial) == []
        old = kills._state(stage.trial)
        assert kills._lost(stage, scene, old) == []
        verdict = (run / "verdict.json").read_text()
        (run / "verdict.json").write_text(verdict[:-9])
        assert any("verdict.json" in line for line in kills.unreadable(stage.trial))
        assert "cannot be exported" in kills._lost(stage, scene, old)[0]
        (run / "verdict.json").write_text(verdict)
        edit = run / "adapter" / "edit.safetensors"
        edit.write_bytes(edit.read_bytes()[:-4] + b"\0\0\0\1")
        assert "adapter: not what train recorded" in kills.unreadable(stage.trial)
        assert kills._lost(stage, scene, old) == ["the adapter is neither the certified nor the new one"]
        (run / "verdicts.jsonl").write_text("")
        assert kills._history_lost(stage.trial, old) == ["verdicts.jsonl: verdicts are gone"]
        (run / ".x.abcdefgh.gtqlora-staging").mkdir()
        assert kills.left_over(stage.trial) == ["run/.x.abcdefgh.gtqlora-staging"]
        (stage.trial / "out").mkdir()
        assert "out: no export.json" in kills.unreadable(stage.trial)


def test_a_kill_is_just_before_its_change(tmp_path: Path) -> None:
    def work() -> int:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").write_text("b")
        os.replace(tmp_path / "b", tmp_path / "c")
        return 0

    assert forks.forked(work, tmp_path).changes == 3
    os.remove(tmp_path / "c")
    (tmp_path / "a").rmdir()
    for change, left in ((1, []), (2, ["a"]), (3, ["b"])):
        for path in tmp_path.iterdir():
            path.rmdir() if path.is_dir() else path.unlink()
        assert forks.forked(work, tmp_path, Bomb(change=change)).killed
        assert [p.name for p in sorted(tmp_path.iterdir())][-1:] == left


def test_a_kill_in_a_write_tears_the_file_whichever_library_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def work() -> int:
        save_file({"x": torch.zeros(4096)}, tmp_path / "x")
        return 0

    ended = forks.forked(work, tmp_path, Bomb(size=1000))
    assert ended.code == -signal.SIGXFSZ
    assert max((p.stat().st_size for p in tmp_path.iterdir()), default=0) <= 1000
    assert forks.forked(work, tmp_path).code == 0 and (tmp_path / "x").stat().st_size > 16384


def test_every_format_of_export_is_killed() -> None:
    ways = {words[1] if words[:1] == ("--to",) else "safetensors" for words in scenes.EXPORTS.values()}
    assert ways == set(FORMATS)


def test_a_scene_is_known_by_its_name() -> None:
    assert set(SPREAD) < set(SCENES) and isinstance(SCENES["train"], Scene)
