"""What `verify` recorded of held-out prompts, judged again: which refusals are kept, and how the ledger keeps that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from gtqlora import contrasts
from gtqlora.contrasts.near import stand_alone
from gtqlora.floor import ledger
from gtqlora.floor.kept import Completion, length_limit, lost_because, said_otherwise
from gtqlora.floor.ledger import Prompts
from gtqlora.judging.judge import Judge, labels
from gtqlora.results.verdict import Outcome


def harmful_prompts(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the harmful rows, as `prompts_of`."""
    return prompts_of(outcomes, "harmful")


def prompts_of(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    """Return rows of a kind, one for each different prompt, and of prompts that are nearly the same the first one.

    Inside a frame all prompts have its words in common; which ones are asked there was chosen among these.
    """
    found = {contrasts.prompt_key(o.prompt): o for o in reversed(outcomes) if o.kind == kind}
    different = list(reversed(found.values()))
    if any(outcome.wrapper for outcome in different):
        return different
    return [different[place] for place in stand_alone([outcome.prompt for outcome in different])]


def judged_again(outcomes: Sequence[Outcome], judge: Judge) -> list[Outcome]:
    """Return the harmful prompts with their recorded texts judged anew, and why a refusal is lost where it is."""
    rows = harmful_prompts(outcomes)
    before, after = _completions(rows, "before", judge), _completions(rows, "after", judge)
    limit = length_limit(before)
    found = []
    for outcome, was, now in zip(rows, before, after, strict=True):
        lost = lost_because(was, now, outcome, limit) if was.refused else None
        found.append(replace(outcome, label_before=was.label, label_after=now.label, lost=lost))
    return found


def declined_again(outcomes: Sequence[Outcome], judge: Judge, kind: str) -> list[Outcome]:
    """Return prompts of a harmless kind judged anew, and what the judge finds where one is not declined any more."""
    rows = prompts_of(outcomes, kind)
    said = zip(rows, _completions(rows, "before", judge), _completions(rows, "after", judge), strict=True)
    return [
        replace(
            outcome,
            label_before=was.label,
            label_after=now.label,
            lost=said_otherwise(now) if was.refused else None,
        )
        for outcome, was, now in said
    ]


def _completions(outcomes: Sequence[Outcome], when: Literal["before", "after"], judge: Judge) -> list[Completion]:
    texts = [o.text_before if when == "before" else o.text_after for o in outcomes]
    return [
        Completion(
            text=text,
            tokens=getattr(outcome, f"tokens_{when}"),
            ended=getattr(outcome, f"ended_{when}"),
            label=label,
            rejected_log_prob=getattr(outcome, f"rejected_log_prob_{when}"),
        )
        for outcome, text, label in zip(
            outcomes, texts, labels(judge, [o.prompt for o in outcomes], texts), strict=True
        )
    ]


def benign_completions(outcomes: Sequence[Outcome], judge: Judge) -> list[Completion]:
    """Return what the original says to benign prompts."""
    return _completions([o for o in outcomes if o.kind == "benign"], "before", judge)


def losses(rows: Sequence[Outcome]) -> dict[str, int]:
    """Count lost refusals by why they are lost."""
    return dict(Counter(row.lost for row in rows if row.lost is not None))


def _kept(row: Outcome) -> bool | None:
    """Tell whether a refusal is kept (None: undecided) or, of a prompt that the original answers, there is one."""
    if not row.refused_before:
        return row.refused_after
    return None if row.lost == "undecided" else row.lost is None


def entry_prompts(rows: Sequence[Outcome]) -> Prompts:
    """Return outcomes as the ledger keeps them."""
    groupings = [[ledger.short_hash(group) for group in groups] for groups in contrasts.groupings(rows)]
    return {
        ledger.short_hash(contrasts.prompt_key(row.prompt)): [row.refused_before, _kept(row), *groups]
        for row, *groups in zip(rows, *groupings, strict=True)
    }
