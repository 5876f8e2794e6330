"""Runs prompts and taps what happens inside; the only forward-hook code.

Shape letters: B batch, S sequence, T = B*S tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gtqlora import routing
from gtqlora.experts.loading import BF16, load_model
from gtqlora.families import Anatomy, bind, language_model, load_tokenizer
from gtqlora.routing import RouterSpec


@dataclass(frozen=True)
class Subject:
    """A model under study with its tokenizer and anatomy; `model` may be wrapped by an edit."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    @property
    def max_length(self) -> int:
        config: Any = language_model(self.model).config
        return config.max_position_embeddings

    @property
    def stop_ids(self) -> Tensor:
        """Token ids that end a completion."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        end: Any = self.tokenizer.eos_token_id
        if end is not None:
            ends.append(end)
        return torch.tensor(sorted(set(ends)), device=self.device)


def open_subject(model: str, *, dtype: str = "auto", device: str = "cpu", experts: str = BF16) -> Subject:
    """Load MODEL for study. Routers compute in fp32 whatever the model's dtype, so that trained gates can be fp32.

    Args:
        experts: "bf16" as in the checkpoint, or frozen in "nf4", "int4-g32", "int4-g128" or "native".

    Raises:
        ModelError: as `load_model` and `load_tokenizer`.
        ConfigError: `experts` is none of these.
    """
    tokenizer = load_tokenizer(model)
    family, loaded = load_model(model, dtype=dtype, device=device, experts=experts)
    anatomy = bind(loaded, family)
    _routers_to_fp32(loaded, anatomy)
    return Subject(loaded, tokenizer, anatomy)


def _routers_to_fp32(model: nn.Module, anatomy: Anatomy) -> None:
    """Some families' routers compute in the model's dtype; the hooks are copied with the router when PEFT wraps it."""
    for path in anatomy.routers:
        router = model.get_submodule(path)
        if router.get_parameter("weight").dtype == torch.float32:
            continue
        router.weight.data = router.get_parameter("weight").data.float()
        router.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(), *inputs[1:]))
        router.register_forward_hook(_scores_in(model.dtype))  # type: ignore[arg-type]


def _scores_in(dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return lambda _module, _inputs, output: (output[0], output[1].to(dtype), output[2])


@dataclass(frozen=True)
class Decision:
    """What one router decided for T tokens."""

    logits_TE: Tensor
    weights_TK: Tensor
    indices_TK: Tensor


Handler = Callable[[int, nn.Module, Decision], Decision | None]
"""Sees (position among MoE layers, router module, decision); returns a replacement or None to leave it."""


@contextmanager
def routers_tapped(model: nn.Module, anatomy: Anatomy, *handlers: Handler) -> Iterator[None]:
    """Show every router decision to the handlers in turn; a handler may replace it.

    The hook sits on whatever stands at the router's path, so it sees trained gates and original ones alike.
    """
    base = language_model(model)

    def hook(position: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def tap(module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]):
            decision = Decision(*output)
            for handler in handlers:
                decision = handler(position, module, decision) or decision
            return decision.logits_TE, decision.weights_TK, decision.indices_TK

        return tap

    handles = [
        base.get_submodule(layer.router).register_forward_hook(hook(position))
        for position, layer in enumerate(anatomy.moe)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Keeps the last decision of every MoE layer."""

    def __init__(self) -> None:
        self.decisions: dict[int, Decision] = {}

    def __call__(self, position: int, _module: nn.Module, decision: Decision) -> None:
        self.decisions[position] = decision

    def rows(self, rows: Tensor, batch: int) -> Recorder:
        """The decisions of some rows only, of a batch of `batch` sequences."""

        def pick(tokens: Tensor) -> Tensor:
            return tokens.view(batch, -1, tokens.shape[-1])[rows].flatten(0, 1)

        chosen = Recorder()
        chosen.decisions = {
            position: Decision(pick(d.logits_TE), pick(d.weights_TK), pick(d.indices_TK))
            for position, d in self.decisions.items()
        }
        return chosen


class Replay:
    """Gives every router the decision recorded by another run over the same tokens."""

    def __init__(self, source: Recorder) -> None:
        self.source = source

    def __call__(self, position: int, _module: nn.Module, decision: Decision) -> Decision:
        recorded = self.source.decisions[position]
        return Decision(decision.logits_TE, recorded.weights_TK, recorded.indices_TK)


class Mask:
    """Routes around some experts: the next best ones take their place.

    Args:
        masked: experts to remove, by position among MoE layers.
    """

    def __init__(self, anatomy: Anatomy, masked: dict[int, tuple[int, ...]]) -> None:
        self.spec: RouterSpec = anatomy.spec
        self.bias_name = anatomy.family.correction_bias
        self.masked = masked

    def __call__(self, position: int, module: nn.Module, decision: Decision) -> Decision | None:
        experts = self.masked.get(position)
        if not experts:
            return None
        masked_E = torch.zeros(self.spec.n_experts, dtype=torch.bool, device=decision.logits_TE.device)
        masked_E[list(experts)] = True
        bias_E = getattr(module, self.bias_name) if self.bias_name else None
        indices_TK = routing.choose(decision.logits_TE, self.spec, bias_E, masked_E)
        weights_TK = routing.weigh(decision.logits_TE, indices_TK, self.spec).to(decision.weights_TK)
        return Decision(decision.logits_TE, weights_TK, indices_TK)


class direction_removed:
    """Removes one direction from all that writes the residual stream: embeddings, attention and MLP outputs.

    Subtracting (y . r) r from a linear map's output is the same as replacing its weight W by (I - r r^T) W
    (Arditi et al., arXiv 2406.11717, section 4.1), so switching it on and off needs no second copy of the weights.
    """

    def __init__(self, model: nn.Module, direction_D: Tensor) -> None:
        self.model = model
        self.direction_D = direction_D / direction_D.norm()
        self._handles: list[Any] = []

    def _remove(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        r_D = self.direction_D.to(y)
        y = y - (y @ r_D).unsqueeze(-1) * r_D
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def enable(self) -> None:
        base = language_model(self.model)
        writers = [base.get_submodule("model.embed_tokens")]
        for layer in base.get_submodule("model.layers").children():
            writers += [layer.get_submodule("self_attn"), layer.get_submodule("mlp")]
        self._handles = [writer.register_forward_hook(self._remove) for writer in writers]

    def disable(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> None:
        self.enable()

    def __exit__(self, *_: object) -> None:
        self.disable()
