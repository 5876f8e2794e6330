"""Format `gguf-adapter`: the edit as a LoRA adapter that llama.cpp loads on a GGUF of the base, quantized or not.

A gate, which trains whole, becomes a LoRA of full rank, so that its change is exact. llama.cpp takes the scale to be 1
where an adapter names no alpha; with one it would divide it by each tensor's own rank.

Shape letters: D hidden (what a matrix writes), I inputs, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gtqlora.edits.merging import Edit, LowRank
from gtqlora.errors import RunError
from gtqlora.exports.gguf.header import header, padded
from gtqlora.exports.gguf.patch import Patch
from gtqlora.exports.gguf.reading import STRING, Value, read_gguf
from gtqlora.exports.gguf.types import BY_NAME, GgmlType, quantized
from gtqlora.exports.gguf.values import Checkpoint, unrounded
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import EditedModel, Job, Written
from gtqlora.exports.llama_cpp import LlamaCpp
from gtqlora.families import identify
from gtqlora.families.coverage import check_covered
from gtqlora.families.llama_cpp.layout import Layout, Made, Take, as_is
from gtqlora.results.adapter import PROJECTION

FILE = "adapter.gguf"
"""What the adapter is called in the folder."""
F32 = BY_NAME["F32"]
Kind = tuple[GgmlType, tuple[int, ...]]
"""What a tensor is in a GGUF."""


@dataclass(frozen=True)
class Factors:
    """The change of one tensor as a product b_DR a_RI, with the scale inside."""

    a_RI: Tensor
    b_DR: Tensor


def write(job: Job, staged: Path) -> Written:
    """Write the adapter.

    Raises:
        RunError: llama.cpp would lose a part of the edit, or there is no GGUF of the base to judge it on.
        ModelError: the user's GGUF is malformed, or not of the base.
    """
    check_whole(job)
    # Before all files of the model are hashed, which takes minutes: a wrong name is told at once.
    if job.config.base is not None:
        read_gguf(Path(job.config.base).expanduser())
    identity = identify(job.model)
    base, kind, made = base_of(job, staged, job.config.base, "--base", job.config.tokenizer)
    checkpoint = Checkpoint.of(job)
    factors = {name: factors_of(checkpoint, one) for name, one in made.items()}
    write_adapter(staged / FILE, Layout.of(job.model, job.names).architecture, factors)
    form = LlamaCpp.of(job, base, adapter=staged / FILE, label=f"GGUF adapter on {kind}")
    identity.check_unchanged()
    return Written(
        changed=sorted(factors),
        gate_values_changed=checkpoint.gate_values_changed(),
        digest=identity.digest,
        form=form,
        notes=[*_notes(job, kind), *form.notes(job.certificate.outcomes)],
    )


def check_whole(job: Job) -> None:
    """Check that llama.cpp applies all of the edit when it loads it as an adapter.

    Raises:
        RunError: it does not; the message names what would be lost.
    """
    adapter, anatomy = job.certificate.adapter, job.anatomy
    if adapter.info.kind == PROJECTION:
        raise RunError(
            f"{adapter.path}: a projection changes the embedding and the routed experts, of which this format holds "
            "no change; export it merged, with --to gguf or --to gguf --onto USER.gguf"
        )
    lora = [path for path in anatomy.lora_targets if f"{path}.lora_A" in adapter.tensors]
    gates = any(f"{path}.weight" in adapter.tensors for path in anatomy.routers)
    check_covered(anatomy.family, "llama.cpp", lora, gates)


def base_of(
    edited: EditedModel, staged: Path, given: str | None, option: str, donor: str | None = None
) -> tuple[Path, str, Mapping[str, Made]]:
    """Return a GGUF of the base, the type of most of it, and its tensors that the edit changes.

    Args:
        staged: the folder that is being written; a GGUF that is made for now lies beside it.
        given: the user's own GGUF, which the `option` of this name would be.
        donor: a GGUF of which the tokenizer is taken.

    Raises:
        ModelError: the user's GGUF is malformed, or not of the base.
        RunError: there is none, and none can be made.
    """
    if given is not None:
        path = Path(given).expanduser()
        found = Patch.of(edited, path, rewritten=False)
        return path, found.most, found.changed
    try:
        plan = Plan.of(edited, donor)
    except RunError as error:
        raise RunError(
            f"{error}; or give the GGUF that the adapter is for with {option}: it is judged on that"
        ) from error
    # in the hidden folder that goes with what is staged there, also if this process is killed
    path = staged.with_name(f"{staged.name}.base.gguf")
    plan.write(path, None)
    return path, plan.dtype, {name: one for name, one in plan.layout.made.items() if one.sources & edited.edits.keys()}


def factors_of(checkpoint: Checkpoint, made: Made) -> Factors:
    """Return the change of one tensor of a GGUF, whose rows or columns may be in another order than on disk.

    Raises:
        RunError: the GGUF holds several tensors of the checkpoint as this one.
    """
    if len(made.parts) != 1 or len(made.shape) != 2:
        raise RunError(f"{made.name}: is made of several tensors in this GGUF, so no adapter fits it; use --onto")
    (part,) = made.parts
    edit: Edit = checkpoint.edited.edits[part.disk]
    edit.check(tuple(checkpoint.headers[part.disk].shape))
    if isinstance(edit, LowRank):
        return reordered(Factors(edit.a_RI.float(), edit.b_DR.float()), part.take)
    before, after = (torch.cat(list(checkpoint.parts(made, change))) for change in (None, unrounded))
    return of_full_rank(after - before)


def of_full_rank(change_EI: Tensor) -> Factors:
    """Return a change as a product with the identity, on its smaller side."""
    n_experts, inputs = change_EI.shape
    if n_experts <= inputs:
        return Factors(change_EI, torch.eye(n_experts))
    return Factors(torch.eye(inputs), change_EI)


def reordered(factors: Factors, take: Take) -> Factors:
    """Return the factors of the matrix that `take`, which reorders rows or columns, makes of their product."""
    if take is as_is:
        return factors
    outputs, inputs = factors.b_DR.shape[0], factors.a_RI.shape[1]
    rows, columns = order(take, outputs, inputs)
    return Factors(factors.a_RI[:, columns], factors.b_DR[rows])


def order(take: Take, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Return which rows and which columns of a matrix `take` takes, in its order; one of both stays as it is."""
    # fp32 counts exactly far enough
    rows_DI = take(torch.arange(outputs, dtype=torch.float32)[:, None].repeat(1, inputs))
    columns_DI = take(torch.arange(inputs, dtype=torch.float32)[None].repeat(outputs, 1))
    return rows_DI[:, 0].long(), columns_DI[0].long()


