"""A checkpoint's tensor changed block by block, from one file into another; never whole in memory.

Shape letters: E matrices of a stack, N rows, K columns.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from gtqlora.errors import ModelError, RunError
from gtqlora.families.headers import Extent

_BLOCK = 2**20
"""Values that are changed at once: 4 MiB in fp32, and some more for what is computed from them."""
_MATRIX = 2**25
"""Values of a matrix that is read and written in one piece, though it is cut between columns, which lie scattered."""
_STEP = 128
"""Rows or columns of a block are a multiple of this, but for the last ones."""
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Change(Protocol):
    """What happens to a tensor, which may be cut: each part is changed by itself.

    Cut between rows, a stack of matrices [E, N, K] is one of E N rows, and a vector is one row. Cut between columns,
    each matrix of a stack is changed alike.
    """

    @property
    def by_columns(self) -> bool:
        """Return whether a matrix is cut between columns, and not between rows."""
        ...

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that the change is for a tensor of this shape.

        Raises:
            RunError: it is not.
        """
        ...

    def __call__(self, weight_NK: Tensor, part: slice = slice(None)) -> Tensor:
        """Return the changed rows or columns `part` of a matrix, given these in fp32."""
        ...


@dataclass(frozen=True)
class Block:
    """Some rows or columns of a matrix in a stack.

    Attributes:
        part: those of `rows` and `columns` that the matrix is cut into.
    """

    matrix: int
    rows: slice
    columns: slice
    part: slice


def _as_cut(shape: tuple[int, ...], change: Change) -> tuple[int, ...]:
    """Return the shape in which a change sees a tensor, see `Change`."""
    return shape if change.by_columns else (math.prod(shape[:-1]), *shape[-1:])


