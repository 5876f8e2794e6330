"""Layers of one resident base whose rows are of different variants: the base's product once, each row's own part added.

Shape letters: B sequences of the batch, T rows (a sequence's tokens lie together), N outputs, K inputs, V variants,
R rank, D hidden, S length.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora.bitdelta.onebit import OneBit
from gtqlora.edits.merging import LowRank

if TYPE_CHECKING:
    from gtqlora.bitdelta.kernels import Groups, Matrices, Signs

_TILE = 1 << 22
"""Bytes of signs that are unpacked at a time: they stay in the cache until they are multiplied."""
_MERGED = 24
"""Rows of one variant from which on its matrix is put together tile by tile: two products would take longer."""
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number, the type of its bits."""

Rows = Tensor | slice
"""Rows of one variant in a batch: their numbers, or all of them."""


class Batch:
    """Which variant each sequence of the running batch is of; all layers of a model share one.

    Args:
        variants: how many there are, the base among them.
        kernels: whether layers multiply by Triton's kernels; by default on GPUs.
    """

    def __init__(self, device: torch.device, variants: int, *, kernels: bool | None = None) -> None:
        self.device, self.n_variants = device, variants
        self.kernels = device.type == "cuda" if kernels is None else kernels
        self.begin([0])

    def begin(self, variants: Sequence[int]) -> None:
        """Say of which variants the sequences are that the next forward pass has; 0 is the base."""
        self._variants = tuple(variants)
        self._groups: dict[int, list[tuple[int, Rows]]] = {}
        self._kernel_groups: dict[int, Groups] = {}

    def of_rows(self, rows: int) -> list[int]:
        """Return the variant of every row of a tensor with this many."""
        each = rows // len(self._variants)
        return [variant for variant in self._variants for _ in range(each)]

    def groups(self, rows: int) -> list[tuple[int, Rows]]:
        """Return the variants in the batch, and the rows of each."""
        if rows not in self._groups:
            self._groups[rows] = grouped(self.of_rows(rows), self.device)
        return self._groups[rows]

    def kernel_groups(self, rows: int) -> Groups:
        """Return the same for the kernels."""
        from gtqlora.bitdelta.kernels import Groups

        if rows not in self._kernel_groups:
            self._kernel_groups[rows] = Groups.of(self.of_rows(rows), self.device)
        return self._kernel_groups[rows]

    def has_any(self, owners: Collection[int]) -> bool:
        """Return whether one of these variants is in the batch."""
        return any(variant in owners for variant in self._variants)


def grouped(variants: Sequence[int], device: torch.device) -> list[tuple[int, Rows]]:
    """Return the variants among rows of these variants, and the rows of each."""
    rows: dict[int, list[int]] = {}
    for row, variant in enumerate(variants):
        rows.setdefault(variant, []).append(row)
    if len(rows) == 1:
        return [(variants[0], slice(None))]
    return [(variant, torch.tensor(mine, device=device)) for variant, mine in rows.items()]


# --- one-bit differences in plain torch ------------------------------------------------------------------------------


class Tiles:
    """Unpacks one-bit matrices a tile at a time, always into the same memory.

    A table of 256 entries holds the eight signs of every byte. They are read as complex numbers, the largest type that
    torch copies in one go: an unpacked matrix costs 0.1 ns a weight instead of 0.4.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._bits = dtype, _BITS[dtype.itemsize]
        self._one = torch.ones((), dtype=dtype, device=device).view(self._bits)
        places = torch.arange(8, dtype=torch.uint8)
        signs = ((torch.arange(256, dtype=torch.uint8)[:, None] >> places) & 1).float() * 2 - 1
        # a number is 16 bytes: eight halves, or half of eight floats; torch is four times as fast along one dimension
        table = signs.to(device, dtype).view(torch.complex128)
        self._table = table.flatten() if table.shape[1] == 1 else table
        self._index = torch.empty(0, dtype=torch.int32, device=device)
        self._memory = self._table[:0]

    def of(self, delta: OneBit) -> Iterator[tuple[slice, Tensor]]:
        """Give rows of a matrix, and their signs in the dtype; the next tile takes their place."""
        outputs, inputs = delta.shape
        step = max(_TILE // (inputs * self.dtype.itemsize), 1)
        for first in range(0, outputs, step):
            bytes_NB = delta.signs_NB[first : first + step]
            yield slice(first, first + len(bytes_NB)), self.unpacked(bytes_NB)[:, :inputs]

    def unpacked(self, bytes_NB: Tensor) -> Tensor:
        """Return the signs of some rows, all that their bytes have."""
        count = bytes_NB.numel()
        if count > len(self._index):
            self._index = self._index.new_empty(count)
            self._memory = self._table.new_empty(count, *self._table.shape[1:])
        index, out = self._index[:count], self._memory[:count]
        index.copy_(bytes_NB.reshape(-1))
        torch.index_select(self._table, 0, index, out=out)
        return out.view(self.dtype).view(len(bytes_NB), -1)

    def product(self, x_TK: Tensor, delta: OneBit) -> Tensor:
        """Return what a one-bit matrix makes of rows."""
        # scales beside the product and not in the tile: of few rows they are far fewer numbers
        out_TN, scaled_TK = x_TK.new_empty(len(x_TK), delta.shape[0]), x_TK * delta.column_K
        for rows, signs_NK in self.of(delta):
            out_TN[:, rows] = F.linear(scaled_TK, signs_NK)
        return out_TN.mul_(delta.row_N)

    def merged(self, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, delta: OneBit) -> Tensor:
        """Return what a matrix with its one-bit difference makes of rows, never holding more of it than a tile."""
        # outputs by rows: a product is faster where the larger matrix is on the left
        out_NT, x_KT = x_TK.new_empty(delta.shape[0], len(x_TK)), x_TK.T
        for rows, signs_NK in self.of(delta):
            self._scale(signs_NK, delta.row_N[rows])
            merged_NK = torch.addcmul(weight_NK[rows], signs_NK, delta.column_K, out=signs_NK)
            torch.mm(merged_NK, x_KT, out=out_NT[rows])
        out_TN = out_NT.T.contiguous()
        return out_TN if bias_N is None else out_TN.add_(bias_N)

    def _scale(self, signs_NK: Tensor, row_N: Tensor) -> None:
        """Multiply signs by their rows' scales, in place."""
        # the bits of 1 out and those of the scale in: an integer pass, where bf16 would be widened and rounded back
        signs_NK.view(self._bits).bitwise_xor_((row_N.view(self._bits) ^ self._one)[:, None])


