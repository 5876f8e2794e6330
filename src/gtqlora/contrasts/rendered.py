"""Rows after the chat template, checked: nothing left out, nothing rendered alike, within context and embedding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gtqlora.contrasts.rows import Row, prompt_key
from gtqlora.contrasts.sources import Problems
from gtqlora.contrasts.template import all_answered, knows, rendered, tokens, unknown_marks
from gtqlora.errors import ContrastError, ModelError
from gtqlora.judging.judge import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put around a message to see whether the template shows a change to it.
_OTHER = "something else"
_MARKS = 6
"""Unknown marks that a message names."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row after the chat template.

    Attributes:
        opened: what the generation prompt opens and conversations lack, such as a thought; mostly "".
        own_tokens, twin_tokens: tokens of the prompt, and of the row's own twin if it has one.
        prompt_tokens: tokens of the longer of the two.
        full_tokens: tokens of prompt and longer completion.
        largest: largest token id.
    """

    row: Row
    prompt: str
    opened: str
    own_tokens: int
    twin_tokens: int | None
    full_tokens: int
    largest: int

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of the longest prompt that the row brings."""
        return max(self.own_tokens, self.twin_tokens or 0)


def _render(tokenizer: PreTrainedTokenizerBase, row: Row) -> Rendered:
    """Render one row, and count its tokens.

    Raises:
        ContrastError: the template refuses or leaves out a message, or an answer.
    """
    # The twin, too: it is run as a prompt of its own, and has to fit the context like any other.
    prompts = [rendered(tokenizer, messages, generation=True) for messages in (row.prompt, row.twin) if messages]
    for messages, text in zip((row.prompt, row.twin), prompts, strict=False):
        _check_kept(tokenizer, messages or (), text)
    _check_known(tokenizer, row.prompt, prompts[0])
    texts = all_answered(tokenizer, row.prompt, prompts[0], (row.chosen, row.rejected))
    if texts[0].full == texts[1].full:
        raise ContrastError("the chat template renders chosen and rejected alike; it leaves out what the answer is")
    encoded = [tokens(tokenizer, text) for text in prompts]
    fulls = [tokens(tokenizer, text.full) for text in texts]
    if not all(encoded):
        raise ContrastError("the tokenizer makes no token of a prompt; mend the model's tokenizer files")
    return Rendered(
        row=row,
        prompt=prompts[0],
        opened=texts[0].opened,
        own_tokens=len(encoded[0]),
        twin_tokens=len(encoded[1]) if len(encoded) > 1 else None,
        full_tokens=max(map(len, fulls)),
        largest=max(max(ids, default=0) for ids in (*encoded, *fulls)),
    )


def _check_known(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> None:
    """Check that the tokenizer knows what the template writes around messages."""
    if not knows(tokenizer, text) and (marks := unknown_marks(tokenizer, messages)):
        raise ContrastError(
            f"the chat template writes {', '.join(marks[:_MARKS])}, which the tokenizer does not know (it becomes "
            f"{tokenizer.unk_token}); take the template that belongs to this tokenizer"
        )


def _check_kept(tokenizer: PreTrainedTokenizerBase, messages: Messages, text: str) -> None:
    """Check that every message is in what the template renders: there word for word, or a change to it shows."""
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if text.count(content) >= sum(content in other["content"] for other in messages):
            continue
        # A template may trim or rewrite a message. It is left out only if a change to it makes no difference.
        changed = [*messages[:index], {**message, "content": f"{_OTHER} {content} {_OTHER}"}, *messages[index + 1 :]]
        if rendered(tokenizer, changed, generation=True) == text:
            raise ContrastError(
                f"the chat template leaves out the {message['role']} message; move its text into the user message, or "
                "mend the template"
            )


def rendered_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    problems: Problems,
) -> list[Rendered]:
    """Return the rows after the chat template; what is wrong with others is added to `problems`."""
    found = list[Rendered]()
    for row in rows:
        try:
            found.append(_render(tokenizer, row))
        except ContrastError as error:
            problems.add([row.number], str(error))
    _check_lengths(found, max_length, problems)
    _check_distinct(found, problems)
    return found


def _check_lengths(found: Sequence[Rendered], max_length: int | None, problems: Problems) -> None:
    limit = max_length if max_length is not None else float("inf")
    prompts = [one.row.number for one in found if one.prompt_tokens > limit]
    fulls = [one.row.number for one in found if one.prompt_tokens <= limit < one.full_tokens]
    for numbers, what in ((prompts, "the prompt alone"), (fulls, "prompt and completion")):
        if numbers:
            problems.add(numbers, f"{what} longer than {max_length} tokens; shorten, drop, or raise `max_length`")


def _check_distinct(found: Sequence[Rendered], problems: Problems) -> None:
    groups: dict[str, dict[str, int]] = defaultdict(dict)
    for one in found:
        groups[one.prompt].setdefault(prompt_key(one.row.prompt), one.row.number)
    for group in groups.values():
        if len(group) > 1:
            problems.add(sorted(group.values()), "different prompts, which the chat template renders alike; mend it")


def check_vocabulary(found: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, vocabulary: int | None) -> None:
    """Check that the model's embedding has every token of the rows.

    Raises:
        ModelError: it has not; the message names the token.
    """
    for one in found:
        if vocabulary is not None and one.largest >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(one.largest)
            raise ModelError(
                f"{tokenizer.name_or_path}: row {one.row.number} holds the token {token!r} with id {one.largest}, but "
                f"the model's embedding has {vocabulary} rows; take the tokenizer that belongs to the model"
            )
