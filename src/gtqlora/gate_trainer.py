"""TRL's DPO trainer, with a learning rate for the gates, the routing anchor, router health and a guard.

Formulas and sources are in docs/method.md. Shape letters: B rows, S sequence, T = B*S tokens, E experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from gtqlora import routing
from gtqlora.adapters import adapters_off, assert_bias_frozen, is_gate, routers_of, save_trained, trainable
from gtqlora.capture import Handler, Mask, Recorder, routers_tapped
from gtqlora.config import TrainConfig
from gtqlora.contrasts import KINDS
from gtqlora.errors import TrainingError
from gtqlora.families import Anatomy
from gtqlora.progress import report
from gtqlora.resume import mark_complete
from gtqlora.run import whole
from gtqlora.silencing import Draws, RowsMasked


class GuardStop(TrainingError):
    """Training was stopped: a value that is not finite, or routing that collapsed."""


def assert_finite(model: nn.Module) -> None:
    """Every trained weight is a number.

    Raises:
        GuardStop: names the first one that is not.
    """
    for name, p in trainable(model).items():
        if not torch.isfinite(p).all():
            raise GuardStop(f"the weights of {name} are no longer finite")


class KindCollator(DataCollatorForPreference):
    """TRL's preference batch plus each row's kind, as an index into `KINDS`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["kind"] = torch.tensor([KINDS.index(example["kind"]) for example in examples])
        return batch


class Health:
    """Router health of one batch against the original model; counts of experts run over the whole training."""

    def __init__(self, anatomy: Anatomy, dead_budget: int) -> None:
        self.spec, self.dead_budget = anatomy.spec, dead_budget
        self.used_LE = torch.zeros(len(anatomy.moe), anatomy.spec.n_experts)
        self.tokens = 0

    def measure(self, edited: Recorder, original: Recorder, mask_BS: Tensor, kind_B: Tensor) -> dict[str, float]:
        """Means over MoE layers; both recorders saw the same tokens, `mask_BS` says which are real."""
        real_T, kind_T = mask_BS.flatten() > 0, kind_B[:, None].expand(mask_BS.shape).flatten()
        layers: list[dict[str, float]] = []
        for position, ours in edited.decisions.items():
            theirs = original.decisions[position]
            counts_E = self._counts(ours.indices_TK[real_T])
            self.used_LE[position] += counts_E.cpu()
            now, then = routing.load(counts_E), routing.load(self._counts(theirs.indices_TK[real_T]))
            found = {"load_cv": now.cv, "load_cv_original": then.cv}
            found |= {"max_vio": now.max_vio, "load_entropy": now.entropy}
            same_T = routing.overlap_T(ours.indices_TK, theirs.indices_TK)
            kl_T = routing.divergence_T(theirs.logits_TE, ours.logits_TE, self.spec)
            for index, kind in enumerate(KINDS):
                chosen_T = real_T & (kind_T == index)
                if bool(chosen_T.any()):
                    found[f"overlap_{kind}"] = float(same_T[chosen_T].mean())
                    found[f"kl_{kind}"] = float(kl_T[chosen_T].mean())
            layers.append(found)
        self.tokens += int(real_T.sum())
        means = {f"health/{key}": sum(layer[key] for layer in layers) / len(layers) for key in layers[0]}
        if self.tokens >= self.dead_budget:
            means["health/dead_experts"] = float((self.used_LE == 0).sum())
        return means

    def _counts(self, indices_TK: Tensor) -> Tensor:
        return torch.bincount(indices_TK.flatten(), minlength=self.spec.n_experts).float()


@contextmanager
def weights_unhashed() -> Iterator[None]:
    """Keep TRL from hashing every weight, which takes minutes, for a cache file that data in memory never gets."""
    module: Any = dpo_trainer
    kept, module.hash_module = module.hash_module, lambda _module: ""
    try:
        yield
    finally:
        module.hash_module = kept


