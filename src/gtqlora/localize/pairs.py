"""Flagged prompts and their twins."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from gtqlora.capture import Subject
from gtqlora.contrasts import Contrast, Messages, Row
from gtqlora.contrasts.template import encode_opening


@dataclass(frozen=True)
class Pair:
    """A flagged prompt and its twin: same words but for what makes it flagged; equal token counts if `aligned`.

    Attributes:
        prompt, twin: in tokens, with what the chat template has before answers, such as an empty thought.
        twin_messages: the twin as it is written, for the judge.
        matched: the twin is a true one; else an unrelated benign prompt stands in for it.
    """

    row: Row
    prompt: list[int]
    twin: list[int]
    twin_messages: Messages
    matched: bool = True

    def answered_with(self, begun: Sequence[int]) -> Pair:
        """Return the same pair, both of whose answers have begun with these tokens."""
        return replace(self, prompt=[*self.prompt, *begun], twin=[*self.twin, *begun])

    @property
    def aligned(self) -> bool:
        """Return whether the two can be interchanged token by token."""
        return self.matched and len(self.prompt) == len(self.twin)

    @property
    def common(self) -> int:
        """Return the number of tokens before the two differ; a causal model computes the same on them."""
        return next(
            (i for i, (a, b) in enumerate(zip(self.prompt, self.twin, strict=False)) if a != b),
            min(len(self.prompt), len(self.twin)),
        )


def pairs_of(contrast: Contrast, subject: Subject, limit: int, seed: int) -> list[Pair]:
    """Return lookalike and harmful rows with their twins, at most `limit`, drawn reproducibly with their siblings.

    Both kinds have an equal part of the limit; what the rarer one leaves of its part goes to the other.

    Rows without a twin are left out where others have one. Where none has, benign rows stand in, in turn.
    """
    flagged = [*contrast.of_kind("lookalike"), *contrast.of_kind("harmful")]
    twins = [(row, twin) for row in flagged if (twin := contrast.twin_of(row)) is not None]
    strangers = zip(flagged, cycle([row.prompt for row in contrast.of_kind("benign")]), strict=False)
    groups: dict[str, list[Pair]] = defaultdict(list)
    for row, twin in twins or strangers:
        prompt, other = (encode_opening(subject.tokenizer, text) for text in (row.prompt, twin))
        groups[row.pair_id].append(Pair(row, prompt, other, twin, matched=bool(twins)))
    # sorted first: the draw depends on the seed alone, not on the order of the rows
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    drawn = [pair for pair_id in order for pair in groups[pair_id]]
    left, kept = _parts(Counter(pair.row.kind for pair in drawn), limit), list[Pair]()
    for pair in drawn:
        if left[pair.row.kind] > 0:
            left[pair.row.kind] -= 1
            kept.append(pair)
    return kept


def _parts(counts: Mapping[str, int], limit: int) -> dict[str, int]:
    """Return how many of each kind are drawn: as many of each, as far as there are so many."""
    parts = dict[str, int]()
    for kind in sorted(counts, key=lambda kind: counts[kind]):
        parts[kind] = min(counts[kind], (limit - sum(parts.values())) // (len(counts) - len(parts)))
    return parts


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to discover on and pairs to confirm on; siblings stay together."""
    number = {pair_id: i for i, pair_id in enumerate(dict.fromkeys(pair.row.pair_id for pair in pairs))}
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        # pair_ids in turn, and pairs were shuffled before: the halves are random
        parts[number[pair.row.pair_id] % 2].append(pair)
    return parts
