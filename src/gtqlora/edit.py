"""The `train` stage: GT-QLoRA on a contrast set, resumable, guarded, its adapter written whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback
from trl.trainer.dpo_config import DPOConfig

from gtqlora import contrasts
from gtqlora.adapters import (
    ADAPTER_WEIGHTS,
    GT_QLORA,
    Info,
    assert_bias_frozen,
    assert_experts_frozen,
    assert_trains_exactly,
    frozen_state,
    lora_config,
    peft_targets_kept,
    read_info,
    save,
)
from gtqlora.capture import Subject, open_subject
from gtqlora.config import TrainConfig
from gtqlora.contrast_statistics import check_rendering
from gtqlora.contrasts import Contrast
from gtqlora.errors import ContrastError, TrainingError
from gtqlora.gate_trainer import GateTargetedTrainer, GuardStop, Journal, KindCollator, assert_finite
from gtqlora.judging import judge_of
from gtqlora.resume import drop_checkpoints, last_checkpoint
from gtqlora.run import Run, fingerprint, whole
from gtqlora.silencing import Draws, rank

ADAPTER, METRICS, CHECKPOINTS = "adapter", "metrics.jsonl", "checkpoints"
RANKED = 200
"""Harmful prompts on which experts are ranked, at most."""


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
            details = read_info(run / ADAPTER).details
            return Trained(run / ADAPTER, details["steps"], details["stopped"])
        drop_checkpoints(run / CHECKPOINTS, keep_hash=None if again else stage.record["hash"])
        return _train(config, run, stage.record["hash"])


def _train(config: TrainConfig, run: Run, stage_hash: str) -> Trained:
    rows = contrasts.load(config.contrast, judge_of(config.judge)).split(config.split)
    subject = open_subject(config.model, dtype=config.dtype, device=config.device, experts=config.experts)
    check_rendering(rows, subject.tokenizer, subject.max_length, subject.vocabulary)
    # An older adapter must not stand beside pairs it was not trained on, even if this training fails.
    shutil.rmtree(run / ADAPTER, ignore_errors=True)
    contrasts.save(rows, run / contrasts.FILE)
    frozen = frozen_state(subject.model)
    trainer = _trainer(config, subject, rows, run, stage_hash)
    steps, stopped = _fit(trainer, run / CHECKPOINTS)
    assert_experts_frozen(trainer.model, frozen)
    details = {"config": asdict(config), "steps": steps, "stopped": stopped}
    with whole(run / ADAPTER) as staged:
        save(trainer.model, staged, Info(GT_QLORA, config.model, subject.anatomy.family.model_type, details))
    return Trained(run / ADAPTER, steps, stopped)


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
        ddp_broadcast_buffers=False,  # nothing trained is a buffer, and frozen experts are most of the model
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
    pad = subject.pad_id
    encoded = [dict(contrasts.encode_preference(subject.tokenizer, row)) for row in rows.rows]
    draws = _draws(config, subject, rows)
    with peft_targets_kept():
        trainer = GateTargetedTrainer(
            anatomy=anatomy,
            settings=config,
            draws=draws,
            model=subject.model,
            args=_arguments(config, run / CHECKPOINTS),
            train_dataset=Dataset.from_list(encoded),
            processing_class=subject.tokenizer,
            data_collator=KindCollator(pad_token_id=pad),
            peft_config=lora_config(anatomy, mode=config.mode, rank=config.rank, alpha=config.alpha),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Journal(run / METRICS, stage_hash, anatomy))
    assert_trains_exactly(trainer.model, anatomy, mode=config.mode, rank=config.rank)
    trainer.assert_exact_reference()
    return trainer


def _draws(config: TrainConfig, subject: Subject, rows: Contrast) -> Draws | None:
    """What "harden" silences; experts are ranked in the model as it is before training."""
    if config.objective == "edit":
        return None
    ranking = rank(subject, rows, prompts=RANKED, batch_size=config.batch_size, seed=config.seed)
    if ranking is None:
        raise ContrastError(
            f"{config.contrast}: split {config.split!r} has no harmful rows with twins or benign rows to compare them "
            'with, so "harden" cannot tell which experts to silence; add some'
        )
    return Draws(subject.anatomy, ranking, share=config.silence_share, seed=config.seed)


def _fit(trainer: GateTargetedTrainer, checkpoints: Path) -> tuple[int, str | None]:
    """Train to the end, from the last checkpoint if there is one; steps done, and why the guard stopped it."""
    found, stopped = last_checkpoint(checkpoints), None
    with peft_targets_kept(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            if found is None or found[0] < trainer.args.max_steps:
                trainer.train(resume_from_checkpoint=str(found[1]) if found else None)
                assert_finite(trainer.model)
                steps = trainer.state.global_step
            else:  # killed between the last step and the adapter; transformers would do one step more
                steps = _restore(trainer, *found)
        except GuardStop as stop:
            stopped, good = str(stop), last_checkpoint(checkpoints)
            if good is None:
                raise TrainingError(f"{stop}; no checkpoint was good yet. Lower the learning rates") from stop
            steps = _restore(trainer, *good)
    assert_bias_frozen(trainer.model, trainer.anatomy)
    trainer.model.eval()
    return steps, stopped


def _restore(trainer: GateTargetedTrainer, step: int, checkpoint: Path) -> int:
    """Put the weights of a checkpoint back; its step."""
    set_peft_model_state_dict(trainer.model, load_file(checkpoint / ADAPTER_WEIGHTS))
    return step
