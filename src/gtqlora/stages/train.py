"""The `train` stage: GT-QLoRA on a contrast set, resumable, guarded, its adapter written whole."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from transformers import PrinterCallback

from gtqlora import contrasts
from gtqlora.capture import Subject, open_subject
from gtqlora.config import TrainConfig
from gtqlora.contrasts import Contrast
from gtqlora.contrasts.statistics import check_rendering
from gtqlora.edits.adapters import load_edit, save
from gtqlora.edits.arguments import arguments
from gtqlora.edits.checkpoint_files import (
    Checkpoint,
    Origin,
    Unusable,
    check_origin,
    drop,
    read_checkpoint,
    reading,
    set_aside,
    tidy,
    usable,
)
from gtqlora.edits.checkpointing import GuardStop, MetricsCallback, assert_finite
from gtqlora.edits.collating import KindCollator
from gtqlora.edits.frozen import assert_experts_frozen, frozen_state
from gtqlora.edits.hardening import sampler
from gtqlora.edits.trainer import GateTargetedTrainer
from gtqlora.edits.wrapping import (
    assert_bias_frozen,
    assert_trains_exactly,
    check_trains,
    freeze_rest_of_routers,
    lora_config,
    peft_targets_kept,
)
from gtqlora.errors import ConfigError, RunError, TrainingError
from gtqlora.experts.sharding import is_sharded
from gtqlora.families import load_config
from gtqlora.families.identity import ModelIdentity, identify
from gtqlora.judging.judge import Judge, judge_of
from gtqlora.progress import note
from gtqlora.ranks import by_leader, leader_first, partings, progressing, ranks
from gtqlora.results.adapter import Info, LogitsMoved, Training, info_of, read_info
from gtqlora.results.metrics import LOGITS_BY_GATES, LOGITS_BY_LORA, METRICS, read_metrics
from gtqlora.run import PATHS, Run, fingerprint
from gtqlora.stages.cut_short import enough_memory, goes_on
from gtqlora.stages.plan import check_memory
from gtqlora.storage.atomic import scratch_errors

ADAPTER, CHECKPOINTS = "adapter", "checkpoints"
ASIDE = PATHS | {
    *("logging_steps", "save_steps", "report_to", "dead_budget"),
    *("gradient_checkpointing", "activation_memory", "cuda_graphs"),
}
"""Settings that the edit does not depend on, bit for bit."""
_UNUSED = frozenset({"max_new_tokens"})
"""Settings that only go with the edit, for `verify`."""


@dataclass(frozen=True)
class TrainResult:
    """What training left: the adapter folder, the steps done, and why it stopped early, if it did.

    Attributes:
        moved: how far router logits were from the original's when it was last logged.
        fresh: these settings had left it before, so nothing was trained now.
    """

    adapter: Path
    steps: int
    stopped: str | None
    moved: LogitsMoved | None = None
    fresh: bool = field(default=False, compare=False)


def train(config: TrainConfig, run: Run, *, again: bool = False) -> TrainResult:
    """Edit MODEL by preference pairs; an edit that is there stays until this one is whole.

    Args:
        again: anew, even if nothing changed; checkpoints are dropped.

    Raises:
        ContrastError, ModelError: bad pairs or a bad model.
        RunError: checkpoints of other settings are there.
        TrainingError: an invariant broke, or the guard stopped before any checkpoint was good.
        ConfigError: the program that the edit is for applies nothing of it.
    """
    check_trains(load_config(config.model)[0], config.mode, config.target)
    _check_shared(config)
    judge = judge_of(config.judge)  # a misspelt judge before gigabytes are hashed
    with leader_first():
        model = identify(config.model)
    inputs = {"model": model.digest, "contrast": fingerprint(config.contrast)}
    # another judge may refuse the rows, so they are read again; the edit that follows from them is the same
    judged = {**inputs, "judge": judge.identity}
    with run.stage("train", config, judged, again=again, aside=ASIDE) as stage:
        stage.outputs += [ADAPTER, METRICS, contrasts.FILE]
        if stage.fresh:
            return _trained_before(run / ADAPTER)
        settings = {key: value for key, value in asdict(config).items() if key not in ASIDE | _UNUSED}
        # which of its GPUs a machine takes changes nothing, and ranks take one each
        origin = Origin({**settings, "device": config.device.partition(":")[0]}, inputs)
        if not again:
            check_origin(usable(run / CHECKPOINTS), origin)
        edit = _train(config, model, judge, run, origin, again)
        new = stage.renewed()
        edit.save(new)
        _copy_figures(run / CHECKPOINTS / METRICS, new / METRICS)
        return TrainResult(run / ADAPTER, edit.steps, edit.stopped, edit.moved)


def _check_shared(config: TrainConfig) -> None:
    """Check that ranks can share a batch.

    Raises:
        ConfigError: they cannot, all alike.
    """
    count = ranks().count
    if config.batch_size % count:
        near = max(count, config.batch_size // count * count)
        raise ConfigError(
            f"batch_size = {config.batch_size} cannot be shared by {count} ranks, which run as many rows each; set "
            f"{near} or {near + count}"
        )


def _copy_figures(source: Path, target: Path) -> None:
    """Of the training that made the edit; none if somebody removed them before it was whole."""
    if source.exists():
        shutil.copyfile(source, target)
    else:
        target.touch()


def _trained_before(adapter: Path) -> TrainResult:
    made = read_info(adapter).details
    if not isinstance(made, Training) or made.steps is None:
        raise RunError(f"{adapter}: its steps are not on record; run `gtqlora train --again`")
    return TrainResult(adapter, made.steps, made.stopped, made.moved, fresh=True)


@dataclass(frozen=True)
class _Edit:
    """A trained model, not yet written."""

    trainer: GateTargetedTrainer
    rows: Contrast
    info: Info
    steps: int
    stopped: str | None
    moved: LogitsMoved | None

    def save(self, folder: Path) -> None:
        save(self.trainer.model, folder / ADAPTER, self.info)
        contrasts.save(self.rows, folder / contrasts.FILE)


def _train(config: TrainConfig, model: ModelIdentity, judge: Judge, run: Run, origin: Origin, again: bool) -> _Edit:
    """Train from the newest checkpoint that can be loaded; one that cannot gives way to the one before."""
    rows = contrasts.load(config.contrast, judge).split(config.split)
    contrasts.check_kinds(rows.rows, f"{config.contrast}, split {config.split!r}")
    check_memory(config, rows)
    while True:
        try:
            with partings(lambda: goes_on(run.home / CHECKPOINTS)), progressing():
                return _attempt(config, model, rows, run, origin, again)
        except Unusable as bad:  # parts of it may be in the model already
            set_aside(bad)
            again = False
        gc.collect()


def _attempt(config: TrainConfig, model: ModelIdentity, rows: Contrast, run: Run, origin: Origin, again: bool) -> _Edit:
    enough = partial(enough_memory, config, run.home / CHECKPOINTS)
    with enough(lambda: "while the model was loaded"):
        subject = open_subject(replace(config, model=model.model))
    model.check_unchanged()
    if config.activation_memory and config.gradient_checkpointing and is_sharded(subject.model):
        note("activation_memory is not used: dense weights are split, so that every layer is computed again")
    # Before anything is trained: one long row would run out of memory in the middle of it.
    limit = min(subject.max_length, config.max_length or subject.max_length)
    check_rendering(rows, subject.tokenizer, limit, subject.vocabulary)
    frozen = frozen_state(subject.model)
    with enough(lambda: "while the reference was computed"):
        trainer = _trainer(config, subject, rows, run, origin)
    if again:
        drop(run / CHECKPOINTS, METRICS)
    tidy(run / CHECKPOINTS)
    with enough(lambda: f"in step {trainer.state.global_step + 1}"):
        steps, stopped = _fit(trainer, run / CHECKPOINTS)
    assert_experts_frozen(trainer.model, frozen)
    moved = _moved(run / CHECKPOINTS / METRICS, steps)
    made = Training(asdict(config), steps, stopped, trainer.gate_rates, trainer.reference, moved)
    info = info_of(model.model, subject.anatomy.family.model_type, made)
    return _Edit(trainer, rows, info, steps, stopped, moved)


def _moved(metrics: Path, steps: int) -> LogitsMoved | None:
    """Return how far router logits had moved when it was last logged, up to a step."""
    logged = [line for line in read_metrics(metrics) if line["step"] <= steps and LOGITS_BY_GATES in line]
    return LogitsMoved(gates=logged[-1][LOGITS_BY_GATES], lora=logged[-1][LOGITS_BY_LORA]) if logged else None


def _trainer(config: TrainConfig, subject: Subject, rows: Contrast, run: Run, origin: Origin) -> GateTargetedTrainer:
    os.environ.setdefault("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()
    anatomy = subject.anatomy
    pad = subject.pad_id
    encoded = [dict(contrasts.encode_preference(subject.tokenizer, row)) for row in rows.rows]
    draws, on_gpu = sampler(config, subject, rows), config.device.startswith("cuda")
    with peft_targets_kept(), scratch_errors():  # datasets are mapped on the disk
        trainer = GateTargetedTrainer(
            anatomy=anatomy,
            settings=config,
            draws=draws,
            original=origin.inputs.get("model"),
            model=subject.model,
            args=arguments(config, run / CHECKPOINTS),
            train_dataset=Dataset.from_list(encoded),
            processing_class=subject.tokenizer,
            data_collator=KindCollator(
                pad_token_id=pad,
                few_shapes=on_gpu,
                # rows with ablated experts are told apart by their places
                packed=on_gpu and draws is None and anatomy.family.only_attends,
                share=(ranks().rank, ranks().count),
            ),
            peft_config=lora_config(
                anatomy, mode=config.mode, rank=config.rank, alpha=config.alpha, target=config.target
            ),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MetricsCallback(run / CHECKPOINTS / METRICS, origin, anatomy, run.check_held))
    freeze_rest_of_routers(trainer.model, anatomy)
    assert_trains_exactly(trainer.model, anatomy, mode=config.mode, rank=config.rank, target=config.target)
    trainer.assert_exact_reference()
    trainer.measure_gate_rates()
    return trainer


def _fit(trainer: GateTargetedTrainer, checkpoints: Path) -> tuple[int, str | None]:
    """Train to the end, from the last checkpoint if there is one; steps done, and why the guard stopped it.

    Raises:
        Unusable: that checkpoint cannot be loaded.
    """
    last, stopped = next(iter(usable(checkpoints)), None), None
    with peft_targets_kept(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            if last is None or last.step < trainer.args.max_steps:
                _say_threads(last)
                trainer.train(resume_from_checkpoint=str(last.folder) if last else None)
                assert_finite(trainer.model)
                steps = trainer.state.global_step
            else:  # killed between the last step and the adapter; transformers would do one step more
                steps = _restore(trainer, last)
        except GuardStop as stop:
            stopped, good = str(stop), _newest(checkpoints)
            if good is None:
                raise TrainingError(f"{stop}; no checkpoint was good yet. {_slower(trainer.settings)}") from stop
            steps = _restore(trainer, good)
    assert_bias_frozen(trainer.model, trainer.anatomy)
    trainer.model.eval()
    return steps, stopped


def _newest(checkpoints: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, which the leader of several ranks wrote."""
    found = next(iter(usable(checkpoints)), None)
    there = by_leader(lambda: str(found.folder) if found else None)
    return None if there is None else read_checkpoint(Path(there))


def _slower(settings: TrainConfig) -> str:
    """Say which settings hold the routing closer to the original's."""
    gates = "lr_gates" if settings.gate_step is None else "gate_step"
    names = {"lora": ["lr_lora"], "gates": [gates]}.get(settings.mode, [gates, "lr_lora"])
    given = [f"{name} ({getattr(settings, name):g})" for name in names]
    return f"Lower {' or '.join(given)}, or raise anchor_harmful ({settings.anchor_harmful:g})"


def _say_threads(last: Checkpoint | None) -> None:
    now = torch.get_num_threads()
    if last is not None and last.threads != now:
        note(
            f"{last.folder}: computed on {last.threads} threads, and now there are {now}, which round otherwise: the "
            "weights will not be bit for bit those of an uninterrupted training"
        )


def _restore(trainer: GateTargetedTrainer, checkpoint: Checkpoint) -> int:
    """Put the weights of a checkpoint back; its step."""
    with reading(checkpoint.folder):
        load_edit(trainer.model, checkpoint.folder)
    return checkpoint.step