# --- a linear and what variants add to it ----------------------------------------------------------------------------


class Part(Protocol):
    """What some variants add to a linear's output."""

    def add(self, out_TN: Tensor, x_TK: Tensor, batch: Batch) -> None:
        """Add each row's own, in place."""
        ...


@dataclass(frozen=True)
class OneBits:
    """One-bit differences by variant, a tile at a time."""

    deltas: Mapping[int, OneBit]
    tiles: Tiles

    def add(self, out_TN: Tensor, x_TK: Tensor, batch: Batch) -> None:
        """Add each row's own, in place."""
        for variant, rows in batch.groups(len(x_TK)):
            if variant in self.deltas:
                out_TN[rows] += self.tiles.product(x_TK[rows], self.deltas[variant])


@dataclass(frozen=True)
class LowRanks:
    """Low-rank products by variant."""

    products: Mapping[int, LowRank]

    def add(self, out_TN: Tensor, x_TK: Tensor, batch: Batch) -> None:
        """Add each row's own, in place."""
        for variant, rows in batch.groups(len(x_TK)):
            if variant in self.products:
                own = self.products[variant]
                out_TN[rows] += F.linear(F.linear(x_TK[rows], own.a_RI), own.b_DR)


@dataclass(frozen=True)
class KernelOneBits:
    """One-bit differences in the kernel's order, for GPUs."""

    signs: Signs

    def add(self, out_TN: Tensor, x_TK: Tensor, batch: Batch) -> None:
        """Add each row's own, in place."""
        from gtqlora.bitdelta.kernels import add_one_bit

        add_one_bit(out_TN, x_TK, self.signs, batch.kernel_groups(len(x_TK)))


@dataclass(frozen=True)
class KernelLowRanks:
    """Low-rank products, stacked for the kernel, for GPUs."""

    a_VRK: Matrices
    b_VNR: Matrices

    def add(self, out_TN: Tensor, x_TK: Tensor, batch: Batch) -> None:
        """Add each row's own, in place."""
        from gtqlora.bitdelta.kernels import add_low_rank

        add_low_rank(out_TN, x_TK, self.a_VRK, self.b_VNR, batch.kernel_groups(len(x_TK)))


def one_bits(deltas: Mapping[int, OneBit], tiles: Tiles, batch: Batch) -> Part:
    """Return these differences as the device multiplies them; scales in the model's dtype."""
    if not batch.kernels:
        return OneBits(deltas, tiles)
    from gtqlora.bitdelta.kernels import signs_of

    return KernelOneBits(signs_of(deltas, batch.n_variants, tiles.dtype, batch.device))


def low_ranks(products: Mapping[int, LowRank], batch: Batch) -> Part:
    """Return these products as the device multiplies them."""
    if not batch.kernels:
        return LowRanks(products)
    from gtqlora.bitdelta.kernels import Matrices, slots

    # zeros fill up to the largest rank, and add nothing
    rank = max(own.a_RI.shape[0] for own in products.values())
    a_VRK = torch.stack([F.pad(own.a_RI, (0, 0, 0, rank - len(own.a_RI))) for own in products.values()])
    b_VNR = torch.stack([F.pad(own.b_DR, (0, rank - own.b_DR.shape[1])) for own in products.values()])
    slot_V = slots(list(products), batch.n_variants, batch.device)
    return KernelLowRanks(Matrices(a_VRK, slot_V), Matrices(b_VNR, slot_V))


