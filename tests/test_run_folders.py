"""What a run directory may be, what is its own, and what happens when it goes away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gtqlora.cli import main
from gtqlora.errors import RunError
from gtqlora.run import MANIFEST, Run, atomic_write, write_json


@dataclass(frozen=True)
class _Config:
    seed: int = 0
    logging: int = 1


def _listing(folder: Path) -> list[tuple[str, str]]:
    """Names, and contents of plain files."""
    return sorted((str(p.relative_to(folder)), p.read_text() if p.is_file() else "") for p in folder.rglob("*"))


# --- which folders


@pytest.mark.parametrize(
    "name",
    [
        *("adapter/notes.txt", "checkpoints/checkpoint-500/model.bin", "metrics.jsonl", "diagnosis/mine", ".git/HEAD"),
        *(".lock", ".x.gtqlora-staging", ".adapter.abcdefgh.gtqlora-stagin", "manifest.json", "contrast.parquet"),
    ],
)
def test_a_folder_of_the_user_s_is_no_run_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = _listing(tmp_path)
    with pytest.raises(RunError, match="choose another --run"):
        Run(tmp_path)
    assert _listing(tmp_path) == before


@pytest.mark.parametrize("text", ['{"name": "my app", "icons": []}', '{"files": {"a": 1}}', "not json"])
def test_a_manifest_of_something_else_is_not_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json: not .*choose another --run"):
        Run(tmp_path)
    assert _listing(tmp_path) == [(MANIFEST, text)]


def test_what_is_there_is_said(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=r"it holds 'a', 'b', 'c', \.\.\., and no manifest\.json"):
        Run(tmp_path)


@pytest.mark.parametrize("verb", ["train", "diagnose", "project"])
def test_every_verb_that_makes_a_run_refuses(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("precious")
    model = ["organism:null", "--contrast", "organism", "--config", "organism"]
    assert main([verb, *model, "--run", str(tmp_path)]) == 2
    assert "not empty and not a run directory" in capsys.readouterr().err
    assert _listing(tmp_path) == [("adapter", ""), ("adapter/notes.txt", "precious")]


@pytest.mark.parametrize("verb", [["verify"], ["export"], ["report"], ["report", "--compare"]])
def test_verbs_that_read_a_run_make_none(tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    Run(tmp_path / "run").close()
    more = [str(tmp_path / "out")] if verb == ["export"] else []
    first = [str(tmp_path / "run")] if "--compare" in verb else []
    assert main([verb[0], *first, *verb[1:], str(tmp_path / "empty"), *more]) == 2
    assert "not a run directory (no manifest.json in it)" in " ".join(capsys.readouterr().err.split())
    assert _listing(tmp_path / "empty") == []


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "home", "root"])
def test_odd_run_directories(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    place = {"home": home, "root": Path("/")}.get(kind, tmp_path / "place")
    if kind == "link":
        (tmp_path / "real").mkdir()
        place.symlink_to(tmp_path / "real")
        Run(place).close()
        assert (tmp_path / "real" / MANIFEST).exists()
        return
    if kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        place.write_text("mine")
    with pytest.raises(RunError, match="choose another --run"):
        Run(place)
    assert not list(home.iterdir()) and not (tmp_path / "nowhere").exists()


def test_a_run_inside_a_model_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    Run(tmp_path / "runs" / "edit").close()
    assert (tmp_path / "runs" / "edit" / MANIFEST).exists()


@pytest.mark.parametrize("path", ["a\0b", "a\udcffb", "~nobody-of-that-name/run"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(RunError, match="cannot be used as a path"):
        Run(path)


def test_home_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Run("~/run").close()
    assert (tmp_path / "run" / MANIFEST).exists()


_KILLED_AT_FIRST = """
import os, signal, sys
from pathlib import Path
from gtqlora.run import Run
fatal, seen = int(sys.argv[2]), 0
def count(event, _):
    global seen
    seen += event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock"}
    if seen == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
Run(sys.argv[1])
os._exit(0)
"""


def test_a_run_killed_while_it_is_made_is_known_as_ours(tmp_path: Path) -> None:
    """At every file-system change on the way to the manifest."""
    code = f"""
import os, sys
for fatal in range(1, 60):
    child = os.fork()
    if not child:
        sys.argv = ["-", sys.argv[1] + f"/{{fatal}}", str(fatal)]
        exec({_KILLED_AT_FIRST!r}, {{"__name__": "__main__"}})
    if os.waitpid(child, 0)[1] == 0:
        break
print(fatal)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import gtqlora.run\n" + code, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert 8 < last < 59
    for folder in tmp_path.iterdir():
        Run(folder).close()
        assert sorted(p.name for p in folder.iterdir()) == [".lock", MANIFEST]
        assert json.loads((folder / MANIFEST).read_text()) == {"format": 1, "stages": {}}


