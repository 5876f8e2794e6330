"""Tensors of a checkpoint's safetensors files, found by name and read one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.families.headers import holder, opened

_OPEN = 2
"""Files kept open: pages of an open file that were read count as the process's memory, though they can be dropped."""


class TensorFiles:
    """Names, shapes and dtypes from the headers; data only when read. Use as a context manager."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers of these files.

        Raises:
            ModelError: a file is no whole safetensors file, or a tensor is in two of which none is an overlay.
        """
        self._open: dict[Path, Any] = {}
        self.where: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in paths:
            file = self._file(path)
            for name in file.keys():  # noqa: SIM118 - a file is no mapping
                if name in self.where and (taken := holder(self.where[name].name, path.name)) != path.name:
                    if taken is None:
                        raise ModelError(f"tensor {name} is in {self.where[name].name} and in {path.name}; remove one")
                    continue
                found = file.get_slice(name)
                self.where[name], self._headers[name] = path, (tuple(found.get_shape()), found.get_dtype())

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def _file(self, path: Path) -> Any:
        """Return the file, opened; it closes once nothing refers to it any more."""
        if path not in self._open:
            # The one that was opened first goes: files are read in order, each nearly to its end.
            while len(self._open) >= _OPEN:
                del self._open[next(iter(self._open))]
            if path.suffix != ".safetensors":
                raise ModelError(f"{path}: not a .safetensors file; convert the weights to safetensors")
            self._open[path] = opened(path)
        return self._open[path]

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape of a tensor and its dtype as safetensors spells it, e.g. `BF16`."""
        return self._headers[name]

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        return self._file(self.where[name]).get_tensor(name)

    def part(self, name: str, index: int, rows: slice) -> Tensor:
        """Return some rows of one matrix of a tensor [E, N, K]; nothing else is read."""
        return self._file(self.where[name]).get_slice(name)[index : index + 1, rows].squeeze(0)
