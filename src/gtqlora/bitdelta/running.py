"""The sequences that are decoded together: they join and leave between steps, each with its own variant.

Shape letters: B sequences, S tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from gtqlora.bitdelta.resident import Resident
from gtqlora.capture.batches import positions


@dataclass(frozen=True, kw_only=True)
class Started:
    """A sequence whose prompt was run, and logits_V of its first new token."""

    variant: int
    cache: DynamicCache
    mask_BS: Tensor
    logits_V: Tensor


class Running:
    """A batch of sequences, padded on the left, and what attention keeps of them.

    Keys are kept with their true positions, so that padding on the left can be added and taken away.
    """

    def __init__(self, model: Resident) -> None:
        self._model = model
        self._variants: list[int] = []
        self._cache: DynamicCache | None = None
        self._mask_BS = torch.zeros(0, 0, dtype=torch.long, device=model.subject.device)

    def __len__(self) -> int:
        return len(self._variants)

    def start(self, prompt: Sequence[int], variant: int) -> Started:
        """Run a prompt by itself; the others do not notice."""
        # Alone and not with other new ones: prompts of different lengths would be padded, which linear attention
        # would have to be told, and all rows of one variant are multiplied with its matrix merged.
        cache, ids_BS = self._new_cache(), torch.tensor([list(prompt)], device=self._mask_BS.device)
        mask_BS = torch.ones_like(ids_BS)
        logits_BV = self._forward(ids_BS, mask_BS, cache, [variant])
        return Started(variant=variant, cache=cache, mask_BS=mask_BS, logits_V=logits_BV[0].cpu())

    def join(self, started: Started) -> None:
        """Take a sequence in, behind the others."""
        if self._cache is None:
            self._cache, self._mask_BS = started.cache, started.mask_BS
        else:
            size = max(self._mask_BS.shape[1], started.mask_BS.shape[1])
            _join(self._cache, started.cache, size)
            self._mask_BS = torch.cat([_padded(mask_BS, size, -1) for mask_BS in (self._mask_BS, started.mask_BS)])
        self._variants.append(started.variant)

    def keep(self, rows: Sequence[int]) -> None:
        """Let all sequences go but these."""
        if not rows:
            self._cache, self._mask_BS, self._variants = None, self._mask_BS[:0, :0], []
        elif self._cache is not None and len(rows) < len(self):
            index = torch.tensor(rows, device=self._mask_BS.device)
            mask_BS = self._mask_BS[index]
            # the longest of those that stay may be shorter than the longest of all was
            size = int(mask_BS.sum(-1).max())
            _keep(self._cache, index, size)
            self._mask_BS, self._variants = mask_BS[:, -size:], [self._variants[row] for row in rows]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Give every sequence its next token; return logits_BV of those after, on the CPU."""
        assert self._cache is not None
        ids_BS = torch.tensor(tokens, device=self._mask_BS.device)[:, None]
        self._mask_BS = pad(self._mask_BS, (0, 1), value=1)
        return self._forward(ids_BS, self._mask_BS, self._cache, self._variants).cpu()

    @torch.inference_mode()
    def _forward(self, ids_BS: Tensor, mask_BS: Tensor, cache: DynamicCache, variants: Sequence[int]) -> Tensor:
        self._model.batch.begin(variants)
        found = self._model.subject.model(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=positions(mask_BS)[:, -ids_BS.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1].float()

    def _new_cache(self) -> DynamicCache:
        """Return an empty cache, with whole keys and values of every layer of attention whatever its window."""
        # A config with a window would give a cache that forgets, and rows of different lengths forget differently. The
        # mask knows the window, so that whole keys are right as well.
        typed = DynamicCache(config=self._model.subject.model.config)
        linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in typed.layers)
        return typed if linear else DynamicCache()


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """Return a tensor with zeros before a dimension that is counted from the end."""
    return pad(tensor, (0, 0) * (-dim - 1) + (size - tensor.shape[dim], 0))


@torch.inference_mode()
def _join(cache: DynamicCache, other: DynamicCache, size: int) -> None:
    """Put another cache's sequences behind a cache's own."""
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if isinstance(mine, LinearAttentionCacheLayerMixin):
            theirs = cast(LinearAttentionCacheLayerMixin, theirs)
            _join_states(mine.conv_states, theirs.conv_states)
            _join_states(mine.recurrent_states, theirs.recurrent_states)
        if isinstance(mine, DynamicLayer) and mine.is_initialized:
            theirs = cast(DynamicLayer, theirs)
            mine.keys = torch.cat([_padded(cast(Tensor, each.keys), size, -2) for each in (mine, theirs)])
            mine.values = torch.cat([_padded(cast(Tensor, each.values), size, -2) for each in (mine, theirs)])


def _join_states(mine: dict[int, Tensor | None], theirs: Mapping[int, Tensor | None]) -> None:
    for place, state in mine.items():
        if state is not None:
            mine[place] = torch.cat([state, cast(Tensor, theirs[place])])


@torch.inference_mode()
def _keep(cache: DynamicCache, rows: Tensor, size: int) -> None:
    """Keep some sequences of a cache, and the last positions only."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                states.update({i: state[rows] for i, state in states.items() if state is not None})
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys, layer.values = (cast(Tensor, part)[rows][:, :, -size:] for part in (layer.keys, layer.values))
