"""A decoder stack run over the tokens of a batch without its padding, and with each pair's prompt once.

The chosen and the rejected row of a pair begin with the same prompt, and a causal model computes the same for it in
both: everything but attention runs over each such token once, and attention's queries do where flash attention can run.
Gradients of both rows add up in the one token, so all sums are those of the padded batch, in another order.

Shape letters: B rows (chosen ones first, then the rejected ones), S sequence, T = B*S places, P packed tokens,
R key rows, Q sequences, H heads, D sizes of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPast

from gtqlora.errors import ModelError
from gtqlora.families import Anatomy, language_model

_ATTENTION = "gtqlora_right_padded"
"""Causal attention over rows that are padded on the right, or packed: no mask of padding is ever made."""

_NONE = -1
_PREFIX = "packed_"
_FLASH_HEAD = 256
"""Sizes of a head up to which flash attention has kernels."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where packed tokens stand in the padded batch.

    Attributes:
        first_P: the place, flat, of each token; -1 for one that only fills up.
        second_P: its place in the rejected row, if it is of the prompt that both rows of a pair have; else -1.
        places_BS: the packed token at each place; the first one where the batch is padded.
    """

    first_P: Tensor
    second_P: Tensor
    places_BS: Tensor


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What attention runs over: chosen rows with their prompts; rejected answers, with the keys of their prompts, too.

    Attributes:
        keys_R: the packed token of each key row, for one sequence after the other, and for what fills up. Rows that
            are left over hold the first token and belong to no sequence.
        first_key_P, second_key_P: the key rows of each packed token, as in `Places`.
        bounds_Q1, key_bounds_Q1: int32, where each sequence begins among packed tokens and among key rows, and where
            the last one ends.
        most: how long a sequence is at most; of few values, as recorded passes depend on it.
    """

    keys_R: Tensor
    first_key_P: Tensor
    second_key_P: Tensor
    bounds_Q1: Tensor
    key_bounds_Q1: Tensor
    most: int


@dataclass(frozen=True)
class Packing:
    """Both, of a batch."""

    places: Places
    sequences: Sequences

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by the names that they have in a batch."""
        parts = {**vars(self.places), **vars(self.sequences)}
        return {_PREFIX + name: part for name, part in parts.items() if isinstance(part, Tensor)}

    @staticmethod
    def taken(batch: dict[str, Any]) -> Packing | None:
        """Take the tensors out of a batch, if it has them."""
        names = [name for name in batch if name.startswith(_PREFIX)]
        if not names:
            return None
        parts = {name.removeprefix(_PREFIX): batch.pop(name) for name in names}
        places = Places(**{field.name: parts.pop(field.name) for field in fields(Places)})
        return Packing(places, Sequences(**parts, most=longest_sequence(places.places_BS.shape[1])))


def longest_sequence(columns: int) -> int:
    """Return the power of two that holds so many tokens."""
    return 1 << (columns - 1).bit_length()


def real_tokens(batch: dict[str, Any]) -> Tensor:
    """Return, as bool, which of the tokens that a model's modules see of a batch are none that fill up."""
    first_P: Tensor | None = batch.get(_PREFIX + "first_P")
    return batch["attention_mask"].flatten() > 0 if first_P is None else first_P >= 0


def seen_at(batch: dict[str, Any], rows: Tensor) -> Tensor:
    """Return places_T: which of the tokens that a model's modules see stand in these rows of the padded batch, flat."""
    places_BS: Tensor | None = batch.get(_PREFIX + "places_BS")
    if places_BS is None:
        ids_BS: Tensor = batch["input_ids"]
        places_BS = torch.arange(ids_BS.numel(), device=ids_BS.device).view(ids_BS.shape)
    return places_BS[rows].flatten()


