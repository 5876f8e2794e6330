"""Embeddings and heads of which each rank holds some of the words.

Of an embedding tokens travel: every rank looks up those words that it has, and the sums are as `exchange` brings them.
Of a head the weights travel: whole where it is asked for logits, and a tile of words at a time for log-probabilities,
whose tiles TRL makes in turn.

Shape letters: V words, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora.experts.exchange import Exchange
from gtqlora.experts.messages import Group, gather_into
from gtqlora.planning.memory import TILE

Lend = Callable[[int], Tensor]
"""Bytes -> memory for a while."""


class Split(Protocol):
    """What a rank holds of one weight."""

    def part_of(self, values: Tensor) -> Tensor:
        """Return a rank's part of values that the whole weight could have."""
        ...

    def exchanged(self, values: Tensor) -> Tensor:
        """Take other values of this rank's part, and return those that it had."""
        ...


_SPLIT = "split_among_ranks"
"""Attribute of a weight that is."""


def split_of(weight: Tensor) -> Split | None:
    """Return what this rank holds of a weight, if it is split."""
    return getattr(weight, _SPLIT, None)


def note_split(weight: nn.Parameter, found: Split) -> None:
    """Note what this rank holds of a weight, which is frozen."""
    weight.requires_grad_(False)
    setattr(weight, _SPLIT, found)


class Words:
    """A rank's rows of a matrix_VD with a row for each word: as many of every tile of words as the other ranks have.

    The weight itself becomes these rows, one tile after the other, and a last one of zeros.
    """

    def __init__(self, weight: nn.Parameter, group: Group, lend: Lend) -> None:
        self.weight, self.group, self._lend = weight, group, lend
        self.count, self.hidden = weight.shape
        self.tile = min(TILE, self.count)
        self.each = -(-self.tile // group.size())
        note_split(weight, self)
        weight.data = torch.cat([self.part_of(weight.data), weight.data.new_zeros(1, self.hidden)])

    @property
    def n_tiles(self) -> int:
        """Return the number of tiles, of which the last may have fewer words."""
        return -(-self.count // self.tile)

    def part_of(self, values: Tensor) -> Tensor:
        """Return this rank's rows of values_VD; zeros where there is no word."""
        part = values.new_zeros(self.n_tiles, self.each, self.hidden)
        first = self.group.rank() * self.each
        for index, mine in enumerate(part):
            tile = values[index * self.tile : (index + 1) * self.tile]
            found = tile[first : first + self.each]
            mine[: len(found)] = found
        return part.view(-1, self.hidden)

    def exchanged(self, values: Tensor) -> Tensor:
        """Take other values of this rank's part, and return those that it had."""
        held = self.weight.data[:-1]
        before = held.clone()
        held.copy_(values)
        return before

    def rows_of(self, ids: Tensor) -> Tensor:
        """Return the row of each word; the last one, of zeros, of those that other ranks hold."""
        tile, inside = ids // self.tile, ids % self.tile
        mine = inside // self.each == self.group.rank()
        return torch.where(mine, tile * self.each + inside % self.each, len(self.weight) - 1)

    def tile_of(self, start: int) -> Tensor:
        """Return the matrix of the tile that begins at a word; another one takes its memory."""
        first = start // self.tile * self.each
        part = self.weight.data[first : first + self.each]
        whole = self._lend(part.nbytes * self.group.size()).view(part.dtype).view(-1, self.hidden)
        gather_into(whole, part, self.group)
        return whole[: min(self.tile, self.count - start)]

    def whole(self) -> Tensor:
        """Return matrix_VD."""
        found = self.weight.new_empty(self.count, self.hidden)
        for start in range(0, self.count, self.tile):
            found[start : start + self.tile] = self.tile_of(start)
        return found


def words_of(weight: Tensor) -> Words | None:
    """Return the words of a matrix that is split by them."""
    found = split_of(weight)
    return found if isinstance(found, Words) else None


def split(model: PreTrainedModel, exchange: Exchange, lend: Lend) -> None:
    """Leave each rank its words of a model's embedding and head, which may be one matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    words = Words(embedding.get_parameter("weight"), exchange.group, lend)
    embedding.padding_idx = None  # which says where no gradient goes, and has to be one of the rows
    embedding.exchange = exchange  # type: ignore[assignment]
    embedding.register_forward_pre_hook(partial(_asked, exchange, words))
    embedding.register_forward_hook(partial(_answered, exchange))
    tied = head.weight is embedding.weight
    answers = words if tied else Words(head.get_parameter("weight"), exchange.group, lend)
    vars(head)["forward"] = partial(_logits, head, answers)


def _asked(exchange: Exchange, words: Words, _module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return words.rows_of(exchange.all_of(inputs[0]))


def _answered(exchange: Exchange, _module: nn.Module, _inputs: object, found: Tensor) -> Tensor:
    return exchange.sum_of(found)


def _logits(head: nn.Linear, words: Words, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, words.whole(), head.bias)


class Tiled(torch.Tensor):
    """A head's matrix_VD for TRL's log-probabilities, which ask for a slice of words after the other; nothing else may.

    Every rank has to ask for the same slices.
    """

    words: Words

    @staticmethod
    def of(words: Words) -> Tiled:
        """Return the matrix of words."""
        weight, shape = words.weight, (words.count, words.hidden)
        found: Tiled = torch.Tensor._make_wrapper_subclass(Tiled, shape, dtype=weight.dtype, device=weight.device)  # type: ignore[attr-defined]
        found.words = words
        return found

    def __getitem__(self, rows: slice) -> Tensor:  # type: ignore[override]
        found = self.words.tile_of(rows.start)
        assert rows.start % self.words.tile == 0 and rows.stop - rows.start == len(found)
        return found

    @classmethod
    def __torch_dispatch__(cls, function: object, *_: object, **__: object) -> object:  # type: ignore[override]
        raise NotImplementedError(f"{function} of a head whose words are split among ranks")
