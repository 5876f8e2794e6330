"""Batches for judges that are models: texts of like length together, a limited number of tokens at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Tokens = Sequence[int]


def batches(texts: Sequence[Tokens], *, most: int) -> Iterator[list[int]]:
    """Yield the numbers of all texts, in batches of at most so many tokens, padding among them, or of one text."""
    batch: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        # In this order the text that is added is the longest, to which the others are padded.
        if batch and (len(batch) + 1) * len(texts[i]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
