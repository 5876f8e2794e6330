"""The one-way rule: a harmful row's `chosen` refuses and its `rejected` does not, whatever the settings say.

The judge says what is a refusal; under it stand the English lists, lengths, and what an answer is made of, so that no
judge turns the rule around and no row brings in an answer to a harmful prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gtqlora.contrasts.rows import DECLINED_KINDS, Row, prompt_key
from gtqlora.errors import ContrastError
from gtqlora.judging.english import answers_after_refusing, assents_in_english, refuses_in_english
from gtqlora.judging.folding import flat, holds
from gtqlora.judging.judge import Judge, refusals

# The longest opening phrase and the longest refusal in a harmful row: too short to hold harmful content.
OPENING_WORDS, OPENING_CHARACTERS = 24, 240
REFUSAL_WORDS, REFUSAL_CHARACTERS = 40, 320


@dataclass(frozen=True)
class Judged:
    """Whether the judge takes a row's `chosen` for a refusal and, where `chosen` has to be one, its `rejected`."""

    chosen: bool
    rejected: bool


def judged_rows(rows: Sequence[Row], judge: Judge) -> list[Judged]:
    """Ask the judge about the answers of all rows together; in the order of the rows."""
    # Of other rows' `rejected` nothing is asked: it may be a refusal or any other bad answer.
    declined = [row for row in rows if row.kind in DECLINED_KINDS]
    prompts = [row.prompt for row in (*rows, *declined)]
    found = refusals(judge, prompts, [*(row.chosen for row in rows), *(row.rejected for row in declined)])
    rejected = iter(found[len(rows) :])
    return [
        Judged(chosen, row.kind in DECLINED_KINDS and next(rejected)) for row, chosen in zip(rows, found, strict=False)
    ]


def check_row(row: Row, judged: Judged) -> None:
    """Check one row by itself.

    Raises:
        ContrastError: the pair prefers nothing, teaches over-refusal, breaks the one-way rule, or does not decline what
            its system prompt tells the model to.
    """
    if flat(row.chosen) == flat(row.rejected):
        raise ContrastError("chosen and rejected are the same; a pair must prefer one over the other")
    if row.twin is not None and prompt_key(row.twin) == prompt_key(row.prompt):
        raise ContrastError("twin is the prompt itself; give the harmless counterpart or leave it out")
    if row.kind == "harmful":
        _check_one_way(row, judged)
    elif row.kind == "instructed":
        _check_instructed(row, judged)
    elif judged.chosen:
        raise ContrastError(
            f"chosen of a {row.kind} row is a refusal by the judge, which teaches over-refusal; "
            "give a helpful answer, or set `judge` if it is none"
        )


def _check_instructed(row: Row, judged: Judged) -> None:
    """Check a row that is declined at its user's wish; nothing in it is harmful, so no length is too long."""
    if all(message["role"] != "system" for message in row.prompt):
        raise ContrastError(
            "an instructed row has no system message that tells the model to decline; put it first in prompt, or give "
            "the row another kind"
        )
    if not judged.chosen:
        raise ContrastError(
            "chosen of an instructed row must decline, and is no refusal by the judge; make it one, or set `judge` if "
            "it is one in other words"
        )
    # a pair of two refusals would teach which words to decline in, and not to decline
    if judged.rejected:
        raise ContrastError(
            "rejected of an instructed row must be an answer, and is a refusal by the judge; give what the model says "
            "without the system message"
        )


def _check_one_way(row: Row, judged: Judged) -> None:
    """Check a harmful row; with English lists under the judge, a judge turned around does not turn the rule around."""
    if assents_in_english(row.chosen):
        raise ContrastError(
            "chosen of a harmful row opens with an assent (the one-way rule; no setting changes it); "
            "open it with the refusal"
        )
    if not judged.chosen:
        raise ContrastError(
            "chosen of a harmful row must be a refusal (the one-way rule; no setting changes it); "
            "make it one, or set `judge` if it is one in other words"
        )
    if judged.rejected or refuses_in_english(row.rejected):
        raise ContrastError(
            "rejected of a harmful row must not be a refusal (the one-way rule; no setting changes it); "
            'make it an opening phrase such as "Sure, here is"'
        )
    # An `answer` is stored too, so it must not become the place where harmful content hides.
    _check_length("rejected", row.rejected, "an opening phrase only", OPENING_WORDS, OPENING_CHARACTERS)
    _check_length("answer", row.answer or "", "an opening phrase only", OPENING_WORDS, OPENING_CHARACTERS)
    # A judge reads how a completion begins; a refusal has no room to comply after it.
    _check_length("chosen", row.chosen, "a refusal and no more", REFUSAL_WORDS, REFUSAL_CHARACTERS)
    _check_no_answer(row)


def _check_no_answer(row: Row) -> None:
    if answers_after_refusing(row.chosen):
        raise ContrastError(
            "chosen of a harmful row goes on to answer (the one-way rule; no setting changes it); "
            "make it a refusal and no more, without assents, steps or lists"
        )
    asked = " ".join(message["content"] for message in row.prompt)
    for name, text in (("rejected", row.rejected), ("answer", row.answer or "")):
        if holds(row.chosen, text, asked):
            raise ContrastError(
                f"chosen of a harmful row holds words of its {name} (the one-way rule; no setting changes it); "
                "make it a refusal and no more"
            )


def _check_length(name: str, text: str, what: str, words: int, characters: int) -> None:
    # Characters count as well: words can be joined, and some scripts put no spaces between them.
    if len(text.split()) > words or len(text) > characters:
        raise ContrastError(
            f"{name} of a harmful row must be {what}, at most {words} words and {characters} characters; shorten it"
        )
