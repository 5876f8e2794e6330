"""Format `gguf`, whole: the merged model as a GGUF in the checkpoint's own dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtqlora.exports.gguf.header import header, padded
from gtqlora.exports.gguf.reading import BOOL, FLOAT32, INT32, STRING, UINT32, Value
from gtqlora.exports.gguf.tokenizer import tokenizer
from gtqlora.exports.gguf.types import BY_NAME, GgmlType, quantized
from gtqlora.exports.gguf.values import Change, Checkpoint, rounded, unrounded
from gtqlora.exports.job import EditedModel, Form, Job, Said
from gtqlora.exports.llama_cpp import LlamaCpp
from gtqlora.families.llama_cpp import Layout, Made, Setting, settings
from gtqlora.families.patching import Tally
from gtqlora.progress import track
from gtqlora.results.verdict import Outcome

_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


@dataclass(frozen=True)
class Plan:
    """A GGUF that can be written: everything about it that could be refused has been looked at.

    Attributes:
        types: by name of a tensor.
        dtype: of most of the weights.
    """

    checkpoint: Checkpoint
    layout: Layout
    metadata: Mapping[str, Value]
    types: Mapping[str, GgmlType]
    dtype: str

    @staticmethod
    def of(edited: EditedModel, donor: str | None = None) -> Plan:
        """Return the plan of an edited model's GGUF.

        Args:
            donor: a GGUF of the same model, of which the tokenizer is taken.

        Raises:
            ModelError: the model is none that can be written as a GGUF.
            RunError: it needs a tokenizer from elsewhere.
        """
        layout, checkpoint = Layout.of(edited.model, edited.names), Checkpoint.of(edited)
        found = {**_typed(settings(edited.model, edited.anatomy, layout)), **tokenizer(edited, layout, donor)}
        checkpoint.check(layout.made)
        types = {name: BY_NAME["F32" if one.is_float else checkpoint.dtype(one)] for name, one in layout.made.items()}
        # Files are called by the type of most of their weights, though vectors and routers are always F32.
        largest = max(layout.made, key=lambda name: types[name].n_bytes(layout.made[name].shape))
        dtype = types[largest].name
        found["general.type"] = Value(STRING, "model")
        found["general.file_type"] = Value(UINT32, _FILE_TYPES[dtype])
        return Plan(checkpoint, layout, found, types, dtype)

    def write(self, path: Path, change: Change | None) -> None:
        """Write the GGUF, edited by this; one tensor of the checkpoint is in memory at a time."""
        made = self.layout.made
        with path.open("xb") as out:
            out.write(header(self.metadata, {name: (self.types[name], one.shape) for name, one in made.items()}))
            for name, one in track(made.items(), "write tensors", len(made)):
                for values_NK in self.checkpoint.parts(one, change):
                    out.write(quantized(values_NK, self.types[name]))
                out.write(bytes(padded(out.tell()) - out.tell()))

    def kept(self) -> dict[str, float]:
        """Return by name how much of each changed tensor's change survives rounding to the checkpoint's dtype."""
        edited = {n: one for n, one in self.layout.made.items() if one.sources & self.checkpoint.edited.edits.keys()}
        return {name: self._kept(one) for name, one in edited.items()}

    def _kept(self, one: Made) -> float:
        tally = Tally()
        for before, wanted, written in zip(
            *(self.checkpoint.parts(one, change) for change in (None, unrounded, rounded)), strict=True
        ):
            tally.add(before, wanted, written)
        return tally.kept


def _typed(found: Mapping[str, Setting]) -> dict[str, Value]:
    """Return settings as GGUF's types have them."""
    kinds = {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: INT32}
    return {key: Value(kinds[type(value)], value) for key, value in found.items()}


@dataclass(frozen=True)
class Converted(Form):
    """The whole GGUF in llama.cpp against one of the base, which is there only while it is asked."""

    job: Job
    plan: Plan
    edited: Path

    @property
    def name(self) -> str:
        """Return what it is called in messages."""
        return f"GGUF ({self.plan.dtype}) in llama.cpp"

    def said(self, rows: Sequence[Outcome], *, edited: bool) -> list[Said]:
        """Return what it says to these rows' prompts."""
        if edited:
            return LlamaCpp.of(self.job, self.edited).said(rows, edited=True)
        # beside the other, so that it goes with it if this process is killed
        base = self.edited.with_name("base.gguf")
        self.plan.write(base, None)
        try:
            return LlamaCpp.of(self.job, base).said(rows, edited=False)
        finally:
            base.unlink()
