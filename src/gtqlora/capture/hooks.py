"""Forward hooks on routers, routed experts and what writes the residual stream; the only place that hooks a model.

Shape letters: B batch, S sequence, T = B*S tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gtqlora import routing
from gtqlora.families import Anatomy, check_projectable, language_model
from gtqlora.routing import RouterSpec


@dataclass(frozen=True)
class Decision:
    """What one router decided for T tokens; `bias_E` is what steers the choice beside the logits, if anything does."""

    logits_TE: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    bias_E: Tensor | None = None


Handler = Callable[[int, nn.Module, Decision], Decision | None]
"""Sees (position among MoE layers, router module, decision); returns a replacement or None to leave it."""


@contextmanager
def _removed_at_last(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def router_hooks(model: nn.Module, anatomy: Anatomy, *handlers: Handler) -> Iterator[None]:
    """Show every router decision to the handlers in turn; a handler may replace it.

    The hook sits on whatever stands at the router's path, so it sees trained gates and original ones alike.
    """
    base, bias_name = language_model(model), anatomy.family.correction_bias

    def hook(position: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def seen(module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor, Tensor]):
            decision = Decision(*output, bias_E=getattr(module, bias_name) if bias_name else None)
            # Each handler sees what those before it made of the decision; None leaves it.
            for handler in handlers:
                decision = handler(position, module, decision) or decision
            return decision.logits_TE, decision.weights_TK, decision.indices_TK

        return seen

    handles = [
        base.get_submodule(layer.router).register_forward_hook(hook(position))
        for position, layer in enumerate(anatomy.moe)
    ]
    with _removed_at_last(handles):
        yield


class Recorder:
    """Keeps the last decision of every MoE layer."""

    def __init__(self) -> None:
        self.decisions: dict[int, Decision] = {}

    def __call__(self, position: int, _module: nn.Module, decision: Decision) -> None:
        self.decisions[position] = decision

    def at(self, tokens_N: Tensor) -> Recorder:
        """Return the decisions on some of the tokens only."""
        chosen = Recorder()
        chosen.decisions = {
            position: Decision(d.logits_TE[tokens_N], d.weights_TK[tokens_N], d.indices_TK[tokens_N], d.bias_E)
            for position, d in self.decisions.items()
        }
        return chosen


class Replay:
    """Gives every router the decision recorded by another run over the same tokens."""

    def __init__(self, source: Recorder) -> None:
        self.source = source

    def __call__(self, position: int, _module: nn.Module, decision: Decision) -> Decision:
        # The logits stay this run's own: they show what the router would have decided here.
        recorded = self.source.decisions[position]
        return replace(decision, weights_TK=recorded.weights_TK, indices_TK=recorded.indices_TK)


@dataclass(frozen=True)
class Call:
    """What one layer's routed experts are given for T tokens: their inputs, and who computes on them how much."""

    hidden_TD: Tensor
    indices_TK: Tensor
    weights_TK: Tensor


ExpertHandler = Callable[[int, Call], Call | None]
"""Sees (position among MoE layers, call); returns a replacement or None to leave it."""


