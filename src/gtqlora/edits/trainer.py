"""TRL's DPO trainer, with a learning rate for the gates, the routing anchor, router health and a guard.

Formulas and sources are in docs/method.md. Shape letters: B rows, S sequence, T = B*S tokens, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput
from trl.trainer import dpo_trainer

from gtqlora import routing
from gtqlora.capture import Handler, Mask, Recorder, router_hooks
from gtqlora.config import TrainConfig
from gtqlora.contrasts import ALL_KINDS, DECLINED_KINDS
from gtqlora.edits.captured import CapturedStack
from gtqlora.edits.checkpointing import GuardStop
from gtqlora.edits.collating import longest_of, most_tokens
from gtqlora.edits.figures import figures_of, merge, of_this_rank, told
from gtqlora.edits.gate_rates import rates_by_effect
from gtqlora.edits.hardening import AblationSampler
from gtqlora.edits.head import completions_only
from gtqlora.edits.health import Health
from gtqlora.edits.host_inputs import HostInputs
from gtqlora.edits.lora import in_half_precision
from gtqlora.edits.owned import OwnedAdamW
from gtqlora.edits.packing import PackedStack, seen_at
from gtqlora.edits.recomputing import Recomputation
from gtqlora.edits.reference import FILLER, Batch, ReferenceTrainer
from gtqlora.edits.sums import Sums, Whole, whole_of
from gtqlora.edits.wrapping import Part, adapters_off, gate_weights, is_gate, restore_masters, trainable
from gtqlora.experts.exchange import exchange_of
from gtqlora.experts.sharding import is_sharded
from gtqlora.families import Anatomy
from gtqlora.localize.expert_ablation import RowsAblated
from gtqlora.ranks import all_of, average, ranks

_LOGGED = 3
"""Logged batches over which the guard averages the overlap: one batch may hold few harmful prompts."""
_WORST = "health/overlap_harmful_worst"


@contextmanager
def weights_unhashed() -> Iterator[None]:
    """Keep TRL from hashing every weight, which takes minutes, for a cache file that data in memory never gets."""
    module: Any = dpo_trainer
    kept, module.hash_module = module.hash_module, lambda _module: ""
    try:
        yield
    finally:
        module.hash_module = kept


@contextmanager
def _mode_kept(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode once: the base class does so in every step, for thousands of modules."""
    model.train()
    vars(model)["train"] = lambda mode=True: model
    try:
        yield
    finally:
        del vars(model)["train"]