def blocks(shape: tuple[int, ...], *, by_columns: bool) -> Iterator[Block]:
    """Yield the blocks of a tensor [N, K] or [E, N, K]; always the same ones for a shape.

    What is judged and what is written are computed in the same blocks, as a product's rounding hangs on its shape.
    """
    *stack, rows, columns = shape
    length, other = (columns, rows) if by_columns else (rows, columns)
    step = max(_STEP, _BLOCK // max(other, 1) // _STEP * _STEP)
    for matrix in range(math.prod(stack)):
        for start in range(0, length, step):
            part = slice(start, min(start + step, length))
            cut = (slice(0, rows), part) if by_columns else (part, slice(0, columns))
            yield Block(matrix, *cut, part)


def changed(tensor: Tensor, change: Change) -> Tensor:
    """Return a checkpoint's tensor as it is written: changed block by block and rounded to its own dtype.

    Raises:
        RunError: the change is for another shape.
    """
    change.check(tuple(tensor.shape))
    out, shape = torch.empty_like(tensor, memory_format=torch.contiguous_format), _as_cut(tuple(tensor.shape), change)
    source_ENK, out_ENK = (whole.reshape(-1, *shape[-2:]) for whole in (tensor, out))
    for block in blocks(shape, by_columns=change.by_columns):
        place = (block.matrix, block.rows, block.columns)
        out_ENK[place] = change(_exact(source_ENK[place]), block.part).to(tensor.dtype)
    return out


def _exact(values_NK: Tensor) -> Tensor:
    """Return a block in fp32 and in memory of its own: how a product is rounded hangs on where its factors lie, too."""
    return torch.empty(values_NK.shape, device=values_NK.device).copy_(values_NK)


@dataclass
class Tally:
    """What became of a tensor.

    Attributes:
        values: that came out different.
        wanted, lost: energy of the change, and of what rounding did to it.
    """

    values: int = 0
    wanted: float = 0.0
    lost: float = 0.0

    def add(self, before: Tensor, wanted: Tensor, written: Tensor) -> None:
        """Count a block: in the checkpoint, as it should be in fp32, and as it is written."""
        self.values += int((before != written).sum())
        self.lost += float((written.float() - wanted).norm()) ** 2
        self.wanted += float((wanted - before.float()).norm()) ** 2

    @property
    def kept(self) -> float:
        """Return the share of the change's energy that survives rounding; 1 where nothing was to change."""
        return 1 - self.lost / self.wanted if self.wanted else 1.0


def check_change(name: str, extent: Extent, change: Change) -> None:
    """Check that a tensor of the checkpoint can be changed so.

    Raises:
        ModelError: it is quantized.
        RunError: the change is for another shape.
    """
    known = (*_DTYPES, "F8_E4M3")
    if extent.dtype not in known:
        raise ModelError(
            f"tensor {name} is {extent.dtype}, and only {', '.join(known)} can be changed; export the edit as an "
            "adapter (--to peft), or train it on the unquantized checkpoint"
        )
    if extent.dtype not in _DTYPES and change.by_columns:
        raise ModelError(
            f"tensor {name} is {extent.dtype}, which a projection would round anew as `verify` did not; project the "
            "bf16, fp16 or fp32 checkpoint"
        )
    try:
        change.check(extent.shape)
    except RunError as error:
        raise RunError(f"tensor {name}: {error}") from error


def patch(name: str, extent: Extent, change: Change, source: int, target: int, start: int) -> Tally:
    """Write a changed tensor into a file at `start`.

    Args:
        source, target: descriptors of files, open for reading and for writing.

    Raises:
        RunError: a value of the changed tensor is not finite.
        OSError: the source is shorter than it was, or the target's disk is full.
    """
    extent = dataclasses.replace(extent, shape=_as_cut(extent.shape, change))
    tally, dtype = Tally(), _DTYPES[extent.dtype]
    for piece, parts in _pieces(extent.shape, by_columns=change.by_columns):
        values_NK = torch.empty(_size(piece), dtype=dtype)
        move(source, extent, extent.start, piece, values_NK, write=False)
        for part in parts:
            # the piece is the block itself, or a whole matrix that is cut into blocks here
            before = values_NK[:, part] if len(parts) > 1 else values_NK
            wanted = change(_exact(before), part)
            # Looked at after rounding: fp16 may be too narrow for what fp32 holds.
            written = wanted.to(dtype)
            if not bool(written.isfinite().all()):
                raise RunError(f"tensor {name} would hold NaN or infinity with the edit; nothing was written")
            tally.add(before, wanted, written)
            before.copy_(written)
        move(target, extent, start, piece, values_NK, write=True)
    return tally


def _pieces(shape: tuple[int, ...], *, by_columns: bool) -> Iterator[tuple[Block, list[slice]]]:
    """Yield what of a tensor is read and written at once, and the blocks into which that is cut."""
    *_, rows, columns = shape
    every = blocks(shape, by_columns=by_columns)
    if not by_columns or rows * columns > _MATRIX:
        yield from ((block, [block.part]) for block in every)
        return
    for matrix, found in groupby(every, key=lambda block: block.matrix):
        yield Block(matrix, slice(0, rows), slice(0, columns), slice(0, columns)), [block.part for block in found]


def _size(block: Block) -> tuple[int, int]:
    return block.rows.stop - block.rows.start, block.columns.stop - block.columns.start


def move(file: int, extent: Extent, start: int, block: Block, values_NK: Tensor, *, write: bool) -> None:
    """Read or write a block of a tensor that begins at `start`, in as few runs as its place in the matrix allows."""
    rows, columns = extent.shape[-2:]
    wide, each = values_NK.shape[1], values_NK.element_size()
    first = start + each * ((block.matrix * rows + block.rows.start) * columns + block.columns.start)
    run = each * (values_NK.numel() if wide == columns else wide)
    data = memoryview(values_NK.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    for index, at in enumerate(range(0, len(data), run)):
        _move_run(file, data[at : at + run], first + index * each * columns, write=write)


def _move_run(file: int, data: memoryview, at: int, *, write: bool) -> None:
    while data:
        moved = os.pwrite(file, data, at) if write else os.preadv(file, [data], at)
        if moved == 0:
            raise OSError("a file of the checkpoint became shorter while it was read")
        data, at = data[moved:], at + moved
