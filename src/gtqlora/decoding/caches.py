"""Where runs keep keys and values: a cache that grows with every token, and one whose columns stay where they are.

In the second all rows write the same column at a step and go on to the next, past the last one to the first. A row's
own positions and mask say where its text lies, so a row can begin whenever another one ends, and a step has the same
shapes and addresses every time: it can be captured.

Shape letters: B rows, b rows that begin together, S sequence, H heads of keys and values, G query heads for each of
them, C columns, d size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from gtqlora.capture import Subject
from gtqlora.families import language_model

_ATTENTION = "gtqlora_one_query"


def growing(subject: Subject) -> DynamicCache:
    """Return an empty cache that grows."""
    return DynamicCache(config=subject.model.config)


def has_columns(subject: Subject, columns: int) -> bool:
    """Tell whether all the layers' caches can be kept in so many columns: none lets go of old tokens before."""
    kinds = (DynamicLayer, LinearAttentionLayer)
    return all(
        type(layer) in kinds or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > columns)
        for layer in growing(subject).layers
    )


def attends_only(subject: Subject) -> bool:
    """Tell whether every layer is attention: padding inside a text then changes nothing."""
    return not any(isinstance(layer, LinearAttentionLayer) for layer in growing(subject).layers)


def bytes_of_row(cache: Cache, columns: int) -> int:
    """Return the bytes that a row of so many columns takes; the cache given holds one token of one row."""
    sizes = [sum(tensor.nbytes for tensor in tensors_of(layer)) for layer in cache.layers]
    tokens = sum(size for size, layer in zip(sizes, cache.layers, strict=True) if isinstance(layer, DynamicLayer))
    return sum(sizes) + (columns - 1) * tokens


def tensors_of(layer: Any) -> list[Tensor]:
    """Return what a layer's cache holds."""
    if isinstance(layer, LinearAttentionLayer):
        return [*_states(layer.conv_states), *_states(layer.recurrent_states)]
    return [layer.keys, layer.values]


def _states(states: dict[int, Tensor | None]) -> list[Tensor]:
    return [state for state in states.values() if state is not None]


class _Columns(StaticLayer):
    """Keys and values_BHCd of one layer; a step writes the column at which all caches of a run are."""

    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, columns: int, column_1: Tensor) -> None:
        super().__init__(max_cache_len=columns)
        self.column_1 = column_1

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column_1, key_states)
        self.values.index_copy_(2, self.column_1, value_states)
        return self.keys, self.values

    def take(self, layer: Any, rows_b: Tensor, columns_S: Tensor) -> None:
        """Copy what a grown layer holds, keys_bHSd and values_bHSd."""
        self.keys[rows_b[:, None], :, columns_S] = layer.keys.transpose(1, 2)
        self.values[rows_b[:, None], :, columns_S] = layer.values.transpose(1, 2)


class ColumnCache(Cache):
    """A cache of fixed shape for B rows, as wide as the layers of a grown one.

    Args:
        like: a cache that a run of some rows has filled.
        column_1: the column that the next step writes; whoever steps moves it on.
    """

    def __init__(self, like: Cache, rows: int, columns: int, column_1: Tensor) -> None:
        super().__init__(layers=[_empty(layer, rows, columns, column_1) for layer in like.layers])

    def take(self, grown: Cache, rows_b: Tensor, columns_S: Tensor) -> None:
        """Take over what b rows have read, so that column s of theirs comes to stand at columns_S[s]."""
        for mine, theirs in zip(self.layers, grown.layers, strict=True):
            if isinstance(mine, _Columns):
                mine.take(theirs, rows_b, columns_S)
            else:
                for own, state in zip(tensors_of(mine), tensors_of(theirs), strict=True):
                    own.index_copy_(0, rows_b, state)


def _empty(like: Any, rows: int, columns: int, column_1: Tensor) -> _Columns | LinearAttentionLayer:
    if isinstance(like, LinearAttentionLayer):
        return _empty_states(like, rows)
    layer = _Columns(columns, column_1)
    layer.lazy_initialization(like.keys[:1].expand(rows, -1, -1, -1), like.values[:1].expand(rows, -1, -1, -1))
    return layer


def _empty_states(like: LinearAttentionLayer, rows: int) -> LinearAttentionLayer:
    layer = LinearAttentionLayer(number_of_states=len(like.conv_states))
    for i, convolved in like.conv_states.items():
        layer.lazy_initialization(_widened(convolved, rows), _widened(like.recurrent_states[i], rows), i)
        layer.has_previous_state[i] = True
    return layer


def _widened(state: Tensor | None, rows: int) -> Tensor | None:
    return None if state is None else state[:1].expand(rows, *state.shape[1:])


def _one_query(
    _module: nn.Module,
    query_BHSd: Tensor,
    key_BHCd: Tensor,
    value_BHCd: Tensor,
    bias_B11C: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Attend with one query a row: heads that share keys come as queries of one head, and keys are read once."""
    heads, (rows, n_keys) = query_BHSd.shape[1], key_BHCd.shape[:2]
    query_BHGd = query_BHSd.reshape(rows, n_keys, heads // n_keys, -1)
    out_BHGd = F.scaled_dot_product_attention(query_BHGd, key_BHCd, value_BHCd, attn_mask=bias_B11C, scale=scaling)
    return out_BHGd.reshape(rows, 1, heads, -1), None


AttentionInterface.register(_ATTENTION, _one_query)


@contextmanager
def one_query(subject: Subject) -> Iterator[None]:
    """Let the model attend with one query a row, whatever attention it was loaded with."""
    config: Any = language_model(subject.model).config
    before, config._attn_implementation = config._attn_implementation, _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def lowest(dtype: torch.dtype) -> float:
    """Return what masks a column where it is added to its score: finite, as rows without any column occur."""
    return torch.finfo(dtype).min