@torch.no_grad()
def _restore_masters(model: PeftModel) -> None:
    """fp32 again for what trains: TRL casts it to bf16 when bitsandbytes holds the dense weights in 4 bits."""
    for p in trainable(model).values():
        p.data = p.data.float()
    for wrapper in routers_of(model).values():
        gate: Any = wrapper.modules_to_save["default"]
        gate.weight.copy_(wrapper.original_module.weight)


class GateTargetedTrainer(DPOTrainer):
    """DPO with an SFT term (TRL's own) plus a routing anchor, gates in a parameter group of their own."""

    model: Any  # a PeftModel; the base class says None may be

    def __init__(self, *, anatomy: Anatomy, settings: TrainConfig, draws: Draws | None = None, **kwargs: Any) -> None:
        self.anatomy, self.settings, self.draws = anatomy, settings, draws
        self._until_backward = ExitStack()
        self.health = Health(anatomy, settings.dead_budget)
        with weights_unhashed():
            super().__init__(**kwargs)
        _restore_masters(self.model)

    def _prepare_dataset(self, dataset: Any, *_args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Nothing: rows come in tokens, with the prompt that is evaluated, which TRL's own encoding may cut short."""
        return dataset

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = trainable(self.model)
            lora = {"params": [p for n, p in named.items() if not is_gate(n)], "lr": self.settings.lr_lora}
            gates = {"params": [p for n, p in named.items() if is_gate(n)], "lr": self.settings.lr_gates}
            self.optimizer = torch.optim.AdamW(
                [group for group in (lora, gates) if group["params"]], weight_decay=self.settings.weight_decay
            )
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._until_backward:
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kind_B = inputs.pop("kind")
        both, (silence, plain_B) = Recorder(), self._silence(kind_B)
        with routers_tapped(self.model, self.anatomy, both, *silence):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._check_finite("loss", loss)
        anchor = self._anchor(both, inputs, kind_B, plain_B)
        self._check_finite("routing anchor", anchor)
        self._metrics["train"]["loss/anchor"].append(anchor.item())
        # gradient checkpointing runs the layers again, and they must route as they did
        self._until_backward.enter_context(routers_tapped(self.model, self.anatomy, *silence))
        return loss + anchor

    def _silence(self, kind_B: Tensor) -> tuple[tuple[Handler, ...], Tensor | None]:
        """What silences experts in this step, and plain_B: the rows that run as they are (None: all of them)."""
        if self.draws is None:
            return (), None
        step = self.state.global_step
        silent_B = torch.tensor(self.draws.rows(step, len(kind_B)), device=kind_B.device)
        mask = Mask(self.anatomy, self.draws.experts(step))
        return (RowsMasked(mask, silent_B.repeat(2)),), ~silent_B  # chosen, then rejected

    def _check_finite(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise GuardStop(f"the {what} is {value.item()} at step {self.state.global_step + 1}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A checkpoint holds the adapter only."""
        save_trained(self.model, output_dir or str(self.args.output_dir))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's card would land in the run directory."""

    def _weights(self, kind_B: Tensor) -> Tensor:
        table = {"benign": self.settings.anchor_benign, "harmful": self.settings.anchor_harmful}
        return torch.tensor([table.get(kind, 0.0) for kind in KINDS], device=kind_B.device)[kind_B]

    def _anchor(self, both: Recorder, inputs: dict[str, Any], kind_B: Tensor, plain_B: Tensor | None = None) -> Tensor:
        """Weighted divergence of router scores from the original's, over prompt and chosen completion.

        On logging steps every row is compared, for the health figures; the loss only has the anchored kinds. Rows with
        silenced experts (not in plain_B) are left out: behind those, routing is not the original's in any case.
        """
        weight_B = self._weights(kind_B)
        logging = (self.state.global_step + 1) % self.settings.logging_steps == 0  # this step's line is written next
        compared_B = torch.ones_like(kind_B, dtype=torch.bool) if logging else weight_B > 0
        rows = (compared_B if plain_B is None else compared_B & plain_B).nonzero().squeeze(-1)
        if len(rows) == 0:
            return torch.zeros((), device=kind_B.device)
        ids_BS, mask_BS = inputs["input_ids"][rows], inputs["attention_mask"][rows]
        original = self._original_routing(ids_BS, mask_BS)
        edited = both.rows(rows, len(inputs["input_ids"]))
        if logging:
            self._record_health(edited, original, mask_BS, kind_B[rows])
        weight_T = (weight_B[rows, None] * mask_BS).flatten()
        losses = [
            (routing.divergence_T(original.decisions[p].logits_TE, d.logits_TE, self.anatomy.spec) * weight_T).sum()
            for p, d in edited.decisions.items()
        ]
        anchored_tokens = (mask_BS.sum(-1) * (weight_B[rows] > 0)).sum().clamp(min=1)
        return torch.stack(losses).mean() / anchored_tokens

    @torch.no_grad()
    def _original_routing(self, ids_BS: Tensor, mask_BS: Tensor) -> Recorder:
        recorder = Recorder()
        with adapters_off(self.model), routers_tapped(self.model, self.anatomy, recorder):
            self.model.get_base_model().model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        return recorder

    @torch.no_grad()
    def _record_health(self, edited: Recorder, original: Recorder, mask_BS: Tensor, kind_B: Tensor) -> None:
        measured = self.health.measure(edited, original, mask_BS, kind_B)
        for key, value in measured.items():
            self._metrics["train"][key].append(value)
        limit = self.settings.max_load_cv * max(measured["health/load_cv_original"], 0.1)
        if measured["health/load_cv"] > limit:
            raise GuardStop(
                f"routing collapsed at step {self.state.global_step + 1}: the load's coefficient of variation is "
                f"{measured['health/load_cv']:.2f}, the limit is {limit:.2f}"
            )
        overlap = measured.get("health/overlap_harmful", 1.0)
        if overlap < self.settings.min_overlap:
            raise GuardStop(
                f"routing of harmful prompts left the original at step {self.state.global_step + 1}: "
                f"top-k overlap {overlap:.2f}, the limit is {self.settings.min_overlap:.2f}"
            )

    @torch.no_grad()
    def assert_exact_reference(self) -> None:
        """Before the first step policy and reference agree: the margin is 0, and the stored log-probs are these.

        Raises:
            TrainingError: they do not, so the reference is not the model that training starts from.
        """
        rows = [self.train_dataset[i] for i in range(min(len(self.train_dataset), self.args.train_batch_size))]
        batch = {k: v.to(self.accelerator.device) for k, v in self.data_collator(rows).items() if k != "kind"}
        reference = torch.cat(self.compute_ref_log_probs(self.model, dict(batch)))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        policy = self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=labels,
            use_cache=False,
            fused_lm_head=True,
        ).log_probs.sum(dim=1)
        margin = float((policy - reference).abs().max())
        if margin != 0.0:
            raise TrainingError(f"step-0 margin is {margin:.3g}, not 0: the reference is not the starting model")
        stored = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).to(reference)
        # another batch composition pads differently, which changes the last bits of a sum
        loose = 1e-4 if self.model.dtype == torch.float32 else 2e-2
        if not torch.allclose(stored, reference, rtol=loose, atol=loose * 10):
            raise TrainingError("the precomputed reference log-probs are not those of the starting model")


class Journal(TrainerCallback):
    """Progress, `metrics.jsonl`, and a mark on every checkpoint that is whole and good."""

    def __init__(self, metrics: Path, stage_hash: str, anatomy: Anatomy) -> None:
        self.metrics, self.stage_hash, self.anatomy = metrics, stage_hash, anatomy

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kept = [line for line in read_metrics(self.metrics) if line["step"] <= state.global_step]
        with whole(self.metrics) as staged:
            staged.write_text("".join(json.dumps(line) + "\n" for line in kept))
        report("train", state.global_step, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        report("train", state.global_step, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        line = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        with self.metrics.open("a") as stream:
            stream.write(json.dumps({"step": state.global_step, **line}) + "\n")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        assert_bias_frozen(model, self.anatomy)
        assert_finite(model)
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        mark_complete(folder, state.global_step, self.stage_hash)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line cut by a kill is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
