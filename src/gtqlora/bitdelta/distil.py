"""Row scales fitted to what the fine-tune's layers compute on some texts, and not to its weights alone.

With signs s and column scales c kept, the row scale r[n] that brings (x . s[n] c) r[n] nearest to x . delta[n] over
inputs x is a quotient of two sums: no gradient, no second model. Inputs are those that the fine-tune's layers get; of
one layer at a time. BitDelta fits its scales end to end instead, with base, fine-tune and variant in memory.

Shape letters: T tokens, N rows (outputs), K columns (inputs), B batch, S sequence, D hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gtqlora.bitdelta.checkpoints import Change
from gtqlora.bitdelta.onebit import SCALE_DTYPE, OneBit, encode, signs
from gtqlora.capture import Call, Subject, expert_hooks, forward, input_hooks, left_padded
from gtqlora.families import TensorNames, language_model
from gtqlora.families.facts import DOWN, GATE_UP
from gtqlora.families.names import Place

_PRIOR = 16
"""Tokens that the scale fitted to the weights counts as: of an expert that few tokens choose, they say little."""


class Distilled:
    """Encodes differences with row scales fitted to a fine-tune's own inputs.

    Args:
        subject: the fine-tune.
        names: of the base's tensors, as `Change.name` has them.
        texts: tokens that it reads; `batch_size` of them at once.
    """

    def __init__(self, subject: Subject, names: TensorNames, texts: Sequence[Sequence[int]], batch_size: int) -> None:
        self._subject, self._names = subject, names
        self._batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
        linears = (path for path, module in language_model(subject.model).named_modules() if _is_linear(module))
        self._linears = frozenset(linears)
        self._layer: str | None = None
        self._seen: dict[str, Tensor] = {}
        self._calls: dict[str, Call] = {}

    def encode(self, change: Change, delta: Tensor) -> OneBit:
        """Return a difference in one bit a weight. Changes of one layer should come together: it is run for them."""
        place, found = self._names.places[change.name], encode(delta)
        self._run(self._layer_of(place.name))
        if place.name.startswith(tuple(f"{path}." for path in self._calls)):
            return self._experts(place, delta, found)
        inputs = self._seen.get(place.name.removesuffix(".weight"))
        return found if inputs is None else fitted_rows(delta, found, inputs)

    def _experts(self, place: Place, delta: Tensor, found: OneBit) -> OneBit:
        if place.expert is not None:
            return fitted_rows(delta, found, self._inputs(place.name, place.expert))
        each = [
            fitted_rows(
                delta[e], OneBit(signs_NB=found.signs_NB[e], row_N=found.row_N[e], column_K=found.column_K[e]), x
            )
            for e, x in ((e, self._inputs(place.name, e)) for e in range(len(delta)))
        ]
        return replace(found, row_N=torch.stack([one.row_N for one in each]))

    @torch.no_grad()
    def _inputs(self, parameter: str, expert: int) -> Tensor:
        """Return what an expert's matrix is given: the tokens that chose it or, before `down`, what it made of them."""
        path, _, name = parameter.rpartition(".")
        call, bank = self._calls[path], language_model(self._subject.model).get_submodule(path)
        states_TD = call.hidden_TD[(call.indices_TK == expert).any(-1)]
        if name != DOWN:
            return states_TD
        gate_TI, up_TI = (states_TD @ bank.get_parameter(GATE_UP)[expert].mT).chunk(2, -1)
        return nn.functional.silu(gate_TI) * up_TI

    def _layer_of(self, parameter: str) -> str:
        """Return the decoder layer of a parameter, or nothing for what stands outside of all of them."""
        return next((path for path in self._subject.anatomy.layers if parameter.startswith(f"{path}.")), "")

    @torch.no_grad()
    def _run(self, layer: str) -> None:
        """Run the model for the inputs of one layer; those of another are let go of."""
        # a pass for each layer: inputs of all of them at once would be as large as the model
        if layer == self._layer:
            return
        self._layer = layer
        subject, routed = self._subject, self._subject.anatomy.moe
        seen, calls = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Call]](list)
        paths = [path for path in self._linears if self._layer_of(path + ".") == layer]
        real_T = torch.ones(0, dtype=torch.bool)

        def see(path: str, inputs: Tensor) -> None:
            seen[path].append(inputs.flatten(0, -2)[real_T])

        def called(position: int, call: Call) -> None:
            if self._layer_of(path := routed[position].experts) == layer:
                calls[path].append(Call(call.hidden_TD[real_T], call.indices_TK[real_T], call.weights_TK[real_T]))

        # padding is dropped as it is seen: it would count as text
        for batch in self._batches:
            ids_BS, mask_BS = left_padded(batch, subject.pad_id, subject.device)
            real_T = mask_BS.flatten().bool()
            with input_hooks(subject.model, paths, see), expert_hooks(subject.model, subject.anatomy, called):
                forward(subject, ids_BS, mask_BS, ids_BS.shape[1])
        self._seen = {path: torch.cat(every) for path, every in seen.items()}
        self._calls = {path: _joined(every) for path, every in calls.items()}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _joined(calls: Sequence[Call]) -> Call:
    return Call(
        torch.cat([call.hidden_TD for call in calls]),
        torch.cat([call.indices_TK for call in calls]),
        torch.cat([call.weights_TK for call in calls]),
    )


def fitted_rows(delta_NK: Tensor, found: OneBit, inputs_TK: Tensor) -> OneBit:
    """Return a one-bit difference with the row scales that fit its products with some inputs, drawn to those it has."""
    inputs_TK = inputs_TK.float().cpu()
    if not len(inputs_TK):
        return found
    before_N = found.row_N.float()
    wanted_TN = inputs_TK @ delta_NK.mT
    given_TN = inputs_TK @ (signs(found) * found.column_K.float()).mT
    # in units of what a token of these inputs says, so that the draw back does not hang on their scale
    prior_N = _PRIOR * given_TN.square().mean(0)
    above_N, below_N = (wanted_TN * given_TN).sum(0) + prior_N * before_N, given_TN.square().sum(0) + prior_N
    row_N = torch.where(below_N > 0, above_N / below_N, before_N).clamp(min=0)
    # a row that does not change stays so, whatever rounding says
    return replace(found, row_N=torch.where(before_N > 0, row_N, 0.0).to(SCALE_DTYPE))
