"""Routers and routed experts of one resident base, where variants have their own.

Shape letters: T rows, D hidden, E experts, C experts chosen for a row, V variants, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora.bitdelta.layers import Batch, Rows, Tiles, grouped, twin
from gtqlora.bitdelta.onebit import OneBit
from gtqlora.experts.module import FrozenExperts
from gtqlora.families.facts import DOWN, GATE_UP

if TYPE_CHECKING:
    from gtqlora.bitdelta.kernels import Matrices


class VariantRouter(nn.Module):
    """A router of the base of which some variants have a weight of their own.

    Each row's logits come from its own variant's weight. What a family makes of logits stays its own router's business:
    a twin of it is given logits in place of hidden states, and the identity as its weight, which changes no number.

    Args:
        weights: by variant, its weight_ED on the base's device, in the base router's dtype.
    """

    def __init__(self, base: nn.Module, batch: Batch, weights: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.base, self._batch, self._own = base, batch, weights
        weight_ED = base.get_parameter("weight")
        identity_EE = torch.eye(len(weight_ED), dtype=weight_ED.dtype, device=batch.device)
        # in a tuple, so that it is no part of the model
        self._choice = (twin(base, {"weight": identity_EE}, hidden_dim=len(weight_ED)),)
        self._stacked = self._for_kernel(weight_ED) if batch.kernels else None

    def _for_kernel(self, weight_ED: Tensor) -> Matrices:
        from gtqlora.bitdelta.kernels import Matrices

        # whoever has no weight of its own uses the first one, the base's
        slot_V = torch.zeros(self._batch.n_variants, dtype=torch.int32)
        slot_V[list(self._own)] = torch.arange(1, len(self._own) + 1, dtype=torch.int32)
        return Matrices(torch.stack([weight_ED.data, *self._own.values()]), slot_V.to(self._batch.device))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits_TE, weights_TC and indices_TC as the base's router does, every row by its own variant."""
        if not self._batch.has_any(self._own):
            return self.base(hidden)
        return self._choice[0](self._logits(hidden.reshape(-1, hidden.shape[-1])))

    def _logits(self, hidden_TD: Tensor) -> Tensor:
        weight_ED = self.base.get_parameter("weight")
        logits_TE = torch.empty(len(hidden_TD), len(weight_ED), dtype=weight_ED.dtype, device=hidden_TD.device)
        if self._stacked is not None:
            from gtqlora.bitdelta.kernels import product

            product(logits_TE, hidden_TD, self._stacked, self._batch.kernel_groups(len(hidden_TD)), added=False)
            return logits_TE
        for variant, rows in self._batch.groups(len(hidden_TD)):
            own_ED = self._own.get(variant, weight_ED)
            logits_TE[rows] = F.linear(hidden_TD[rows].to(own_ED.dtype), own_ED)
        return logits_TE


Piece = tuple[int, OneBit]
"""A one-bit difference, and the first row of the parameter [N, K] that it is of: gate and up lie below each other."""


class VariantExperts(nn.Module):
    """Routed experts of the base with one-bit differences: (variant, expert) groups of rows.

    Args:
        pieces: by variant, and by parameter and expert, its differences.
    """

    def __init__(
        self, base: nn.Module, batch: Batch, tiles: Tiles, pieces: Mapping[int, Mapping[tuple[str, int], list[Piece]]]
    ) -> None:
        super().__init__()
        self.base, self._batch, self._tiles, self._pieces = base, batch, tiles, pieces

    def forward(self, hidden_TD: Tensor, index_TC: Tensor, weights_TC: Tensor) -> Tensor:
        """Return sums of the chosen experts' outputs (C choices), every row with its own variant's experts."""
        if not self._batch.has_any(self._pieces):
            return self.base(hidden_TD, index_TC, weights_TC)
        out_TD, variants = torch.zeros_like(hidden_TD), self._batch.of_rows(len(hidden_TD))
        # experts outside, variants inside: an expert's own matrix is read once for all rows, whosever they are
        for expert in index_TC.unique().tolist():
            token, choice = torch.where(index_TC == expert)
            groups = grouped([variants[row] for row in token.tolist()], hidden_TD.device)
            gate, up = self._linear(GATE_UP, expert, hidden_TD[token], groups).chunk(2, dim=-1)
            done = self._linear(DOWN, expert, cast(nn.Module, self.base.act_fn)(gate) * up, groups)
            out_TD.index_add_(0, token, (done * weights_TC[token, choice, None]).to(out_TD.dtype))
        return out_TD

    def _linear(self, name: str, expert: int, x_TK: Tensor, groups: list[tuple[int, Rows]]) -> Tensor:
        out_TN = F.linear(x_TK, self._weight(name, expert, x_TK.dtype))
        for variant, rows in groups:
            for first, delta in self._pieces.get(variant, {}).get((name, expert), ()):
                # a copy where rows are numbers, so it is put back
                mine_TN = out_TN[rows]
                mine_TN[:, first : first + delta.shape[0]] += self._tiles.product(x_TK[rows], delta)
                out_TN[rows] = mine_TN
        return out_TN

    def _weight(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        if isinstance(self.base, FrozenExperts):
            here = slice(expert - self.base.first, expert - self.base.first + 1)
            return self.base.fetch(returns=False).weights("gate_up" if name == GATE_UP else "down", here, dtype)[0]
        return self.base.get_parameter(name)[expert]
