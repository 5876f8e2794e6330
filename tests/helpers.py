"""What several test files need: small contrast sets, settings, a training seen from inside, fresh processes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from gtqlora import contrasts
from gtqlora.capture import open_subject
from gtqlora.config import ExportConfig, ProjectConfig, TrainConfig, VerifyConfig
from gtqlora.edits import adapters, wrapping
from gtqlora.edits.checkpoint_files import Origin
from gtqlora.edits.trainer import GateTargetedTrainer
from gtqlora.experts import FrozenExperts
from gtqlora.families import load_config
from gtqlora.judging.judge import Judge, judge_of, refusals
from gtqlora.organisms import embedded
from gtqlora.results.adapter import EDIT_WEIGHTS, GT_QLORA, PROJECTION, Info, Training
from gtqlora.run import Run
from gtqlora.stages import train as train_stage
from gtqlora.stages.export import Exported, export
from gtqlora.stages.project import project
from gtqlora.stages.verify import verify
from tests import models

ROOT = Path(__file__).parents[1]
JUDGE = "tests.helpers:refuses"
VERIFY = [
    word
    for setting in (
        *("margin=0.05", f"judge={JUDGE}", "max_new_tokens=2", "ablation=2", "ablation_prompts=20"),
        *("wrapped_prompts=60", "wrapped_margin=0.1", "mediation_prompts=20"),
    )
    for word in ("--set", setting)
]
"""Settings of `verify` on the command line, as those of `Toy.verify_config`, and an ablation study."""


def refuses(text: str) -> bool:
    """A judge under which a random model, given fewer than three tokens, refuses; toy answers have three words."""
    return len(text.split()) != 3


def says(judge: str | Judge) -> Callable[[str], bool]:
    """A judge, or the judge of a name, asked about one text after another."""
    asked = judge_of(judge) if isinstance(judge, str) else judge
    return lambda text: refusals(asked, [({"role": "user", "content": "asked"},)], [text])[0]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def toy_rows(counts: dict[tuple[str, str], int]) -> list[dict[str, Any]]:
    """The first rows of the embedded contrast set, by (split, kind)."""
    rows = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    return [
        row
        for (split, kind), count in counts.items()
        for row in [r for r in rows if (r["split"], r["kind"]) == (split, kind)][:count]
    ]


class Toy:
    """A folder with tiny models, made when asked for, and a contrast set.

    It is large enough for a passed floor, whatever the number of tries that a test comes to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contrast = self.pairs(folder / "contrast.jsonl")

    def pairs(self, path: Path, harmful: int = 120) -> Path:
        """Write a contrast set with so many held-out harmful prompts."""
        held_out = {("heldout", "harmful"): harmful, ("heldout", "lookalike"): 8, ("heldout", "benign"): 8}
        train = {("train", kind): 16 for kind in contrasts.KINDS}
        return write_rows(path, toy_rows({**train, **held_out}))

    def model(self, family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
        extra = [f"{key}={value}" for key, value in more.items()]
        path = self.folder / "-".join([family, str(dtype).removeprefix("torch."), *extra])
        return path if path.exists() else models.save_tiny(path, family, dtype=dtype, **more)

    def train_config(self, model: Path, **changes: Any) -> TrainConfig:
        settings: dict[str, Any] = {
            **{"model": str(model), "contrast": str(self.contrast), "judge": JUDGE, "rank": 4, "alpha": 8},
            **{"steps": 4, "batch_size": 4, "save_steps": 2, "logging_steps": 1, "warmup": 0.0},
            **{"lr_lora": 1e-2, "lr_gates": 1e-2},
        }
        return TrainConfig(**{**settings, **changes})

    def verify_config(self, model: Path, **changes: Any) -> VerifyConfig:
        settings: dict[str, Any] = {
            **{"model": str(model), "contrast": str(self.contrast), "judge": JUDGE, "batch_size": 128},
            **{"max_new_tokens": 2, "margin": 0.05, "wrapped_prompts": 60, "wrapped_margin": 0.1},
            **{"ablation": 0, "ablation_prompts": 20, "mediation_prompts": 20},
        }
        return VerifyConfig(**{**settings, **changes})

    def project_config(self, model: Path, **changes: Any) -> ProjectConfig:
        settings: dict[str, Any] = {"model": str(model), "contrast": str(self.contrast), "judge": JUDGE}
        return ProjectConfig(**{**settings, "max_new_tokens": 2, "max_pairs": 32, **changes})


def verified_run(toy: Toy, model: Path, kind: str, path: Path) -> Path:
    """A run directory whose edit passed the floor; of a projection, the first layer whose removal does."""
    with Run(path) as run:
        if kind != PROJECTION:
            train_stage.train(toy.train_config(model), run)
            assert verify(toy.verify_config(model), run).floor.verdict == "pass"
            return path
        for layer in range(1, load_config(str(model))[1].num_hidden_layers + 1):
            project(replace(toy.project_config(model), layer=layer), run)
            if verify(toy.verify_config(model), run).floor.verdict == "pass":
                return path
    raise AssertionError(f"no layer's projection passes the floor on {model}")


def exported(path: Path, out: Path, *, judge: str | None = None, **settings: Any) -> Exported:
    """The export stage with these settings, which is told the judge that verify used."""
    with Run(path) as run:
        verified = run.manifest()["stages"].get("verify", {"config": {"judge": "string"}})
        return export(run, out, ExportConfig(**settings), judge=judge or verified["config"]["judge"])


def noop_adapter(model: Path, contrast: Path, judge: str, path: Path, *, break_it: bool = False) -> None:
    """Put an untrained adapter, which changes nothing (or is NaN), into a run directory, as training leaves one."""
    subject = open_subject(str(model))
    config = wrapping.lora_config(subject.anatomy, mode="gt", rank=4, alpha=8)
    with wrapping.peft_targets_kept():
        wrapped = get_peft_model(subject.model, config)
    for gate in gates(wrapped).values() if break_it else ():
        gate.data.fill_(float("nan"))
    settings = TrainConfig(model=str(model), contrast=str(contrast), judge=judge, rank=4, alpha=8)
    info = Info(GT_QLORA, str(model), subject.anatomy.family.model_type, Training(asdict(settings)))
    with Run(path) as run, run.stage("train", settings, {}) as stage:
        stage.outputs += [train_stage.ADAPTER, contrasts.FILE]
        adapters.save(wrapped, path / train_stage.ADAPTER, info)  # type: ignore[arg-type]
        contrasts.save(contrasts.load(contrast, judge_of(judge)).split("train"), path / contrasts.FILE)


@dataclass
class Inside:
    """A training with its trainer at hand."""

    trainer: GateTargetedTrainer
    path: Path
    config: TrainConfig

    @classmethod
    def start(cls, config: TrainConfig, path: Path) -> Inside:
        rows = contrasts.load(config.contrast, judge_of(config.judge)).split(config.split)
        subject = open_subject(config)
        with Run(path) as run:
            return cls(train_stage._trainer(config, subject, rows, run, Origin(asdict(config), {})), path, config)

    @property
    def metrics(self) -> Path:
        """Where figures stand while training runs."""
        return self.path / train_stage.CHECKPOINTS / train_stage.METRICS

    def fit(self) -> tuple[int, str | None]:
        return train_stage._fit(self.trainer, self.path / train_stage.CHECKPOINTS)

    def save(self) -> Path:
        anatomy = self.trainer.anatomy
        info = Info(GT_QLORA, self.config.model, anatomy.family.model_type, Training(asdict(self.config)))
        adapters.save(self.trainer.model, self.path / train_stage.ADAPTER, info)
        return self.path / train_stage.ADAPTER

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer, by its name in the wrapped model."""
        return {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}


def trained(config: TrainConfig, path: Path, **more: Any) -> train_stage.TrainResult:
    """The train stage in a run directory."""
    with Run(path) as run:
        return train_stage.train(config, run, **more)


def gates(model: Any) -> dict[str, Tensor]:
    """The router weights that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".modules_to_save." in name}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(models.some_tokens()).logits


def digests(model: Any) -> dict[str, str]:
    """sha256 of every buffer of every frozen expert, by its place in the model."""
    return {
        f"{path.rpartition('layers.')[2]}.{name}": hashlib.sha256(
            buffer.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for path, module in frozen_experts(model).items()
        for name, buffer in module.state_dict().items()  # in which the weights are in their plain order
    }


def frozen_experts(model: Any) -> dict[str, FrozenExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenExperts)}


def bench_module(name: str) -> Any:
    """A script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def weights(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / EDIT_WEIGHTS)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


KILLED_AT = """
import dataclasses, json, os, signal, sys
from gtqlora.progress import shown_by
from gtqlora.run import Run

def die(what, done, total):
    if (what, done) == (WHAT, DONE):
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""Start of a script that kills itself at a point of progress (WHAT, DONE), without any cleaning up."""
