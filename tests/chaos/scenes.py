"""What is killed: commands of toy size, the folder each starts from, and what it comes to if nobody disturbs it.

Every worker has a folder of its own, and every trial starts there from a copy under the same name, since records hold
paths. The model, the pairs and the ledger beside them are part of the copy.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gtqlora import contrasts
from gtqlora.certificate import certify
from gtqlora.cli import app
from gtqlora.config import ExportConfig
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import Job
from gtqlora.run import Run
from gtqlora.stages.export import _WRITERS
from tests import helpers, models, warm
from tests.chaos import forks

STAGING = ".gtqlora-"
_JUDGE = ("--set", f"judge={helpers.JUDGE}")
_TRAIN = {
    **{"rank": 2, "alpha": 4, "steps": 2, "batch_size": 2, "save_steps": 1, "logging_steps": 1, "warmup": 0},
    **{"lr_lora": 1e-2, "lr_gates": 1e-2},
}
_VERIFY = {
    **{"max_new_tokens": 2, "ablation": 0, "margin": 0.05, "batch_size": 128},
    **{"wrapped_prompts": 36, "wrapped_margin": 0.1, "mediation_prompts": 10},
}
_PROJECT = {"max_new_tokens": 2, "max_pairs": 4, "layer": 1}
_DIAGNOSE = {"max_new_tokens": 2, "max_pairs": 4, "bootstrap": 20, "max_candidates": 1, "random_controls": 1}
BASE_GGUF = ("a GGUF of the base",)
"""In the place of a command: it makes `base.gguf`, as a user has one."""
_ONTO = ("--onto", "base.gguf")
EXPORTS: dict[str, tuple[str, ...]] = {
    "export": (),
    "export overlay": ("--overlay",),
    "export link": ("--link",),
    "export peft": ("--to", "peft", "--for", "peft"),
    "export peft vllm": ("--to", "peft", "--for", "vllm"),
    "export gguf": ("--to", "gguf"),
    "export gguf onto": ("--to", "gguf", *_ONTO),
    "export gguf-adapter": ("--to", "gguf-adapter", "--base", "base.gguf"),
}
"""Ways of `export` by the names of their scenes; every format is among them."""
_MOVES = frozenset({"finished", "seconds", "created", "versions", "tries"})
"""Keys of records that differ from one run to the next though nothing is wrong."""


def _set(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Scene:
    """A command and what stands before it.

    Attributes:
        made_by: commands that lead to where it starts.
        result: what it writes, by the name in the trial's folder.
        certified: whether a certified edit lies in the run before, which may not be lost.
    """

    name: str
    command: tuple[str, ...]
    made_by: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]
    certified: bool = False


def scenes() -> list[Scene]:
    source, run = ("model", "--contrast", "pairs.jsonl"), ("--run", "run")
    train = ("train", *source, *run, *_JUDGE, *_set(_TRAIN))
    verify = ("verify", "run", *_JUDGE, *_set(_VERIFY))
    export = ("export", "run", "out", *_JUDGE)
    project = ("project", *source, *run, *_JUDGE, *_set(_PROJECT))
    diagnose = ("diagnose", *source, *run, *_JUDGE, *_set(_DIAGNOSE))
    again = (*train, "--set", "seed=9", "--again")
    edit, judged = ("run/adapter", "run/contrast.parquet"), ("run/verdict.json", "run/scores.parquet")
    return [
        Scene("train", train, (), (*edit, "run/metrics.jsonl")),
        Scene("train over a certified edit", again, (train, verify), (*edit, "run/metrics.jsonl"), certified=True),
        Scene("verify", verify, (train,), judged),
        Scene("verify again", (*verify, "--again"), (train, verify), judged),
        *(_export(name, (*export, *words), (train, verify)) for name, words in EXPORTS.items() if is_here(words)),
        Scene("project over a certified edit", project, (train, verify), edit, certified=True),
        Scene("diagnose", diagnose, (), ("run/diagnosis",)),
        Scene("report", ("report", "run"), (train, verify), ("run/report.html",), certified=True),
    ]


def _export(name: str, command: tuple[str, ...], made_by: tuple[tuple[str, ...], ...]) -> Scene:
    made_by = (*made_by, BASE_GGUF) if "base.gguf" in command else made_by
    return Scene(name, command, made_by, ("out",), certified=True)


def is_here(words: tuple[str, ...]) -> bool:
    """Whether the format of these words of `export` can be written."""
    to = words[1] if words[:1] == ("--to",) else "safetensors"
    return to in _WRITERS and find_spec(f"gtqlora.exports.{_WRITERS[to]}") is not None


@dataclass
class Stage:
    """Where a worker plays: `trial` is the working directory of its commands.

    Attributes:
        before: scene -> the folder it starts from.
        expected: scene -> what its results hold when nothing disturbs it.
        commands: plays commands that nothing disturbs.
    """

    folder: Path
    before: dict[str, Path]
    expected: dict[str, dict[str, str]]
    commands: forks.Child

    @property
    def trial(self) -> Path:
        return self.folder / "trial"

    @classmethod
    def build(cls, folder: Path, wanted: Callable[[Scene], bool] = lambda scene: True) -> Stage:
        """Play every scene once, in this process, so that whatever is imported late is there for the children."""
        warm.quiet()
        stage = cls(folder, {}, {}, forks.Child(app.main, folder / "trial"))
        made: dict[tuple[tuple[str, ...], ...], Path] = {}
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        for scene in filter(wanted, scenes()):
            stage.before[scene.name] = stage._made(scene.made_by, made)
            with stage.set(scene):
                assert in_process(scene.command) == 0, scene
                stage.expected[scene.name] = stage.held(scene)
        gc.collect()
        gc.freeze()  # collections in children must not touch, and so copy, all that was imported
        return stage

    def _made(self, commands: tuple[tuple[str, ...], ...], made: dict[tuple[tuple[str, ...], ...], Path]) -> Path:
        """The folder that these commands lead to."""
        if commands not in made:
            with self._at(self._made(commands[:-1], made) if commands else None):
                if commands:
                    assert in_process(commands[-1]) == 0, commands[-1]
                else:
                    first_folder(self.trial)
                made[commands] = self.folder / f"before-{len(made)}"
                shutil.copytree(self.trial, made[commands])
        return made[commands]

    @contextlib.contextmanager
    def set(self, scene: Scene) -> Iterator[None]:
        """The trial's folder as the scene wants it, as working directory."""
        with self._at(self.before[scene.name]):
            yield

    @contextlib.contextmanager
    def _at(self, before: Path | None) -> Iterator[None]:
        shutil.rmtree(self.trial, ignore_errors=True)
        if before is None:
            self.trial.mkdir(parents=True)
        else:
            shutil.copytree(before, self.trial)
        with contextlib.chdir(self.trial):
            yield

    def held(self, scene: Scene) -> dict[str, str]:
        """What the scene's results hold, by file; what differs from run to run left out."""
        return contents(self.trial, scene.result)


