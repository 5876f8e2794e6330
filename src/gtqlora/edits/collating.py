"""Batches of preference pairs: padded on the right, with the kind of each row and how they are packed.

Where several ranks share a batch, each collates its own rows, and all have batches of one shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from gtqlora.contrasts import ALL_KINDS
from gtqlora.edits.packing import pack
from gtqlora.edits.reference import FILLER, Batch, Row
from gtqlora.ranks import share

_SHORT = 32
_LENGTHS, _SIZES = 4, 8
"""Lengths of padded batches, and sizes of packed ones, in an octave."""


def longest_of(rows: Iterable[Row]) -> int:
    """Return the tokens of the longest prompt with its answer."""
    return max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows)


def most_tokens(rows: Iterable[Row]) -> int:
    """Return the tokens of the largest pair, with its prompt once."""
    return max(sum(_lengths(row)) for row in rows)


def _lengths(row: Row) -> tuple[int, int, int]:
    return len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])


def _up(count: int, parts: int) -> int:
    """Return the next of few sizes, of so many parts an octave."""
    unit = max(_SHORT, (1 << (count - 1).bit_length()) // (2 * parts))
    return -(-count // unit) * unit


@dataclass
class KindCollator(DataCollatorForPreference):
    """TRL's preference batch plus each row's kind, as an index into `ALL_KINDS`.

    Attributes:
        few_shapes: pad and fill up batches to one of few sizes an octave, so that few shapes are run.
        packed: say how the batch is packed, too.
        share: this rank, and how many ranks share each batch.
    """

    few_shapes: bool = False
    packed: bool = False
    share: tuple[int, int] = (0, 1)

    def torch_call(self, examples: list[Row]) -> Batch:
        """Collate this rank's examples as TRL does, and add their kinds."""
        longest = longest_of(examples)
        self.pad_to_multiple_of = _up(longest, _LENGTHS) if self.few_shapes else longest
        shares = [self._shared(examples, rank) for rank in range(self.share[1])]
        mine, real = shares[self.share[0]]
        batch = super().torch_call(mine)
        kinds = [ALL_KINDS.index(example["kind"]) for example in mine]
        batch["kind"] = torch.tensor([*kinds[:real], *[FILLER] * (len(mine) - real)])
        self._empty(batch, real)
        if self.packed:
            used = max(sum(sum(_lengths(example)) for example in share) for share, _ in shares)
            size = _up(used, _SIZES) if self.few_shapes else used
            batch |= pack([_lengths(example) for example in mine], batch["input_ids"].shape[1], size).named()
        return batch

    def _shared(self, examples: list[Row], rank: int) -> tuple[list[Row], int]:
        """Return a rank's examples and how many of them are real: its first ones, in order of ranks."""
        count = self.share[1]
        own = [examples[i] for i in share(len(examples), rank, count)]
        return [*own, *[examples[0]] * (-(-len(examples) // count) - len(own))], len(own)

    @staticmethod
    def _empty(batch: Batch, real: int) -> None:
        """Leave nothing of fillers that a loss could see."""
        for half in batch["completion_mask"].chunk(2):
            half[real:] = 0
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in batch:
                batch[name][real:] = 0
