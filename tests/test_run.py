"""The run directory: one process at a time, artefacts whole or not at all, and stages done once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gtqlora.errors import RunError
from gtqlora.results.files import read_record
from gtqlora.run import (
    MANIFEST,
    Run,
    atomic_write,
    drop_leftovers,
    fingerprint,
    read_parquet,
    sha256_json,
    write_json,
    write_parquet,
)

EMPTY = {"format": 1, "stages": {}}


@dataclass(frozen=True)
class _Config:
    seed: int = 0
    steps: int = 5


def _python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def _contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


# --- the lock

_HOLD = """
import sys
from gtqlora.run import Run
with Run(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_turned_away_until_the_first_ends(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _python(_HOLD, run)
    _until_ready(first)
    with pytest.raises(RunError, match=f"{run}: another process is working in this run directory"):
        Run(run)
    first.communicate("\n", timeout=20)
    assert first.returncode == 0
    Run(run).close()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    first = _python(_HOLD, tmp_path)
    _until_ready(first)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=20)
    Run(tmp_path).close()


def test_a_turned_away_process_removes_nothing(tmp_path: Path) -> None:
    """Even what looks like a leftover may belong to the one at work."""
    with Run(tmp_path) as run, atomic_write(run / "adapter") as staged:
        staged.mkdir()
        second = _python(_HOLD, tmp_path)
        second.communicate(timeout=20)
        assert second.returncode != 0
        assert staged.is_dir()
    assert (tmp_path / "adapter").is_dir()


def test_two_run_directories_do_not_meet(tmp_path: Path) -> None:
    with Run(tmp_path / "a"), Run(tmp_path / "b"), Run(tmp_path / "a" / "inner"):
        pass


def test_a_path_below_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=f"{path}: the run directory cannot be written .*choose another --run"):
            Run(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_no_run_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="cannot be written"):
        Run(tmp_path / "run")


# --- whole

_KILLED = """
import os, signal, sys
from pathlib import Path
from gtqlora.run import atomic_write
with atomic_write(Path(sys.argv[1])) as staged:
    if sys.argv[2] == "folder":
        staged.mkdir()
        (staged / "a").write_text("half")
    else:
        staged.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("existing", [True, False], ids=["over an old one", "anew"])
def test_killed_while_writing(tmp_path: Path, kind: str, existing: bool) -> None:
    target = tmp_path / "artefact.bin"
    if existing and kind == "folder":
        target.mkdir()
        (target / "a").write_text("old")
    elif existing:
        target.write_text("old")
    write_json(tmp_path / MANIFEST, EMPTY)
    before = _contents(tmp_path)
    process = _python(_KILLED, target, kind)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 + existing  # a leftover, which proves that the kill struck inside
    assert target.exists() == existing
    Run(tmp_path).close()
    assert _contents(tmp_path) == {".lock": "", **before}


# Kills a child at its first, second, ... audited action until one gets through; no action is left out.
_KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from gtqlora.run import Run, atomic_write

ACTIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "tempfile.mkdtemp", "fcntl.flock"}

def write(target, text):
    with atomic_write(target) as staged:
        if sys.argv[2] == "file":
            staged.write_text(text * 2)
            return
        staged.mkdir()
        for name in "ab":
            (staged / name).write_text(text)

def read(target):
    if sys.argv[2] == "file":
        return target.read_text()
    return "".join((target / name).read_text() for name in sorted(os.listdir(target)))

def hook(fatal):
    seen = 0
    def count(event, _):
        nonlocal seen
        if event in ACTIONS:
            seen += 1
        if event in ACTIONS and seen == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    return count

fatal, status, absent = 0, 1, 0
while status:
    fatal += 1
    folder = Path(sys.argv[1]) / str(fatal)
    Run(folder).close()
    write(folder / "x", "old")
    child = os.fork()
    if not child:
        sys.addaudithook(hook(fatal))
        write(folder / "x", "new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    absent += not (folder / "x").exists()
    Run(folder).close()
    assert sorted(os.listdir(folder)) == [".lock", "manifest.json", "x"], os.listdir(folder)
    print(read(folder / "x"), absent)
"""