class VariantLinear(nn.Module):
    """A linear of the base to whose output each row's own variant is added.

    Args:
        base: a linear, or what stands in its place for variants with a bias or a weight of their own.
        bits, lora: by variant; on the base's device and in its dtype.
    """

    def __init__(
        self, base: nn.Module, batch: Batch, tiles: Tiles, bits: Mapping[int, OneBit], lora: Mapping[int, LowRank]
    ) -> None:
        super().__init__()
        self.base, self._batch, self._tiles = base, batch, tiles
        # what the kernel has in an order of its own is not kept a second time
        self._bits = {} if batch.kernels else bits
        self._owners, self._lora = frozenset(bits) | frozenset(lora), frozenset(lora)
        self._parts: list[Part] = [one_bits(bits, tiles, batch)] if bits else []
        self._parts += [low_ranks(lora, batch)] if lora else []

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of every row's own variant."""
        if not self._batch.has_any(self._owners):
            return self.base(x)
        x_TK = x.reshape(-1, x.shape[-1])
        if (delta := self._alone(len(x_TK))) is not None:
            base = cast(nn.Linear, self.base)
            return self._tiles.merged(x_TK, base.weight, base.bias, delta).view(*x.shape[:-1], -1)
        # the base's product once for all rows, which is what serving them together is for
        out = self.base(x)
        out_TN = out.view(-1, out.shape[-1])
        for part in self._parts:
            part.add(out_TN, x_TK, self._batch)
        return out

    def _alone(self, rows: int) -> OneBit | None:
        """Return the one-bit difference of the only variant in a batch of many rows, if it is all that it has."""
        variant, *others = (variant for variant, _ in self._batch.groups(rows))
        # nothing else may be the variant's own here: a low-rank product is not merged, nor another bias or weight
        if rows < _MERGED or others or variant in self._lora or type(self.base) is not nn.Linear:
            return None
        return self._bits.get(variant)


class VariantEmbedding(nn.Module):
    """An embedding of the base to whose rows one-bit differences are added."""

    def __init__(self, base: nn.Module, batch: Batch, tiles: Tiles, bits: Mapping[int, OneBit]) -> None:
        super().__init__()
        self.base, self._batch, self._tiles, self._bits = base, batch, tiles, bits

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Return the embeddings of every row's own variant."""
        out = self.base(ids_BS)
        out_TD, ids_T = out.view(-1, out.shape[-1]), ids_BS.reshape(-1)
        for variant, rows in self._batch.groups(len(ids_T)):
            if (delta := self._bits.get(variant)) is not None:
                mine = ids_T[rows]
                signs_TD = self._tiles.unpacked(delta.signs_NB[mine])[:, : out.shape[-1]]
                out_TD[rows] += signs_TD * delta.row_N[mine, None] * delta.column_K
        return out


class Grouped(nn.Module):
    """A module of which some variants have parameters of their own: each gets its own rows, and all else is shared.

    Args:
        base: a module whose inputs and outputs have rows in the order of the batch.
        own: by variant, its parameters and buffers by name.
    """

    def __init__(self, base: nn.Module, batch: Batch, own: Mapping[int, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.base, self._batch = base, batch
        # not registered: a twin shares the base's modules, which must not be moved or counted twice
        self._twins = {variant: twin(base, tensors) for variant, tensors in own.items()}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what every row's own module makes of it."""
        if not self._batch.has_any(self._twins):
            return self.base(*inputs)
        groups = self._batch.groups(len(inputs[0]))
        found = [self._twins.get(variant, self.base)(*(each[rows] for each in inputs)) for variant, rows in groups]
        if len(groups) == 1:
            return found[0]
        if isinstance(found[0], Tensor):
            return self._in_order(found)
        return tuple(self._in_order(parts) for parts in zip(*found, strict=True))

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the groups' rows in the order of the batch; a router has flattened sequences, so that it has more."""
        rows = torch.cat(list(parts))
        order = torch.cat([cast(Tensor, mine) for _, mine in self._batch.groups(len(rows))])
        return torch.empty_like(rows).index_copy_(0, order, rows)


def twin(base: nn.Module, tensors: Mapping[str, Tensor], **attributes: int) -> nn.Module:
    """Return a module like another one, which shares all but these tensors and attributes with it."""
    made = copy.copy(base)
    made.__dict__.update(attributes)
    made._parameters, made._buffers = dict(base._parameters), dict(base._buffers)
    for name, tensor in tensors.items():
        if name in made._buffers:
            made._buffers[name] = tensor
        else:
            made._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    return made
