"""Kill a command anywhere, look at what is left, run it again, and compare with what nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from safetensors import safe_open

from gtqlora.certificate import certify
from gtqlora.errors import GtqloraError
from gtqlora.exports.provenance import check
from gtqlora.results.adapter import adapter_hash
from gtqlora.run import Run, fingerprint, read_manifest
from tests import helpers
from tests.chaos import forks, scenes
from tests.chaos.forks import Bomb, Ended
from tests.chaos.scenes import Scene, Stage

SIGNALS = (signal.SIGKILL,) * 8 + (signal.SIGTERM, signal.SIGINT)
_SOURCES = ("model", "pairs.jsonl", "base.gguf")
_KINDS = ("change",) * 6 + ("size", "seconds")


@dataclass
class Trial:
    """One kill and what came of it; every list names faults.

    Attributes:
        hit: whether the command was ended before its end.
    """

    scene: str
    bomb: Bomb
    hit: bool = False
    broken: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    staging: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        names = ("broken", "lost", "staging", "tracebacks", "differs")
        return {name: found for name in names if (found := getattr(self, name))}


def bombs(stage: Stage, scene: Scene, draw: random.Random) -> Iterator[Bomb]:
    """Without end: most just before a change, some in the middle of a write, some at a random time."""
    count, seconds = measure(stage, scene)
    order = list(range(1, count + 1))
    while True:
        draw.shuffle(order)
        for change in order:
            number = draw.choice(SIGNALS)
            match draw.choice(_KINDS):
                case "change":
                    yield Bomb(change=change, signal=number)
                case "size":
                    yield Bomb(size=int(2 ** draw.uniform(4, 19)))
                case _:
                    yield Bomb(seconds=draw.uniform(0, seconds), signal=number)


def full_disks(stage: Stage, scene: Scene, draw: random.Random) -> Iterator[Bomb]:
    """Without end: every class of bytes at which no file may grow any more."""
    while True:
        yield Bomb(full=int(2 ** draw.uniform(0, 19)))


def measure(stage: Stage, scene: Scene) -> tuple[int, float]:
    """How many changes the scene makes, and how long it takes."""
    with stage.set(scene):
        whole = forks.command(scene.command, stage.trial)
        assert whole.code == 0, whole.output
        return whole.changes, whole.seconds


def play(stage: Stage, scene: Scene, bomb: Bomb) -> Trial:
    """One trial."""
    trial = Trial(scene.name, bomb)
    with stage.set(scene):
        old = _state(stage.trial)
        ended = forks.command(scene.command, stage.trial, bomb)
        trial.hit = ended.code != 0
        _note_end(trial, ended, bomb)
        trial.broken += unreadable(stage.trial)
        _look_again(trial, stage, scene, old)
    return trial


def _note_end(trial: Trial, ended: Ended, bomb: Bomb) -> None:
    """A kill says nothing; Ctrl-C says that it stopped."""
    if ended.traceback:
        trial.tracebacks.append(f"when killed: {ended.output[-2000:]}")
    expected = {0, -bomb.signal, -signal.SIGXFSZ} | ({130} if bomb.signal == signal.SIGINT else set())
    if ended.code not in (expected if bomb.full is None else {0, 2}):
        trial.broken.append(f"ended with {ended.code}: {ended.last_line}")
    if bomb.full is not None and ended.code and not _names_a_file(ended):
        trial.tracebacks.append(f"not one line that names a file: {ended.output[-2000:]}")


def _names_a_file(ended: Ended) -> bool:
    lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return len(lines) == 1 and bool(re.search(r"/|\brun\b|\bout\b", lines[0]))


def _look_again(trial: Trial, stage: Stage, scene: Scene, old: dict[str, Any]) -> None:
    """Nothing lost, then the same command once more."""
    if scene.certified:
        trial.lost += _lost(stage, scene, old)
    trial.lost += _history_lost(stage.trial, old)
    if scenes.contents(stage.trial, _SOURCES) != old["sources"]:
        trial.lost.append("the model, the pairs or the user's GGUF were changed")
    complete = scene.name in scenes.EXPORTS and (stage.trial / "out").exists()
    again = stage.commands(scene.command)
    if again.traceback:
        trial.tracebacks.append(f"when run again: {again.output[-2000:]}")
    if again.code != 0 and not (complete and "exists already" in again.output):
        trial.broken.append(f"run again it ends with {again.code}: {again.last_line}")
    trial.staging += left_over(stage.trial)
    trial.broken += unreadable(stage.trial)
    now, wanted = stage.held(scene), stage.expected[scene.name]
    trial.differs += sorted(name for name in now.keys() | wanted.keys() if now.get(name) != wanted.get(name))


def _state(trial: Path) -> dict[str, Any]:
    adapter, history = trial / "run" / "adapter", trial / "run" / "verdicts.jsonl"
    ledger = trial / "gtqlora-ledger.jsonl"
    return {
        "adapter": adapter_hash(adapter) if adapter.exists() else None,
        "sources": scenes.contents(trial, _SOURCES),
        "lines": {file: file.read_bytes() for file in (history, ledger) if file.exists()},
    }


def _lost(stage: Stage, scene: Scene, old: dict[str, Any]) -> list[str]:
    """The certified edit is there and may be exported, or another one took its place whole."""
    with _opened(stage.trial / "run") as run:
        adapter = run.path / "adapter"
        if not adapter.exists():
            return ["the certified adapter is gone"]
        now = adapter_hash(adapter)
        if now != old["adapter"]:
            wanted = {k: v for k, v in stage.expected[scene.name].items() if k.startswith("run/adapter/")}
            found = scenes.contents(stage.trial, ("run/adapter",))
            return [] if wanted and found == wanted else ["the adapter is neither the certified nor the new one"]
        try:
            certify(run, helpers.JUDGE)
        except GtqloraError as error:
            return [f"the certified adapter cannot be exported any more: {error}"]
    return []


def _opened(path: Path) -> Run:
    return Run(path)


def _history_lost(trial: Path, old: dict[str, Any]) -> list[str]:
    gone = [file for file, data in old["lines"].items() if not file.exists() or not file.read_bytes().startswith(data)]
    return [f"{file.name}: verdicts are gone" for file in gone]


def left_over(trial: Path) -> list[str]:
    return [p.relative_to(trial).as_posix() for p in trial.rglob("*") if p.name.startswith(".gtqlora-") or _staged(p)]


def _staged(path: Path) -> bool:
    return path.name.endswith(".gtqlora-staging") or path.name.startswith("tmp-checkpoint")


# --- what is whole ---------------------------------------------------------------------------------------------------


def unreadable(trial: Path) -> list[str]:
    """What is there under its own name and is not whole; staging folders hold what they will."""
    found = []
    for path in [trial / "run", *sorted((trial / "run").glob("*")), trial / "out"]:
        hidden = path.name.startswith(".") or path.name == "checkpoints"
        for file in [] if hidden else _files(path):
            if (problem := _problem(file)) is not None:
                found.append(f"{file.relative_to(trial)}: {problem}")
    return found + _unrecorded(trial / "run") + _half_exported(trial / "out") + _bad_checkpoints(trial / "run")


def _files(path: Path) -> list[Path]:
    if path.name == "run":
        return [p for p in path.glob("*") if p.is_file() and not p.name.startswith(".")]
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else []


def _problem(file: Path) -> str | None:
    """Why a file cannot be read."""
    try:
        match file.suffix:
            case ".json":
                json.loads(file.read_bytes())
            case ".parquet":
                pq.read_table(file)
            case ".safetensors":
                with safe_open(file, "pt") as shard:
                    for name in shard.keys():  # noqa: SIM118
                        shard.get_tensor(name)
            case ".html":
                assert file.read_text().rstrip().endswith("</html>"), "cut off"
    except Exception as error:  # whatever a library makes of a broken file
        return f"{type(error).__name__}: {error}"
    return None


def _unrecorded(run: Path) -> list[str]:
    """Outputs that are there and are not what the manifest says, unless a newer stage is at work on them."""
    if not (run / "manifest.json").exists() or (run / ".gtqlora-next").exists():
        return []  # the next command carries out what was decided
    found = []
    for name, record in read_manifest(run)["stages"].items():
        for output, identity in record["outputs"].items():
            kept = name == "train" and output == "adapter" and (run / output).exists()
            if kept and fingerprint(run / output) != identity:
                found.append(f"{output}: not what {name} recorded")
    return found


def _half_exported(out: Path) -> list[str]:
    """An export that has its name is complete: it is what was certified."""
    if not out.exists():
        return []
    if not (out / "export.json").exists():
        return ["out: no export.json"]
    try:
        return [f"out: {problem}" for problem in check(out).problems]
    except GtqloraError as error:
        return [f"out: {error}"]


def _bad_checkpoints(run: Path) -> list[str]:
    """A checkpoint with its mark is one that training goes on from."""
    from gtqlora.edits.checkpoint_files import Unusable, read_checkpoint

    found = []
    for mark in run.glob("checkpoints/checkpoint-*/complete.json"):
        try:
            read_checkpoint(mark.parent)
        except Unusable as error:
            found.append(str(error))
    return found


# --- the campaign ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """What one worker plays: trials number, number + jobs, ... of the campaign."""

    number: int
    jobs: int
    count: int
    seed: int
    only: str | None
    disk: bool
    until: float | None


def campaign(
    count: int, jobs: int, seed: int, only: str | None = None, *, disk: bool = False, until: float | None = None
) -> dict[str, Any]:
    """So many kills, or full disks, over so many workers; a summary with every fault."""
    shares = [Share(number, jobs, count, seed, only, disk, until) for number in range(jobs)]
    if jobs == 1:
        trials = work(shares[0])
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            trials = [trial for part in pool.imap_unordered(work, shares) for trial in part]
    return summary(trials)


def work(share: Share) -> list[Trial]:
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage.build(Path(folder), lambda scene: share.only in (None, scene.name))
        played = [scene for scene in scenes.scenes() if scene.name in stage.before]
        # every worker draws in another order, or all would begin with the same
        draw = full_disks if share.disk else bombs
        drawn = {s.name: draw(stage, s, random.Random(f"{share.seed} {share.number} {s.name}")) for s in played}
        trials = []
        for number in range(share.number, share.count, share.jobs):
            if share.until is not None and time.time() > share.until:
                break
            scene = played[(number // share.jobs + share.number) % len(played)]
            trials.append(_until_hit(stage, scene, drawn[scene.name]))
            _tell(share, len(trials), trials[-1])
        stage.commands.close()
    return trials


def _until_hit(stage: Stage, scene: Scene, drawn: Iterator[Bomb]) -> Trial:
    """A bomb that went off after the end, or on a file that never grew so large, killed nothing: another one."""
    for _ in range(10):
        trial = play(stage, scene, next(drawn))
        if trial.hit or trial.faults:
            break
    return trial


def _tell(share: Share, done: int, trial: Trial) -> None:
    mine = len(range(share.number, share.count, share.jobs))
    line = f"[{share.number}] {done}/{mine} {trial.scene}: {'FAULT ' + str(trial.faults) if trial.faults else 'ok'}"
    if trial.faults or done % 10 == 0:
        sys.stderr.write(f"{line[:600]}\n")


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    failed = [trial for trial in trials if trial.faults]
    return {
        "trials": len(trials),
        "kills": sum(trial.hit for trial in trials),
        "by_scene": dict(Counter(trial.scene for trial in trials if trial.hit)),
        "by_signal": dict(Counter(_way(trial.bomb) for trial in trials if trial.hit)),
        **{
            name: sum(name in trial.faults for trial in trials)
            for name in ("broken", "lost", "staging", "tracebacks", "differs")
        },
        "failures": [
            {"reproduce": reproduction(trial), "bomb": _plain(trial.bomb), **trial.faults} for trial in failed
        ],
    }


def _way(bomb: Bomb) -> str:
    if bomb.full is not None:
        return "full"
    return "in a write" if bomb.size is not None else signal.Signals(bomb.signal).name


def _plain(bomb: Bomb) -> dict[str, Any]:
    return {key: value for key, value in asdict(bomb).items() if value is not None}


def reproduction(trial: Trial) -> str:
    bomb = json.dumps({**_plain(trial.bomb), "signal": int(trial.bomb.signal)})
    return f"python -m tests.chaos kill --scene '{trial.scene}' --bomb '{bomb}'"


def one(scene: str, bomb: str) -> dict[str, Any]:
    """One kill anew."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage.build(Path(folder), lambda known: known.name == scene)
        found = next(known for known in scenes.scenes() if known.name == scene)
        here = os.getcwd()
        try:
            return summary([play(stage, found, Bomb(**json.loads(bomb)))])
        finally:
            stage.commands.close()
            os.chdir(here)
