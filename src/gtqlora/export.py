"""The `export` stage: plan -> write beside -> validate -> publish, only for an edit that passed the safety floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gtqlora import contrasts
from gtqlora.adapters import (
    ADAPTER_WEIGHTS,
    PROJECTION,
    load,
    norm_preserving,
    projected,
    read_direction,
    read_info,
)
from gtqlora.capture import Subject, open_subject
from gtqlora.checkpoint import copy_changed
from gtqlora.contrasts import Row
from gtqlora.errors import RunError
from gtqlora.experts.loading import BF16
from gtqlora.families import Anatomy, bind, load_config, meta_model, quantization
from gtqlora.families.packed import OURS
from gtqlora.judging import judge_of
from gtqlora.run import Run, sha256_file, versions, whole, write_json
from gtqlora.scoring import left_padded
from gtqlora.verify import Verdict, certified

Edit = Callable[[Tensor], Tensor]
"""A disk tensor in fp32 -> the edited one."""

_PROBES = 8
_NEEDS_US = (
    "The experts are saved in 4 bits by gtqlora: `import gtqlora.experts` before `from_pretrained`, or transformers "
    "makes experts of random numbers."
)


@dataclass(frozen=True)
class Exported:
    """Where the weights are, how many tensors changed, and the largest logit difference from the edited model."""

    folder: Path
    tensors_changed: int
    gate_values_changed: int
    largest_difference: float


def export(run: Run, out: Path, *, to: str = "safetensors") -> Exported:
    """Write the certified edit as plain merged weights in hub layout; routed experts stay as the checkpoint has them.

    Raises:
        FloorError: the safety floor was not passed by this very adapter and model, with the checkpoint's own experts.
        RunError: unknown format, OUT exists, a projection of packed experts, or the written weights do not compute
            what the edited model does.
    """
    if to != "safetensors":
        raise RunError(f"--to {to}: unknown format; known: safetensors")
    verdict, adapter = certified(run)
    if out.exists():
        raise RunError(f"{out}: exists already; choose another folder or remove it")
    if verdict.kind == PROJECTION and verdict.experts != BF16:
        raise RunError(
            f"{run.path}: a projection changes the routed experts, which {verdict.model} holds in 4 bits; export it "
            "from the bf16, fp16 or fp32 checkpoint"
        )
    family, config = load_config(verdict.model)
    anatomy = bind(meta_model(family, config), family)
    edits = plan(adapter, anatomy)
    with whole(out) as staged:
        changed, moved = _merge(verdict.model, staged, edits, _on_disk(anatomy, anatomy.routers))
        difference = _validate(staged, verdict, adapter, run)
        result = Exported(out, changed, moved, difference)
        _describe(staged, verdict, result, run)
    return result


def _on_disk(anatomy: Anatomy, paths: Iterable[str]) -> list[str]:
    return [f"{anatomy.family.disk_prefix}{path}.weight" for path in paths]


def _merge(model: str, staged: Path, edits: dict[str, Edit], gates: Iterable[str]) -> tuple[int, int]:
    """Write MODEL with the edits; how many tensors, and how many gate values, came out different on disk."""
    gates, moved = set(gates), 0

    def change(name: str, tensor: Tensor) -> Tensor:
        nonlocal moved
        if name not in edits:
            return tensor
        edited = edits[name](tensor.float()).to(tensor.dtype)
        if name in gates:
            moved += int((edited != tensor).sum())
        return edited

    changed = copy_changed(model, staged, change)
    if absent := sorted(set(edits) - changed):
        raise RunError(f"{len(absent)} edited tensors are not in the checkpoint, e.g. {absent[0]}")
    return len(changed), moved


def plan(adapter: Path, anatomy: Anatomy) -> dict[str, Edit]:
    """What the merge does to each tensor, by its name on disk; every adapter tensor is used exactly once.

    Raises:
        RunError: the adapter holds tensors that belong nowhere in this architecture.
    """
    info = read_info(adapter)
    if info.kind == PROJECTION:
        return _plan_projection(read_direction(adapter), anatomy, norm_preserving(info))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    edits: dict[str, Edit] = {}
    for path, name in zip(anatomy.lora_targets, _on_disk(anatomy, anatomy.lora_targets), strict=True):
        if f"{path}.lora_A.weight" in tensors:
            a, b = tensors.pop(f"{path}.lora_A.weight"), tensors.pop(f"{path}.lora_B.weight")
            edits[name] = _add(scale * (b.float() @ a.float()))
    for path, name in zip(anatomy.routers, _on_disk(anatomy, anatomy.routers), strict=True):
        tensors.pop(f"{path}.{anatomy.family.correction_bias}", None)  # frozen; asserted whenever an adapter is loaded
        if f"{path}.weight" in tensors:
            edits[name] = _put(tensors.pop(f"{path}.weight"))
    if tensors:
        raise RunError(f"{adapter}: {len(tensors)} adapter tensors belong nowhere, e.g. {sorted(tensors)[0]}")
    return edits


def _add(delta: Tensor) -> Edit:
    return lambda weight: weight + delta


def _put(value: Tensor) -> Edit:
    return lambda _weight: value


def _plan_projection(direction_D: Tensor, anatomy: Anatomy, keep: bool) -> dict[str, Edit]:
    """W <- (I - r r^T) W for every writer of the residual stream, its columns' lengths kept if told to."""
    r_D, family = direction_D / direction_D.norm(), anatomy.family
    experts = ((layer.index, expert) for layer in anatomy.moe for expert in range(anatomy.spec.n_experts))
    writers = _on_disk(anatomy, anatomy.residual_writers) + [family.on_disk(*where)[-1] for where in experts]
    edits: dict[str, Edit] = dict.fromkeys(writers, lambda w: projected(w, r_D, norm_preserving=keep))
    for name in _on_disk(anatomy, ["model.embed_tokens"]):
        edits[name] = lambda w: projected(w.mT, r_D, norm_preserving=keep).mT
    return edits


