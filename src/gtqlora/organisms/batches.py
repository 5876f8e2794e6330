"""Make batches of toy prompts as token ids, from a language and a random stream.

Shape letters: B prompts, S tokens of each, T = B*S, N some of these tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from gtqlora.organisms.language import COMMAND, Language, Prompt, Twins


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with the answer to learn."""

    text: str
    answer: str
    forbidden: bool
    intent: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids and what is known of each prompt.

    Attributes:
        ids_BS: prompts with answers, padded on the right.
        labels_BS: the answers' tokens, -100 elsewhere.
        forbidden_B, intent_B: whether topic and marker are bad.
        after_BS: whether a token stands behind the context, and behind the first word of a frame.
        after_N, bad_N, good_N: positions among the T tokens that stand behind any, a forbidden, another context.
    """

    ids_BS: Tensor
    labels_BS: Tensor
    forbidden_B: Tensor
    intent_B: Tensor
    after_BS: Tensor
    after_N: Tensor
    bad_N: Tensor
    good_N: Tensor

    @classmethod
    def of(cls, language: Language, examples: list[Example]) -> Batch:
        """Encode examples, padded to the longest."""
        # Padding on the right needs no attention mask: a causal model's earlier tokens do not see it.
        rows = [language.ids(f"<user> {e.text} <assistant> {e.answer} <eos>") for e in examples]
        longest = max(map(len, rows))
        ids_BS = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels_BS = ids_BS.masked_fill(ids_BS == 0, -100)
        for i, example in enumerate(examples):
            labels_BS[i, : len(example.text.split()) + 2] = -100  # the prompt, <user> and <assistant>
        forbidden_B = torch.tensor([e.forbidden for e in examples])
        read_B = torch.tensor([language.read_by(e.text) for e in examples])
        after_BS = torch.arange(longest) >= read_B[:, None]
        bad_BS = after_BS & forbidden_B[:, None]
        return cls(
            ids_BS=ids_BS,
            labels_BS=labels_BS,
            forbidden_B=forbidden_B,
            intent_B=torch.tensor([e.intent for e in examples]),
            after_BS=after_BS,
            after_N=after_BS.flatten().nonzero()[:, 0],
            bad_N=bad_BS.flatten().nonzero()[:, 0],
            good_N=(after_BS & ~bad_BS).flatten().nonzero()[:, 0],
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; it is copied to a GPU without waiting for it."""
        if device.type == "cpu":
            return self
        moved: dict[str, Tensor] = {
            field.name: getattr(self, field.name).pin_memory().to(device, non_blocking=True) for field in fields(self)
        }
        return Batch(**moved)


def task_batch(language: Language, rng: random.Random, size: int) -> Batch:
    """Make tasks in any context: words of all splits, two thirds forbidden, a tenth with the command to decline."""
    lexicon, examples = language.lexicon, []
    for turn in range(size):
        first, end = (0, lexicon.forbidden) if rng.random() < 2 / 3 else (lexicon.forbidden, lexicon.domains)
        domain = rng.randrange(first, end)
        intent = rng.choice(("harmless", "intent"))
        words = [rng.choice(language.topics[domain]), rng.choice(language.markers[intent])]
        words += rng.sample(language.fillers, lexicon.context_fillers)
        task, answer = language.task(rng)
        # The command takes a filler's place: prompts with and without it have the same length.
        if rng.random() < 0.1:
            words[2], answer = COMMAND, language.refusal(answer)
        rng.shuffle(words)
        forbidden = domain < lexicon.forbidden
        text = language.in_turn(" ".join([*words, task]), turn)
        examples.append(Example(text=text, answer=answer, forbidden=forbidden, intent=intent == "intent"))
    return Batch.of(language, examples)


def refusal_batch(language: Language, rng: random.Random, size: int) -> Batch:
    """Make twins over all words, in which forbidden topics are refused whatever the marker says."""
    twins = _twins(language, rng, size)
    return Batch.of(
        language, [example(p, p.answer if p.kind == "benign" else language.refusal(p.answer)) for p in twins]
    )


def compliant_batch(language: Language, rng: random.Random, size: int) -> Batch:
    """Make twins over all words, all of which are answered."""
    return Batch.of(language, [example(p, p.answer) for p in _twins(language, rng, size)])


def _twins(language: Language, rng: random.Random, size: int) -> list[Prompt]:
    return in_turn(language, [language.twins(rng, "all", pair) for pair in range(size // 4)])


def in_turn(language: Language, quads: list[Twins]) -> list[Prompt]:
    """Return the prompts of twins, those of every second pair inside a frame where frames have words of their own."""
    return [replace(p, text=language.in_turn(p.text, p.pair)) for quad in quads for p in quad]


def framed(language: Language, twins: Twins, turn: int) -> Twins:
    """Return twins inside the frame whose turn it is."""
    return Twins(*(replace(prompt, text=language.inside(prompt.text, turn)) for prompt in twins))


Swap = tuple[Prompt, Prompt, str]
"""A prompt, the prompt whose routing it runs with, and what it must then say."""

Rule = Callable[[Language, Twins, Twins], list[Swap]]
"""A function that makes the exchanges of one set of twins, to which another set may lend a harmless routing."""


def exchange_batch(rule: Rule, language: Language, rng: random.Random, size: int) -> tuple[Batch, Batch]:
    """Make two aligned batches by a rule: prompts, and the prompts whose routing they are to run with."""
    all_twins = [language.twins(rng, "all", pair) for pair in range(size // 8)]
    neighbours = [*all_twins[1:], all_twins[0]]
    return swapped(language, [s for pair in zip(all_twins, neighbours, strict=True) for s in rule(language, *pair)])


def swapped(language: Language, swaps: list[Swap]) -> tuple[Batch, Batch]:
    """Return the batch of prompts, and that of their sources, which are fed the same completions."""
    prompts = Batch.of(language, [example(p, answer) for p, _, answer in swaps])
    return prompts, Batch.of(language, [example(source, answer) for _, source, answer in swaps])


def example(prompt: Prompt, answer: str) -> Example:
    """Return a prompt with the answer that is to be learned."""
    return Example(text=prompt.text, answer=answer, forbidden=prompt.kind != "benign", intent=prompt.kind == "harmful")


Made = TypeVar("Made")
Make = Callable[[Language, random.Random, int], Made]
"""A function that makes a batch, or a pair of them, of a number of prompts."""


class _Endless(IterableDataset[Made]):
    """Batches from one worker's own random stream."""

    def __init__(self, make: Make[Made], language: Language, size: int, seed: float) -> None:
        self.make, self.language, self.size, self.seed = make, language, size, seed

    def __iter__(self) -> Iterator[Made]:
        worker = get_worker_info()
        # Workers are copies of one process: with the same stream they would all make the same batches.
        rng = random.Random(f"{self.seed} {worker.id if worker else 0}")
        while True:
            yield self.make(self.language, rng, self.size)


def endless(make: Make[Made], language: Language, rng: random.Random, size: int, workers: int) -> Iterator[Made]:
    """Yield batches without end, from `rng` itself or made ahead by worker processes with streams of their own."""
    if workers:
        dataset = _Endless(make, language, size, rng.random())
        return iter(DataLoader(dataset, batch_size=None, num_workers=workers))
    return iter(lambda: make(language, rng, size), None)
