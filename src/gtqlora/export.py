"""The `export` stage: plan -> write beside -> validate -> publish, only for an edit that passed the safety floor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gtqlora import contrasts
from gtqlora.adapters import ADAPTER_WEIGHTS, PROJECTION, Edited, read_direction, read_info
from gtqlora.capture import Subject, open_subject
from gtqlora.checkpoint import copy_changed
from gtqlora.errors import RunError
from gtqlora.families import Anatomy, bind, load_config, meta_model
from gtqlora.judging import judge_of
from gtqlora.run import Run, sha256_file, versions, whole, write_json
from gtqlora.scoring import left_padded
from gtqlora.verify import Verdict, certified

Edit = Callable[[Tensor], Tensor]
"""A disk tensor in fp32 -> the edited one."""

_PROBES = 8


@dataclass(frozen=True)
class Exported:
    """Where the weights are, how many tensors changed, and the largest logit difference from the edited model."""

    folder: Path
    tensors_changed: int
    gate_values_changed: int
    largest_difference: float


def export(run: Run, out: Path, *, to: str = "safetensors") -> Exported:
    """Write the certified edit as plain merged weights in hub layout.

    Raises:
        FloorError: the safety floor was not passed by this very adapter and model.
        RunError: unknown format, OUT exists, or the written weights do not compute what the edited model does.
    """
    if to != "safetensors":
        raise RunError(f"--to {to}: unknown format; known: safetensors")
    verdict, adapter = certified(run)
    if out.exists():
        raise RunError(f"{out}: exists already; choose another folder or remove it")
    family, config = load_config(verdict.model)
    anatomy = bind(meta_model(family, config), family)
    edits = plan(adapter, anatomy)
    for leftover in out.parent.glob(f".{out.name}.*.new"):
        _remove_tree(leftover)
    with whole(out) as staged:
        gate_names = {f"{family.disk_prefix}{path}.weight" for path in anatomy.routers}
        moved = 0

        def change(name: str, tensor: Tensor) -> Tensor:
            nonlocal moved
            if name not in edits:
                return tensor
            edited = edits[name](tensor.float()).to(tensor.dtype)
            if name in gate_names:
                moved += int((edited != tensor).sum())
            return edited

        changed = copy_changed(verdict.model, staged, change)
        if changed != set(edits):
            absent = sorted(set(edits) - changed)[:3]
            raise RunError(f"{len(edits) - len(changed)} edited tensors are not in the checkpoint, e.g. {absent}")
        difference = _validate(staged, verdict, adapter, run)
        result = Exported(out, len(changed), moved, difference)
        _describe(staged, verdict, result, run)
    return result


def _remove_tree(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


def plan(adapter: Path, anatomy: Anatomy) -> dict[str, Edit]:
    """What the merge does to each tensor, by its name on disk; every adapter tensor is used exactly once.

    Raises:
        RunError: the adapter holds tensors that belong nowhere in this architecture.
    """
    if read_info(adapter).kind == PROJECTION:
        return _plan_projection(read_direction(adapter), anatomy)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    prefix, edits = anatomy.family.disk_prefix, {}
    for path in anatomy.lora_targets:
        a, b = tensors.pop(f"{path}.lora_A.weight", None), tensors.pop(f"{path}.lora_B.weight", None)
        if a is not None and b is not None:
            edits[f"{prefix}{path}.weight"] = _add(scale * (b.float() @ a.float()))
    for path in anatomy.routers:
        gate = tensors.pop(f"{path}.weight", None)
        tensors.pop(f"{path}.{anatomy.family.correction_bias}", None)  # frozen, asserted when the adapter was made
        if gate is not None:
            edits[f"{prefix}{path}.weight"] = _put(gate)
    if tensors:
        raise RunError(f"{adapter}: {len(tensors)} adapter tensors belong nowhere, e.g. {sorted(tensors)[0]}")
    return edits


def _add(delta: Tensor) -> Edit:
    return lambda weight: weight + delta


def _put(value: Tensor) -> Edit:
    return lambda _weight: value


def _plan_projection(direction_D: Tensor, anatomy: Anatomy) -> dict[str, Edit]:
    """W <- (I - r r^T) W for every writer of the residual stream; embedding rows lose their r component."""
    r_D, prefix = (direction_D / direction_D.norm()).float(), anatomy.family.disk_prefix
    edits: dict[str, Edit] = {f"{prefix}model.embed_tokens.weight": lambda w: w - torch.outer(w @ r_D, r_D)}
    writers = [f"{prefix}{path}.weight" for path in anatomy.residual_writers]
    for layer in anatomy.moe:
        for expert in range(anatomy.spec.n_experts):
            writers.append(anatomy.family.on_disk(layer.index, expert)[-1])
    for name in writers:
        edits[name] = lambda w: w - torch.outer(r_D, r_D @ w)
    return edits


@torch.no_grad()
def _probe_logits(subject: Subject, prompts: list[list[int]]) -> Tensor:
    ids_BS, mask_BS = left_padded(prompts, subject.tokenizer.pad_token_id, subject.device)
    logits_BSV = subject.model(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        position_ids=(mask_BS.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    return logits_BSV[mask_BS > 0].float()


def _validate(staged: Path, verdict: Verdict, adapter: Path, run: Run) -> float:
    """The written weights, loaded anew, compute what the edited model computes; the largest logit difference."""
    settings = run.manifest()["stages"]["verify"]["config"]
    rows = contrasts.load(settings["contrast"], judge_of(settings["judge"])).split(settings["split"]).rows[:_PROBES]
    merged = open_subject(str(staged), dtype=settings["dtype"], device=settings["device"])
    prompts = [contrasts.encode_prompt(merged.tokenizer, row.prompt) for row in rows]
    ours = _probe_logits(merged, prompts)
    edited = Edited(open_subject(verdict.model, dtype=settings["dtype"], device=settings["device"]), adapter)
    theirs = _probe_logits(edited.subject, prompts)
    difference = float((ours - theirs).abs().max())
    # rounding the merge to the checkpoint's dtype is the only difference allowed
    allowed = (1e-3 if merged.model.dtype == torch.float32 else 5e-2) * max(1.0, float(theirs.abs().max()))
    if difference > allowed:
        raise RunError(f"the merged weights' logits differ by {difference:.3g} from the edited model's; nothing written")
    return difference


def _describe(staged: Path, verdict: Verdict, result: Exported, run: Run) -> None:
    """`export.json` and the model card."""
    files = {p.name: sha256_file(p) for p in sorted(staged.iterdir()) if p.suffix in (".safetensors", ".json")}
    facts: dict[str, Any] = {
        "base": verdict.model,
        "base_fingerprint": run.manifest()["stages"]["verify"]["inputs"]["model"],
        "adapter": verdict.adapter,
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
        "",
        f"Safety floor: **{verdict.floor['verdict']}** ({verdict.floor['reason']}).",
        "",
        "| prompts | n | refusal before | refusal after | task accuracy after |",
        "|---|---|---|---|---|",
    ]
    for kind, row in verdict.table.items():
        cells = (_percent(row["refusal_before"]), _percent(row["refusal_after"]), _percent(row["accuracy_after"]))
        lines.append(f"| {kind} | {row['refusal_before']['n']} | {' | '.join(cells)} |")
    lines += ["", "Rates with 95 % intervals on held-out prompts. Verified in the dtype of the checkpoint.", ""]
    return "\n".join(lines)
