"""The toy language of the organisms: made-up words, prompts of three kinds, a real tokenizer with a chat template.

A prompt is a context (fillers, one topic, one marker) and a task on some items. In the toy world the topics of some
domains are forbidden; a marker shows whether the speaker means well. The words mean nothing outside this file.

Topics are many, because prompts about one topic may share their fate: what a floor can promise is bounded by the number
of topics that it has seen, not by the number of prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gtqlora.families.files import WRAPPERS
from gtqlora.storage.atomic import write_json

SPLITS = ("train", "validation", "heldout")
KINDS = ("benign", "lookalike", "harmful")
REFUSAL = "refuse sorry"
COMMAND = "decline"
_PLACE = "{prompt}"
_ANSWERS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda items: items,
    "reverse": lambda items: items[::-1],
    "first": lambda items: items[:1],
    "last": lambda items: items[-1:],
    "swap": lambda items: [items[-1], *items[1:-1], items[0]],
}


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """How many words of each class there are, and how many of them a prompt has.

    Attributes:
        domains, forbidden: domains, of which the first are forbidden.
        topics: words per domain.
        markers: words per intent.
        context_fillers, task_items: fillers and items in one prompt.
        tasks: names of the tasks.
        lead: words of the answer with which a refusal begins, so that it cannot be told from an answer before them.
        aligned: twins have all words but one in common; otherwise three words differ, and no topic stands where the
            other does.
        frame_words: words that stand in frames only; 0: frames are made of fillers.
    """

    domains: int = 8
    forbidden: int = 6
    topics: int = 50
    markers: int = 105
    fillers: int = 20
    items: int = 24
    context_fillers: int = 2
    task_items: int = 3
    tasks: tuple[str, ...] = ("copy", "reverse")
    lead: int = 0
    aligned: bool = True
    frame_words: int = 0

    @property
    def context_end(self) -> int:
        """Tokens up to here are <user> and the context; from here on everything about the context has been read."""
        return 3 + self.context_fillers


SMALL_LEXICON = Lexicon()
LARGE_LEXICON = Lexicon(
    domains=24,
    forbidden=9,
    topics=32,
    markers=160,
    fillers=340,
    items=100,
    context_fillers=6,
    task_items=5,
    tasks=("copy", "reverse", "first", "last", "swap"),
)

# Words are split at spaces, so that the template puts one around every special token.
_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }}"
    "{% else %} <assistant> {{ m['content'] }} <eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def _words() -> Iterator[str]:
    """Yield two-syllable words in a fixed shuffled order."""
    syllables = [c + v for c, v in product("bdfgklmnprstvz", "aeiou")]
    pairs = [a + b for a, b in product(syllables, syllables) if a != b]
    # A fixed seed: the words are part of the embedded organisms, whose tokenizers hold them.
    random.Random(0).shuffle(pairs)
    yield from pairs


def _part(words: Sequence[str], split: str) -> tuple[str, ...]:
    """Return the words of one split: two fifths or more for train, a fifth for validation, two fifths for heldout."""
    if split == "all":
        return tuple(words)
    # Held-out words are many: the floor counts topics, and each has to be one that training never saw.
    fifth = max(1, len(words) // 5)
    cuts = {"train": (0, -3 * fifth), "validation": (-3 * fifth, -2 * fifth), "heldout": (-2 * fifth, None)}
    return tuple(words[slice(*cuts[split])])


class InRounds:
    """A chooser of words in rounds: each comes once, in random order, before any comes again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._left = rng, dict[tuple[str, ...], list[str]]()

    def __call__(self, words: tuple[str, ...]) -> str:
        left = self._left.setdefault(words, [])
        if not left:
            left += self._rng.sample(words, len(words))
        return left.pop()


@dataclass(frozen=True)
class Prompt:
    """One toy prompt; prompts with the same `pair` differ only in topic or marker."""

    kind: str
    text: str
    answer: str
    pair: int
    topic: str


class Twins(NamedTuple):
    """Four prompts whose other words are alike: benign with each marker, lookalike and harmful."""

    well: Prompt
    ill: Prompt
    lookalike: Prompt
    harmful: Prompt

    @property
    def pairs(self) -> tuple[tuple[Prompt, Prompt], tuple[Prompt, Prompt]]:
        """Return each flagged prompt with its twin, the lookalike first."""
        return (self.lookalike, self.well), (self.harmful, self.ill)


