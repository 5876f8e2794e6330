"""Format `peft`: an adapter folder that PEFT, vLLM or SGLang loads by itself, and applies whole.

The three read the same two files in three ways, so that each gets its own:

- PEFT rewrites targets named like parts of an MLP into routed experts for some thirty types of models (peft#3711), but
  leaves `target_parameters` alone; whole routers go into `modules_to_save`.
- vLLM has no whole modules beside classifiers. A changed router is LoRA of exact rank there: its change times identity.
- SGLang takes one rank for all, and no router.

Shape letters: D hidden, E experts, R rank of a router's LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor

from gtqlora.edits.merging import merged
from gtqlora.edits.wrapping import Parts
from gtqlora.errors import RunError
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.exports.job import Job, Written, kept_share
from gtqlora.exports.plain import PlainForm
from gtqlora.families.coverage import check_covered, covered
from gtqlora.families.files import weight_files
from gtqlora.families.identity import identify
from gtqlora.results.adapter import PEFT_SETTINGS, PROJECTION
from gtqlora.results.export import public_name
from gtqlora.storage.atomic import scratch_errors, write_json

Loader = Literal["peft", "vllm", "sglang"]

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes (vLLM 0.33.0, vllm/config/lora.py)."""

Settings = dict[str, object]


@dataclass(frozen=True)
class Gate:
    """A changed router in fp32.

    Attributes:
        path: of the router in memory.
        before_ED, wanted_ED: its weight in the checkpoint, and by the edit.
        after_ED: the latter, rounded to the checkpoint's dtype, and in it.
        bias_E: what steers its selection beside the weight, as it is in the checkpoint; None where there is none.
    """

    path: str
    before_ED: Tensor
    wanted_ED: Tensor
    after_ED: Tensor
    bias_E: Tensor | None


@dataclass(frozen=True)
class Adapter:
    """What goes into an adapter folder."""

    settings: Settings
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Write the two files."""
        tensors = {name: self.tensors[name].contiguous() for name in sorted(self.tensors)}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / PEFT_SETTINGS, self.settings)


def write(job: Job, staged: Path) -> Written:
    """Write the adapter.

    Raises:
        RunError: a projection, or the program would not apply all of the edit.
    """
    target = job.config.target
    assert target is not None, "the settings say which program it is for"
    _check(job, target)
    identity, gates = identify(job.model), _gates(job)
    adapter = _MAKERS[target](job, gates)
    adapter.write(staged)
    identity.check_unchanged()
    return Written(
        changed=sorted(job.edits),
        gate_values_changed=sum(int((gate.before_ED != gate.after_ED.float()).sum()) for gate in gates),
        digest=identity.digest,
        kept=dict.fromkeys(job.edits, 1.0) | ({} if target == "vllm" else _kept(job, gates)),
        form=PlainForm(job.certificate, lambda: nullcontext(staged) if target == "peft" else _in_peft(job, gates)),
        notes=[*adapter.notes, _how_known(job, target)],
    )


def _how_known(job: Job, target: Loader) -> str:
    """Return a sentence on how it is known that the program applies all of the edit."""
    found = covered(job.anatomy.family, target)
    if found.tested:
        return f"It is applied whole, as gtqlora's tests see: {found.source}."
    return (
        f"That it is applied whole was read in {found.source}, and not run; the floor was judged on the same edit in "
        "plain PEFT. Ask something that only the edit answers before you rely on it."
    )


@contextmanager
def _in_peft(job: Job, gates: Sequence[Gate]) -> Iterator[Path]:
    """Give the same edit in PEFT's form, where the program itself does not run here."""
    with scratch_errors(), TemporaryDirectory() as folder:
        _for_peft(job, gates).write(Path(folder))
        yield Path(folder)


def _check(job: Job, target: Loader) -> None:
    info = job.certificate.adapter.info
    if info.kind == PROJECTION:
        raise RunError(
            "a projection changes the embedding and every routed expert, which no adapter holds; export it merged, "
            "with --to safetensors or --to gguf"
        )
    parts = _parts(job)
    check_covered(job.anatomy.family, target, parts.lora, gates=bool(parts.gates))


def _parts(job: Job) -> Parts:
    info = job.certificate.adapter.info
    return Parts.of(job.anatomy, info.mode, info.target)


def _gates(job: Job) -> list[Gate]:
    folder, shards = weight_files(job.model)
    with TensorFiles([folder / shard for shard in shards]) as files:
        return [_gate(job, path, files) for path in _parts(job).gates]


def _gate(job: Job, path: str, files: TensorFiles) -> Gate:
    name, bias = job.names.whole(f"{path}.weight"), job.anatomy.family.correction_bias
    stored_ED, edit = files.read(name), job.edits[name]
    return Gate(
        path,
        before_ED=stored_ED.float(),
        wanted_ED=edit(stored_ED.float()),
        after_ED=merged(stored_ED, edit),
        bias_E=None if bias is None else files.read(job.names.whole(f"{path}.{bias}")),
    )


