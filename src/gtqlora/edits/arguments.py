"""What TRL's trainer is told of a training's settings."""

from __future__ import annotations

from pathlib import Path

from trl.trainer.dpo_config import DPOConfig

from gtqlora.config import TrainConfig
from gtqlora.machine import trackers, use_gpu

_RECOMPUTED = {"use_reentrant": False, "preserve_rng_state": False}
"""Nothing in training is random, which is asserted; a state of random numbers cannot be read in a CUDA graph."""


def arguments(config: TrainConfig, output: Path) -> DPOConfig:
    """Return TRL's arguments for a training that writes its checkpoints to `output`."""
    made = DPOConfig(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,  # ranks share each batch, see `KindCollator`
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr_lora,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup * config.steps),
        max_grad_norm=config.max_grad_norm,
        beta=config.beta,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, config.sft_weight],
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=config.batch_size,  # as training runs them: in bf16 another shape rounds otherwise
        router_aux_loss_coef=0.0,  # a load-balance loss itself moves the routing we study
        max_length=None,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs=_RECOMPUTED if config.gradient_checkpointing else None,
        bf16=False,  # the model keeps its own dtype; LoRA and gates stay fp32
        use_cpu=config.device == "cpu",
        dataloader_pin_memory=config.device != "cpu",
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        report_to=trackers(config.report_to) or "none",
        disable_tqdm=True,
        seed=config.seed,
        data_seed=config.seed,
    )
    if config.device.startswith("cuda"):
        # transformers would take GPU 0, and copy the model to all others that it sees
        vars(made)["_setup_devices"], made._n_gpu = use_gpu(config.device), 1
    return made
