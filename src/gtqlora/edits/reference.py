"""The trainer's side of the reference: that it is the model that training starts from, and how exactly it is stored.

Shape letters: B rows, S sequence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl.trainer import dpo_trainer

from gtqlora.config import TrainConfig
from gtqlora.contrasts import ALL_KINDS
from gtqlora.edits.checkpointing import CheckpointedTrainer
from gtqlora.edits.head import completions_only
from gtqlora.edits.wrapping import adapters_off
from gtqlora.errors import TrainingError
from gtqlora.progress import track
from gtqlora.ranks import all_of
from gtqlora.results.adapter import Deviation
from gtqlora.storage.contents import sha256_json

Row = dict[str, Any]
Batch = dict[str, Tensor]
"""Rows in tokens with their masks, kinds and reference log-probabilities; chosen rows first, then the rejected ones."""

FILLER = len(ALL_KINDS)
"""The kind of a row that only fills up a rank's share of a batch: it has no completion, and changes no loss."""

_NO_INPUTS = ("kind", "completion_mask", "ref_chosen_logps", "ref_rejected_logps")
"""What of a batch is not for the model."""


_LAST: dict[str, Dataset] = {}
"""The last reference that was computed: edits of one model are often made one after another."""


@contextmanager
def _quickly_switched() -> Iterator[None]:
    """Let TRL take the edit out of the way as `Switched` does, which says what PEFT's own way costs."""
    module: Any = dpo_trainer
    kept, module.use_adapter = module.use_adapter, lambda model, adapter_name: adapters_off(model, "lora", "gates")
    try:
        yield
    finally:
        module.use_adapter = kept


class ReferenceTrainer(CheckpointedTrainer):
    """TRL's DPO trainer that knows how far its stored reference is from the model that training starts from.

    Attributes:
        original: digest of that model; of one and the same the reference is computed once in a process, on a CPU.
    """

    reference: Deviation | None = None
    original: str | None
    settings: TrainConfig
    data_collator: Any
    train_dataset: Any

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Return the rows with the reference's log-probabilities, in nats: the last ones, if they are of this model."""
        if self.original is None or self.settings.device != "cpu":
            return concatenate_datasets([dataset, self._computed(dataset, batch_size)], axis=1)
        settings = [getattr(self.settings, each) for each in ("dtype", "expert_format")]
        key = sha256_json([self.original, settings, batch_size, torch.get_num_threads(), dataset.to_dict()])
        if key not in _LAST:
            found = self._computed(dataset, batch_size)
            _LAST.clear()
            _LAST[key] = found
        return concatenate_datasets([dataset, _LAST[key]], axis=1)

    def _computed(self, dataset: Dataset, batch_size: int) -> Dataset:
        # TRL's own hands them from rank to rank in a cache file, which data in memory has in one process only
        rows, found = range(len(dataset)), list[list[float]]()
        starts = range(0, len(rows), batch_size)
        for start in track(starts, "reference", len(starts)):
            batch = self._batch([dataset[i] for i in rows[start : start + batch_size]])
            pairs = torch.stack(self._reference(batch), dim=1)[batch["kind"] != FILLER].float().tolist()
            found += [pair for rank in all_of(pairs) for pair in rank]
        columns = zip(("ref_chosen_logps", "ref_rejected_logps"), zip(*found, strict=True), strict=True)
        return Dataset.from_dict({name: np.array(values, np.float32) for name, values in columns})

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Return batches that are whole on every rank; each collates its share of them."""
        loader = super().get_train_dataloader()
        if isinstance(loader.batch_sampler, BatchSamplerShard):
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False  # it would fill up the last batch with rows of the first one
        return loader

    def collated(self, indices: Sequence[int]) -> Batch:
        """Return this rank's share of rows of the training data as one batch, where the model is."""
        return self._batch([self.train_dataset[i] for i in indices])

    def _batch(self, rows: list[Row]) -> Batch:
        batch = self.data_collator(rows)
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def drawn(self, count: int) -> list[list[int]]:
        """Draw rows by the seed, all if `count` is larger, in batches as training runs them."""
        size, total = self.args.train_batch_size, len(self.train_dataset)
        rows = random.Random(self.args.seed).sample(range(total), min(count, total))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @torch.no_grad()
    def assert_exact_reference(self) -> None:
        """Check that policy and reference agree before the first step: no margin, and the stored log-probs are these.

        The policy runs as training runs it, so what is random there shows. How far the stored values are from those
        computed again, in another order of rows, is kept in `reference`: in fp32 of one batch, else of all rows.

        Raises:
            TrainingError: they do not, so the reference is not the model that training starts from.
        """
        fp32 = self.model.dtype == torch.float32
        batches = self.drawn(self.args.train_batch_size if fp32 else len(self.train_dataset))
        self._assert_no_margin(self.collated(batches[0]))
        self.model.eval()
        pairs = [self._stored_and_again(rows) for rows in track(batches, "exact reference", len(batches))]
        self.model.train()
        stored, again = (torch.cat(values) for values in zip(*pairs, strict=True))
        apart = torch.tensor([value for mine in all_of((stored - again).abs().tolist()) for value in mine])
        self.reference = Deviation(mean=float(apart.mean()), max=float(apart.max()), rows=sum(map(len, batches)))
        # another batch composition pads differently, which changes the last bits of a sum; where a tie in a router
        # falls otherwise a row changes more, and of all rows some may: single rows are held to it in one batch only
        loose = 1e-4 if fp32 else 2e-2
        near = torch.allclose(*pairs[0], rtol=loose, atol=loose * 10)
        near = near and self.reference.mean <= loose * (10 + float(again.abs().mean()))
        if not all(all_of(near)):
            raise TrainingError("the precomputed reference log-probs are not those of the starting model")

    def _assert_no_margin(self, batch: Batch) -> None:
        self.model.eval()
        reference = torch.cat(self._reference(batch))
        self.model.train()
        policy, again = self._log_probs(batch), self._log_probs(batch)
        if not all(all_of(torch.equal(policy, again))):
            raise TrainingError(
                "two passes over the same rows differ in training mode: the model drops or jitters something at "
                f"random. Set {self._noise()} to 0 in the model's config.json"
            )
        margin = max(all_of(float((policy - reference).abs().max())))
        if margin != 0.0:
            raise TrainingError(f"step-0 margin is {margin:.3g}, not 0: the reference is not the starting model")

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
        """Return the original's log-probabilities of chosen and rejected answers."""
        with _quickly_switched():
            return super().compute_ref_log_probs(model, inputs)

    def _reference(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with completions_only():
            return self.compute_ref_log_probs(self.model, {key: value for key, value in batch.items() if key != "kind"})

    def _stored_and_again(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the reference's log-probabilities of rows in nats, as they are stored and computed again."""
        batch = self.collated(rows)
        again = torch.cat(self._reference(batch)).float().cpu()
        real = (batch["kind"] != FILLER).repeat(2).cpu()
        stored = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).float().cpu()
        return stored[real], again[real]

    def _log_probs(self, batch: Batch) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {key: value for key, value in batch.items() if key not in _NO_INPUTS}
        with completions_only():
            out = self.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        return out.log_probs.sum(dim=1)

    def _noise(self) -> str:
        """Name the settings of the model that are likely to blame."""
        settings = self.model.config.to_dict().items()
        found = [key for key, value in settings if value and key.endswith(("dropout", "pdrop", "jitter_noise"))]
        return ", ".join(found) or "its dropout"
