"""Put a variant's weights into a model in memory that was opened from its base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gtqlora.capture import Subject
from gtqlora.edits.merging import Edit, merged
from gtqlora.experts.tensor_files import TensorFiles
from gtqlora.families import ModelIdentity, TensorNames
from gtqlora.families.files import weight_files
from gtqlora.families.names import Place
from gtqlora.progress import track


@torch.no_grad()
def place(subject: Subject, names: TensorNames, base: ModelIdentity, edits: Mapping[str, Edit]) -> None:
    """Change a model into a variant: the base's tensors on disk, edited, rounded to their type, then as loaded."""
    model, (folder, shards) = subject.model, weight_files(base.model)
    routers = {f"{path}.weight" for path in subject.anatomy.routers}
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with TensorFiles(folder / shard for shard in shards) as files:
        for name, edit in track(edits.items(), "the variant in memory", len(edits)):
            where = names.places[name]
            target, value = state[where.name], merged(files.read(name), edit)
            # a router computes in fp32, but its weights were loaded in the model's own type before
            _part(target, where, value).copy_(value.to(model.dtype) if where.name in routers else value)


def _part(target: Tensor, place: Place, value: Tensor) -> Tensor:
    """Return the part of a parameter that a tensor on disk is: all of it, or some rows of one expert's matrices."""
    # transformers puts a layer's experts into two parameters, gate's rows before up's
    if place.expert is None:
        return target.data
    rows = value.shape[0]
    return target.data[place.expert, place.part * rows : (place.part + 1) * rows]
