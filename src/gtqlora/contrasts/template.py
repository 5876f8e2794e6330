"""Turn messages into what the model reads: its chat template, and the place in it where an answer begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Message
from gtqlora.judging.thoughts import final, kept_marks, opened_by
from gtqlora.storage.contents import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generation: bool) -> str:
    """Apply the model's chat template to messages; no other place does.

    Args:
        generation: render up to where the assistant's answer begins.

    Raises:
        ContrastError: the template refuses the messages, e.g. a system role it does not know.
        ModelError: the template fails, or does not end.
    """
    # Only now: pairs are also read without a tokenizer, and then transformers need not be imported.
    from gtqlora.families.rendering import render

    return render(tokenizer, messages, generation=generation)


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of rendered text.

    Raises:
        ContrastError: the tokenizer cannot read it.
    """
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    except Exception as error:  # the Rust library raises bare Exception, e.g. for a word without an unknown token
        raise ContrastError(f"the tokenizer cannot read this text ({first_line(error)})") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a prompt, up to where the assistant's answer begins.

    Raises:
        ContrastError, ModelError: as `rendered`, or the tokenizer cannot read the text.
    """
    return tokens(tokenizer, rendered(tokenizer, messages, generation=True))


_TAIL = 16
"""Tokens at the end of a prompt that hold the mark with which its template begins a thought."""


def completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[str]:
    """Return the texts of what a model said after prompts, all in tokens, with thoughts that prompts begin.

    Special tokens are left out, but for the marks of thoughts.
    """
    special = set(tokenizer.all_special_tokens)
    kept = kept_marks(special)
    texts = tokenizer.batch_decode([list(answer) for answer in answers], skip_special_tokens=not kept)
    tails = tokenizer.batch_decode([list(prompt[-_TAIL:]) for prompt in prompts])
    if kept:
        left_out = re.compile("|".join(map(re.escape, sorted(special - set(kept), key=len, reverse=True))) or "(?!)")
        texts = [left_out.sub("", text) for text in texts]
    opened = map(opened_by, tails)
    return [f"{begins}\n{text.strip()}" if begins else text.strip() for begins, text in zip(opened, texts, strict=True)]


def answer_length(tokenizer: PreTrainedTokenizerBase, text: str, answer: Sequence[int]) -> int:
    """Return how many tokens of a completion are its answer and not its thoughts; its text is of `completions`."""
    said = final(text)
    if said == text:
        return len(answer)
    return len(tokenizer.encode(said or "", add_special_tokens=False))


@dataclass(frozen=True)
class Answered:
    """A prompt with its answer and whatever the template puts after it.

    Attributes:
        opened: what the template's generation prompt opens that its conversations lack, such as a thought; the answer
            goes on from there, so that training and evaluation see one and the same prompt. Mostly "".
    """

    full: str
    opened: str


def answered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, answer: str) -> Answered:
    """Return a prompt, which `rendered` made of the messages, followed by an answer.

    Raises:
        ContrastError, ModelError: as `rendered`, or it cannot be told where the answer begins.
    """
    full = rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}], generation=False)
    if full.startswith(prompt):
        return Answered(full, "")
    # Some templates open a thought for generation that finished conversations lack. Then the answer is put behind the
    # opened prompt, with the spacing that the conversation has, so that training sees the prompt that generation sees.
    # The last occurrence: an answer such as "yes" may stand in the prompt, too.
    before, found, after = full.rpartition(answer.strip())
    opened = prompt[_shared(prompt, full) :].strip()
    if not found:
        raise ContrastError(
            f"the chat template's generation prompt opens {opened!r}, which its conversations lack, and it changes "
            "this answer; use a chat template that renders both alike"
        )
    rest = answer.strip().removeprefix(opened).lstrip()
    gap = "" if prompt[-1:].isspace() else before[len(before.rstrip()) :]
    return Answered(f"{prompt}{gap}{rest}{after}", opened)


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the elements that two sequences begin with in common."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *answers: str
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt, and of each answer behind it.

    A token may span the end of the prompt, so the prompt ends where its tokens and those of all answered prompts part.
    """
    text = rendered(tokenizer, messages, generation=True)
    prompt = tokens(tokenizer, text)
    fulls = [tokens(tokenizer, answered(tokenizer, messages, text, answer).full) for answer in answers]
    # The same end for all answers, so that a preference pair has one prompt.
    shared = min(_shared(prompt, full) for full in fulls)
    return prompt[:shared], [full[shared:] for full in fulls]
