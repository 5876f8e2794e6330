"""What `contrast build` made of public sets, in figures: no prompt and no answer stands here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gtqlora.results.served import ServedModel


def counted(count: int, why: str) -> str:
    """Return how many prompts have a label, or are left out for a reason: "24 answers", "1 answer cut off"."""
    return f"{count:,} {why}" if count == 1 else _COUNTED.sub(r"\1s", f"{count:,} {why}")


BEYOND_LIMIT = "beyond --limit"
_COUNTED = re.compile(r"^([\d,]+ (?:refusal|answer|prompt))\b")


@dataclass(frozen=True, kw_only=True)
class BuiltSource:
    """What became of one source.

    Attributes:
        name: as the user named it.
        layout: the set that it was taken for.
        licence, url: of that set, as far as known.
        rows: rows of the source.
        asked: its prompts by kind that the model was asked.
        kept: rows that were made, by kind.
        left_out: rows of which none was made, by reason.
    """

    name: str
    layout: str
    licence: str
    url: str
    rows: int
    asked: Mapping[str, int]
    kept: Mapping[str, int]
    left_out: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A contrast set that was made.

    Attributes:
        served: the model of a server that gave the answers; None where the model here did.
        counts: rows by split, then by kind.
        refused: of the harmful prompts that the model was asked, those that it refuses.
        harmful: the harmful prompts that it was asked.
        own_answers: lookalike rows whose answer is the model's own; the others have their set's.
        with_twin: lookalike rows with a twin.
        limit: prompts of each kind that it was asked, at most.
        floor: what is missing for the safety floor, as a sentence; "" if nothing is.
    """

    file: Path
    card: Path
    model: str
    judge: str
    served: ServedModel | None
    sources: tuple[BuiltSource, ...]
    counts: Mapping[str, Mapping[str, int]]
    refused: int
    harmful: int
    own_answers: int
    with_twin: int
    limit: int
    floor: str

    @property
    def beyond_limit(self) -> str:
        """Return what the limit left out, as a sentence; "" if that is nothing."""
        beyond = sum(one.left_out.get(BEYOND_LIMIT, 0) for one in self.sources)
        return f"--limit {self.limit:,}: {beyond:,} more prompts were not asked" if beyond else ""
