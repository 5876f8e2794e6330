"""Good files that spoilt ones are made from, and what comes of them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests import helpers, models, warm
from tests.chaos import scenes

JUDGE = ("--set", f"judge={helpers.JUDGE}")
_QUICK = tuple(word for key in ("steps=1", "batch_size=4", "rank=2", "alpha=4") for word in ("--set", key))
TRAIN = ("train", "model", "--contrast", "few.jsonl", "--run", "fresh", *JUDGE, *_QUICK)
TRAIN_SHARDED = ("train", "sharded", *TRAIN[2:])
CHECK = ("contrast", "check", "few.jsonl", "--judge", helpers.JUDGE, "--model", "model")


@dataclass
class World:
    """Good files to start from, and what comes of them."""

    folder: Path
    exported: dict[str, str]
    adapter: dict[str, str]
    verdict: dict[str, Any]

    @property
    def good(self) -> Path:
        return self.folder / "good"

    @property
    def trial(self) -> Path:
        return self.folder / "trial"

    @classmethod
    def build(cls, folder: Path) -> World:
        """A model, a sharded one, pairs in both forms, a certified run; every verb is played once in this process."""
        warm.quiet()
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        world, good = cls(folder, {}, {}, {}), folder / "trial"
        good.mkdir(parents=True)
        scenes.first_folder(good)
        models.save_tiny(good / "sharded", "qwen3_moe", num_hidden_layers=2, max_shard_size="20KB")
        (good / "sharded" / "model.safetensors.index.json").stat()
        rows = [json.loads(line) for line in (good / "pairs.jsonl").read_text().splitlines()]
        helpers.write_rows(good / "few.jsonl", [row for row in rows if row["split"] == "train"])
        pq.write_table(pa.Table.from_pylist([_flat(row) for row in rows]), good / "pairs.parquet")
        with contextlib.chdir(good):
            world._play()
        return world

    def _play(self) -> None:
        steps = {scene.name: scene.command for scene in scenes.scenes()}
        for command in (
            *(steps["train"], steps["verify"], steps["export"], ("report", "run"), ("inspect", "model", "--json")),
            *(("contrast", "check", "pairs.parquet", "--model", "model", "--judge", helpers.JUDGE), TRAIN_SHARDED),
        ):
            scenes.in_process(command)
        self.exported = scenes.contents(self.trial, ("out",))
        self.adapter = scenes.contents(self.trial, ("run/adapter/edit.safetensors",))
        self.verdict = json.loads(Path("run/verdict.json").read_text())
        for name in ("out", "fresh"):
            shutil.rmtree(name)
        shutil.copytree(self.trial, self.good)

    @contextlib.contextmanager
    def laid_out(self) -> Iterator[None]:
        """The good files as working directory, to be spoilt."""
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(self.good, self.trial)
        with contextlib.chdir(self.trial):
            yield


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()}