# --- the lock


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda p: p.symlink_to("elsewhere"), lambda p: p.symlink_to("/dev/zero"), _socket],
    ids=["pipe", "folder", "link", "link to a device", "socket"],
)
def test_a_lock_that_is_no_plain_file_is_refused(
    tmp_path: Path, make: Callable[[Path], object], has_manifest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    if has_manifest:
        write_json(tmp_path / MANIFEST, {"format": 1, "stages": {}})
    make(Path(".lock"))
    with pytest.raises(RunError, match=r"not a plain file|it holds '\.lock'"):
        Run(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


# --- gone under our feet


@pytest.mark.parametrize(
    "act",
    [
        lambda path: shutil.rmtree(path),
        lambda path: path.rename(path.with_name("moved")),
        lambda path: (path / ".lock").unlink(),
        lambda path: (shutil.rmtree(path), Run(path)),
        lambda path: (path.rename(path.with_name("moved")), path.symlink_to("moved"), (path / ".lock").unlink()),
    ],
    ids=["removed", "moved", "lock removed", "made anew by another", "replaced by a link"],
)
def test_a_run_that_went_away_is_not_made_again(tmp_path: Path, act: Callable[[Path], object]) -> None:
    path = tmp_path / "run"
    with Run(path) as run:
        kept = act(path)
        before = _listing(tmp_path)
        with pytest.raises(RunError, match="was removed or replaced while this command worked"):
            write_json(run / "verdict.json", {})
        with pytest.raises(RunError, match="was removed or replaced"), run.stage("s", _Config(), {}):
            pytest.fail("a stage began")
        assert _listing(tmp_path) == before
        del kept


def test_a_run_that_went_away_during_a_stage_records_nothing(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        with pytest.raises(RunError, match="was removed or replaced"), run.stage("s", _Config(), {}):
            shutil.rmtree(run.path)
        assert not run.path.exists()


# --- what is the run's own


@pytest.mark.parametrize(
    ("place", "owned"),
    [
        *(("adapter", True), ("adapter/w", True), ("checkpoints/checkpoint-2/w", True), ("manifest.json", True)),
        *(("diagnosis/a/b", True), (".lock", True), (".", True), ("x/../adapter/w", True), ("link/w", True)),
        *(("../other/adapter/w", True), ("made-up/w", True), ("merged", False), ("w/adapter", False)),
        *(("../adapter/w", False), ("../run-2", False), ("adapters", False)),
    ],
)
def test_what_a_run_owns(tmp_path: Path, place: str, owned: bool) -> None:
    Run(tmp_path / "other").close()
    with Run(tmp_path / "run") as run:
        (run / "link").symlink_to("adapter")
        with run.stage("s", _Config(), {}) as stage:
            stage.outputs.append("made-up")
        assert run.owns(run / "" / place) == owned


# --- settings that are no part of the answer, outputs that are renewed together


def _do(run: Run, text: str, config: _Config = _Config(), *, fail: bool = False) -> bool:
    with run.stage("s", config, {}, aside={"logging"}) as stage:
        stage.outputs += ["folder", "file"]
        if not stage.fresh:
            new = stage.renewed()
            (new / "folder").mkdir()
            (new / "folder" / "a").write_text(text)
            (new / "file").write_text(text)
            assert not fail or (run / "folder" / "a").read_text() == "one"
            if fail:
                raise KeyboardInterrupt
        return stage.fresh


def test_a_setting_set_aside_changes_nothing(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        fresh = [_do(run, "one"), _do(run, "two", _Config(logging=5)), _do(run, "two", _Config(seed=1))]
    assert fresh == [False, True, False]


def test_outputs_stay_until_all_of_them_are_renewed(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run:
        _do(run, "one")
        before = _listing(run.path)
        with pytest.raises(KeyboardInterrupt):
            _do(run, "two", _Config(seed=1), fail=True)
        assert _listing(run.path) == before
        assert _do(run, "three")  # fresh: nothing has changed


_RENEW = """
import os, signal, sys
from pathlib import Path
import gtqlora.run
from tests.test_run_folders import _Config, _do

def hook(fatal):
    seen = 0
    def count(event, _):
        nonlocal seen
        if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "fcntl.flock"}:
            seen += 1
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
    return count

fatal, status = 0, 1
while status:
    fatal += 1
    folder = Path(sys.argv[1]) / str(fatal)
    with gtqlora.run.Run(folder) as run:
        _do(run, "one")
    child = os.fork()
    if not child:
        with gtqlora.run.Run(folder) as run:
            sys.addaudithook(hook(fatal))
            _do(run, "two", _Config(seed=1))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    with gtqlora.run.Run(folder) as run:
        texts = {(folder / "folder" / "a").read_text(), (folder / "file").read_text()}
        assert sorted(os.listdir(folder)) == [".lock", "file", "folder", "manifest.json"], os.listdir(folder)
        print(*texts, run.manifest()["stages"]["s"]["seed"], _do(run, "three", _Config(seed=len(texts & {"two"}))))
"""


def test_killed_anywhere_outputs_and_record_are_all_old_or_all_new(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _RENEW, tmp_path], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    states = done.stdout.splitlines()
    turn = states.index("two 1 True")
    assert turn > 20 and len(states) - turn > 5
    assert states == ["one 0 True"] * turn + ["two 1 True"] * (len(states) - turn)


def test_a_kill_leaves_no_staging_in_checkpoints(tmp_path: Path) -> None:
    place = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    Run(tmp_path / "run").close()
    place.mkdir(parents=True)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom gtqlora.run import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as staged:\n    staged.touch()\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", code, place / "complete.json"], check=False)
    assert died.returncode == -signal.SIGKILL and len(list(place.iterdir())) == 1
    Run(tmp_path / "run").close()
    assert list(place.iterdir()) == []


def test_a_run_is_usable_for_whole(tmp_path: Path) -> None:
    with Run(tmp_path / "run") as run, atomic_write(run / "a") as staged:
        staged.write_text("x")
    assert (tmp_path / "run" / "a").read_text() == "x"