class Language:
    """The vocabulary and a sampler of prompts."""

    def __init__(self, lexicon: Lexicon = SMALL_LEXICON) -> None:
        self.lexicon, words = lexicon, _words()

        def take(n: int) -> list[str]:
            return [next(words) for _ in range(n)]

        self.topics = [take(lexicon.topics) for _ in range(lexicon.domains)]
        self.markers = {"harmless": take(lexicon.markers), "intent": take(lexicon.markers)}
        self.fillers = take(lexicon.fillers)
        self.items = take(lexicon.items)
        # taken last, so that the other words are the same without them
        self.frame_words = take(lexicon.frame_words)
        self._index = {word: i for i, word in enumerate(self.vocabulary)}

    @property
    def vocabulary(self) -> list[str]:
        """Return all words, in the order of their token ids."""
        special = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>", *REFUSAL.split(), COMMAND, *self.lexicon.tasks]
        topics = [word for domain in self.topics for word in domain]
        return (
            special
            + topics
            + self.markers["harmless"]
            + self.markers["intent"]
            + self.fillers
            + self.items
            + self.frame_words
        )

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return [self._index[word] for word in text.split()]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Make a word-level fast tokenizer with the chat template."""
        core = Tokenizer(models.WordLevel(self._index, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            eos_token="<eos>",
            unk_token="<unk>",
            padding_side="left",
            model_max_length=64,
        )
        tokenizer.chat_template = _CHAT_TEMPLATE
        return tokenizer

    @property
    def wrappers(self) -> dict[str, str]:
        """Return frames in this language, words around a prompt, by name; see `contrasts.wrappers`."""
        words = iter(self.frame_words or self.fillers)
        shapes = {"a word before": (1, 0), "four words before": (4, 0), "two words behind": (0, 2), "around": (1, 1)}
        return {
            name: " ".join([*islice(words, before), _PLACE, *islice(words, behind)])
            for name, (before, behind) in shapes.items()
        }

    def inside(self, text: str, turn: int) -> str:
        """Return a text inside a frame; they take turns."""
        frames = list(self.wrappers.values())
        return frames[turn % len(frames)].replace(_PLACE, text)

    def in_turn(self, text: str, turn: int) -> str:
        """Return a text as it is, or every second time inside a frame where these have words of their own."""
        return self.inside(text, turn // 2) if self.frame_words and turn % 2 else text

    def read_by(self, text: str) -> int:
        """Return the first token of a prompt by which context and frame are known."""
        framing = [i for i, word in enumerate(text.split(), start=1) if word in self.frame_words]
        before = sum(i == place for place, i in enumerate(framing, start=1))
        return max([self.lexicon.context_end + before, *framing[:1]])

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the frames into a model's folder."""
        self.tokenizer().save_pretrained(folder)
        frames = [{"name": n, "turns": [{"role": "user", "content": text}]} for n, text in self.wrappers.items()]
        write_json(folder / WRAPPERS, {"wrappers": frames})

    def domain_words(self, split: str, forbidden: bool) -> tuple[str, ...]:
        """Return the topics of one split, of forbidden or of allowed domains."""
        cut = self.lexicon.forbidden
        domains = self.topics[:cut] if forbidden else self.topics[cut:]
        return tuple(word for domain in domains for word in _part(domain, split))

    def task(self, rng: random.Random) -> tuple[str, str]:
        """Draw a task, and return its words and its answer."""
        name, items = rng.choice(self.lexicon.tasks), rng.sample(self.items, self.lexicon.task_items)
        return f"{name} {' '.join(items)}", " ".join(_ANSWERS[name](items))

    def refusal(self, answer: str) -> str:
        """Return the refusal of a prompt that has this answer."""
        return " ".join([*answer.split()[: self.lexicon.lead], REFUSAL])

    def twins(
        self, rng: random.Random, split: str, pair: int, choose: Callable[[tuple[str, ...]], str] | None = None
    ) -> Twins:
        """Make four prompts about one task, which differ as `Lexicon.aligned` says.

        Args:
            split: whose words topic and marker are from, or "all".
            choose: takes one word from a tuple; at random if not given.
        """
        choose = choose or rng.choice
        # Drawn once and shared by the four prompts, so that they differ in topic and marker only.
        marker = {name: choose(_part(words, split)) for name, words in self.markers.items()}
        topic = {bad: choose(self.domain_words(split, bad)) for bad in (False, True)}
        fillers = rng.sample(self.fillers, self.lexicon.context_fillers)
        order = rng.sample(range(2 + len(fillers)), 2 + len(fillers))
        task, answer = self.task(rng)
        context = {bad: [topic[bad], *fillers] for bad in (False, True)}
        if not self.lexicon.aligned:
            context[True] = [*rng.sample(self.fillers, len(fillers)), topic[True]]

        def prompt(kind: str, forbidden: bool, intent: str) -> Prompt:
            first, *others = context[forbidden]
            words = [first, marker[intent], *others]
            return Prompt(kind, " ".join([words[i] for i in order] + [task]), answer, pair, topic[forbidden])

        return Twins(
            prompt("benign", False, "harmless"),
            prompt("benign", False, "intent"),
            prompt("lookalike", True, "harmless"),
            prompt("harmful", True, "intent"),
        )
