"""GT-QLoRA: DPO with an exact reference, an SFT term and a routing anchor, on LoRA and whole gates.

Formulas and sources are in docs/method.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from gtqlora import routing
from gtqlora.adapters import is_gate, trainable
from gtqlora.capture import Recorder, routers_tapped
from gtqlora.config import TrainConfig
from gtqlora.families import Anatomy

KINDS = ("benign", "lookalike", "harmful")


class KindCollator(DataCollatorForPreference):
    """TRL's preference batch plus each row's kind."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["kind"] = torch.tensor([KINDS.index(example["kind"]) for example in examples])
        return batch


def anchor_loss(edited_TE: Tensor, original_TE: Tensor, score: str) -> Tensor:
    """KL_T(original || edited) of router scores per token: over experts for softmax, summed over experts for sigmoid.

    Zero when the routing is the original's. Logits in, nats out.
    """
    if score == "softmax":
        return F.kl_div(edited_TE.log_softmax(-1), original_TE.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    p_TE = original_TE.sigmoid()
    cross_TE = F.binary_cross_entropy_with_logits(edited_TE, p_TE, reduction="none")
    entropy_TE = F.binary_cross_entropy_with_logits(original_TE, p_TE, reduction="none")
    return (cross_TE - entropy_TE).sum(-1)


class GateTargetedTrainer(DPOTrainer):
    """TRL's DPO trainer with a parameter group for the gates and the routing anchor."""

    def __init__(self, *, anatomy: Anatomy, settings: TrainConfig, **kwargs: Any) -> None:
        self.anatomy = anatomy
        self.settings = settings
        super().__init__(**kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = trainable(self.model)
            groups = [
                {"params": [p for n, p in named.items() if not is_gate(n)], "lr": self.settings.lr_lora},
                {"params": [p for n, p in named.items() if is_gate(n)], "lr": self.settings.lr_gates},
            ]
            self.optimizer = torch.optim.AdamW(
                [g for g in groups if g["params"]], weight_decay=self.settings.weight_decay
            )
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        kind_B = inputs.pop("kind")
        edited = Recorder()
        with routers_tapped(self.model, self.anatomy, edited):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        edited.armed = False
        anchor = self._anchor(edited, inputs, kind_B)
        self._metrics["train"]["anchor"].append(anchor.item())
        return loss + anchor

    def _anchor(self, edited: Recorder, inputs: dict[str, Any], kind_B: Tensor) -> Tensor:
        s = self.settings
        weight_kind = torch.tensor([s.anchor_benign, 0.0, s.anchor_harmful], device=kind_B.device)
        rows = (weight_kind[kind_B] > 0).nonzero().squeeze(-1)
        if len(rows) == 0:
            return torch.zeros((), device=kind_B.device)
        original = Recorder()
        ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
        with torch.no_grad(), self.model.disable_adapter(), routers_tapped(self.model, self.anatomy, original):
            self.model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
        weight_T = (weight_kind[kind_B[rows]][:, None] * mask).reshape(-1)
        total: Any = 0.0
        batch, length = inputs["input_ids"].shape
        for position, decision in original.decisions.items():
            logits_TE = edited.decisions[position].logits_TE.view(batch, length, -1)[rows].flatten(0, 1)
            loss_T = anchor_loss(logits_TE, decision.logits_TE, self.anatomy.spec.score)
            total = total + (loss_T * weight_T).sum() / mask.sum()
        return total / len(original.decisions)
