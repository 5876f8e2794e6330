"""Batches of preference pairs: padded on the right, with the kind of each row and how they are packed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from gtqlora.contrasts import ALL_KINDS
from gtqlora.edits.packing import pack
from gtqlora.edits.reference import Batch

_SHORT = 32
_LENGTHS, _SIZES = 4, 8
"""Lengths of padded batches, and sizes of packed ones, in an octave."""


def longest_of(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return the tokens of the longest prompt with its answer."""
    return max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)


def most_tokens(rows: Iterable[Mapping[str, Any]]) -> int:
    """Return the tokens of the largest pair, with its prompt once."""
    return max(sum(_lengths(row)) for row in rows)


def _lengths(row: Mapping[str, Any]) -> tuple[int, int, int]:
    return len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])


def _unit(count: int, parts: int) -> int:
    """Return the step between sizes near a count, of so many parts an octave."""
    return max(_SHORT, (1 << (count - 1).bit_length()) // (2 * parts))


@dataclass
class KindCollator(DataCollatorForPreference):
    """TRL's preference batch plus each row's kind, as an index into `ALL_KINDS`.

    Attributes:
        few_shapes: pad and fill up batches to one of few sizes an octave, so that few shapes are run.
        packed: say how the batch is packed, too.
    """

    few_shapes: bool = False
    packed: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> Batch:
        """Collate examples as TRL does, and add their kinds."""
        if self.few_shapes:
            self.pad_to_multiple_of = _unit(longest_of(examples), _LENGTHS)
        batch = super().torch_call(examples)
        batch["kind"] = torch.tensor([ALL_KINDS.index(example["kind"]) for example in examples])
        if self.packed:
            pairs = [_lengths(example) for example in examples]
            unit = _unit(sum(map(sum, pairs)), _SIZES) if self.few_shapes else 1
            batch |= pack(pairs, batch["input_ids"].shape[1], unit).named()
        return batch