class GateTargetedTrainer(ReferenceTrainer):
    """DPO with an SFT term (TRL's own) plus a routing anchor, gates in parameter groups of their own.

    Attributes:
        gate_rates: learning rate of each router, by path, where the settings give it by effect.
    """

    model: Any  # a PeftModel; the base class says None may be
    loss_is_scaled_for_ga = True  # each part is divided by the sums of the whole optimizer batch

    def __init__(
        self,
        *,
        anatomy: Anatomy,
        settings: TrainConfig,
        draws: AblationSampler | None = None,
        original: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.anatomy, self.settings, self.draws, self.original = anatomy, settings, draws, original
        self._until_backward, self._until_trained = ExitStack(), ExitStack()
        self.health = Health(anatomy, settings.dead_budget)
        self.gate_rates: dict[str, float] = {}
        packed, on_gpu = PackedStack(kwargs["model"], anatomy), settings.device.startswith("cuda")
        if on_gpu:  # before TRL computes the reference, which must be what the policy computes
            self._until_trained.enter_context(packed.installed())
        if (exchange := exchange_of(kwargs["model"])) is not None:
            self._until_trained.enter_context(exchange.own())
        with weights_unhashed(), completions_only():
            super().__init__(**kwargs)
        restore_masters(self.model)
        in_half_precision(self.model)
        # ablation changes from step to step, which a recorded pass cannot
        self._stack = self._captured_stack(packed) if on_gpu and draws is None else None

    def _captured_stack(self, packed: PackedStack) -> CapturedStack:
        settings, rows = self.settings, self.train_dataset
        each = most_tokens(rows) if self.data_collator.packed else 2 * longest_of(rows)
        tokens = -(-self.args.train_batch_size // ranks().count) * each
        limit, inputs = settings.activation_memory, None
        if is_sharded(self.model) and settings.gradient_checkpointing:  # memory is short
            limit, size = 0.0, tokens * self.anatomy.hidden_size * self.model.dtype.itemsize
            inputs = HostInputs(torch.device("cuda", torch.cuda.current_device()), longest=size)
        return CapturedStack(
            self.model,
            self.anatomy,
            packed,
            Recomputation(self.model, longest=tokens, limit=limit),
            graphs=settings.cuda_graphs,
            averaged=ranks().several and settings.accumulation == 1,
            inputs=inputs,
        )

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Leave the dataset as it is: rows come in tokens, and TRL's own encoding may cut the prompt short."""
        return dataset

    def create_accelerator_and_postprocess(self) -> None:
        """Leave the model unwrapped: gradients of ranks are averaged once a step, and frozen weights differ."""
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with LoRA and gates in groups of their own, each router in one if rates are by effect."""
        if self.optimizer is None:
            lora = [p for name, p in trainable(self.model).items() if not is_gate(name)]
            groups = [{"params": lora, "lr": self.settings.lr_lora}, *self._gate_groups()]
            # where dense weights are split for want of room, Adam's moments are, too
            kind = OwnedAdamW if is_sharded(self.model) else torch.optim.AdamW
            self.optimizer = kind(
                [group for group in groups if group["params"]],
                weight_decay=self.settings.weight_decay,
                fused=self.settings.device.startswith("cuda"),  # one kernel for hundreds of weights
            )
        return self.optimizer

    def _gate_groups(self) -> list[dict[str, Any]]:
        gates = gate_weights(self.model)
        if self.settings.lr_gates is not None:
            return [{"params": list(gates.values()), "lr": self.settings.lr_gates}]
        return [{"params": [gate], "lr": self.gate_rates[path]} for path, gate in gates.items()]

    def measure_gate_rates(self) -> None:
        """Measure the gates' learning rates where they are given by effect, on as many rows as make a step."""
        if self.settings.gate_step is None or not gate_weights(self.model):
            return
        parts = [self.collated(rows) for rows in self.drawn(self.args.train_batch_size * self.settings.accumulation)]
        whole = self._whole_of(parts).sums

        def loss_of(part: Batch) -> Tensor:
            kind_B = part.pop("kind")
            return self._preference_loss(self.model, part, self._sums(part, kind_B, None), whole)

        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        self.model.train()
        self.gate_rates = rates_by_effect(
            *(self.model, self.anatomy, parts, loss_of),
            gate_step=self.settings.gate_step,
            max_grad_norm=self.settings.max_grad_norm,
        )
        self._metrics["train"].clear()  # training has not begun

    def train(self, *arguments: Any, **more: Any) -> TrainOutput:
        """Train; afterwards the model attends as it did before, also over rows that are padded on the left."""
        with self._until_trained, _mode_kept(self.model):
            return super().train(*arguments, **more)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run one part forward and backward; hooks that recomputation needs stay on until the end."""
        with self._until_backward:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._count_part()  # while a GPU is busy with the backward pass
        if self._whole.left == 0 and not (self._stack is not None and self._stack.averages):
            average(p.grad for p in self._trained if p.grad is not None)
        return loss

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        return list(trainable(self.model).values())

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | None:
        # the base class looks through all that is frozen, too
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """Return the parts of one optimizer batch; what divides their losses is known before the first one runs."""
        parts, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._draw_silent(parts)
        if parts:
            self._whole = self._whole_of(parts)
        return parts, items

    def _whole_of(self, parts: list[Batch]) -> Whole:
        given = [(part, part["kind"], part.get("silent")) for part in parts]
        masks = [self._compared(kind_B, silent_B) for _, kind_B, silent_B in given]
        compared = [(int(anchored_B.sum()), int(others_B.sum())) for anchored_B, others_B in masks]
        return whole_of([self._sums(*one) for one in given], compared)

    def _draw_silent(self, parts: list[Batch]) -> None:
        """Mark the rows of each part that run with ablated experts."""
        if self.draws is None:
            return
        counts = all_of([int((part["kind"] != FILLER).sum()) for part in parts])
        silent = iter(self.draws.rows(self.state.global_step, sum(map(sum, counts))))
        for i, part in enumerate(parts):
            shares = [[next(silent) for _ in range(counts[rank][i])] for rank in range(ranks().count)]
            mine = shares[ranks().rank]
            silent_B = torch.tensor([*mine, *[False] * (len(part["kind"]) - len(mine))])
            part["silent"] = silent_B.to(part["kind"].device)

    def _sums(self, inputs: Batch, kind_B: Tensor, silent_B: Tensor | None) -> Sums:
        anchored_B, _ = self._compared(kind_B, silent_B)
        tokens_B = inputs["attention_mask"][: len(kind_B)].sum(-1)  # chosen rows come first, then the rejected ones
        chosen, rows = inputs["completion_mask"][: len(kind_B), 1:].sum(), (kind_B != FILLER).sum()
        return Sums(rows=float(rows), chosen=float(chosen), anchored=float((tokens_B * anchored_B).sum()))

    def _compared(self, kind_B: Tensor, silent_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return which rows are held to the original's routing, and which others are compared with it for figures.

        Rows with ablated experts are left out: behind those, routing is not the original's in any case.
        """
        plain_B = torch.ones_like(kind_B, dtype=torch.bool) if silent_B is None else ~silent_B
        anchored_B = self._weights(kind_B) > 0
        return plain_B & anchored_B, plain_B & ~anchored_B & (kind_B != FILLER)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return DPO's loss with the SFT term, plus the routing anchor."""
        kind_B, silent_B = inputs.pop("kind"), inputs.pop("silent", None)
        part, whole = self._sums(inputs, kind_B, silent_B), self._whole.sums
        both, ablate = Recorder(), self._ablate(silent_B)
        if self._stack is not None:
            self._until_backward.enter_context(self._stack.limited())
        with self._recorded(both, *ablate):
            loss = self._preference_loss(model, inputs, part, whole)
        anchor = self._anchor(both, inputs, kind_B, silent_B) / max(whole.anchored, 1.0)
        self._mine = figures_of(loss, anchor, kind_B != FILLER, inputs["completion_mask"], self._found)
        # gradient checkpointing runs the layers again, and they must route as they did
        self._until_backward.enter_context(router_hooks(self.model, self.anatomy, *ablate))
        return loss + anchor

    def _recorded(self, recorder: Recorder, *ablate: Handler) -> AbstractContextManager[None]:
        """Run the model with its routers' decisions on record; as CUDA graphs where there is a GPU."""
        if self._stack is not None:
            return self._stack.running(recorder)
        return router_hooks(self.model, self.anatomy, recorder, *ablate)

    def _preference_loss(self, model: nn.Module, inputs: Batch, part: Sums, whole: Sums) -> Tensor:
        """Return DPO's loss with the SFT term, of a part of an optimizer batch."""
        # TRL's terms are means over the part, fillers and all, of which each has a loss of log 2 and no gradient
        rows = len(inputs["input_ids"]) // 2
        weights = {"sigmoid": rows / whole.rows, "sft": self.settings.sft_weight * part.chosen / whole.chosen}
        if not part.chosen:  # a mean over nothing is no number
            del weights["sft"]
        self.loss_types, self.loss_weights = list(weights), list(weights.values())
        metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        with completions_only(), of_this_rank(self.accelerator):
            loss: Tensor = super().compute_loss(model, inputs)
        self._found = {name: values[-1] for name, values in self._metrics["train"].items()}
        self._metrics["train"] = metrics
        fillers = rows - part.rows
        return loss - fillers / whole.rows * math.log(2) if fillers else loss

    def _count_part(self) -> None:
        """Add a part's figures, if they are numbers; with the last part the optimizer batch is whole."""
        found = told(self._mine)
        losses, anchors = [one.loss for one in found], [one.anchor for one in found]
        for what, values in (("loss", losses), ("routing anchor", anchors)):
            wrong = [value for value in values if not math.isfinite(value)]
            if wrong:
                raise GuardStop(f"the {what} is {wrong[0]} at step {self.state.global_step + 1}")
        merge(self._metrics["train"], found)
        self._whole.anchor += sum(anchors) / len(anchors)
        self._whole.left -= 1
        if self._whole.left == 0:
            self._metrics["train"]["loss/anchor"].append(self._whole.anchor)
            if self._logging:
                self._record_health()

    @property
    def _logging(self) -> bool:
        """Tell whether the line of this step is written next."""
        return (self.state.global_step + 1) % self.settings.logging_steps == 0

    def _ablate(self, silent_B: Tensor | None) -> tuple[Handler, ...]:
        """Return what ablates experts in this step, in the rows that are drawn for it."""
        if self.draws is None or silent_B is None:
            return ()
        mask = Mask(self.anatomy, self.draws.experts(self.state.global_step))
        return (RowsAblated(mask, silent_B.repeat(2)),)  # chosen, then rejected

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """Count none: of a small model it takes more than the optimizer, for a figure that nobody reads."""
        return 0

    def create_model_card(self, *_: object, **__: object) -> None:
        """Write none: TRL's card would land in the run directory."""

    def _weights(self, kind_B: Tensor) -> Tensor:
        # a user's own refusals are to be kept as the harmful ones are
        table = {"benign": self.settings.anchor_benign, **dict.fromkeys(DECLINED_KINDS, self.settings.anchor_harmful)}
        of_kinds = [table.get(kind, 0.0) for kind in ALL_KINDS]
        return torch.tensor([*of_kinds, 0.0], device=kind_B.device)[kind_B]  # the last one is `FILLER`

    def _anchor(self, both: Recorder, inputs: Batch, kind_B: Tensor, silent_B: Tensor | None) -> Tensor:
        """Weighted divergence of router scores from the original's, summed over prompt and chosen completion.

        The loss has the anchored kinds. On logging steps the other rows are compared too, for the health figures, and
        by themselves: whether a step is logged must not change how the sums of its loss are rounded.
        """
        anchored_B, others_B = self._compared(kind_B, silent_B)
        anchored, others = self._whole.compared[-self._whole.left]
        loss = self._divergence(both, inputs, kind_B, anchored_B, anchored)
        if self._logging:
            with torch.no_grad():
                self._divergence(both, inputs, kind_B, others_B, others)
        return loss

    def _divergence(self, both: Recorder, inputs: Batch, kind_B: Tensor, compared_B: Tensor, together: int) -> Tensor:
        """Of the compared rows; they are counted for the health figures on logging steps."""
        if together == 0:
            return torch.zeros((), device=kind_B.device)
        rows = compared_B.nonzero().squeeze(-1)
        original, edited = self._routing(inputs, rows, together, "lora", "gates"), both.at(seen_at(inputs, rows))
        known = {"lora": edited, "gates": original}  # it takes another pass only where both parts train
        lora = original
        if self._logging:
            lora = known.get(self.settings.mode) or self._routing(inputs, rows, together, "gates")
        if len(rows) == 0:  # other ranks have such rows
            return torch.zeros((), device=kind_B.device)
        mask_BS = inputs["attention_mask"][rows]
        if self._logging:
            with torch.no_grad():
                self.health.add(edited, original, lora, mask_BS, kind_B[rows])
        weight_T = (self._weights(kind_B)[rows, None] * mask_BS).flatten()
        losses = [
            (routing.divergence_T(was.logits_TE, now.logits_TE, self.anatomy.spec, was.bias_E) * weight_T).sum()
            for was, now in ((original.decisions[p], now) for p, now in edited.decisions.items())
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _routing(self, inputs: Batch, rows: Tensor, together: int, *off: Part) -> Recorder:
        """Return the routing of rows without these parts of the edit; as many run on all ranks, whose tokens meet."""
        recorder = Recorder()
        run = torch.cat([rows, rows.new_zeros(together - len(rows))])
        ids_BS, mask_BS = inputs["input_ids"][run], inputs["attention_mask"][run]
        room = nullcontext() if self._stack is None else self._stack.limited(False)
        with room, adapters_off(self.model, *off), router_hooks(self.model, self.anatomy, recorder):
            self.model.get_base_model().model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        mine = torch.arange(len(rows) * ids_BS.shape[1], device=ids_BS.device)
        return recorder if len(run) == len(rows) else recorder.at(mine)

    def _record_health(self) -> None:
        measured = self.health.figures()
        if not measured:  # experts were ablated in every row
            return
        for key, value in measured.items():
            self._metrics["train"][key].append(value)
        limit = self.settings.max_load_cv * max(measured["health/load_cv_original"], 0.1)
        if measured["health/load_cv"] > limit:
            raise GuardStop(
                f"routing collapsed at step {self.state.global_step + 1}: the load's coefficient of variation is "
                f"{measured['health/load_cv']:.2f}, the limit is {limit:.2f}"
            )
        overlap = self._mean_overlap(measured)
        if overlap is not None and overlap < self.settings.min_overlap:
            raise GuardStop(
                f"routing of harmful prompts left the original at step {self.state.global_step + 1}: top-k overlap "
                f"{overlap:.2f} in its worst layer, the limit is {self.settings.min_overlap:.2f}"
            )

    def _mean_overlap(self, measured: Mapping[str, float]) -> float | None:
        """Return the worst layer's overlap on harmful prompts over the last logged batches; None without any."""
        # from the log, which a resumed training has as well
        logged = [found for entry in self.state.log_history if (found := entry.get(_WORST)) is not None]
        seen = [*logged[1 - _LOGGED :], *([measured[_WORST]] if _WORST in measured else [])]
        return sum(seen) / len(seen) if seen else None
