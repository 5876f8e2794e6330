"""What an edit did to refusals, answers and accuracy: rates before and after, and their paired change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gtqlora.contrasts import groupings, kinds_of
from gtqlora.judging.labels import ANSWER
from gtqlora.results.verdict import Agreement, KindRow, Outcome, of_kind
from gtqlora.stats import Interval, benjamini_hochberg, mcnemar, paired_difference, rate


def table(outcomes: Sequence[Outcome], level: float) -> dict[str, KindRow]:
    """Return the row of each kind of held-out prompts; q-values are controlled over the kinds.

    Args:
        level: of the intervals, such as 0.95.
    """
    # a kind that was not asked is no row: it would count among the tests that q is corrected for
    kinds = {kind: of_kind(outcomes, kind) for kind in kinds_of(o.kind for o in outcomes)}
    p_values = [_changed(rows) for rows in kinds.values()]
    q_values = map(float, benjamini_hochberg(p_values))
    return {kind: _row(rows, level, p, q) for (kind, rows), p, q in zip(kinds.items(), p_values, q_values, strict=True)}


def agreement(outcomes: Sequence[Outcome], level: float) -> Agreement | None:
    """Return how often two judges agree; None where one has judged."""
    if not any(outcome.said_before for outcome in outcomes):
        return None
    groups = groupings(outcomes)[-1]
    before, after = (
        [len(set(said)) == 1 for said in whens]
        for whens in ([o.said_before for o in outcomes], [o.said_after for o in outcomes])
    )
    harmful = zip(outcomes, before, after, strict=True)
    differ = [o.number for o, was, now in harmful if o.kind == "harmful" and not (was and now)]
    return Agreement(before=rate(before, level, groups), after=rate(after, level, groups), differ=differ)


def _changed(outcomes: Sequence[Outcome]) -> float:
    """Return the p-value that refusals changed."""
    before, after = [o.refused_before for o in outcomes], [o.refused_after for o in outcomes]
    return mcnemar(before, after, groupings(outcomes)[-1])


def _row(outcomes: Sequence[Outcome], level: float, p: float, q: float) -> KindRow:
    groups = groupings(outcomes)[-1]  # topics where the rows carry them, else pairs
    old, new = [o.refused_before for o in outcomes], [o.refused_after for o in outcomes]
    was, now = [o.label_before == ANSWER for o in outcomes], [o.label_after == ANSWER for o in outcomes]
    return KindRow(
        refusal_before=rate(old, level, groups),
        refusal_after=rate(new, level, groups),
        drop=paired_difference(old, new, level, groups),
        p=p,
        q=q,
        accuracy_before=_accuracy([o.correct_before for o in outcomes], groups, level),
        accuracy_after=_accuracy([o.correct_after for o in outcomes], groups, level),
        answered_before=rate(was, level, groups),
        answered_after=rate(now, level, groups),
        gain=paired_difference(now, was, level, groups),
        labels_before=dict(Counter(o.label_before for o in outcomes)),
        labels_after=dict(Counter(o.label_after for o in outcomes)),
    )


def _accuracy(correct: Sequence[bool | None], groups: Sequence[str], level: float) -> Interval | None:
    """Return the share of correct answers among the rows that give an expected one; None if no row does."""
    known = [(right, group) for right, group in zip(correct, groups, strict=True) if right is not None]
    return rate([right for right, _ in known], level, [group for _, group in known]) if known else None
