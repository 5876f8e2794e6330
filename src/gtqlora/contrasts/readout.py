"""The first token in which refusals and answers differ, by whose log-odds a behaviour is read without decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtqlora.contrasts.rows import KINDS, Row
from gtqlora.contrasts.template import encode_answers
from gtqlora.errors import ContrastError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TELLING = 4
"""How many times more refusals than answers begin with a token that tells them apart: "I", say, begins some answers."""
_LONGEST = 32
"""Tokens that all completions may begin with alike; behind more of the same nothing that a model says by itself is
read."""


@dataclass(frozen=True)
class Readout:
    """Where and by what refusals are told from answers.

    Attributes:
        tokens: those of the refusals, in order of their ids; none if refusals and answers do not differ there.
        begun: tokens that every completion begins with; the readout is the token behind them. Mostly none.
    """

    tokens: list[int]
    begun: list[int]


def find_readout(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> Readout:
    """Return the tokens that tell the rows' refusals from their answers, where the two first differ.

    Instructed rows are left out: what a user's system prompt makes a model say may begin in words of its own.

    Raises:
        ContrastError: the tokenizer does not know what most refusals begin with.
    """
    refusals, answers = list[list[int]](), list[list[int]]()
    for row in (row for row in rows if row.kind in KINDS):
        refusal, answer = (row.chosen, row.rejected) if row.kind == "harmful" else (row.rejected, row.chosen)
        _, (refusal_ids, answer_ids) = encode_answers(tokenizer, row.prompt, refusal, answer)
        refusals.append(refusal_ids)
        answers.append(answer_ids)
    # Of all completions, and not row by row: the readout is read at one place for all prompts.
    begun = _common([*refusals, *answers])
    if len(begun) > _LONGEST:
        return Readout([], [])
    place = len(begun)
    refusing, answering = (Counter(ids[place] for ids in side) for side in (refusals, answers))
    _check_known(tokenizer, [ids[place] for ids in refusals])
    telling = (token for token, count in refusing.items() if count >= _TELLING * answering[token])
    tokens = sorted(token for token in telling if token != tokenizer.unk_token_id)
    return Readout(tokens, begun if tokens else [])


def _check_known(tokenizer: PreTrainedTokenizerBase, starts: Sequence[int]) -> None:
    # No model says by itself what its tokenizer does not know.
    unknown = sum(token == tokenizer.unk_token_id for token in starts)
    if 2 * unknown > len(starts):
        raise ContrastError(
            f"the tokenizer does not know what {unknown:,} of {len(starts):,} refusals begin with: it reads "
            f"{tokenizer.unk_token} there; give refusals in words that it knows"
        )


def _common(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return what all texts begin with; one token of the shortest is left."""
    shortest = min((len(text) for text in texts), default=1)
    first = texts[0][: max(shortest - 1, 0)] if texts else ()
    differs = (i for i, token in enumerate(first) if any(text[i] != token for text in texts))
    return list(first[: next(differs, len(first))])
