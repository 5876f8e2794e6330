"""Learning rates of the gates by their effect: for each router, so that a step changes its logits by so much.

An Adam step moves every weight by about its learning rate, in the direction of the gradient's sign. What that does to a
logit depends on how many inputs the router has, how long they are, and how far the gradient's sign agrees with them: it
lies between the rate times the inputs' length (signs at random) and the rate times the sum of their magnitudes. So the
first step is measured and not guessed: its direction, on the inputs that the routers are given.

Shape letters: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn

from gtqlora.capture import Decision, input_hooks, router_hooks
from gtqlora.edits.packing import real_tokens
from gtqlora.edits.wrapping import gate_weights, trainable
from gtqlora.errors import TrainingError
from gtqlora.families import Anatomy
from gtqlora.progress import track
from gtqlora.ranks import average, ranks, summed
from gtqlora.routing import RouterSpec

_TOKENS = 512
"""Tokens whose router inputs are kept, at most; in bf16 and 60 layers of 7,168 inputs they are 440 MiB."""
_ADAM_EPS = 1e-8


class _Seen:
    """Inputs and logits of every router, for evenly spaced real tokens of the batches that ran inside `of`."""

    def __init__(self, model: PeftModel, anatomy: Anatomy, tokens_each: int) -> None:
        self.model, self.anatomy, self.each = model, anatomy, tokens_each
        self.inputs: dict[str, list[Tensor]] = {path: [] for path in anatomy.routers}
        self.logits: dict[str, list[Tensor]] = {path: [] for path in anatomy.routers}

    @contextmanager
    def of(self, part: dict[str, Tensor]) -> Iterator[None]:
        """Watch the routers while one batch runs forward."""
        real = real_tokens(part).nonzero().squeeze(-1)
        kept_T = real[:: max(1, len(real) // self.each)]

        def given(path: str, hidden: Tensor) -> None:
            self.inputs[path].append(hidden.detach().reshape(-1, hidden.shape[-1])[kept_T])

        def decided(position: int, _module: nn.Module, decision: Decision) -> None:
            self.logits[self.anatomy.routers[position]].append(decision.logits_TE.detach()[kept_T])

        with (
            input_hooks(self.model, self.anatomy.routers, given),
            router_hooks(self.model, self.anatomy, decided),
        ):
            yield


def rates_by_effect(
    model: PeftModel,
    anatomy: Anatomy,
    parts: Sequence[dict[str, Tensor]],
    loss_of: Callable[[dict[str, Tensor]], Tensor],
    *,
    gate_step: float,
    max_grad_norm: float,
) -> dict[str, float]:
    """Return each router's learning rate with which Adam's first step changes its logits by `gate_step`.

    Root mean square over tokens and experts, in the unit of `routing.log_scores_TE`. Rates have three digits, so that a
    training that is resumed on other threads has the same. The model's gradients are cleared.

    Args:
        parts: of one optimizer batch.
        loss_of: runs the model on a part.

    Raises:
        TrainingError: a router gets no gradient.
    """
    seen = _Seen(model, anatomy, max(1, _TOKENS // len(parts) // ranks().count))
    for part in track(parts, "gate rates", len(parts)):
        with seen.of(part):
            loss = loss_of(part)
        loss.backward()
    average(p.grad for p in trainable(model).values() if p.grad is not None)
    nn.utils.clip_grad_norm_(trainable(model).values(), max_grad_norm)
    steps = {path: _first_step(gate) for path, gate in gate_weights(model).items()}
    model.zero_grad(set_to_none=True)
    found = {}
    for path, step_ED in steps.items():
        moved = _moved(torch.cat(seen.inputs[path]), torch.cat(seen.logits[path]), step_ED, anatomy.spec)
        if not moved > 0:
            raise TrainingError(f"{path}: no gradient reaches this router, so it cannot train")
        found[path] = float(f"{gate_step / moved:.3g}")
    return found


def _first_step(gate: nn.Parameter) -> Tensor:
    """Return Adam's first step for a learning rate of 1: nearly the gradient's sign."""
    gradient = torch.zeros_like(gate) if gate.grad is None else gate.grad
    return gradient / (gradient.abs() + _ADAM_EPS)


def _moved(inputs_TD: Tensor, logits_TE: Tensor, step_ED: Tensor, spec: RouterSpec) -> float:
    """Return the change of log scores per learning rate, root mean square over tokens and experts that move."""
    change_TE = inputs_TD.float() @ step_ED.T
    # The derivative of log sigmoid: what moves a saturated score hardly moves the weight that comes of it.
    change_TE = change_TE * (-logits_TE.float()).sigmoid() if spec.score == "sigmoid" else change_TE
    change_TE = change_TE - change_TE.mean(-1, keepdim=True)
    moves_E = step_ED.abs().amax(-1) > 0.5
    if not bool(moves_E.any()):
        return 0.0
    squares = change_TE[:, moves_E].square()
    total, count = summed(torch.tensor([float(squares.sum(dtype=torch.float64)), squares.numel()], dtype=torch.float64))
    return float((total / count).sqrt())
