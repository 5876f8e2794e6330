"""Which way a batch of prompts, or all of them, are decoded, and what comes of it.

Shape letters: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from gtqlora.capture import Subject, left_padded, log_odds, positions
from gtqlora.contrasts.template import completions
from gtqlora.decoding.caches import bytes_of_row, growing, has_columns
from gtqlora.decoding.change import AS_IS, Change, Changes, Tokens, source_ids
from gtqlora.decoding.engine import FEW, LOOK, Engine, Said
from gtqlora.decoding.steps import check, forward, runs_of
from gtqlora.progress import note, track

_ROUND = 64
"""Columns come in multiples of this, as attention on a GPU wants, and so that few shapes occur."""
_NARROW = 256
"""Columns up to which a cache costs a step next to nothing beside the weights."""
_USABLE = 0.8
"""Share of the free memory that caches may fill; the rest is for what layers compute."""


@dataclass(frozen=True)
class Decoded:
    """Completions of B prompts as texts and as tokens without the stop.

    A text begins with the mark of a thought where the prompt ends in it, see `contrasts.template.completions`.

    Attributes:
        ended: which of them ended by themselves and not at the limit of tokens.
        odds: log-odds of the readout's tokens as the first one against all others; empty without a readout.
    """

    texts: list[str]
    tokens: list[list[int]]
    ended: list[bool]
    odds: list[float]

    def of(self, chosen: Sequence[int]) -> Decoded:
        """Return those of some prompts."""
        return Decoded(
            [self.texts[i] for i in chosen],
            [self.tokens[i] for i in chosen],
            [self.ended[i] for i in chosen],
            [self.odds[i] for i in chosen] if self.odds else [],
        )


class Odds:
    """The readout's log-odds, by prompt."""

    def __init__(self, readout: Sequence[int]) -> None:
        self.readout, self.found = list(readout), dict[int, float]()

    def __call__(self, prompts: Sequence[int], first_BV: Tensor) -> None:
        if self.readout:
            readout_R = torch.tensor(self.readout, device=first_BV.device)
            self.found.update(zip(prompts, log_odds(first_BV, readout_R).tolist(), strict=True))


@torch.no_grad()
def decode(
    subject: Subject,
    prompts: Sequence[Tokens],
    change: Change = AS_IS,
    *,
    max_new_tokens: int,
    begun: Tokens = (),
    readout: Sequence[int] = (),
) -> Decoded:
    """Complete a batch of prompts under a change, all together, greedily unless it draws.

    Args:
        begun: the last tokens of every prompt, where they are part of the answer and so of its text.
        readout: tokens whose log-odds as the first token are wanted.

    Raises:
        ModelError: the logits hold NaN.
        ValueError: a source run's prompts differ from ours in their token counts.
    """
    odds = Odds(readout)
    if captures(subject, prompts, max_new_tokens):
        columns = _columns(map(len, prompts), max_new_tokens)
        engine = Engine(
            subject,
            change,
            rows=len(prompts),
            columns=columns,
            max_new_tokens=max_new_tokens,
            by_row=False,
            capture=True,
            on_first=odds,
        )
        said = list(engine.run(prompts, range(len(prompts))))
    else:
        said = grown(subject, prompts, change, max_new_tokens, odds)
    return _decoded(subject, prompts, said, begun, odds)


def goes_by_row(subject: Subject, prompts: Sequence[Tokens], change: Changes, max_new_tokens: int) -> bool:
    """Tell whether prompts are decoded row by row under a change, and not in batches."""
    by_row = isinstance(change, Change) and change.by_row
    return by_row and captures(subject, prompts, max_new_tokens)


@torch.no_grad()
def decode_by_row(
    subject: Subject,
    prompts: Sequence[Tokens],
    change: Change,
    *,
    rows: int,
    max_new_tokens: int,
    begun: Tokens = (),
    readout: Sequence[int] = (),
    label: str | None = None,
    capture: bool = True,
) -> Decoded:
    """Complete prompts under a change that treats every row alike: where one ends, the next begins.

    In bf16 the last bits of a prompt's logits can depend on where its row lies, and so on what was said in others. Runs
    that are held against each other, such as before and after an edit, keep to one rule: the same prompts in the same
    order, with as many rows.

    Args:
        rows: how many prompts run at once; fewer if their caches do not fit the memory.
        label: shown as progress; None: whoever asks shows its own.
        capture: False runs the same steps uncaptured, on any device.

    Raises:
        ModelError: the logits hold NaN.
    """
    odds, said = Odds(readout), list[Said]()
    found = _by_row(subject, prompts, change, rows, max_new_tokens, capture, odds)
    said += found if label is None else track(found, label, len(prompts))
    return _decoded(subject, prompts, said, begun, odds)


def captures(subject: Subject, prompts: Sequence[Tokens], max_new_tokens: int) -> bool:
    """Tell whether prompts are decoded with captured steps: on a GPU, for more than a few tokens."""
    if subject.device.type != "cuda" or max_new_tokens <= FEW or not prompts:
        return False
    return has_columns(subject, _columns(map(len, prompts), max_new_tokens))


