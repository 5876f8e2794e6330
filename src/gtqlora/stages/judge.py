"""`judge`: what judges say of answers in a file, how often they are wrong where it has labels, and if two agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gtqlora.contrasts.labelled import LabelledAnswer, read_labelled
from gtqlora.judging.agreement import Confusion, Errors, confusion, errors, kappa
from gtqlora.judging.judge import NamedJudge
from gtqlora.judging.labels import LABELS, UNDECIDED, Label
from gtqlora.stats import Interval, rate
from gtqlora.storage.tables import check_table, write_table


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One judge on the answers.

    Attributes:
        name: the judge's.
        identity: which weights or source judged, see `judging.trust.identity`.
        said: how many answers it gives each label.
        objects_only: it finds answers that should not have been given, and leaves all others undecided.
        confusion, errors: on those that have a label; None where none has.
    """

    name: str
    identity: str
    said: dict[Label, int]
    objects_only: bool
    confusion: Confusion | None
    errors: Errors | None

    @property
    def undecided(self) -> float:
        """Return the share of all answers that it leaves undecided."""
        return self.said[UNDECIDED] / max(1, sum(self.said.values()))


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two judges agree.

    Attributes:
        alike: the share of answers to which both give the same label.
        kappa: Cohen's; agreement beyond chance. NaN where one of them only objects, as it labels nothing else.
        said: how many answers have which label by the first and which by the second.
        differ: the rows in which they differ.
    """

    alike: Interval
    kappa: float
    said: Confusion
    differ: list[int]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was found; no text is in it.

    Attributes:
        file: what was judged.
        rows: its answers.
        labelled: those that have a label.
        judges: each one, and both together where there are two.
        agreement: of the two.
        out: the file with each row's labels; None where none was asked for.
    """

    file: str
    rows: int
    labelled: int
    judges: list[Measured]
    agreement: Agreement | None
    out: Path | None = None


def judge(source: str, by: NamedJudge, *, columns: Mapping[str, str] | None = None, out: Path | None = None) -> Judged:
    """Have every answer of a file judged, and compare with the labels that it has.

    Args:
        by: the judge, or two of them as `judging.pair.judges_of` makes them.
        columns: see `contrasts.labelled.read_labelled`.
        out: a new CSV, JSONL or Parquet file, by its ending, that gets each row's number and labels, and no text.

    Raises:
        ContrastError: as `read_labelled`.
        ConfigError: a judge fails, or `out` has another ending.
        RunError: `out` is there, or cannot be written.
    """
    # What is wrong is said before anybody is asked, which may take hours.
    if out is not None:
        check_table(out)
    rows = read_labelled(source, columns)
    said = by.labels_by([row.prompt for row in rows], [row.answer for row in rows])
    by_each = [list(labels) for labels in zip(*said, strict=True)]
    joint: list[Label] = [by.joint(said) for said in zip(*by_each, strict=True)]
    named = list(zip(by.judges, by_each, strict=True))
    # Both together are a judge of its own, and the one that a verdict would use.
    if len(named) > 1:
        named.append((by, joint))
    if out is not None:
        write_table(out, _lines(rows, by_each, joint))
    return Judged(
        file=source,
        rows=len(rows),
        labelled=sum(row.label is not None for row in rows),
        judges=[_measured(one, said, rows) for one, said in named],
        agreement=_agreement(by, rows, by_each) if len(by_each) == 2 else None,
        out=out,
    )


def _measured(by: NamedJudge, said: Sequence[Label], rows: Sequence[LabelledAnswer]) -> Measured:
    true: list[Label] = [row.label for row in rows if row.label is not None]
    found: list[Label] = [label for row, label in zip(rows, said, strict=True) if row.label is not None]
    counted = Counter(said)
    return Measured(
        name=by.name,
        identity=by.identity,
        said={label: counted[label] for label in LABELS},
        objects_only=by.objects_only,
        confusion=confusion(true, found) if true else None,
        errors=errors(true, found) if true else None,
    )


def _agreement(by: NamedJudge, rows: Sequence[LabelledAnswer], said: Sequence[Sequence[Label]]) -> Agreement:
    """Return how far two judges agree; of one that only objects, where it does not, nothing differs."""
    one, other = said
    alike = [
        a == b or (b == UNDECIDED and by.judges[1].objects_only) or (a == UNDECIDED and by.judges[0].objects_only)
        for a, b in zip(one, other, strict=True)
    ]
    return Agreement(
        alike=rate(alike),
        kappa=math.nan if any(judge.objects_only for judge in by.judges) else kappa(one, other),
        said=confusion(one, other),
        differ=[row.number for row, same in zip(rows, alike, strict=True) if not same],
    )


def _lines(
    rows: Sequence[LabelledAnswer], by_each: Sequence[Sequence[Label]], joint: Sequence[Label]
) -> list[dict[str, object]]:
    columns = {"judge": by_each[0], **({"second_judge": by_each[1], "both": joint} if len(by_each) == 2 else {})}
    return [
        {"row": row.number, "label": row.label, **{name: said[i] for name, said in columns.items()}}
        for i, row in enumerate(rows)
    ]
