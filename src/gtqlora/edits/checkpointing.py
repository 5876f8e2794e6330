"""The trainer's side of checkpoints: what it saves and loads again, and the callback that vouches for them.

What lies on disk, and which checkpoint to go on from, is in `checkpoint_files`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.dpo_trainer import DPOTrainer

from gtqlora.edits.adapters import load_edit, save_edit
from gtqlora.edits.checkpoint_files import RANDOM, STATE, Origin, mark_complete, reading
from gtqlora.edits.owned import OwnedAdamW
from gtqlora.edits.wrapping import assert_bias_frozen, trainable
from gtqlora.errors import TrainingError
from gtqlora.families import Anatomy
from gtqlora.progress import report
from gtqlora.ranks import ranks
from gtqlora.results.metrics import read_metrics
from gtqlora.storage.atomic import atomic_write, named_errors, sync


class GuardStop(TrainingError):
    """Training was stopped: a value that is not finite, or routing that collapsed."""


def assert_finite(model: nn.Module) -> None:
    """Check that every trained weight is a number.

    Raises:
        GuardStop: names the first one that is not.
    """
    for name, p in trainable(model).items():
        if not torch.isfinite(p).all():
            raise GuardStop(f"the weights of {name} are no longer finite")


def _check_state(file: Path) -> None:
    """Raises if a checkpoint's trainer state is not of the step and the types that it should be."""
    state = TrainerState.load_from_json(str(file))
    for name, value in vars(TrainerState()).items():
        found = getattr(state, name)
        kind = (int, float) if isinstance(value, int | float) else type(value)
        if value is not None and found is not None and not isinstance(found, kind):
            raise ValueError(f"{file.name}: {name} is {found!r}")
    if file.parent.name != f"checkpoint-{state.global_step}":
        raise ValueError(f"{file.name} is of step {state.global_step}")


class CheckpointedTrainer(DPOTrainer):
    """TRL's DPO trainer whose checkpoints hold the edit, and can be told to be unusable."""

    model: Any  # a PeftModel; the base class says None may be

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A checkpoint holds the edit only, in a form that no other loader opens."""
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_edit(self.model, folder)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        if isinstance(optimizer := getattr(self.optimizer, "optimizer", self.optimizer), OwnedAdamW):
            optimizer.tell_leader()
        if not ranks().leads:
            return
        with named_errors(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the trainer's state and the edit; it is the first that is read of a checkpoint."""
        folder = Path(resume_from_checkpoint)
        with reading(folder):
            _check_state(folder / STATE)  # the base class reads it where its errors cannot be told from others
            load_edit(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def store_flos(self) -> None:
        """Count nothing where there are ranks: to add up their counts all would have to save."""
        if not ranks().several:
            super().store_flos()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if ranks().several:  # nothing that ranks do is random, and one process may go on from here
            os.replace(Path(output_dir) / "rng_state_0.pth", Path(output_dir) / RANDOM)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if ranks().several:
            return
        with reading(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)


class MetricsCallback(TrainerCallback):
    """Progress, `metrics.jsonl`, and a mark on every checkpoint that is whole and good."""

    def __init__(self, metrics: Path, origin: Origin, anatomy: Anatomy, check_held: Callable[[], None]) -> None:
        self.metrics, self.origin, self.anatomy, self.check_held = metrics, origin, anatomy, check_held

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Keep the figures up to the step that training goes on from."""
        kept = [line for line in read_metrics(self.metrics) if line["step"] <= state.global_step]
        with atomic_write(self.metrics) as staged:
            staged.write_text("".join(json.dumps(line) + "\n" for line in kept))
        report("train", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Say how far training is."""
        report("train", state.global_step, state.max_steps)
        self.check_held()  # what is logged and saved after a step must not make a removed run anew

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        """Write a line of figures."""
        if not logs or "loss" not in logs:
            return
        line = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        line.pop("num_tokens", None)  # TRL counts from where this process began, not from where the training did
        self.check_held()
        with named_errors(self.metrics), self.metrics.open("a") as stream:
            stream.write(json.dumps({"step": state.global_step, **line}) + "\n")

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        """Vouch for a checkpoint that is whole and good."""
        assert model is not None
        assert_bias_frozen(model, self.anatomy)
        assert_finite(model)
        if not ranks().leads:
            return
        sync(self.metrics)
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        mark_complete(folder, state.global_step, self.origin, torch.get_num_threads())