def write_adapter(path: Path, architecture: str, factors: Mapping[str, Factors]) -> None:
    """Write a LoRA adapter for llama.cpp in F32, by name of the changed tensors."""
    shapes: dict[str, Kind] = {}
    for name, found in factors.items():
        shapes |= {f"{name}.lora_a": (F32, tuple(found.a_RI.shape)), f"{name}.lora_b": (F32, tuple(found.b_DR.shape))}
    every = (tensor for found in factors.values() for tensor in (found.a_RI, found.b_DR))
    write_tensors(path, architecture, shapes, (quantized(tensor, F32) for tensor in every))


def write_tensors(path: Path, architecture: str, shapes: Mapping[str, Kind], contents: Iterable[bytes]) -> None:
    """Write a LoRA adapter for llama.cpp from the bytes of its tensors, in their order."""
    metadata = {
        "general.type": Value(STRING, "adapter"),
        "general.architecture": Value(STRING, architecture),
        "adapter.type": Value(STRING, "lora"),
    }
    with path.open("xb") as out:
        out.write(header(metadata, shapes))
        for content in contents:
            out.write(content)
            out.write(bytes(padded(out.tell()) - out.tell()))


def _notes(job: Job, kind: str) -> list[str]:
    base = "BASE.gguf" if job.config.base is None else Path(job.config.base).name
    return [
        f"llama.cpp loads it with `llama-server -m {base} --lora {FILE}`; a request switches it off or on with "
        '"lora": [{"id": 0, "scale": 0.0}] or 1.0.',
        f"The floor was judged with the adapter on a GGUF of the base in {kind}; with another one, or another scale, "
        "nothing was shown.",
    ]
