"""Batches of preference pairs: padded on the right, with the kind of each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from gtqlora.contrasts import ALL_KINDS
from gtqlora.edits.reference import Batch

_SHORT = 32


def longest_of(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return the tokens of the longest prompt with its answer."""
    return max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)


@dataclass
class KindCollator(DataCollatorForPreference):
    """TRL's preference batch plus each row's kind, as an index into `ALL_KINDS`.

    Attributes:
        few_lengths: pad batches to one of four lengths an octave, so that few shapes are run.
    """

    few_lengths: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> Batch:
        """Collate examples as TRL does, and add their kinds."""
        if self.few_lengths:
            longest = longest_of(examples)
            self.pad_to_multiple_of = max(_SHORT, 1 << max(0, (longest - 1).bit_length() - 3))
        batch = super().torch_call(examples)
        batch["kind"] = torch.tensor([ALL_KINDS.index(example["kind"]) for example in examples])
        return batch