@contextmanager
def expert_hooks(model: nn.Module, anatomy: Anatomy, *handlers: ExpertHandler) -> Iterator[None]:
    """Show every call of a layer's routed experts to the handlers in turn; a handler may replace it.

    Shared experts and the residual connection around the layer keep their own inputs.
    """
    base = language_model(model)

    def hook(position: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def seen(_module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            call = Call(*inputs)
            for handler in handlers:
                call = handler(position, call) or call
            return call.hidden_TD, call.indices_TK, call.weights_TK

        return seen

    handles = [
        base.get_submodule(layer.experts).register_forward_pre_hook(hook(position))
        for position, layer in enumerate(anatomy.moe)
    ]
    with _removed_at_last(handles):
        yield


class CallRecorder:
    """Keeps the last call of every MoE layer's experts."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}

    def __call__(self, position: int, call: Call) -> None:
        self.calls[position] = call


class Interchange:
    """Gives the experts the routing of one recorded run and, if wanted, the inputs of another, over aligned tokens."""

    def __init__(self, routing: CallRecorder, inputs: CallRecorder | None) -> None:
        self.routing, self.inputs = routing, inputs

    def __call__(self, position: int, call: Call) -> Call:
        routed = self.routing.calls[position]
        hidden_TD = call.hidden_TD if self.inputs is None else self.inputs.calls[position].hidden_TD
        return Call(hidden_TD, routed.indices_TK, routed.weights_TK)


StatesHandler = Callable[[int, Tensor], None]
"""Sees (index, state_BSD) of the residual stream: 0 after the embedding, i after decoder layer i - 1."""


@contextmanager
def state_hooks(model: nn.Module, anatomy: Anatomy, handler: StatesHandler) -> Iterator[None]:
    """Show the residual stream to the handler, as transformers' `hidden_states` but without keeping it.

    The last state is taken after the final norm, as there.
    """
    base = language_model(model)
    # transformers' last hidden state is the one after the final norm, so the last layer's own output is never shown.
    paths = (anatomy.family.embedding, *anatomy.layers[:-1], anatomy.family.final_norm)
    places = [base.get_submodule(path) for path in paths]

    def hook(index: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: handler(index, output)

    handles = [place.register_forward_hook(hook(index)) for index, place in enumerate(places)]
    with _removed_at_last(handles):
        yield


InputHandler = Callable[[str, Tensor], None]
"""Sees (path, what the module there is given)."""


@contextmanager
def input_hooks(model: nn.Module, paths: Iterable[str], handler: InputHandler) -> Iterator[None]:
    """Show the inputs of linears to the handler."""
    base = language_model(model)

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: handler(path, inputs[0])

    handles = [base.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    with _removed_at_last(handles):
        yield


class Mask:
    """Routes around some experts: the next best ones take their place.

    Args:
        masked: experts to remove, by position among MoE layers.

    Raises:
        ValueError: fewer experts of a layer are left than its router picks.
    """

    def __init__(self, anatomy: Anatomy, masked: dict[int, tuple[int, ...]]) -> None:
        self.spec: RouterSpec = anatomy.spec
        self._masked_E: dict[int, Tensor] = {}
        for position, experts in masked.items():
            if experts:
                routing.check_mask(set(experts), self.spec)
                self._masked_E[position] = torch.zeros(self.spec.n_experts, dtype=torch.bool)
                self._masked_E[position][list(experts)] = True

    def __call__(self, position: int, _module: nn.Module, decision: Decision) -> Decision | None:
        masked_E = self._masked_E.get(position)
        if masked_E is None:
            return None
        # Kept on the device: a step that is captured must copy nothing to it.
        masked_E = self._masked_E[position] = masked_E.to(decision.logits_TE.device)
        # Chosen and weighed anew from the logits, so that the weights are those of a router without these experts.
        indices_TK = routing.choose(decision.logits_TE, self.spec, decision.bias_E, masked_E)
        weights_TK = routing.weigh(decision.logits_TE, indices_TK, self.spec).to(decision.weights_TK)
        return replace(decision, weights_TK=weights_TK, indices_TK=indices_TK)


class direction_removed:
    """Removes one direction from all that writes the residual stream: embeddings, attention and MLP outputs.

    Subtracting (y . r) r from a linear map's output is the same as replacing its weight W by (I - r r^T) W
    (Arditi et al., arXiv 2406.11717, section 4.1), so switching it on and off needs no second copy of the weights.

    Raises:
        ModelError: a norm stands between the writers and the residual stream.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, direction_D: Tensor) -> None:
        check_projectable(anatomy)
        self.model, self.writers = model, (anatomy.family.embedding, *anatomy.blocks)
        # On the device from here on: a step that is captured must copy nothing to it.
        self.direction_D = (direction_D / direction_D.norm()).to(next(model.parameters()).device)
        self._handles: list[RemovableHandle] = []

    def _remove(
        self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        # Attention returns its weights beside the states; only the states are written to the residual stream.
        y = output[0] if isinstance(output, tuple) else output
        r_D = self.direction_D.to(y)
        y = y - (y @ r_D).unsqueeze(-1) * r_D
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def enable(self) -> None:
        """Remove the direction from here on."""
        base = language_model(self.model)
        self._handles = [base.get_submodule(path).register_forward_hook(self._remove) for path in self.writers]

    def disable(self) -> None:
        """Leave the direction in again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> None:
        self.enable()

    def __exit__(self, *_: object) -> None:
        self.disable()
