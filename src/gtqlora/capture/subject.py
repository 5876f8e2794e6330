"""A model opened for study: its tokenizer, its anatomy, and routers that compute in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gtqlora.capture.fused import fuse
from gtqlora.config import ModelConfig
from gtqlora.errors import ModelError
from gtqlora.experts.exchange import Exchange, exchange_of
from gtqlora.experts.loading import BF16, load_model
from gtqlora.experts.module import FrozenExperts
from gtqlora.experts.sharding import is_sharded, is_worth_it, shard
from gtqlora.families import Anatomy, bind, language_model, load_config, load_tokenizer
from gtqlora.ranks import ranks


@dataclass(frozen=True)
class Subject:
    """A model under study with its tokenizer and anatomy; `model` may be wrapped by an edit."""

    # A transformers model or PEFT's wrapper around one; they share no class that has all that is called here.
    model: Any
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy

    @property
    def device(self) -> torch.device:
        """Return the device of the weights, where inputs must be, too."""
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        """Return the token id that fills up short prompts; it is masked wherever it stands."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    @property
    def max_length(self) -> int:
        """Return how many tokens the model's positions reach."""
        config: Any = language_model(self.model).config
        return config.max_position_embeddings

    @property
    def vocabulary(self) -> int:
        """Return the number of rows of the embedding: token ids from here on have none."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def stop_ids(self) -> Tensor:
        """Return the token ids that end a completion, those of the model's generation settings and the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        end: Any = self.tokenizer.eos_token_id
        if end is not None:
            ends.append(end)
        return torch.tensor(sorted(set(ends)), device=self.device)


def open_subject(settings: ModelConfig | str) -> Subject:
    """Load a model for study. Routers compute in fp32 whatever the model's dtype, so that trained gates can be fp32.

    Args:
        settings: a stage's settings, or `ModelConfig(model=...)`; a model alone is opened with the defaults.

    Raises:
        ModelError: as `load_model` and `load_tokenizer`, or no token ends an answer.
        ConfigError: the chat template reads a variable of nearly the name of one in `template`.
    """
    config = ModelConfig(model=settings) if isinstance(settings, str) else settings
    model = config.model
    load_config(model)  # what cannot be studied at all is said before anything else
    tokenizer = load_tokenizer(model, config.template)
    family, loaded = load_model(
        model,
        dtype=config.dtype,
        device=config.device,
        expert_format=config.expert_format,
        expert_range=_range_here(config.expert_format),
        memory=config.expert_memory,
        disk=config.expert_disk,
    )
    anatomy = bind(loaded, family)
    ready(loaded, anatomy)
    if not is_sharded(loaded) and is_worth_it(loaded, family):
        shard(loaded, family)
    exchanging(loaded, anatomy)
    subject = Subject(loaded, tokenizer, anatomy)
    if not len(subject.stop_ids):
        raise ModelError(f"{model}: no token ends an answer; name an eos_token in tokenizer_config.json")
    return subject


def _range_here(expert_format: str) -> tuple[int, int] | None:
    """Return which part of the experts this rank holds: the ranks of a machine split them, if they are frozen."""
    return (ranks().place, ranks().here) if ranks().here > 1 and expert_format != BF16 else None


def exchanging(model: nn.Module, anatomy: Anatomy) -> None:
    """Let ranks that split a model's experts exchange tokens."""
    if ranks().here == 1:
        return
    # where the embedding is split, its tokens go the same ways
    exchange = exchange_of(model) or Exchange(ranks().machine)
    for layer in anatomy.moe:
        experts = model.get_submodule(layer.experts)
        if isinstance(experts, FrozenExperts):
            experts.exchange = exchange
            # before all other hooks, which may round
            model.get_submodule(layer.router).register_forward_pre_hook(_sending(exchange), prepend=True)


def _sending(exchange: Exchange) -> Callable[..., None]:
    return lambda _module, inputs: exchange.send(inputs[0])


def open_layer(config: ModelConfig, whole: Anatomy, tokenizer: PreTrainedTokenizerBase, index: int) -> Subject:
    """Load one decoder layer of a model as `open_subject` loads it whole, see `families.layers.with_layer`.

    Raises:
        ModelError: as `load_model`.
    """
    _, loaded = load_model(
        config.model, dtype=config.dtype, device=config.device, expert_format=config.expert_format, layer=index
    )
    anatomy = whole.part(index)
    ready(loaded, anatomy)
    return Subject(loaded, tokenizer, anatomy)


def ready(model: nn.Module, anatomy: Anatomy) -> None:
    """Make a model that is bound compute as all stages study it: routers in fp32, and fused kernels on a GPU."""
    _routers_to_fp32(model, anatomy)
    fuse(model)


def _routers_to_fp32(model: nn.Module, anatomy: Anatomy) -> None:
    """Make routers compute in fp32 and return weights in the model's dtype, as the experts after them expect."""
    # As hooks and not as a class around the router: PEFT copies a module's hooks with it when it wraps the router.
    for path in anatomy.routers:
        router = model.get_submodule(path)
        if router.get_parameter("weight").dtype == torch.float32:
            continue
        # The data and not the parameter, so that whoever holds the parameter has the new values, too.
        router.weight.data = router.get_parameter("weight").data.float()
        router.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(), *inputs[1:]))
        router.register_forward_hook(_scores_in(model.dtype))  # type: ignore[arg-type]


def _scores_in(dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return lambda _module, _inputs, output: (output[0], output[1].to(dtype), output[2])
