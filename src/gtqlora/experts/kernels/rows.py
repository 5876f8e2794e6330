"""Which rows go to which expert, and how their outputs come together again; shared by all kernels.

A row is one (token, choice) pair. Shape letters: T tokens, D hidden, E experts held, K experts chosen per token,
R = T*K rows, N of them for experts held here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from gtqlora.experts.layout import Format, Fused, Parts


class Experts(Protocol):
    """What a kernel may ask of the experts; `FrozenExperts` says more."""

    format: Format
    n_experts: int
    first: int
    count: int
    hidden_size: int
    intermediate_size: int
    room: Room | None

    @property
    def act_fn(self) -> Callable[[Tensor], Tensor]:
        """Return the activation of the gate."""
        ...

    def fetch(self, *, back: bool = False, returns: bool = True) -> Experts:
        """Return these experts with their weights on the device that computes; to be asked before they are read."""
        ...

    def leave(self) -> None:
        """Be told that a pass has read them."""
        ...

    def sizes(self, projection: Fused) -> tuple[int, int]:
        """Return rows and columns of one matrix."""
        ...

    def get_buffer(self, target: str) -> Tensor:
        """Return a buffer by name."""
        ...

    def arrange(self, *, tiled: bool) -> None:
        """Put the weights into the order of `tiles`, or back into the plain one."""
        ...

    def parts(self, projection: Fused, experts: slice = slice(None)) -> Parts:
        """Return views of the 4-bit parts of a projection."""
        ...

    def weights(self, projection: Fused, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return dequantized weights, gate_up [E, 2I, H] or down [E, H, I]."""
        ...


class Context(Protocol):
    """What autograd hands to the passes of the kernels' functions, and what they keep there."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    module: Experts

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows sorted by expert, in order of tokens for each.

    Attributes:
        order_R: which (token, choice) each row is, flat; rows for experts held elsewhere come last.
        offsets_E1: int32 [E + 1]; the rows of the held expert e are offsets[e] to offsets[e + 1], N is the last one.
        top_k: choices of a token.
    """

    order_R: Tensor
    offsets_E1: Tensor
    top_k: int

    @property
    def tokens_R(self) -> Tensor:
        """Return the token of each row."""
        return self.order_R // self.top_k


@dataclass(frozen=True, kw_only=True)
class Placed(Rows):
    """Rows with the way back, and cut into tiles where a kernel wants that.

    Attributes:
        places_TK: the row of each (token, choice).
        tiles: int32 [at most, 4]: expert, first row and number of rows of each tile.
        n_tiles: int32 [1]; tiles from there on are not filled.
        most: rows of a tile, at most.
    """

    places_TK: Tensor
    tiles: Tensor | None = None
    n_tiles: Tensor | None = None
    most: int = 0


@torch.no_grad()
def sort_rows(top_k_index_TK: Tensor, first: int, count: int) -> Rows:
    """Sort rows by expert, for the experts `first` to `first + count - 1`; nothing here waits for a GPU."""
    expert_R = top_k_index_TK.reshape(-1).to(torch.int32) - first
    # Experts held elsewhere, before or after these, are one more, which comes last.
    expert_R = expert_R.masked_fill((expert_R < 0) | (expert_R > count), count)
    sorted_R, order_R = expert_R.sort(stable=True)
    bounds_E1 = torch.arange(count + 1, dtype=torch.int32, device=sorted_R.device)
    offsets_E1 = torch.searchsorted(sorted_R, bounds_E1, out_int32=True)
    return Rows(order_R=order_R, offsets_E1=offsets_E1, top_k=top_k_index_TK.shape[-1])


def place_rows(top_k_index_TK: Tensor, first: int, count: int) -> Placed:
    """Sort rows as `sort_rows` does, and find the row of each (token, choice)."""
    rows = sort_rows(top_k_index_TK, first, count)
    order_R = rows.order_R
    places_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    places_TK = places_R.view(top_k_index_TK.shape)
    return Placed(order_R=order_R, offsets_E1=rows.offsets_E1, top_k=rows.top_k, places_TK=places_TK)


class Room:
    """How many of a layer's rows have room, where others hold some of its experts.

    Attributes:
        exact: as many as there are for the experts held here, for which is waited; outside `limited` it always is.
        share: of all rows R, for which nobody waits. Rows beyond are left out, and whoever reads `seen` must run again.
        seen_1: fp32, the largest share so far that experts held here wanted.
    """

    def __init__(self, share: float, device: torch.device) -> None:
        self.share, self.exact = share, True
        self.seen_1 = torch.zeros(1, device=device)

    @contextmanager
    def limited(self, yes: bool = True) -> Iterator[None]:
        """Give room to a share of the rows for a while, or again to as many as there are."""
        before, self.exact = self.exact, not yes
        try:
            yield
        finally:
            self.exact = before

    def __call__(self, rows: Placed) -> Placed:
        """Return the rows that have room, and one at least: no kernel runs over nothing."""
        total = len(rows.order_R)
        if self.exact:
            return replace(rows, order_R=rows.order_R[: max(1, int(rows.offsets_E1[-1]))])
        limit = min(total, ceil(self.share * total))
        torch.maximum(self.seen_1, rows.offsets_E1[-1:] / total, out=self.seen_1)
        offsets_E1 = rows.offsets_E1.clamp(max=limit)
        return replace(rows, order_R=rows.order_R[:limit], offsets_E1=offsets_E1, tiles=None, n_tiles=None)


def gather(values_TD: Tensor, rows: Rows, n_rows: int) -> Tensor:
    """Return values_ND of the tokens of the first `n_rows` rows."""
    return values_TD.index_select(0, rows.tokens_R[:n_rows])


def spread(values_ND: Tensor, rows: Rows) -> Tensor:
    """Put sorted rows' values back in their places [T, K, D]; zero for experts held elsewhere."""
    shape = (len(rows.order_R), *values_ND.shape[1:])
    n_rows = len(values_ND)
    placed = values_ND.new_empty(shape) if n_rows == len(rows.order_R) else values_ND.new_zeros(shape)
    placed[rows.order_R[:n_rows]] = values_ND
    return placed.unflatten(0, (-1, rows.top_k))


def sum_of(precision: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of such numbers are kept: half precisions add up in fp32."""
    return torch.promote_types(precision, torch.float32)


def combine(outputs_ND: Tensor, top_k_weights_TK: Tensor, rows: Rows) -> Tensor:
    """Return weighted sums_TD over each token's choices, in at least fp32, rounded once to the outputs' dtype."""
    dtype = sum_of(outputs_ND.dtype)
    weighted_TKD = spread(outputs_ND, rows).to(dtype) * top_k_weights_TK.to(dtype).unsqueeze(-1)
    return weighted_TKD.sum(1).to(outputs_ND.dtype)


def compute_dtype(hidden_states: Tensor) -> torch.dtype:
    """Return the dtype experts compute in: the hidden states' own, or autocast's where that is on."""
    kind = hidden_states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype


def fused_sizes(module: Experts, projection: Fused) -> tuple[int, int]:
    """Return the outputs and inputs of an expert's matrices of a projection, stacked as gate over up."""
    if projection == "down":
        return module.hidden_size, module.intermediate_size
    return 2 * module.intermediate_size, module.hidden_size


def activated(gate_up_N2I: Tensor, module: Experts) -> Tensor:
    """Return act_fn(gate) * up, in torch."""
    gate_NI, up_NI = gate_up_N2I.chunk(2, dim=-1)
    return module.act_fn(gate_NI) * up_NI
