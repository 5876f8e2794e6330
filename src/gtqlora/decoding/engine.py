"""Decodes many prompts a row each, on a GPU: rows that end leave, and the next prompts take them.

Nothing waits for the GPU but a look at the tokens every few steps, so the processor runs ahead. What a row has said
after its end is cut off, and the same tokens come out as if each step were looked at.

Shape letters: B rows, b rows that begin together, S sequence, C columns of the cache, V vocabulary, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gtqlora.capture import Subject, left_padded, positions
from gtqlora.decoding.caches import ColumnCache, attends_only, growing, lowest, one_query
from gtqlora.decoding.change import Change, Tokens, source_ids
from gtqlora.decoding.steps import Repeated, check, forward, runs_of
from gtqlora.experts.sharding import is_sharded
from gtqlora.experts.streaming import waiting

LOOK = 8
"""Steps between two looks at what was said."""
FEW = 4
"""Tokens up to which capturing a step costs more than it saves."""
_TOKENS_AT_ONCE = 16_384
"""Of prompts that begin together, so that what their layers compute fits beside the cache."""
_SHARED = 32
"""Tokens with which all prompts begin from which on they are read once for all."""


@dataclass
class Said:
    """What was said to one prompt so far; `ended` where a stop token came."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False

    def hear(self, tokens: Sequence[int], stops: frozenset[int], most: int) -> None:
        """Go on with tokens, up to a stop or the limit."""
        heard = list(takewhile(lambda token: token not in stops, tokens))
        room = most - len(self.tokens)
        self.ended = len(heard) < min(len(tokens), room)
        self.tokens += heard[:room]


