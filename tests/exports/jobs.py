"""Jobs on models other than a run's own: of a writer only that is asked which hangs on the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtqlora.certificate import certify
from gtqlora.config import ExportConfig
from gtqlora.edits.merging import Edit, LowRank, Whole
from gtqlora.exports.gguf.values import Checkpoint
from gtqlora.exports.job import EditedModel, Job
from gtqlora.families import bind, load_config, meta_model, tensor_names
from gtqlora.run import Run
from tests import helpers


def certified(path: Path, **settings: Any) -> Job:
    with Run(path) as run:
        return Job.of(certify(run, helpers.JUDGE), ExportConfig(to="gguf", **settings))


def job_on(model: Path, run: Path, *, edited: bool = False, **settings: Any) -> Job:
    """A job on another model than the run's, which changes nothing, or gates and LoRA's targets at random."""
    job, (family, config) = certified(run, **settings), load_config(str(model))
    skeleton = meta_model(family, config)
    certificate = replace(job.certificate, verdict=replace(job.certificate.verdict, model=str(model)))
    anatomy, names = bind(skeleton, family), tensor_names(str(model), family, skeleton)
    job = replace(job, certificate=certificate, model=str(model), anatomy=anatomy, names=names, edits={})
    return replace(job, edits=random_edits(job)) if edited else job


def random_edits(model: EditedModel) -> dict[str, Edit]:
    """LoRA on all its targets and other routers, of the size of a real edit's."""
    draw, edits, headers = torch.Generator().manual_seed(0), dict[str, Edit](), Checkpoint.of(model).headers

    def noise(*shape: int) -> Tensor:
        return 0.05 * torch.randn(shape, generator=draw)

    for name in (model.names.whole(f"{path}.weight") for path in model.anatomy.lora_targets):
        rows, columns = headers[name].shape
        edits[name] = LowRank(noise(4, columns), noise(rows, 4))
    for name in (model.names.whole(f"{path}.weight") for path in model.anatomy.routers):
        edits[name] = Whole(noise(*headers[name].shape))
    return edits
