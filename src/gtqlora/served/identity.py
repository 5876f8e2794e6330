"""Whether what a server says is said by our weights: its greedy answers to harmless prompts, read by our model.

The probes are prompts of the pairs, and the first half of each: models that were trained alike answer alike, and go on
with half a prompt each in its own way. Each token that the server said is held against what our model says in its
place, after the same tokens. Two programs round differently, so that after a tie their texts part; the tokens before
and behind it agree all the same. What a server tells of itself, such as a file's path, is no evidence and is not asked
for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gtqlora.decoding import Change, Decoded, Switch, Tokens
from gtqlora.errors import ModelError
from gtqlora.results.served import ServedModel, ServedPair
from gtqlora.scoring import Runner
from gtqlora.served.saying import Served

PROBES = 24
"""Prompts of each harmless kind that are asked."""
TOKENS = 32
"""Tokens of an answer that are looked at."""
SAME = 0.95
"""Least share of a served model's tokens that ours says, too: other weights, or 4 bits of these, say fewer."""
_FEWEST, _RIGHT = 5, 0.75
"""Telling tokens below which two models cannot be told apart, and the share of them that has to be right."""
_AT_ONCE = 8
"""Answers that are read together: the logits of whole answers take more memory than those of last tokens."""

T = TypeVar("T")


def drawn(candidates: Sequence[T], seed: str) -> list[T]:
    """Draw the probes among harmless prompts."""
    return random.Random(seed).sample(list(candidates), min(PROBES, len(candidates)))


def with_halves(served: Served, prompts: Sequence[Tokens]) -> list[Tokens]:
    """Return prompts, and the first halves that are the tokens of some text: there are servers that read texts only."""
    halves = [ids[: len(ids) // 2] for ids in prompts]
    return [*prompts, *(half for half in halves if half and served.text_of(half) is not None)]


def check_model(runner: Runner, served: Served, prompts: Sequence[Tokens]) -> ServedModel:
    """Check that a served model is the one that is open here, and return how far it is.

    Args:
        runner: of the model here.
        prompts: the probes.

    Raises:
        ModelError: it is not, or the server cannot be asked.
    """
    said = _Said.of(runner, served, prompts, "probes")
    own = said.held(runner, nullcontext)
    same = _share(said, own, "the model")
    return ServedModel(
        server=served.server.url, model=served.server.model, probes=len(said.prompts), tokens=len(own), same=same
    )


def check_pair(
    runner: Runner, original: Switch, before: Served, after: Served, prompts: Sequence[Tokens], server: str
) -> ServedPair:
    """Check that two served models are the original and the edited one, and which is which.

    Args:
        runner: of the edited model.
        original: makes it the original.
        prompts: the probes.
        server: its address, for the record.

    Raises:
        ModelError: they are not, or cannot be told apart, or the server cannot be asked.
    """
    was = _Said.of(runner, before, prompts, "probes, before")
    now = _Said.of(runner, after, prompts, "probes, after")
    was_own, was_other = was.held(runner, original), was.held(runner, nullcontext)
    now_own, now_other = now.held(runner, nullcontext), now.held(runner, original)
    same_before, same_after = _share(was, was_own, "the original"), _share(now, now_own, "the edited model")
    own, other = np.concatenate([was_own, now_own]), np.concatenate([was_other, now_other])
    telling, right = int((own != other).sum()), int((own & ~other).sum())
    if telling < _FEWEST:
        raise after.server.fault(
            f"original and edited model say the same to the probes ({telling} tokens tell them apart; it takes "
            f"{_FEWEST}), so that nobody can tell which is served"
        )
    if right < _RIGHT * telling:
        raise after.server.fault(
            f"of {telling} tokens that tell the original from the edited model only {right} are said by the right one; "
            "are the two names exchanged, or do both mean one model?"
        )
    return ServedPair(
        server=server,
        before=before.name,
        after=after.name,
        probes=len(now.prompts),
        tokens=len(own),
        same_before=same_before,
        same_after=same_after,
        telling=telling,
        right=right,
    )


@dataclass(frozen=True)
class _Said:
    """What a served model said to probes: prompts, and the tokens of answers with the stop where they ended."""

    served: Served
    prompts: list[Tokens]
    answers: list[list[int]]

    @staticmethod
    def of(runner: Runner, served: Served, prompts: Sequence[Tokens], label: str) -> _Said:
        # Not from the journal: it is what the server says now that tells what it serves.
        asked, prompts = replace(served, journal=None), with_halves(served, prompts)
        said = asked(prompts, min(TOKENS, runner.max_new_tokens), label)
        answers = _with_stops(said, min(served.stops))
        kept = [i for i, answer in enumerate(answers) if answer]
        return _Said(served, [prompts[i] for i in kept], [answers[i] for i in kept])

    def held(self, runner: Runner, switch: Switch) -> NDArray[np.bool_]:
        """Return which of the tokens our model says, too, in one of its states; any stop is as good as another."""
        found: dict[int, list[bool]] = {}
        reader = replace(runner, batch_size=_AT_ONCE)
        for batch in reader.logits(self.prompts, Change(switch=switch), completions=self.answers):
            for i, ours in zip(batch.chosen, batch.rows(batch.values_BSV.argmax(-1)), strict=True):
                pairs = zip(self.answers[i], ours.tolist(), strict=True)
                stops = self.served.stops
                found[i] = [theirs == own or (theirs in stops and own in stops) for theirs, own in pairs]
        return np.array([same for i in sorted(found) for same in found[i]], dtype=bool)


def _with_stops(said: Decoded, stop: int) -> list[list[int]]:
    return [[*ids, *([stop] if ended else [])] for ids, ended in zip(said.tokens, said.ended, strict=True)]


def _share(said: _Said, same: NDArray[np.bool_], what: str) -> float:
    """Return the share of tokens that are ours.

    Raises:
        ModelError: it is too small.
    """
    if not same.size:
        raise said.served.server.fault("nothing shows what is served: it was asked no harmless prompt, or said nothing")
    share = float(same.mean())
    if share < SAME:
        raise _unlike(said.served, share, same.size, what)
    return share


def _unlike(served: Served, share: float, tokens: int, what: str) -> ModelError:
    return served.server.fault(
        f"it is not {what}: of the {tokens:,} tokens that it says to harmless probes {what} here says {share:.1%}, "
        f"too, and it takes {SAME:.0%}; serve the weights that are named here, in their own dtype and not in fewer bits"
    )
