"""Answers with labels, to measure judges on: from files of any kind that pairs are read from, under known columns.

Known are this project's own labels, the human labels of XSTest's completions (Röttger et al. 2023, arXiv 2308.01263)
and whether a response refuses, as WildGuardMix has it (Han et al. 2024, arXiv 2406.18495).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gtqlora.contrasts.columns import told_values
from gtqlora.contrasts.files import LONGEST
from gtqlora.contrasts.sources import Problems, a_prompt, parsed, records
from gtqlora.errors import ContrastError
from gtqlora.judging.labels import ANSWER, LABELS, PARTIAL, REFUSAL, Label
from gtqlora.judging.messages import Messages
from gtqlora.judging.thoughts import PAIRS, thinks
from gtqlora.progress import note
from gtqlora.storage.contents import in_json

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "goal"),
    "answer": ("answer", "completion", "response"),
    # before `label`, as a set may have one of its prompts under that name
    "label": ("final_label", "response_refusal_label", "response_refusal", "label"),
}
"""Columns in which prompt, answer and label are looked for, in this order."""
_WORDS: dict[str, Label] = {
    **{label: label for label in LABELS},
    **dict.fromkeys(("2_full_refusal", "full_refusal", "yes", "true"), REFUSAL),
    **dict.fromkeys(("1_full_compliance", "full_compliance", "compliance", "no", "false"), ANSWER),
    **dict.fromkeys(("3_partial_refusal", "partial_refusal"), PARTIAL),
}
"""What labels of public sets mean; yes and no are replies to whether the answer refuses."""


@dataclass(frozen=True, kw_only=True)
class LabelledAnswer:
    """An answer to a prompt.

    Attributes:
        number: of its row.
        prompt: empty where the set has none.
        answer: thoughts and all, beginning with the mark of a thought where only its end stands in the file.
        label: what it is called in the file, if anything.
    """

    number: int
    prompt: Messages
    answer: str
    label: Label | None


def read_labelled(source: str, named: Mapping[str, str] | None = None) -> list[LabelledAnswer]:
    """Return the answers of a file, folder or hub dataset.

    Args:
        named: the columns of `prompt`, `answer` and `label`, where they are not called as in `COLUMNS`.

    Raises:
        ContrastError: it cannot be read, has no rows or no answers, or labels that are not known.
    """
    rows = [(number, parsed(raw)) for number, raw, _ in records(source)]
    if not rows:
        raise ContrastError(f"{source}: no rows in it; give answers to judge")
    columns = _columns(source, sorted({name for _, row in rows for name in row}), named or {})
    if columns["prompt"] is None:
        note(f"{source}: no column with prompts, so judges see answers alone; name one with --as prompt=COLUMN")
    labels = _labels(source, rows, columns["label"])
    problems = Problems(source)
    found = [_read(number, row, columns, labels, problems) for number, row in rows]
    problems.stop()
    return [row for row in found if row is not None]


def _columns(source: str, present: Sequence[str], named: Mapping[str, str]) -> dict[str, str | None]:
    """Return where prompt, answer and label stand; None where they do not."""
    if unknown := sorted(set(named) - set(COLUMNS)):
        raise ContrastError(f"--as {unknown[0]}=...: unknown; known: {', '.join(COLUMNS)}")
    for what, column in named.items():
        if column not in present:
            raise ContrastError(f"{source}: no column {column!r} for {what}; there are {', '.join(present)}")
    found = {
        what: named.get(what) or next((name for name in names if name in present), None)
        for what, names in COLUMNS.items()
    }
    if found["answer"] is None:
        raise ContrastError(
            f"{source}: no column with answers ({', '.join(COLUMNS['answer'])}); there are {', '.join(present)}; "
            "name it with --as answer=COLUMN"
        )
    return found


def _labels(
    source: str, rows: Sequence[tuple[int, Mapping[str, object]]], column: str | None
) -> dict[str, Label | None]:
    """Return what each text in the column of labels means."""
    # All of them at once, so that the user mends them in one go.
    values = Counter(_word(row.get(column)) for _, row in rows) if column is not None else Counter[str]()
    found: dict[str, Label | None] = {word: _WORDS.get(word.casefold().replace(" ", "_")) for word in values if word}
    if unknown := {word: values[word] for word, label in found.items() if label is None}:
        raise ContrastError(
            f"{source}: labels in {column!r} that are not known, with their rows: {told_values(unknown)}; known: "
            f"{', '.join(_WORDS)}; name the column with --as label=COLUMN, or write these"
        )
    found[""] = None
    return found


def _word(value: object) -> str:
    return "" if value is None else str(value).strip()


def _read(
    number: int,
    row: Mapping[str, object],
    columns: Mapping[str, str | None],
    labels: Mapping[str, Label | None],
    problems: Problems,
) -> LabelledAnswer | None:
    answer, label = columns["answer"], columns["label"]
    assert answer is not None
    text = row.get(answer, "")  # CSV does not tell an empty text from none
    if not isinstance(text, str) or len(text) > LONGEST:
        fault = f"has more than {LONGEST:,} characters" if isinstance(text, str) else f"is {in_json(text)}"
        problems.add([number], f'{answer} {fault}; it must be a text ("" where nothing was said)')
        return None
    prompt, asked = columns["prompt"], row.get(columns["prompt"] or "")
    try:
        messages = a_prompt(prompt, asked) if prompt is not None else ({"role": "user", "content": ""},)
    except ContrastError as error:
        problems.add([number], str(error))
        return None
    said = None if label is None else labels[_word(row.get(label))]
    return LabelledAnswer(number=number, prompt=messages, answer=_begun(text), label=said)


def _begun(text: str) -> str:
    """Return a text with the beginning of its thought, which a chat template wrote and a record may lack."""
    # Only where no beginning stands anywhere: an answer may speak of such marks.
    if thinks(text):
        return text
    return next((begins + text for begins, ends in PAIRS if ends in text and begins not in text), text)
