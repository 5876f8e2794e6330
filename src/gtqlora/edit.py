"""The `train` stage: GT-QLoRA on a contrast set, resumable, guarded, its adapter written whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig

from gtqlora import contrasts
from gtqlora.adapters import (
    GT_QLORA,
    Info,
    assert_bias_frozen,
    assert_trains_exactly,
    lora_config,
    peft_targets_kept,
    save,
)
from gtqlora.capture import Subject, open_subject
from gtqlora.config import TrainConfig
from gtqlora.contrasts import Contrast
from gtqlora.errors import TrainingError
from gtqlora.gate_trainer import COMPLETE, GateTargetedTrainer, GuardStop, Journal, KindCollator
from gtqlora.judging import judge_of
from gtqlora.run import Run, fingerprint, whole

ADAPTER, METRICS, CHECKPOINTS = "adapter", "metrics.jsonl", "checkpoints"


@dataclass(frozen=True)
class Trained:
    """What training left: the adapter folder, the steps done, and why it stopped early, if it did."""

    adapter: Path
    steps: int
    stopped: str | None


def train(config: TrainConfig, run: Run, *, again: bool = False) -> Trained:
    """Edit MODEL by preference pairs.

    Raises:
        ContrastError, ModelError: bad pairs or a bad model.
        TrainingError: an invariant broke, or the guard stopped before any checkpoint was good.
    """
    inputs = {"model": fingerprint(config.model), "contrast": fingerprint(config.contrast)}
    with run.stage("train", config, inputs, device=config.device, again=again) as stage:
        stage.outputs += [ADAPTER, METRICS, contrasts.FILE]
        if stage.fresh:
            return _read(run)
        contrast = contrasts.load(config.contrast, judge_of(config.judge))
        rows = contrast.split(config.split)
        subject = open_subject(config.model, dtype=config.dtype, device=config.device)
        contrasts.statistics(rows, subject.tokenizer, subject.max_length)
        contrasts.save(rows, run / contrasts.FILE)
        _drop_checkpoints(run / CHECKPOINTS, None if again else stage.record["hash"])
        trainer = _trainer(config, subject, rows, run, stage.record["hash"])
        stopped = _fit(trainer, run / CHECKPOINTS)
        steps = trainer.state.global_step if stopped is None else _last_good(run / CHECKPOINTS)[0]
        details = {"config": asdict(config), "steps": steps, "stopped": stopped}
        info = Info(GT_QLORA, config.model, subject.anatomy.family.model_type, details)
        with whole(run / ADAPTER) as staged:
            save(trainer.model, staged, info)
        return Trained(run / ADAPTER, steps, stopped)


def _read(run: Run) -> Trained:
    details = json.loads((run / ADAPTER / "gtqlora.json").read_text())["details"]
    return Trained(run / ADAPTER, details["steps"], details["stopped"])


def _arguments(config: TrainConfig, output: Path) -> DPOConfig:
    return DPOConfig(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr_lora,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        max_grad_norm=config.max_grad_norm,
        beta=config.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, config.sft_weight],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=4 * config.batch_size,
        router_aux_loss_coef=0.0,  # a load-balance loss itself moves the routing we study
        max_length=None,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=False,  # the model keeps its own dtype; LoRA and gates stay fp32
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=config.device != "cpu",
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        report_to=config.report_to,
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
    )


def _trainer(config: TrainConfig, subject: Subject, rows: Contrast, run: Run, stage_hash: str) -> GateTargetedTrainer:
    os.environ.setdefault("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()
    anatomy = subject.anatomy
    with peft_targets_kept():
        trainer = GateTargetedTrainer(
            anatomy=anatomy,
            settings=config,
            model=subject.model,
            args=_arguments(config, run / CHECKPOINTS),
            train_dataset=Dataset.from_list(rows.to_preference()),
            processing_class=subject.tokenizer,
            data_collator=KindCollator(pad_token_id=subject.tokenizer.pad_token_id),
            peft_config=lora_config(anatomy, mode=config.mode, rank=config.rank, alpha=config.alpha),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Journal(run / METRICS, stage_hash, anatomy))
    assert_trains_exactly(trainer.model, anatomy, mode=config.mode, rank=config.rank)
    trainer.assert_exact_reference()
    return trainer


def _fit(trainer: GateTargetedTrainer, checkpoints: Path) -> str | None:
    """Train to the end, from the last good checkpoint if there is one; the reason if the guard stopped it."""
    good = _last_good(checkpoints, missing_ok=True)[1]
    with peft_targets_kept(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            trainer.train(resume_from_checkpoint=str(good) if good else None)
        except GuardStop as stop:
            _restore(trainer, checkpoints, stop)
            return str(stop)
    assert_bias_frozen(trainer.model, trainer.anatomy)
    trainer.model.eval()
    return None


def _restore(trainer: GateTargetedTrainer, checkpoints: Path, stop: GuardStop) -> None:
    step, folder = _last_good(checkpoints, missing_ok=True)
    if folder is None:
        raise TrainingError(f"{stop}; no checkpoint was good yet, so no adapter was written. Lower the learning rates")
    from peft import set_peft_model_state_dict

    with peft_targets_kept():
        set_peft_model_state_dict(trainer.model, load_file(folder / "adapter_model.safetensors"))
    trainer.model.eval()


def _marked(checkpoints: Path) -> list[tuple[int, Path, str]]:
    """(step, folder, stage hash) of every checkpoint that was written whole."""
    found = []
    for mark in checkpoints.glob(f"checkpoint-*/{COMPLETE}"):
        content: dict[str, Any] = json.loads(mark.read_text())
        found.append((content["step"], mark.parent, content["hash"]))
    return sorted(found)


def _last_good(checkpoints: Path, *, missing_ok: bool = False) -> tuple[int, Path | None]:
    found = _marked(checkpoints)
    if not found and not missing_ok:
        raise TrainingError(f"{checkpoints}: no complete checkpoint")
    return (found[-1][0], found[-1][1]) if found else (0, None)


def _drop_checkpoints(checkpoints: Path, keep_hash: str | None) -> None:
    """Half-written checkpoints and those of other settings or inputs are of no use."""
    keep = {folder for _, folder, stage_hash in _marked(checkpoints) if stage_hash == keep_hash}
    for folder in checkpoints.glob("checkpoint-*"):
        if folder not in keep:
            shutil.rmtree(folder)
