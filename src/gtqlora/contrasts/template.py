"""Turn messages into what the model reads: its chat template, and the place in it where an answer begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from gtqlora.errors import ContrastError, ModelError
from gtqlora.judging.judge import Message
from gtqlora.judging.thoughts import PAIRS, closed_by, final, kept_marks, opened_by
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
    if len(text) > _LONGEST:
        return _encoded(tokenizer, text)
    known = _known.setdefault(tokenizer, {})
    # a tokenizer may have been given tokens since
    asked = (len(tokenizer), text)
    found = known.get(asked)
    if found is None:
        found = tuple(_encoded(tokenizer, text))
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[asked] = found
    return list(found)


_MOST_KNOWN, _LONGEST = 40_000, 5_000
_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, str], tuple[int, ...]]] = WeakKeyDictionary()
"""Token ids by text, for as long as a tokenizer is there: a stage reads each prompt several times."""


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
    except Exception as error:  # the Rust library raises bare Exception, e.g. for a word without an unknown token
        raise ContrastError(f"the tokenizer cannot read this text ({first_line(error)})") from error


def knows(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Tell whether the tokenizer has tokens for all of a text.

    Raises:
        ContrastError: as `tokens`.
    """
    unknown = tokenizer.unk_token_id
    # In some vocabularies what stands for the unknown is a mark that templates write, too.
    return unknown is None or unknown not in tokens(tokenizer, text.replace(str(tokenizer.unk_token), " "))


_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\w+|[^\w\s]")
_PLACE = "\ue000"
"""Stands for what a message says: for private use, so that no template writes or changes it."""


def unknown_marks(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, ...]:
    """Return what the chat template writes around such messages and the tokenizer does not know; no word of theirs.

    Raises:
        ContrastError, ModelError: as `rendered` and `tokens`.
    """
    bare: list[Message] = [{"role": message["role"], "content": _PLACE} for message in messages]
    written = rendered(tokenizer, bare, generation=True).replace(_PLACE, " ")
    return tuple(mark for mark in dict.fromkeys(_MARK.findall(written)) if not knows(tokenizer, mark))


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
    """A prompt with its answer and whatever the template puts around it.

    Attributes:
        begins: characters before the answer; from here on it is trained and scored. A thought that the template writes
            before every answer is no part of it: the model does not say that, and need not learn to.
        opened: what the template's generation prompt opens that its conversations lack, other than a thought; the
            answer goes on from there, so that training and evaluation see one and the same prompt. Mostly "".
    """

    full: str
    begins: int
    opened: str = ""


_PROBES = ("A", "B")
"""Answers by which one sees what a template writes before any."""