def pack(pairs: Sequence[tuple[int, int, int]], columns: int, size: int) -> Packing:
    """Return the packing of a batch.

    Args:
        pairs: tokens of each pair's prompt, chosen answer and rejected answer.
        columns: S.
        size: P; packed tokens are filled up to this many.
    """
    used, n_pairs, most = sum(map(sum, pairs)), len(pairs), longest_sequence(columns)
    first, second, first_key, second_key = (torch.full((size,), _NONE) for _ in range(4))
    places, keys = torch.zeros(2 * n_pairs, columns, dtype=torch.long), torch.zeros(2 * size, dtype=torch.long)
    bounds, key_bounds = [0], [0]
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        start, key = bounds[-1], key_bounds[-1]
        answer, end = start + prompt + chosen, start + prompt + chosen + rejected
        whole, asks = torch.arange(start, answer), torch.arange(answer, end)
        shared, below = whole[:prompt], (n_pairs + i) * columns
        other = torch.cat([shared, asks])
        places[i, : len(whole)], places[n_pairs + i, : len(other)] = whole, other
        first[whole], second[shared] = i * columns + torch.arange(len(whole)), below + torch.arange(prompt)
        first[asks] = below + torch.arange(prompt, len(other))
        next_key = key + len(whole)
        keys[key:next_key], keys[next_key : next_key + len(other)] = whole, other
        first_key[whole], second_key[shared] = torch.arange(key, next_key), next_key + torch.arange(prompt)
        first_key[asks] = next_key + torch.arange(prompt, len(other))
        bounds += [answer, end]
        key_bounds += [next_key, next_key + len(other)]
    key = key_bounds[-1]
    keys[key : key + size - used] = torch.arange(used, size)
    for begin in range(0, size, most):  # as many sequences, whatever is left to fill
        filled = min(begin + most, size - used)
        bounds.append(max(bounds[-1], used + filled))
        key_bounds.append(max(key_bounds[-1], key + filled))
    sequences = Sequences(
        keys_R=keys,
        first_key_P=first_key,
        second_key_P=second_key,
        bounds_Q1=torch.tensor(bounds, dtype=torch.int32),
        key_bounds_Q1=torch.tensor(key_bounds, dtype=torch.int32),
        most=most,
    )
    return Packing(Places(first_P=first, second_P=second, places_BS=places), sequences)


# --- tokens to places and back ---------------------------------------------------------------------------------------


def _at(values_TD: Tensor, places_P: Tensor) -> Tensor:
    """Return the values at these places, zero where there is none."""
    return values_TD.index_select(0, places_P.clamp(min=0)).masked_fill_((places_P == _NONE)[:, None], 0)


