"""Format `gguf`: the edit in the user's own GGUF, or the merged model as a new one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gtqlora.exports.gguf.patch import Patch
from gtqlora.exports.gguf.reading import read_gguf
from gtqlora.exports.gguf.values import rounded
from gtqlora.exports.gguf.whole import Converted, Plan
from gtqlora.exports.job import Job, Written
from gtqlora.exports.llama_cpp import LlamaCpp
from gtqlora.families import identify

FILE = "model.gguf"
"""What a whole GGUF is called in the folder."""


def write(job: Job, staged: Path) -> Written:
    """Write the edited GGUF.

    Raises:
        ModelError: the model cannot be a GGUF, or the user's is none of this model.
        RunError: a tensor's type cannot be written, or there is no tokenizer.
    """
    # Before all files of the model are hashed, which takes minutes: a wrong name is told at once.
    for path in filter(None, (job.config.onto, job.config.tokenizer)):
        read_gguf(Path(path).expanduser())
    identity = identify(job.model)
    written = _whole(job, staged) if job.config.onto is None else _onto(job, staged, Path(job.config.onto).expanduser())
    identity.check_unchanged()
    return replace(written, digest=identity.digest)


def _onto(job: Job, staged: Path, source: Path) -> Written:
    found = Patch.of(job, source)
    kept = found.write(staged)
    form = LlamaCpp.of(job, source, edited=staged / source.name, label=f"GGUF ({found.most})")
    return Written(
        changed=sorted(found.changed),
        gate_values_changed=found.checkpoint.gate_values_changed(),
        digest="",
        kept=kept,
        form=form,
        notes=[*found.notes(), *form.notes(job.certificate.outcomes)],
    )


def _whole(job: Job, staged: Path) -> Written:
    plan = Plan.of(job, job.config.tokenizer)
    plan.write(staged / FILE, rounded)
    kept = plan.kept()
    return Written(
        changed=sorted(kept),
        gate_values_changed=plan.checkpoint.gate_values_changed(),
        digest="",
        kept=kept,
        form=Converted(job, plan, staged / FILE),
        notes=LlamaCpp.of(job, staged / FILE).notes(job.certificate.outcomes),
    )
