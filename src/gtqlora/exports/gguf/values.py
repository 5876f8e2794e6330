"""Values of a GGUF's tensors, from the checkpoint's files and an edit: one tensor on disk in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gtqlora.edits.merging import Edit
from gtqlora.errors import ModelError, RunError
from gtqlora.exports.job import EditedModel
from gtqlora.families.files import weight_files, weight_map
from gtqlora.families.headers import Header, opened, read_headers
from gtqlora.families.llama_cpp import Made, Part, as_is
from gtqlora.families.patching import blocks

Change = Callable[[Tensor, Edit, slice], Tensor]
"""(rows or columns of a tensor on disk, its edit, which they are) -> these edited: `rounded` or `unrounded`."""


class Stored(Protocol):
    """A tensor in a safetensors file, of which a part is read."""

    def __getitem__(self, index: slice | int) -> Tensor:
        """Return the rows, or one matrix of a stack."""
        ...


_FLOATS = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors on disk, and what an edit does to them.

    Attributes:
        folder: where its files are.
        headers: by name of a tensor.
    """

    edited: EditedModel
    folder: Path
    headers: Mapping[str, Header]

    @staticmethod
    def of(edited: EditedModel) -> Checkpoint:
        """Return the checkpoint of a model that is edited; its headers are read.

        Raises:
            ModelError: its files are not in order.
        """
        folder, files = weight_files(edited.model)
        return Checkpoint(edited, folder, read_headers(folder, files, weight_map(folder)))

    def check(self, made: Mapping[str, Made]) -> None:
        """Check that everything that is needed is there, as floats.

        Raises:
            ModelError: a tensor is missing, or quantized.
        """
        for disk in sorted({disk for one in made.values() for disk in one.sources}):
            header = self.headers.get(disk)
            if header is None or header.dtype not in _FLOATS:
                what = "is not in the checkpoint as one tensor of floats" if header is None else f"is {header.dtype}"
                raise ModelError(
                    f"{self.edited.model}: tensor {disk} {what}; a GGUF of its own needs the bf16, fp16 or fp32 "
                    "checkpoint; with --onto, a GGUF that you have is enough for what trains"
                )

    def dtype(self, one: Made) -> str:
        """Return the dtype on disk, as safetensors spells it; F32 where parts differ."""
        found = {self.headers[disk].dtype for disk in one.sources}
        return found.pop() if len(found) == 1 else "F32"

    def parts(self, one: Made, change: Change | None = None) -> Iterator[Tensor]:
        """Yield a tensor's fp32 rows [N, K], a few after the other, the edited ones changed by this.

        Raises:
            RunError: a changed value is not finite.
        """
        for part in one.parts:
            with opened(self.folder / self.headers[part.disk].file) as file:
                for values in self._changed(part, file.get_slice(part.disk), change):
                    if change is not None and not bool(values.isfinite().all()):
                        raise RunError(f"tensor {part.disk} would hold NaN or infinity with the edit")
                    yield part.take(values).reshape(-1, one.shape[-1])

    def _changed(self, part: Part, stored: Stored, change: Change | None) -> Iterator[Tensor]:
        """Yield a part's values in fp32: rows of it where these are what is taken, in the blocks of a merge."""
        if part.expert is not None and change is None:
            # without the edit, which may be of a whole stack and read from disk
            yield stored[part.expert].float()
            return
        shape, edit = self.headers[part.disk].shape, self.edited.edits.get(part.disk)
        if part.expert is None and part.take is as_is and len(shape) == 2 and not (edit and edit.by_columns):
            # In just these blocks: the rounding of a product hangs on its shape, and `verify` judged these.
            for block in blocks(shape, by_columns=False):
                rows = stored[block.rows]
                yield (rows if change is None or edit is None else change(rows, edit, block.part)).float()
            return
        whole = stored[:] if part.expert is None else stored[part.expert]
        yield (whole if change is None or edit is None else _in_blocks(whole, edit, change)).float()

    def gate_values_changed(self) -> int:
        """Return how many values of the routers' weights a merge changes."""
        gates = [Made(name, self.headers[name].shape, (Part(name, as_is),)) for name in self.edited.gates]
        edited = (gate for gate in gates if gate.name in self.edited.edits)
        pairs = (zip(self.parts(gate), self.parts(gate, rounded), strict=True) for gate in edited)
        return sum(int((before != after).sum()) for each in pairs for before, after in each)


def unrounded(weight: Tensor, edit: Edit, part: slice) -> Tensor:
    """Return edited values in fp32."""
    return edit(weight.float(), part)


def rounded(weight: Tensor, edit: Edit, part: slice) -> Tensor:
    """Return edited values in the dtype that they have on disk: as a merge writes them."""
    return edit(weight.float(), part).to(weight.dtype)


def _in_blocks(weight: Tensor, edit: Edit, change: Change) -> Tensor:
    edit.check(tuple(weight.shape))
    found = torch.empty(weight.shape)
    for block in blocks(tuple(weight.shape), by_columns=edit.by_columns):
        found[block.rows, block.columns] = change(weight[block.rows, block.columns], edit, block.part).float()
    return found