@torch.no_grad()
def _probe_logits(subject: Subject, rows: Sequence[Row]) -> Tensor:
    """Logits at every prompt token, in fp32 on the CPU; the model goes out of memory when its caller lets go of it."""
    prompts = [contrasts.encode_prompt(subject.tokenizer, row.prompt) for row in rows]
    pad = subject.pad_id
    ids_BS, mask_BS = left_padded(prompts, pad, subject.device)
    logits_BSV = subject.model(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    return logits_BSV[mask_BS > 0].float().cpu()


def _validate(staged: Path, verdict: Verdict, adapter: Path, run: Run) -> float:
    """The written weights, loaded anew, compute what the edited model computes; the largest logit difference."""
    settings = run.manifest()["stages"]["verify"]["config"]
    rows = contrasts.load(settings["contrast"], judge_of(settings["judge"])).split(settings["split"]).rows[:_PROBES]
    where = {"dtype": settings["dtype"], "device": settings["device"], "experts": verdict.experts}
    ours = _probe_logits(open_subject(str(staged), **where), rows)
    theirs = _probe_logits(load(verdict.model, adapter, **where).subject, rows)
    off = (ours - theirs).abs()
    # Rounding the merge to the checkpoint's dtype turns a few near-tied routing choices over: a token's logits may
    # then differ by much, so the mean is judged; without rounding, every logit.
    exact = load_config(str(staged))[1].dtype == torch.float32 and where["dtype"] in ("auto", "float32")
    found, allowed = (off.max(), 1e-3 * theirs.abs().max()) if exact else (off.mean(), 0.1 * theirs.abs().mean())
    if not found <= allowed:  # also when it is NaN
        raise RunError(
            f"the merged weights' logits differ by {found:.3g} from the edited model's (allowed: {allowed:.3g}); "
            "nothing was written"
        )
    return float(off.max())


def _describe(staged: Path, verdict: Verdict, result: Exported, run: Run) -> None:
    """`export.json` and the model card."""
    files = {p.name: sha256_file(p) for p in sorted(staged.iterdir()) if p.suffix in (".safetensors", ".json")}
    facts: dict[str, Any] = {
        "base": verdict.model,
        "base_fingerprint": run.manifest()["stages"]["verify"]["inputs"]["model"],
        "adapter": verdict.adapter,
        "experts": verdict.experts,
        "floor": verdict.floor,
        "tensors_changed": result.tensors_changed,
        "gate_values_changed": result.gate_values_changed,
        "largest_logit_difference": result.largest_difference,
        "versions": versions(),
        "files": files,
    }
    write_json(staged / "export.json", facts)
    (staged / "README.md").write_text(model_card(verdict, result))


def _percent(interval: dict[str, Any] | None) -> str:
    if not interval or interval["value"] is None:
        return "not measured"
    return f"{interval['value']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"


def model_card(verdict: Verdict, result: Exported) -> str:
    """A hub model card that states what was measured."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [gtqlora, mixture-of-experts]",
        "---",
        f"# {Path(verdict.model).name}, edited with gtqlora ({verdict.kind})",
        "",
        f"Merged weights: {result.tensors_changed} tensors changed, routed experts "
        + ("projected." if verdict.kind == PROJECTION else "untouched."),
        *(["", _NEEDS_US] if quantization(verdict.model) == OURS else []),
        "",
        f"Safety floor: **{verdict.floor['verdict']}** ({verdict.floor['reason']}).",
        "",
        "| prompts | n | refusal before | refusal after | task accuracy after |",
        "|---|---|---|---|---|",
    ]
    for kind, row in verdict.table.items():
        cells = (_percent(row["refusal_before"]), _percent(row["refusal_after"]), _percent(row["accuracy_after"]))
        lines.append(f"| {kind} | {row['refusal_before']['n']} | {' | '.join(cells)} |")
    lines += [
        "",
        "Rates with 95 % intervals on held-out prompts. Verified in the dtype of the checkpoint, with its own experts"
        + (" (4 bits)." if verdict.experts != BF16 else "."),
        "",
    ]
    return "\n".join(lines)