@pytest.mark.parametrize(("kind", "moments_without"), [("file", 0), ("folder", 1)])
def test_killed_anywhere_leaves_the_old_or_the_new(tmp_path: Path, kind: str, moments_without: int) -> None:
    process = _python(_KILLED_EVERYWHERE, tmp_path, kind)
    out = process.communicate(timeout=25)[0].split()
    assert process.returncode == 0
    states, absent = out[::2], int(out[-1])
    turn = states.index("newnew")
    assert turn > 5
    assert states == ["oldold"] * turn + ["newnew"] * (len(states) - turn)
    assert absent == moments_without  # only between a folder's two renames, where `Run` put it back


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_body_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("old")

    def write() -> None:
        with atomic_write(tmp_path / "a") as staged:
            staged.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert _contents(tmp_path) == {"a": "old"}


def test_a_failing_swap_puts_the_old_folder_back(tmp_path: Path) -> None:
    """An error between the two renames: what was written vanishes just before its turn."""
    target = tmp_path / "a"
    target.mkdir()
    (target / "x").write_text("old")
    process = _python(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from gtqlora.run import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as staged:\n"
        "    staged.mkdir()\n"
        "    done = []\n"
        "    def once(event, args):\n"
        "        if event == 'os.rename' and Path(args[1]).name == 'a' and not done:\n"
        "            done.append(1)\n"
        "            raise OSError('no space')\n"
        "    sys.addaudithook(once)\n",
        target,
    )
    process.communicate(timeout=20)
    assert process.returncode == 1
    assert _contents(tmp_path) == {"a/x": "old"}


def test_a_body_that_writes_nothing_is_an_error_and_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass
    assert _contents(tmp_path) == {"a": "old"}


def test_whole_replaces_folders_and_files_and_makes_parents(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "a.json"
    for text in ("one", "two"):
        with atomic_write(target) as staged:
            assert staged.suffix == ".json"
            staged.write_text(text)
    assert _contents(tmp_path) == {"deep/er/a.json": "two"}
    with atomic_write(tmp_path / "deep") as staged:
        staged.mkdir()
        (staged / "b").write_text("three")
    assert _contents(tmp_path) == {"deep/b": "three"}


def test_the_next_write_of_the_same_name_cleans_up_outside_run_directories(tmp_path: Path) -> None:
    """As for an export's folder, which lies where the user wants it."""
    process = _python(_KILLED, tmp_path / "out[1]", "folder")
    process.communicate(timeout=20)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "out[1]") as staged:
        staged.mkdir()
        (staged / "a").write_text("new")
    assert _contents(tmp_path) == {"out[1]/a": "new"}


_AT_WORK = """
import sys
from pathlib import Path
from gtqlora.run import atomic_write
with atomic_write(Path(sys.argv[1])) as staged:
    staged.mkdir()
    print("ready", flush=True)
    sys.stdin.readline()
    (staged / "a").write_text("done")
"""


@pytest.mark.parametrize("place", ["merged", "inner/adapter"])
def test_another_process_at_work_is_left_alone(tmp_path: Path, place: str) -> None:
    """Even in the same folder, or in a run directory inside this one."""
    Run(tmp_path).close()
    process = _python(_AT_WORK, tmp_path / place)
    _until_ready(process)
    Run(tmp_path).close()
    drop_leftovers((tmp_path / place).parent)
    process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert (tmp_path / place / "a").read_text() == "done"


def test_files_of_the_user_are_left_alone(tmp_path: Path) -> None:
    mine = {".bashrc.new": "a", ".a.123.old": "b", ".a.b.staging/c": "c", "adapter.new": "d"}
    Run(tmp_path).close()
    manifest = (tmp_path / MANIFEST).read_text()
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    Run(tmp_path).close()
    assert _contents(tmp_path) == {".lock": "", MANIFEST: manifest, **mine}


# --- JSON and Parquet


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_no_number_and_keeps_the_old(tmp_path: Path, bad: float) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": [bad]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_parquet_round_trip(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None, "c": ["x"]}, {"a": 2, "b": "t", "c": []}]
    write_parquet(tmp_path / "rows.parquet", rows)
    assert read_parquet(tmp_path / "rows.parquet") == rows


# --- fingerprints