class _Spread(torch.autograd.Function):
    """values_PD of tokens -> of each place, where a token may stand in two; places of none get no gradient."""

    @staticmethod
    def forward(ctx: Any, values_PD: Tensor, tokens_T: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
        ctx.save_for_backward(first_P, second_P)
        return values_PD.index_select(0, tokens_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_P, second_P = ctx.saved_tensors
        return _at(grads[0], first_P).add_(_at(grads[0], second_P)), None, None, None


class _Take(torch.autograd.Function):
    """values_TD of places -> of each token at its first place."""

    @staticmethod
    def forward(ctx: Any, values_TD: Tensor, first_P: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(first_P, places_T)
        return values_TD.index_select(0, first_P.clamp(min=0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_P, places_T = ctx.saved_tensors
        elsewhere_T = first_P[places_T] != torch.arange(len(places_T), device=places_T.device)
        return grads[0].index_select(0, places_T).masked_fill_(elsewhere_T[:, None], 0), None, None


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """One pass over a packed batch: decoder layers hand it to their attention, and it counts them."""

    over: Places | Sequences
    attended: list[nn.Module]


def _attention(
    module: nn.Module,
    query_BHSD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    _mask: Tensor | None,
    *,
    windows: Sequence[int | None],
    packing: _Run | None = None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    # by layer, and not what the layer says here: of some families that is another thing than their mask
    layer: Any = module.layer_idx
    size = windows[layer]
    if packing is None:
        window = _window(query_BHSD, size)
        return sdpa_attention_forward(module, query_BHSD, key_BHSD, value_BHSD, window, scaling=scaling, **settings)
    packing.attended.append(module)
    over = packing.over
    query_PHD, key_PHD, value_PHD = (part[0].transpose(0, 1) for part in (query_BHSD, key_BHSD, value_BHSD))
    if isinstance(over, Sequences):
        dropout = settings.get("dropout", 0.0)
        return _flash(query_PHD, key_PHD, value_PHD, over, scaling, size, dropout)[None], None
    places_T, rows = over.places_BS.flatten(), len(over.places_BS)

    def padded(values_PHD: Tensor) -> Tensor:
        values_TD = _Spread.apply(values_PHD.flatten(1), places_T, over.first_P, over.second_P)
        return values_TD.view(rows, -1, *values_PHD.shape[1:]).transpose(1, 2)  # type: ignore[union-attr]

    query = padded(query_PHD)
    window = _window(query, size)
    key, value = padded(key_PHD), padded(value_PHD)
    out_BSHD, _ = sdpa_attention_forward(module, query, key, value, window, scaling=scaling, **settings)
    out_PD: Tensor = _Take.apply(out_BSHD.flatten(0, 1).flatten(1), over.first_P, places_T)  # type: ignore[assignment]
    return out_PD.unflatten(1, out_BSHD.shape[2:])[None], None


def _window(query_BHSD: Tensor, size: int | None) -> Tensor | None:
    """Return which keys [S, S] a sliding window leaves to each query; None for all before it."""
    length = query_BHSD.shape[2]
    if not size or size >= length:
        return None
    every = torch.ones(length, length, dtype=torch.bool, device=query_BHSD.device)
    return (every.tril() & every.triu(1 - size))[None, None]


def _flash(
    query_PHD: Tensor,
    key_PHD: Tensor,
    value_PHD: Tensor,
    over: Sequences,
    scaling: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Return attention of each sequence's queries to its keys, whose last one is the last query's."""

    def rows(values_PHD: Tensor) -> Tensor:
        ways = (over.keys_R, over.first_key_P, over.second_key_P)
        return _Spread.apply(values_PHD.flatten(1), *ways).unflatten(1, values_PHD.shape[1:])  # type: ignore[union-attr]

    less = query_PHD.shape[-1] - value_PHD.shape[-1]
    value_RHD = nn.functional.pad(rows(value_PHD), (0, less)) if less else rows(value_PHD)
    found = torch.ops.aten._flash_attention_forward(
        *(query_PHD, rows(key_PHD), value_RHD, over.bounds_Q1, over.key_bounds_Q1, over.most, over.most),
        *(dropout, True, False),
        scale=scaling,
        window_size_left=window - 1 if window else None,
        window_size_right=0 if window else None,
    )
    return found[0][..., : value_PHD.shape[-1]]


# --- the stack -------------------------------------------------------------------------------------------------------

Stack = Callable[..., BaseModelOutputWithPast]


class PackedStack:
    """A decoder stack that packs what it is given, if the batch says how; inside `installed`.

    Attributes:
        run: the stack that runs over packed tokens, or over a batch as it is.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        inner: Any = language_model(model)
        self.stack, self.config, self.n_layers = inner.base_model, inner.config, anatomy.n_layers
        self._own: Stack = self.stack.forward
        self._flash = _flash_fits(inner)
        self._windows = [anatomy.family.window(inner.config, index) for index in range(anatomy.n_layers)]
        self.run: Stack = self.eager

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the stack's place for a while, in which all rows are padded on the right and padding needs no mask."""
        AttentionInterface.register(
            _ATTENTION, _attention
        )  # and nothing that makes masks: transformers makes none then
        attention, self.config._attn_implementation = self.config._attn_implementation, _ATTENTION
        self.stack.forward = self._forward
        try:
            yield
        finally:
            self.config._attn_implementation, self.stack.forward = attention, self._own

    def eager(self, *, packing: Places | Sequences | None = None, **inputs: Any) -> BaseModelOutputWithPast:
        """Run the layers one kernel after the other.

        Raises:
            ModelError: a layer attends without being told which tokens belong together.
        """
        if packing is None:
            return self._own(**inputs, windows=self._windows)
        run = _Run(packing, [])
        out = self._own(**inputs, windows=self._windows, packing=run)
        if len(run.attended) != self.n_layers:
            raise ModelError(f"{len(run.attended)} of {self.n_layers} layers attend to packed rows: set packed = false")
        return out

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> BaseModelOutputWithPast:
        packing = Packing.taken(settings)
        if packing is None:
            return self.run(input_ids=input_ids, **settings)
        places = packing.places
        first_P = places.first_P.clamp(min=0)
        settings |= {
            "input_ids": input_ids.flatten()[first_P][None],
            "position_ids": (first_P % input_ids.shape[1])[None],
            "packing": packing.sequences if self._flash else places,
        }
        out = self.run(**settings)
        spread = _Spread.apply(out[0][0], places.places_BS.flatten(), places.first_P, places.second_P)
        out.last_hidden_state = spread.unflatten(0, input_ids.shape)  # type: ignore[union-attr]
        return out


def _flash_fits(model: Any) -> bool:
    """Return whether flash attention has a kernel for such a model."""
    config, weight = model.config, next(model.parameters())
    size = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    return weight.is_cuda and weight.element_size() == 2 and size <= _FLASH_HEAD and size % 8 == 0
