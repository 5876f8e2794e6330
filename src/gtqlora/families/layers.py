"""A model with one of its decoder layers, so that a model larger than memory can be run a layer at a time."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gtqlora.families.facts import Family


class Absent(nn.Module):
    """Stands where a module was not loaded, and passes on what it is given."""

    def forward(self, given: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        """Return the first argument."""
        return given


def with_layer(model_class: type[PreTrainedModel], family: Family, index: int) -> type[PreTrainedModel]:
    """Return the class of a model that has one decoder layer; it runs as the whole model does, masks and all.

    With the first layer comes the embedding, and with the last one norm and head: the others are given hidden states as
    `inputs_embeds`, and what the model without its head returns are the layer's hidden states.
    """

    def init(self: PreTrainedModel, *args: object, **kwargs: object) -> None:
        model_class.__init__(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        _keep(self, family, index)

    # Of the same name: it is by its name that transformers, and we, know which tensors a class has.
    made = type(model_class.__name__, (model_class,), {"__init__": init, "__module__": model_class.__module__})
    return cast(type[PreTrainedModel], made)


def _keep(model: PreTrainedModel, family: Family, index: int) -> None:
    layers = cast(nn.ModuleList, model.get_submodule(family.layers))
    for other in range(len(layers)):
        if other != index:
            layers[other] = Absent()
    last = index == len(layers) - 1
    tied = bool(getattr(model.config, "tie_word_embeddings", False))  # transformers ties by name: both have to be there
    gone = {family.embedding: index > 0 and not tied, family.head: not last and not tied, family.final_norm: not last}
    # Modules without parameters, and not none at all: the model's own loop goes over every layer.
    for path, absent in gone.items():
        if absent:
            model.set_submodule(path, Absent())


def absent(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of tensors begin that a model was made without."""
    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Absent))


def moe_layers_of(model: nn.Module, family: Family) -> tuple[int, ...]:
    """Return the indices of those decoder layers with a router that the model was not made without."""
    config, gone = cast(PreTrainedConfig, model.config), absent(model)
    return tuple(index for index in family.moe_layers(config) if f"{family.layer(index)}." not in gone)
