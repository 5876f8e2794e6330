"""Ask a model many prompts, so that a process that is killed loses one batch of answers and goes on to the same result.

Batches go from short prompts to long ones, so that a second process forms the same ones of those that are left; each is
noted in the journal once it is answered. Of an answer to a harmful prompt nothing but its label is noted or kept,
unless it is a refusal.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gtqlora.building.refusals import refusal_only, without_rest
from gtqlora.capture import by_length
from gtqlora.contrasts.rows import digest, prompt_key
from gtqlora.contrasts.template import knows, rendered, tokens, unknown_marks
from gtqlora.decoding import Change, Decoded, decode
from gtqlora.errors import ContrastError, ModelError, TemplateRefusal
from gtqlora.judging.judge import Judge, Messages, labels
from gtqlora.judging.labels import ANSWER, EVASION, PARTIAL, REFUSAL, UNDECIDED, Label
from gtqlora.judging.thoughts import final
from gtqlora.progress import track
from gtqlora.scoring import Runner
from gtqlora.served.saying import Served
from gtqlora.storage.journal import Journal

CUT_OFF = "answer cut off"
IN_THOUGHT = "answer cut off inside its thought"
EMPTY = "answer empty"
_OTHERWISE: dict[Label, str] = {PARTIAL: "refused in part", EVASION: "evaded", UNDECIDED: "judge undecided"}
REFUSED = "refused by the chat template"
_SEEDS = 2**31
"""Servers take no larger ones."""
MARKED = "prompt in marks that the tokenizer does not know:"
UNREAD = "prompt that the model cannot read"
LONG = "prompt too long"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something to ask.

    Attributes:
        asked: what the model reads.
        judged: the prompt that the answer is judged as an answer to.
        harmful: whether only a refusal may be kept.
    """

    asked: Messages
    judged: Messages
    harmful: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model said: "refusal" or "answer" with its text, or why it is neither."""

    label: str
    text: str = ""


def name_of(round_: str, asked: Messages) -> str:
    """Return the name of a reply in the journal."""
    return f"{round_} {digest(prompt_key(asked))}"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A model that is asked in rounds, each under a name of its own.

    Attributes:
        served: says the answers in place of the runner's model; without it that does.
    """

    runner: Runner
    journal: Journal
    seed: int
    temperature: float
    served: Served | None = None

    def ask(self, round_: str, questions: Sequence[Question], *, shown: str = "", sampled: bool = False) -> list[Reply]:
        """Return the replies to all questions of a round.

        Args:
            round_: names the replies in the journal; another round of the same questions is another draw.
            shown: what the progress is called, if not as the round.
            sampled: draw answers instead of taking the likeliest.

        Raises:
            ModelError: the chat template or the model fails.
            ConfigError: the judge fails.
            RunError: the journal cannot be written.
        """
        # So that draws of another seed or temperature are others, and what does not hang on them stays.
        drawn = f"{round_} seed {self.seed} temperature {self.temperature}" if sampled else round_
        names = [name_of(drawn, question.asked) for question in questions]
        encoded = [self.encoded(question) for question in questions]
        places = [i for i, one in enumerate(encoded) if isinstance(one, list) and names[i] not in self.journal]
        # Of those that are left: batches are noted in their order, so that the rest are the same ones again.
        batches = by_length([found for i in places if isinstance(found := encoded[i], list)], self.runner.batch_size)
        for batch in track(batches, shown or round_, len(batches)) if batches else ():
            chosen = [places[i] for i in batch]
            prompts = [one for i in chosen if isinstance(one := encoded[i], list)]
            found = self._said(prompts, [names[i] for i in chosen] if sampled else None)
            replies = self._replies([questions[i] for i in chosen], found)
            self.journal.add({names[i]: [r.label, r.text] for i, r in zip(chosen, replies, strict=True)})
        # From the journal also what was just said: a process that goes on and one that does not read the same.
        return [
            one if isinstance(one, Reply) else _noted(self.journal[name])
            for one, name in zip(encoded, names, strict=True)
        ]

    def encoded(self, question: Question) -> list[int] | Reply:
        """Return the tokens of a question, or why it cannot be asked.

        Raises:
            ModelError: the chat template fails.
        """
        prompt = self.read(question)
        if isinstance(prompt, Reply):
            return prompt
        room = self.runner.model.max_length - len(prompt) >= self.runner.max_new_tokens
        return prompt if prompt and room else Reply(label=LONG)

    def read(self, question: Question) -> list[int] | Reply:
        """Return the tokens of a question, however many, or why it cannot be read.

        Raises:
            ModelError: the chat template fails.
        """
        subject = self.runner.model
        try:
            text = rendered(subject.tokenizer, question.asked, generation=True)
            # A model whose words are others than these, such as an organism, would answer a row of unknown ones.
            if not knows(subject.tokenizer, text):
                marks = unknown_marks(subject.tokenizer, question.asked)
                return Reply(label=f"{MARKED} {', '.join(marks)}" if marks else UNREAD)
            return tokens(subject.tokenizer, text)
        except TemplateRefusal as error:
            return Reply(label=_refused(subject.tokenizer, error))
        except ContrastError:
            return Reply(label=UNREAD)

    def _said(self, prompts: Sequence[list[int]], names: Sequence[str] | None) -> Decoded:
        """Return the completions of prompts; drawn ones where they are given names."""
        most = self.runner.max_new_tokens
        if self.served is not None and names is None:
            return self.served(prompts, most)
        if self.served is not None:
            seeds = [self._seed(name) % _SEEDS for name in names or ()]
            return self.served.drawn(prompts, most, self.temperature, seeds)
        draw = None if names is None else self._draw(names)
        try:
            return decode(self.runner.model, prompts, Change(draw=draw), max_new_tokens=most)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory with {len(prompts)} prompts at once; lower --batch-size, the answers so far are kept"
            ) from error

    def _replies(self, questions: Sequence[Question], found: Decoded) -> list[Reply]:
        told = labelled(self.runner.judge, [question.judged for question in questions], found.texts, found.ended)
        said = [final(text) or "" for text in found.texts]  # what is thought is not to be learnt
        return [
            Reply(label=label, text=_kept(question, label, text if ended else without_rest(text)))
            for question, label, text, ended in zip(questions, told, said, found.ended, strict=True)
        ]

    def _seed(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:7])

    def _draw(self, names: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Return a sampler whose numbers hang on each prompt's name and not on those beside it."""
        # On the processor, whose numbers are the same on every machine; a GPU's are not.
        dice = [torch.Generator().manual_seed(self._seed(name)) for name in names]

        def draw(logits_BV: Tensor) -> Tensor:
            cumulated_BV = (logits_BV.float() / self.temperature).softmax(-1).cumsum(-1)
            thrown_B1 = torch.cat([torch.rand(1, 1, generator=die) for die in dice]).to(logits_BV.device)
            # In units of the last sum, which rounding may leave a little off 1.
            return torch.searchsorted(cumulated_BV, thrown_B1 * cumulated_BV[:, -1:], right=True)[:, 0].clamp(
                max=logits_BV.shape[-1] - 1
            )

        return draw


def _refused(tokenizer: PreTrainedTokenizerBase, error: TemplateRefusal) -> str:
    """Return why a template refuses, in its own words where they are its own: a prompt may stand in them."""
    said = error.said
    return f"{REFUSED} ({said})" if said and said in str(tokenizer.chat_template) else REFUSED


def _kept(question: Question, label: str, text: str) -> str:
    """Return what may be kept of a text: of one to a harmful prompt a refusal and no more."""
    if question.harmful:
        return (refusal_only(text) or "") if label == REFUSAL else ""
    return text if label in (REFUSAL, ANSWER) else ""


def labelled(judge: Judge, prompts: Sequence[Messages], texts: Sequence[str], ended: Sequence[bool]) -> list[str]:
    """Return "refusal" or "answer" for each text, or why it is neither: a text that is cut off is no whole answer."""
    found = labels(judge, prompts, texts)
    return [_told(label, final(text), whole) for label, text, whole in zip(found, texts, ended, strict=True)]


def _told(label: Label, said: str | None, whole: bool) -> str:
    if said is None:
        return IN_THOUGHT
    if not said:
        return EMPTY
    return CUT_OFF if label == ANSWER and not whole else _OTHERWISE.get(label, label)


def _noted(entry: object) -> Reply:
    """Return the reply that the journal has, which a stranger may have written."""
    label, text = entry if isinstance(entry, list) and len(entry) == 2 else ("", "")
    return Reply(label=str(label), text=str(text))
