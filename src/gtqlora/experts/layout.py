"""What every 4-bit format has in common: named parts of quantized matrices, their shapes, and the checks.

Shape letters: N rows (outputs) and K columns (inputs) of a matrix, L matrices, G groups in a row, B blocks in a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gtqlora.errors import ModelError

Parts = dict[str, Tensor]
"""What stands for quantized matrices, by name; leading dimensions are the matrices'."""

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each part of one matrix."""


Device = torch.device | str | int | None
"""Where tensors are made; None is the default device."""

Fused = Literal["gate_up", "down"]
"""What is multiplied at once: the gates and ups of some experts, or their downs."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits_of(tensor: Tensor) -> Tensor:
    """Return the same memory as whole numbers, one for each element."""
    return tensor.view(_INTEGERS[tensor.element_size()])


# Quantizing takes several fp32 copies of its input: piece by piece they are a few MB, not some of the model's size.
_AT_ONCE = 2**21
"""Weights quantized in one go: what bounds the memory it takes."""


def pieces(groups: Tensor) -> Iterator[Tensor]:
    """Yield groups [..., B, W], some at a time, as fp32 [b, W]."""
    yield from (piece.float() for piece in groups.flatten(0, -2).split(_groups_at_once(groups)))


def scaled_pieces(groups: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same with their scales, given as [..., B], in fp32 [b, 1]."""
    some = scales.flatten().unsqueeze(-1).split(_groups_at_once(groups))
    yield from ((piece, scale.float()) for piece, scale in zip(pieces(groups), some, strict=True))


def _groups_at_once(groups: Tensor) -> int:
    return max(1, _AT_ONCE // groups.shape[-1])


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """How 4-bit weights are laid out.

    Attributes:
        name: as in settings and files.
        group: weights that share one scale, at most.
    """

    name: str
    group: int

    @abstractmethod
    def check(self, rows: int, columns: int) -> None:
        """Check that such a matrix can be held.

        Raises:
            ModelError: its sizes do not divide into groups.
        """

    @abstractmethod
    def layout(self, rows: int, columns: int) -> Layout:
        """Return the parts of one [N, K] matrix that `check` accepts."""

    @abstractmethod
    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """Return the codes [..., N, K], 0..15 in uint8, of a `packed` part."""

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Return the inverse of `unpack`."""

    @abstractmethod
    def _quantize(self, matrices_LNK: Tensor) -> Parts:
        """Return parts, with leading L, of matrices of accepted sizes.

        Raises:
            ModelError: NaN or infinity in them.
        """

    @abstractmethod
    def _dequantize(self, parts: Parts, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return weights [..., N, K] of parts that have the right shapes."""

    def empty(self, lead: tuple[int, ...], rows: int, columns: int, device: Device = None) -> Parts:
        """Return uninitialized parts of matrices [*lead, N, K], also on "meta".

        Raises:
            ModelError: as `check`.
        """
        self.check(rows, columns)
        return {
            name: torch.empty((*lead, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in self.layout(rows, columns).items()
        }

    @torch.no_grad()
    def quantize(self, matrix: Tensor) -> Parts:
        """Return parts of matrices [..., N, K] in any float dtype; takes a few tens of MB besides, whatever their size.

        Raises:
            ModelError: NaN or infinity, or as `check`.
        """
        *lead, rows, columns = matrix.shape
        self.check(rows, columns)
        parts = self._quantize(matrix.reshape(-1, rows, columns))
        return {name: part.reshape((*lead, *part.shape[1:])) for name, part in parts.items()}

    def _largest(self, groups: Tensor, rows: int, columns: int) -> Tensor:
        """Return the largest magnitude, fp32, of every group [..., B, W].

        Raises:
            ModelError: NaN or infinity in a group.
        """
        largest = torch.cat([piece.abs().amax(-1) for piece in pieces(groups)]).view(groups.shape[:-1])
        if not bool(largest.isfinite().all()):
            raise ModelError(f"{self.name}: a matrix {rows} x {columns} holds NaN or infinity; get the weights again")
        return largest

    def dequantize(self, parts: Parts, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return weights [..., N, K].

        Raises:
            ModelError: the parts are not those of such matrices.
        """
        self.check_parts(parts, rows, columns)
        return self._dequantize(parts, rows, columns, dtype)

    def check_parts(self, parts: Parts, rows: int, columns: int) -> tuple[int, ...]:
        """Return the leading dimensions of the parts of [..., N, K] matrices.

        Raises:
            ModelError: a part is missing, unknown, or of another shape or dtype; or as `check`.
        """
        self.check(rows, columns)
        layout = self.layout(rows, columns)
        if parts.keys() != layout.keys():
            raise ModelError(f"{self.name}: parts are {sorted(parts)}, expected {sorted(layout)}")
        packed = parts["packed"]
        lead = packed.shape[: packed.ndim - len(layout["packed"][0])]
        for name, (shape, dtype) in layout.items():
            found = parts[name]
            if found.dtype != dtype or found.shape != (*lead, *shape):
                raise ModelError(
                    f"{self.name}: {name} of a {rows} x {columns} matrix is {found.dtype} {list(found.shape)}, "
                    f"expected {dtype} {[*lead, *shape]}"
                )
        return tuple(lead)

    def bits(self, rows: int, columns: int) -> float:
        """Return the bits per weight, scales included, of an [N, K] matrix as it lies in memory."""
        parts = self.empty((), rows, columns, device="meta")
        return sum(part.nbytes for part in parts.values()) * 8 / (rows * columns)