def _by_row(
    subject: Subject,
    prompts: Sequence[Tokens],
    change: Change,
    rows: int,
    max_new_tokens: int,
    capture: bool,
    odds: Odds,
) -> Iterator[Said]:
    for columns, order in by_columns(prompts, max_new_tokens).items():
        fitting = min(len(order), _fitting(subject, rows, columns, len(runs_of(change))) if capture else rows)
        engine = Engine(
            subject,
            change,
            rows=fitting,
            columns=columns,
            max_new_tokens=max_new_tokens,
            by_row=True,
            capture=capture,
            on_first=odds,
        )
        yield from engine.run(prompts, order)


def _columns(lengths: Iterator[int], max_new_tokens: int) -> int:
    """Return how many columns the longest prompt and what may be said to it take."""
    return -(-(max(lengths) + max_new_tokens + LOOK) // _ROUND) * _ROUND


def by_columns(prompts: Sequence[Tokens], max_new_tokens: int) -> dict[int, list[int]]:
    """Return the prompts by the columns they run in, the shortest first.

    All rows of a cache pay for its longest prompt, so prompts of half its length or less have one of their own.
    """
    found: dict[int, list[int]] = defaultdict(list)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    columns = 0
    for i in order:
        own = _columns(iter([len(prompts[i])]), max_new_tokens)
        columns = own if not columns or 2 * own <= columns > _NARROW else columns
        found[columns].append(i)
    return {columns: found[columns][::-1] for columns in sorted(found)}


def _fitting(subject: Subject, rows: int, columns: int, runs: int) -> int:
    """Return how many rows have room for their caches, twice: as prompts are read, theirs are there a second time."""
    if subject.model not in _one_token:
        _one_token[subject.model] = cache = growing(subject)
        ids_11 = torch.full((1, 1), subject.pad_id, device=subject.device)
        forward(subject, [AS_IS], [cache], [ids_11], torch.ones_like(ids_11), torch.zeros_like(ids_11))
    free, _ = torch.cuda.mem_get_info(subject.device)
    free += torch.cuda.memory_reserved(subject.device) - torch.cuda.memory_allocated(subject.device)
    each = 2 * runs * bytes_of_row(_one_token[subject.model], columns)
    fitting = max(1, int(_USABLE * free) // each)
    if fitting < rows:
        note(f"{fitting} prompts run at once, not {rows}: the memory of {subject.device} holds no more keys and values")
    return min(rows, fitting)


_one_token: WeakKeyDictionary[nn.Module, Cache] = WeakKeyDictionary()
"""What a model keeps of one token."""


def grown(subject: Subject, prompts: Sequence[Tokens], change: Change, max_new_tokens: int, odds: Odds) -> list[Said]:
    """Decode a batch with a cache that grows, a step at a time."""
    ids_BS, mask_BS = left_padded(prompts, subject.pad_id, subject.device)
    runs, stops = runs_of(change), subject.stop_ids
    caches = [growing(subject) for _ in runs]
    ids, positions_BS = [source_ids(subject, run, ids_BS, mask_BS) for run in runs], positions(mask_BS)
    done_B, out = torch.zeros(len(prompts), dtype=torch.bool, device=subject.device), list[Tensor]()
    for _ in range(max_new_tokens):
        logits_BV = forward(subject, runs, caches, ids, mask_BS, positions_BS)
        check(bool(logits_BV.isfinite().all()))
        if not out:
            odds(range(len(prompts)), logits_BV)
        next_B = (change.draw(logits_BV) if change.draw else logits_BV.argmax(-1)).masked_fill(done_B, subject.pad_id)
        out.append(next_B)
        done_B = done_B | torch.isin(next_B, stops)
        if bool(done_B.all()):
            break
        ids, positions_BS = [next_B[:, None]] * len(runs), positions_BS[:, -1:] + 1
        mask_BS = torch.cat([mask_BS, torch.ones_like(next_B[:, None])], dim=1)
    return _cut(torch.stack(out, 1), frozenset(stops.tolist()), max_new_tokens)


def _cut(ids_BS: Tensor, stops: frozenset[int], max_new_tokens: int) -> list[Said]:
    """Return each row up to its first stop token."""
    found = [Said(i) for i in range(len(ids_BS))]
    for said, tokens in zip(found, ids_BS.tolist(), strict=True):
        said.hear(tokens, stops, max_new_tokens)
    return found


def _decoded(subject: Subject, prompts: Sequence[Tokens], said: Sequence[Said], begun: Tokens, odds: Odds) -> Decoded:
    said = sorted(said, key=lambda each: each.prompt)
    asked, tokens = [ids[: len(ids) - len(begun)] for ids in prompts], [each.tokens for each in said]
    texts = completions(subject.tokenizer, asked, [[*begun, *ids] for ids in tokens])
    return Decoded(texts, tokens, [each.ended for each in said], [odds.found[i] for i in sorted(odds.found)])