def test_a_hash_of_json_knows_no_key_order() -> None:
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def _append(path: Path) -> None:
    path.write_text(path.read_text() + "x")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _append(folder / "a"),
        lambda folder: _append(folder / "sub" / "b"),
        lambda folder: (folder / "c").write_text(""),
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "a").rename(folder / "z"),
    ],
    ids=["content", "content below", "added", "removed", "renamed"],
)
def test_a_folder_s_fingerprint_changes_with_it(tmp_path: Path, change: Callable[[Path], object]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_text("1")
    (tmp_path / "sub" / "b").write_text("2")
    before = fingerprint(tmp_path)
    os.utime(tmp_path / "a", (1, 1))
    assert fingerprint(tmp_path) == before  # touching is no change
    change(tmp_path)
    assert fingerprint(tmp_path) != before


def test_a_folder_s_fingerprint_is_contents_behind_links_too(tmp_path: Path) -> None:
    """Whatever the size, the time, or where a link leads; a link in a circle ends."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "b").write_text("12")
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "there")
    (folder / "circle").symlink_to(folder)
    before = fingerprint(folder)
    os.utime(tmp_path / "there" / "b", (1, 1))
    assert fingerprint(folder) == before
    (tmp_path / "there" / "b").write_text("21")
    assert fingerprint(folder) != before


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    """The hub keeps times and locks in `.cache` of a downloaded folder."""
    (tmp_path / "a").write_text("1")
    before = fingerprint(tmp_path)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "a.metadata").write_text("now")
    (tmp_path / ".hidden").write_text("now")
    assert fingerprint(tmp_path) == before


def test_a_file_s_fingerprint_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    _append(tmp_path / "b")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_a_home_path_and_a_folder_s_split_are_read_not_taken_for_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").write_text("1")
    names = ("~/set", "~/set/a", f"{tmp_path}/set:train")
    before = [fingerprint(name) for name in names]
    assert fingerprint(f"{tmp_path}/set:test") != before[2]
    _append(tmp_path / "set" / "a")
    assert all(fingerprint(name) != old for name, old in zip(names, before, strict=True))


def test_a_hub_id_is_itself() -> None:
    assert fingerprint("org/name:split") == "hub:org/name:split"


# --- stages


def _do(
    run: Run,
    config: _Config = _Config(),
    inputs: str = "i",
    *,
    name: str = "s",
    text: str = "done",
    output: str = "out",
    again: bool = False,
) -> bool:
    """Do a stage that writes one artefact; whether it was fresh."""
    with run.stage(name, config, {"model": inputs}, again=again) as stage:
        stage.outputs.append(output)
        if not stage.fresh:
            with atomic_write(run / output) as staged:
                staged.mkdir()
                (staged / "a").write_text(text)
        return stage.fresh


@pytest.fixture
def run(tmp_path: Path):
    with Run(tmp_path / "run") as held:
        yield held


def test_a_stage_is_done_once(run: Run) -> None:
    assert [_do(run), _do(run), _do(run)] == [False, True, True]
    assert not _do(run, again=True)


def test_a_stage_stays_fresh_in_another_process_and_in_a_copy(tmp_path: Path, run: Run) -> None:
    _do(run)
    run.close()
    (tmp_path / "run").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "out" / "a", (1, 1))
    with Run(tmp_path / "moved") as moved:
        assert _do(moved)


@pytest.mark.parametrize(
    "change",
    [
        lambda run: _do(run, _Config(steps=6)),
        lambda run: _do(run, inputs="other"),
        lambda run: (run / "out" / "a").write_text("tampered") and _do(run),
        lambda run: (run / "out" / "a").unlink() or _do(run),
        lambda run: (run / "out").rename(run / "elsewhere") and _do(run),
    ],
    ids=["config", "input", "changed output", "incomplete output", "missing output"],
)
def test_a_change_makes_a_stage_stale(run: Run, change: Callable[[Run], bool]) -> None:
    _do(run)
    assert not change(run)


def test_a_failing_body_records_nothing(run: Run) -> None:
    with pytest.raises(RuntimeError), run.stage("s", _Config(), {}):
        raise RuntimeError
    assert run.manifest() == EMPTY
    assert json.loads((run / MANIFEST).read_text()) == EMPTY


def _spoil(folder: Path) -> None:
    (folder / "a").write_text("second")
    folder.mkdir()


def test_a_failing_body_with_other_settings_does_not_pass_its_output_off_as_the_first_one_s(run: Run) -> None:
    _do(run, text="first")
    with pytest.raises(FileNotFoundError), run.stage("s", _Config(steps=6), {"model": "i"}):
        (run / "out" / "a").rename(run / "nowhere" / "a")
    assert _do(run, text="first")  # it failed before it changed anything
    with pytest.raises(FileExistsError), run.stage("s", _Config(steps=6), {"model": "i"}):
        _spoil(run / "out")
    assert not _do(run, text="first")


def test_a_stage_that_overwrites_another_s_output_takes_its_place(run: Run) -> None:
    """As `project` after `train`: both make `adapter/`."""
    _do(run, name="train", text="one")
    _do(run, name="diagnose", output="diagnosis")
    _do(run, name="project", text="two")
    assert set(run.manifest()["stages"]) == {"diagnose", "project"}
    assert not _do(run, name="train", text="one")


def test_what_the_manifest_records(run: Run) -> None:
    _do(run, _Config(seed=7))
    record = json.loads((run / MANIFEST).read_text())["stages"]["s"]
    assert record["config"] == {"seed": 7, "steps": 5}
    assert record["inputs"] == {"model": "i"}
    assert (record["seed"], record["device"]) == (7, "cpu")
    assert record["outputs"] == {"out": fingerprint(run / "out")}
    assert record["versions"].keys() >= {"torch", "transformers"}
    assert record["seconds"] >= 0
    assert record["finished"].endswith("+00:00")


RECORD = {"hash": "h", "config": {}, "inputs": {}, "outputs": {}}


def _stage(**changes: object) -> str:
    return json.dumps({"format": 1, "stages": {"s": {**RECORD, **changes}}})


@pytest.mark.parametrize(
    "text",
    [
        *("{", "", "[]", "null", "7", '{"format": 1}', '{"stages": {}}', '{"format": 1, "stages": []}'),
        *('{"format": 1, "stages": {"s": {}}}', '{"format": 1, "stages": {"s": 1}}'),
        *(
            '{"format": true, "stages": {}}',
            '{"format": "1", "stages": {}}',
            '{"format": 1, "format": 1, "stages": {}}',
        ),
        *('{"format": 1, "stages": {}, "x": NaN}', '{"format": 1, "stages": {}, "x": 1e999}'),
        *("[" * 100_000, '{"format": 1, "stages": {}, "x": ' + "9" * 5000 + "}"),
        *(_stage(hash=1), _stage(config=[]), _stage(config=None), _stage(inputs=[]), _stage(inputs={"model": 1})),
        *(_stage(outputs=[]), _stage(outputs={"a": 1}), _stage(outputs={"../a": "h"}), _stage(outputs={"/a": None})),
        *(_stage(outputs={"": None}), _stage(versions=[]), _stage(versions={"torch": 2}), _stage(device=1)),
        *(_stage(seconds="1"), _stage(seconds=None), _stage(finished=1), _stage(seed="x")),
    ],
)
def test_a_corrupt_manifest_is_named(run: Run, text: str) -> None:
    (run / MANIFEST).write_text(text)
    with pytest.raises(RunError, match=rf"{run / MANIFEST}: not .*; choose another --run"):
        _do(run)
    run.close()
    with pytest.raises(RunError, match=rf"{run / MANIFEST}: not .*; choose another --run"):
        Run(run.path)
    assert (run / MANIFEST).read_text() == text


def test_a_manifest_of_a_later_version_is_named(run: Run) -> None:
    write_json(run / MANIFEST, {"format": 2, "stages": {}})
    with pytest.raises(RunError, match="of format 2, which this version does not know"):
        run.manifest()


def test_a_manifest_that_is_no_text_is_named(run: Run) -> None:
    (run / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="not valid JSON"):
        run.manifest()


# --- reading artefacts


@dataclass(frozen=True)
class Numbers:
    """A record that stands for any artefact's."""

    a: list[int]


def test_a_missing_artefact_names_the_command_that_makes_it(run: Run) -> None:
    with pytest.raises(RunError, match=r"no verdict\.json here; run `gtqlora verify` first"):
        read_record(Numbers, run.path, "verdict.json", "verify")
    with pytest.raises(RunError, match="no adapter here; run `gtqlora train` first"):
        run.require("adapter", "train")


def test_artefacts_are_read(run: Run) -> None:
    write_json(run / "verdict.json", {"a": [1]})
    assert read_record(Numbers, run.path, "verdict.json", "verify") == Numbers([1])


@pytest.mark.parametrize("text", ["{", "[1]", "null", '"a"', "7", '{"a": 1, "a": 2}', '{"a": Infinity}', "[" * 100_000])
def test_a_spoilt_artefact_names_file_and_verb(run: Run, text: str) -> None:
    (run / "verdict.json").write_text(text)
    with pytest.raises(RunError, match=rf"{run / 'verdict.json'}: not valid JSON .*; run `gtqlora verify` again"):
        read_record(Numbers, run.path, "verdict.json", "verify")


def test_an_artefact_that_is_no_file_is_not_waited_for(run: Run) -> None:
    os.mkfifo(run / "verdict.json")
    with pytest.raises(RunError, match=r"verdict\.json: not a plain file; run `gtqlora verify` again"):
        read_record(Numbers, run.path, "verdict.json", "verify")
