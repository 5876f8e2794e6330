"""Format `safetensors`: the edit merged into the checkpoint's own files, in hub layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gtqlora.errors import RunError
from gtqlora.exports.job import Job, Written
from gtqlora.exports.layerwise import validate
from gtqlora.families import packed, quantization
from gtqlora.families.copying import Copied, copy_changed
from gtqlora.results.adapter import PROJECTION


def write(job: Job, staged: Path) -> Written:
    """Write the merged weights.

    Raises:
        RunError: a projection of packed experts, or the written weights do not compute what the edited model does.
    """
    verdict = job.certificate.verdict
    quantized = quantization(verdict.model)
    if verdict.kind == PROJECTION and quantized is not None:
        raise RunError(
            f"a projection changes the routed experts, which {verdict.model} holds quantized ({quantized}); export it "
            "from the bf16, fp16 or fp32 checkpoint"
        )
    written = _merge(job, staged)
    return replace(written, divergence=validate(staged, job))


def _merge(job: Job, staged: Path) -> Written:
    config = job.config
    share = config.link or config.overlay
    copied = copy_changed(job.model, staged, job.edits, share=share, overlay=config.overlay)
    kept = {name: tally.kept for name, tally in sorted(copied.changed.items())}
    return Written(
        changed=sorted(copied.changed),
        gate_values_changed=sum(tally.values for name, tally in copied.changed.items() if name in job.gates),
        digest=copied.digest,
        hashes=copied.hashes,
        kept=kept,
        notes=[*(_shared(copied) if share else ()), *_rounded_anew(job)],
    )


def _rounded_anew(job: Job) -> Iterator[str]:
    if quantization(job.model) == packed.FP8:
        yield (
            "Changed FP8 weights were quantized anew, in their blocks, and judged so. They were judged in 16-bit "
            "arithmetic: a server that computes in FP8 rounds activations as well."
        )


def _shared(copied: Copied) -> Iterator[str]:
    """Say which weight files hold bytes that are the base's as well."""
    ways = list(copied.moved.values())
    if links := ways.count("hard link"):
        yield f"{_files(links)} hard links to the base's: the same files, so writing into one writes into both."
    if clones := ways.count("reflink"):
        yield f"{_files(clones)} reflinks of the base's: on the same disk blocks, until somebody writes into either."
    if ways and not links + clones:
        yield (
            "No weight file could be shared with the base's: where the file system has no reflinks, or on another one, "
            "a file with changed tensors is a copy."
        )


def _files(count: int) -> str:
    return f"{count} weight files are" if count > 1 else "1 weight file is"