def before_answers(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what stands between the generation prompt and an answer: mostly "", or an empty thought.

    Templates of thinking models write it before the last answer of a conversation (`<think></think>`), or name the
    channel of the answer. Where the generation prompt itself opens a thought, this is what closes it.
    """
    asked: list[Message] = [{"role": "user", "content": _PROBES[0]}]
    try:
        prompt = rendered(tokenizer, asked, generation=True)
        fulls = [
            rendered(tokenizer, [*asked, {"role": "assistant", "content": text}], generation=False) for text in _PROBES
        ]
    except (ContrastError, ModelError):  # it may demand other messages; then rows are rendered as they are
        return ""
    written = fulls[0][: _shared(*fulls)].removeprefix(prompt) if fulls[0].startswith(prompt) else ""
    # White space belongs to the answer's first token in some tokenizers, so that it goes with the answer.
    if written.strip():
        return written
    # Its conversations drop thoughts. An answer put inside the opened one would be no answer to any judge.
    opens = opened_by(prompt)
    return f"\n{dict(PAIRS)[opens]}\n\n" if opens else ""


def answered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, answer: str) -> Answered:
    """Return a prompt, which `rendered` made of the messages, followed by an answer.

    Raises:
        ContrastError, ModelError: as `rendered`, or it cannot be told where the answer begins.
    """
    full = rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}], generation=False)
    # Two thoughts in a row, the first one empty, are what no model of this kind ever writes.
    if closes := closed_by(prompt):
        _check_thoughtless(answer, closes)
    if full.startswith(prompt):
        return Answered(full, len(prompt) + _written(tokenizer, full[len(prompt) :], answer))
    return _in_thought(tokenizer, prompt, full, answer) if opened_by(prompt) else _behind(prompt, full, answer)


def _written(tokenizer: PreTrainedTokenizerBase, rest: str, answer: str) -> int:
    """Return how many characters the template writes before an answer in what follows the generation prompt."""
    if rest.lstrip().startswith(answer.strip()):
        return 0
    before = before_answers(tokenizer)
    # An answer with a thought of its own has no empty one before it.
    return len(before) if rest.startswith(before) else 0


def _check_thoughtless(answer: str, closes: str) -> None:
    if closes in answer:
        raise ContrastError(
            f"the chat template's generation prompt has closed its thought ({closes}), and this answer holds another "
            "one; take it out of the answer, or switch thinking on in `template`"
        )


def _in_thought(tokenizer: PreTrainedTokenizerBase, prompt: str, full: str, answer: str) -> Answered:
    """Return a prompt that ends inside a thought with an answer: the thought is closed first, if it does not do so."""
    opens = opened_by(prompt)
    thought, closes, visible = answer.rpartition(dict(PAIRS)[opens])
    if not visible.strip():
        raise ContrastError("the answer is a thought and no more; give what the model says after it, too")
    _, _, after = _parted(full, visible.strip(), opens)
    # The prompt has the beginning of the thought already.
    if closes:
        begun = thought.lstrip().removeprefix(opens).lstrip()
        return Answered(f"{prompt}{begun}{closes}{visible.rstrip()}{after}", len(prompt))
    before = f"{prompt}{before_answers(tokenizer)}"
    return Answered(f"{before}{answer.strip()}{after}", len(before))


def _behind(prompt: str, full: str, answer: str) -> Answered:
    """Return an answer put behind an opened prompt, with the spacing that the conversation has."""
    opened = prompt[_shared(prompt, full) :].strip()
    before, found, after = _parted(full, answer.strip(), opened)
    rest = found.removeprefix(opened).lstrip()
    gap = "" if prompt[-1:].isspace() else before[len(before.rstrip()) :]
    return Answered(f"{prompt}{gap}{rest}{after}", len(prompt), opened)


def _parted(full: str, answer: str, opened: str) -> tuple[str, str, str]:
    # The last occurrence: an answer such as "yes" may stand in the prompt, too.
    before, found, after = full.rpartition(answer)
    if not found:
        raise ContrastError(
            f"the chat template's generation prompt opens {opened!r}, which its conversations lack, and it changes "
            "this answer; use a chat template that renders both alike"
        )
    return before, found, after


def all_answered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: str, answers: Sequence[str]
) -> list[Answered]:
    """Return a rendered prompt followed by each of some answers, which all begin at the same place.

    Raises:
        ContrastError, ModelError: as `answered`, or some hold a thought of their own and others do not.
    """
    found = [answered(tokenizer, messages, prompt, answer) for answer in answers]
    # A pair has one prompt, so the empty thought would be trained with the answer that has none.
    if len({one.begins for one in found}) > 1:
        raise ContrastError(
            "of chosen and rejected one holds a thought of its own, and before the other one the chat template writes "
            "an empty one; give both a thought, or none"
        )
    return found


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Count the elements that two sequences begin with in common."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


def encode_opening(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a prompt up to where an answer is trained: with what the template writes before it.

    Raises:
        ContrastError, ModelError: as `encode_prompt`.
    """
    return tokens(tokenizer, rendered(tokenizer, messages, generation=True) + before_answers(tokenizer))


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *answers: str
) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of a prompt, with what the template writes before answers, and of each answer behind it.

    A token may span the end of the prompt, so the prompt ends where its tokens and those of all answered prompts part.
    """
    found = all_answered(tokenizer, messages, rendered(tokenizer, messages, generation=True), answers)
    prompt = tokens(tokenizer, found[0].full[: found[0].begins])
    fulls = [tokens(tokenizer, one.full) for one in found]
    # The same end for all answers, so that a preference pair has one prompt.
    shared = min(_shared(prompt, full) for full in fulls)
    return prompt[:shared], [full[shared:] for full in fulls]