def _kept(job: Job, gates: Sequence[Gate]) -> dict[str, float]:
    """Return what survives of each router's change; factors of LoRA are written as they were trained."""
    shares = [kept_share(gate.before_ED, gate.wanted_ED, gate.after_ED.float()) for gate in gates]
    return {job.names.whole(f"{gate.path}.weight"): share for gate, share in zip(gates, shares, strict=True)}


# --- one maker for each program --------------------------------------------------------------------------------------


def _for_peft(job: Job, gates: Sequence[Gate]) -> Adapter:
    shared = [path for path in _parts(job).lora if path in job.anatomy.shared]
    others = [path for path in _parts(job).lora if path not in job.anatomy.shared]
    settings = _settings(job, others or DUMMY_TARGET_MODULES) | {
        "target_parameters": [f"{path}.weight" for path in shared] or None,
        "modules_to_save": [gate.path for gate in gates] or None,
    }
    whole = {f"{_PREFIX}{gate.path}.weight": gate.after_ED for gate in gates}
    # PEFT wants all of a module that is saved whole.
    bias = job.anatomy.family.correction_bias
    whole |= {f"{_PREFIX}{gate.path}.{bias}": gate.bias_E for gate in gates if gate.bias_E is not None}
    return Adapter(
        settings, _factors(job, lambda path: path) | whole, (_IN_PEFT, *([_SHARED_IN_PEFT] if shared else []))
    )


def _for_vllm(job: Job, gates: Sequence[Gate]) -> Adapter:
    scale, tensors = job.certificate.adapter.scale, _factors(job, _on_disk(job))
    ranks = {_on_disk(job)(gate.path): min(gate.before_ED.shape) for gate in gates}
    for gate in gates:
        name = f"{_PREFIX}{_on_disk(job)(gate.path)}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = exact_factors(gate, scale)
    # One scale for all, alpha / r, so that it does not matter whether a version of vLLM reads the patterns.
    patterns = {re.escape(".".join(name.split(".")[-2:])): rank for name, rank in ranks.items()}
    settings = _settings(job, _last_words(tensors)) | {
        "rank_pattern": patterns,
        "alpha_pattern": {pattern: rank * scale for pattern, rank in patterns.items()},
    }
    return Adapter(settings, tensors, (_IN_VLLM.format(rank=_vllm_rank(job, ranks.values())),))


def _for_sglang(job: Job, gates: Sequence[Gate]) -> Adapter:
    assert not gates
    tensors = _factors(job, _on_disk(job))
    return Adapter(_settings(job, _last_words(tensors)), tensors, (_IN_SGLANG,) if job.anatomy.shared else ())


_MAKERS: dict[Loader, Callable[[Job, Sequence[Gate]], Adapter]] = {
    "peft": _for_peft,
    "vllm": _for_vllm,
    "sglang": _for_sglang,
}

_IN_PEFT = "It is loaded on the base as AutoModelForCausalLM opens it, with PEFT 0.21 and transformers 5."
_SHARED_IN_PEFT = "Shared experts are in target_parameters."
_IN_VLLM = (
    "vLLM needs --max-lora-rank {rank}, as a changed router is LoRA of full rank; it rounds adapters to the model's "
    "dtype."
)
_IN_SGLANG = "SGLang needs --disable-shared-experts-fusion: shared experts that it fuses with others take no adapter."


def _settings(job: Job, modules: Sequence[str] | str) -> Settings:
    adapter = job.certificate.adapter
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(adapter.info.base),
        "revision": adapter.info.revision,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
    }


def _on_disk(job: Job) -> Callable[[str], str]:
    """Return what gives a module's name in the checkpoint, by which servers know it."""
    return lambda path: job.names.whole(f"{path}.weight").removesuffix(".weight")


def _factors(job: Job, named: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the factors of LoRA as they were trained, in fp32, by PEFT's names for them."""
    tensors = job.certificate.adapter.tensors
    return {
        f"{_PREFIX}{named(path)}.{part}.weight": tensors[f"{path}.{part}"]
        for path in _parts(job).lora
        for part in ("lora_A", "lora_B")
    }


def exact_factors(gate: Gate, scale: float) -> tuple[Tensor, Tensor]:
    """Return A_RD and B_ER, R the smaller size, whose product times LoRA's scale is the whole change of a router."""
    delta_ED = gate.wanted_ED - gate.before_ED
    identity_RR = torch.eye(min(delta_ED.shape)) / scale
    return (delta_ED, identity_RR) if len(identity_RR) == len(delta_ED) else (identity_RR, delta_ED)


def _last_words(tensors: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[-3] for name in tensors})


def _vllm_rank(job: Job, ranks: Iterable[int]) -> int:
    needed = max([job.certificate.adapter.rank, *ranks])
    for rank in _VLLM_RANKS:
        if rank >= needed:
            return rank
    raise RunError(
        f"the adapter needs LoRA of rank {needed}, and vLLM takes {_VLLM_RANKS[-1]} at most; export it merged"
    )