class Engine:
    """Rows of a cache of fixed shape, and what is being said in them.

    Args:
        rows: how many prompts run at once.
        columns: of the cache; at least the longest prompt, what may be said to it, and `LOOK`.
        by_row: the change treats each row alike, so that rows may begin one by one.
        capture: whether a step is captured; where not, the same step runs as it is.
        on_first: is shown the prompts that begin and the logits_bV of their first tokens.
    """

    def __init__(
        self,
        subject: Subject,
        change: Change,
        *,
        rows: int,
        columns: int,
        max_new_tokens: int,
        by_row: bool,
        capture: bool,
        on_first: Callable[[list[int], Tensor], None],
    ) -> None:
        device = subject.device
        self.subject, self.change, self.runs = subject, change, runs_of(change)
        self.columns, self.most, self.by_row, self.on_first = columns, max_new_tokens, by_row, on_first
        self.stops, self.stop_set = subject.stop_ids, frozenset(subject.stop_ids.tolist())
        self.ids_B1 = torch.full((rows, 1), subject.pad_id, device=device)
        self.positions_B1 = torch.zeros_like(self.ids_B1)
        self.done_B = torch.ones(rows, dtype=torch.bool, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        dtype = subject.model.dtype
        self.bias_B11C = torch.full((rows, 1, 1, columns), lowest(dtype), dtype=dtype, device=device)
        self.caches: list[ColumnCache] = []
        self.shared: list[Cache] | None = None
        self.in_row: list[Said | None] = [None] * rows
        streams = bool(waiting(subject.model.modules())) or is_sharded(subject.model)
        self._repeated = Repeated(capture=capture and not streams)

    @property
    def captured(self) -> bool:
        """Return whether its steps are replayed from a capture."""
        return self._repeated.captured

    def run(self, prompts: Sequence[Tokens], order: Sequence[int]) -> Iterator[Said]:
        """Yield what is said to each prompt, as they end; they begin in the given order."""
        waiting = list(order)
        n_shared = self._read_shared([prompts[i] for i in order]) if self._may_share else 0
        while waiting or any(self.in_row):
            free = [row for row, said in enumerate(self.in_row) if said is None]
            if waiting and self._worth_beginning(len(free), len(waiting)):
                begun, waiting = waiting[: len(free)], waiting[len(free) :]
                for some in self._read_together(prompts, begun):
                    self._begin(free[: len(some)], some, prompts, n_shared)
                    free = free[len(some) :]
            else:
                self._go_on()
            yield from self._ended()

    def _worth_beginning(self, free: int, waiting: int) -> bool:
        """Tell whether enough rows are free: reading a few prompts costs several steps of all rows."""
        return free >= min(waiting, max(1, len(self.in_row) // 4))

    def _read_together(self, prompts: Sequence[Tokens], begun: list[int]) -> list[list[int]]:
        """Return the prompts that begin in parts that are read at once."""
        if not self.by_row:
            return [begun]
        size = max(1, _TOKENS_AT_ONCE // max(len(prompts[i]) for i in begun))
        return [begun[start : start + size] for start in range(0, len(begun), size)]

    # --- what all prompts begin with

    @property
    def _may_share(self) -> bool:
        return self.by_row and attends_only(self.subject)

    def _read_shared(self, prompts: Sequence[Tokens]) -> int:
        """Read the tokens with which all prompts begin, if that saves enough; return how many they are."""
        # What the first and the last in order begin with, those between them begin with, too.
        first, last = min(map(list, prompts)), max(map(list, prompts))
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        n_shared = min(alike, min(map(len, prompts)) - 1)
        if n_shared * (len(prompts) - 1) < _SHARED * len(prompts):
            return 0
        self.shared = [growing(self.subject) for _ in self.runs]
        ids_1S, mask_1S = left_padded([first[:n_shared]], self.subject.pad_id, self.subject.device)
        forward(self.subject, self.runs, self.shared, [ids_1S] * len(self.runs), mask_1S, positions(mask_1S))
        return n_shared

    def _beginnings(self, rows: int) -> list[Cache]:
        if self.shared is None:
            return [growing(self.subject) for _ in self.runs]
        caches = deepcopy(self.shared)
        for cache in caches:
            cache.batch_repeat_interleave(rows)
        return caches

    # --- prompts begin

    def _begin(self, rows: list[int], begun: list[int], prompts: Sequence[Tokens], n_shared: int) -> None:
        """Read prompts, put what was read before the current column, and choose their first tokens."""
        subject, device = self.subject, self.subject.device
        rests = [list(prompts[i])[n_shared:] for i in begun]
        ids_bS, mask_bS = left_padded(rests, subject.pad_id, device)
        ids = [source_ids(subject, run, ids_bS, mask_bS) for run in self.runs]
        whole_bS = torch.cat([mask_bS.new_ones(len(begun), n_shared), mask_bS], dim=1)
        positions_bS = positions(whole_bS)
        grown = self._beginnings(len(begun))
        logits_bV = forward(subject, self.runs, grown, ids, whole_bS, positions_bS[:, n_shared:])
        self.on_first(begun, logits_bV)
        rows_b = torch.tensor(rows, device=device)
        self._take(grown, rows_b, whole_bS)
        self.positions_B1[rows_b] = positions_bS[:, -1:]
        self.done_B[rows_b] = False
        next_b = self._chosen(logits_bV)
        self._advance(rows_b, next_b)
        for row, prompt, token in zip(rows, begun, next_b.tolist(), strict=True):
            self.in_row[row] = said = Said(prompt)
            said.hear([token], self.stop_set, self.most)
        check(bool(self.finite))

    def _take(self, grown: Sequence[Cache], rows_b: Tensor, mask_bS: Tensor) -> None:
        rows, length = len(self.in_row), mask_bS.shape[1]
        columns_S = (self.column_1 + torch.arange(-length, 0, device=rows_b.device)) % self.columns
        self.caches = self.caches or [ColumnCache(each, rows, self.columns, self.column_1) for each in grown]
        for cache, each in zip(self.caches, grown, strict=True):
            cache.take(each, rows_b, columns_S)
        bias_bC = torch.full_like(self.bias_B11C[rows_b, 0, 0], lowest(self.bias_B11C.dtype))
        bias_bC[:, columns_S] = bias_bC[:, columns_S].masked_fill(mask_bS.bool(), 0)
        self.bias_B11C[rows_b, 0, 0] = bias_bC

    # --- they go on, all together

    def _step(self) -> Tensor:
        """Return logits_BV after each row's last token, which is written to the current column."""
        self.bias_B11C.index_fill_(3, self.column_1, 0)
        ids = [self.ids_B1] * len(self.runs)
        with one_query(self.subject):
            return forward(self.subject, self.runs, self.caches, ids, self.bias_B11C, self.positions_B1)

    def _go_on(self) -> None:
        steps = min(LOOK, max(self.most - len(said.tokens) for said in self.in_row if said))
        block: list[Tensor] = []
        for _ in range(steps):
            block.append(self._chosen(self._repeated(self._step)))
            self.column_1.add_(1).remainder_(self.columns)
            self._advance(slice(None), block[-1])
        for said, tokens in zip(self.in_row, torch.stack(block, 1).tolist(), strict=True):
            if said is not None:
                said.hear(tokens, self.stop_set, self.most)
        check(bool(self.finite))

    def _chosen(self, logits_BV: Tensor) -> Tensor:
        self.finite.logical_and_(logits_BV.isfinite().all())
        return self.change.draw(logits_BV) if self.change.draw else logits_BV.argmax(-1)

    def _advance(self, rows: Tensor | slice, next_b: Tensor) -> None:
        """Make tokens the ones that their rows read next; ended rows read padding, which costs the fewest experts."""
        next_b = next_b.masked_fill(self.done_B[rows], self.subject.pad_id)
        self.done_B[rows] = self.done_B[rows] | torch.isin(next_b, self.stops)
        self.ids_B1[rows] = next_b[:, None]
        self.positions_B1[rows] += 1

    def _ended(self) -> Iterator[Said]:
        for row, said in enumerate(self.in_row):
            if said is not None and (said.ended or len(said.tokens) == self.most):
                self.in_row[row] = None
                yield said