def first_folder(folder: Path) -> None:
    """The toy model and pairs; enough held-out prompts for a floor that passes whatever few tries there are."""
    # llama.cpp's Qwen3-MoE has no dense layers
    models.save_tiny(folder / "model", "qwen3_moe", num_hidden_layers=2, mlp_only_layers=[])
    held_out = {("heldout", "harmful"): 110, ("heldout", "lookalike"): 2, ("heldout", "benign"): 2}
    seen = {(split, kind): 4 for split in ("train", "validation") for kind in contrasts.KINDS}
    helpers.write_rows(folder / "pairs.jsonl", helpers.toy_rows({**seen, **held_out}))


def _base_gguf() -> None:
    with Run("run") as run:
        job = Job.of(certify(run, helpers.JUDGE), ExportConfig(to="gguf"))
    Plan.of(job).write(Path("base.gguf"), None)


def in_process(command: tuple[str, ...]) -> int:
    if command == BASE_GGUF:
        _base_gguf()
        return 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = app.main(list(command))
    if code:
        raise AssertionError(f"{' '.join(command)}: {said.getvalue()}")
    return code


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Hash of every file below these names."""
    found = {}
    for name in names:
        path = folder / name
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            found[file.relative_to(folder).as_posix()] = _content(file)
    return found


def _content(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".json":
        data = json.dumps(_still(json.loads(data)), sort_keys=True).encode()
    elif file.suffix == ".jsonl":
        data = json.dumps([_still(json.loads(line)) for line in data.splitlines()]).encode()
    elif file.suffix in (".html", ".md"):
        return "a page"  # holds times; that it is whole is checked apart
    return hashlib.sha256(data).hexdigest()


def _still(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _still(entry) for key, entry in value.items() if key not in _MOVES and "second" not in key}
    return [_still(entry) for entry in value] if isinstance(value, list) else value
