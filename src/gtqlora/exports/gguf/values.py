"""Values of a GGUF's tensors, from the checkpoint's files and an edit: one tensor on disk in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gtqlora.edits.merging import Edit, merged
from gtqlora.errors import ModelError
from gtqlora.exports.gguf.layout import Made, Part, as_is
from gtqlora.exports.job import Job
from gtqlora.families.files import weight_files, weight_map
from gtqlora.families.headers import Header, opened, read_headers

Change = Callable[[Tensor, Edit], Tensor]
"""(tensor on disk, its edit) -> the edited tensor: `merging.merged`, or `unrounded`."""
_FLOATS = {"F32", "F16", "BF16"}


@dataclass(frozen=True)
class Checkpoint:
    """A model's tensors on disk, and what an edit does to them.

    Attributes:
        folder: where its files are.
        headers: by name of a tensor.
    """

    job: Job
    folder: Path
    headers: Mapping[str, Header]

    @staticmethod
    def of(job: Job) -> Checkpoint:
        """Return a job's checkpoint; its headers are read.

        Raises:
            ModelError: its files are not in order.
        """
        folder, files = weight_files(job.model)
        return Checkpoint(job, folder, read_headers(folder, files, weight_map(folder)))

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
                    f"{self.job.model}: tensor {disk} {what}; a GGUF of its own needs the bf16, fp16 or fp32 "
                    "checkpoint; with --onto, a GGUF that you have is enough for what trains"
                )

    def dtype(self, one: Made) -> str:
        """Return the dtype on disk, as safetensors spells it; F32 where parts differ."""
        found = {self.headers[disk].dtype for disk in one.sources}
        return found.pop() if len(found) == 1 else "F32"

    def parts(self, one: Made, change: Change | None = None) -> Iterator[Tensor]:
        """Yield a tensor's fp32 rows [N, K], part after part, the edited ones changed by this."""
        for part in one.parts:
            tensor, edit = self._read(part), self.job.edits.get(part.disk)
            changed = tensor if change is None or edit is None else change(tensor, edit)
            yield part.take(changed.float()).reshape(-1, one.shape[-1])

    def _read(self, part: Part) -> Tensor:
        with opened(self.folder / self.headers[part.disk].file) as file:
            return file.get_tensor(part.disk) if part.expert is None else file.get_slice(part.disk)[part.expert]

    def gate_values_changed(self) -> int:
        """Return how many values of the routers' weights a merge changes."""
        gates = (
            (self._read(Part(name, as_is)), self.job.edits[name]) for name in self.job.gates & self.job.edits.keys()
        )
        return sum(int((merged(gate, edit) != gate).sum()) for gate, edit in gates)


def unrounded(tensor: Tensor, edit: Edit) -> Tensor:
    """Return the edited tensor in fp32, before it is rounded to its dtype on disk."""
    return edit(tensor.float())
