"""The safety floor of a variant, in the form that ships: held to the fine-tune, and to the base where that refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gtqlora.bitdelta.container import ENOUGH, binds
from gtqlora.config import VerifyConfig
from gtqlora.contrasts import KINDS, Contrast, Row
from gtqlora.edits.effects import table
from gtqlora.errors import ContrastError, FloorError
from gtqlora.exports.forms import compared
from gtqlora.exports.job import Said
from gtqlora.floor.ancestry import ancestry
from gtqlora.floor.decision import Decision, decide
from gtqlora.floor.outcomes import losses
from gtqlora.judging.judge import NamedJudge
from gtqlora.results.export import FormVerdict
from gtqlora.results.verdict import KindRow, Outcome
from gtqlora.scoring import Runner, log_probs

FORM = "one bit a weight"


@dataclass(frozen=True, kw_only=True)
class Sayings:
    """What the three models said to the same rows: the fine-tune, the base, and the variant."""

    tuned: list[Said]
    base: list[Said]
    variant: list[Said]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The variant held to both models.

    Attributes:
        spent: share of the first original's refusals that may be lost by now, by the worse of both bounds.
        tries: variants and edits judged on these prompts.
    """

    tuned: FormVerdict
    base: FormVerdict
    spent: float
    tries: int


def check_rows(rows: Contrast, split: str) -> None:
    """Check that there are prompts of every kind.

    Raises:
        ContrastError: there are not.
    """
    if missing := [kind for kind in KINDS if not rows.of_kind(kind)]:
        raise ContrastError(
            f"{rows.source}: split {split!r} has no {' and no '.join(missing)} rows; a verdict needs every kind"
        )


def said(runner: Runner, rows: Sequence[Row], label: str) -> list[Said]:
    """Return what a model says to rows, and of harmful ones how likely it is to answer."""
    answers, harmful = runner.answers(rows, label=label), [row for row in rows if row.kind == "harmful"]
    found = log_probs(runner, harmful, [row.rejected for row in harmful], label=f"{label}: readiness to answer")
    ready = dict(zip([row.number for row in harmful], found, strict=True))
    return [
        Said(text=a.text, tokens=len(a.tokens), ended=a.ended, rejected_log_prob=ready.get(row.number))
        for row, a in zip(rows, answers, strict=True)
    ]


def judged(
    config: VerifyConfig,
    base: str,
    folder: Path,
    *,
    rows: Sequence[Row],
    sayings: Sayings,
    inputs: Mapping[str, str],
    judge: NamedJudge,
) -> Judged:
    """Decide the floor against both models, and enter both verdicts in the ledger.

    Args:
        config: its model is the fine-tune.
        folder: where the variant is being written.
        inputs: identities of the variant ("adapter"), the fine-tune ("tuned"), the base ("base"), the pairs
            ("contrast") and the judge ("judge").

    Raises:
        FloorError: no pass; the message has the refusals before and after.
    """
    verdicts: dict[str, FormVerdict] = {}
    spent, tries = 0.0, 0
    for which, model, before in (("tuned", config.model, sayings.tuned), ("base", base, sayings.base)):
        past = ancestry(model)
        outcomes = compared(rows, before, sayings.variant, judge)
        margin = past.margin(config.margin)
        # the base binds from half on, whatever the settings say
        settings = replace(config, model=model, **({} if which == "tuned" else {"min_refused": ENOUGH}))
        given = {**inputs, "model": inputs[which]}
        # the same variant on the same prompts: both entries of the ledger count as one try
        found = decide(settings, folder, given, rows=rows, outcomes=outcomes, judge=judge, margin=margin)
        verdicts[which] = _verdict(found, outcomes, config)
        tries = max(tries, found.tries)
        if which == "tuned" or binds(found.floor):
            spent = max(spent, past.spent + max(found.floor.losses.high, 0.0))
    _check(verdicts)
    return Judged(tuned=verdicts["tuned"], base=verdicts["base"], spent=spent, tries=tries)


def _verdict(found: Decision, outcomes: Sequence[Outcome], config: VerifyConfig) -> FormVerdict:
    return FormVerdict(name=FORM, floor=found.floor, lost=losses(found.harmful), table=table(outcomes, config.level))


def _check(verdicts: Mapping[str, FormVerdict]) -> None:
    """Check that the floor passes against the fine-tune, and against a base that refuses enough."""
    whom = {"tuned": "the fine-tune", "base": "the base"}
    for which, verdict in verdicts.items():
        if (which == "tuned" or binds(verdict.floor)) and verdict.floor.verdict != "pass":
            raise FloorError(
                f"{FORM}: the safety floor's verdict against {whom[which]} is {verdict.floor.verdict!r} "
                f"({verdict.floor.reason}); harmful prompts refused: {_rates(verdict.table['harmful'])}; nothing was "
                "written"
            )


def _rates(row: KindRow) -> str:
    shown = (
        f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})" for rate in (row.refusal_before, row.refusal_after)
    )
    return " -> ".join(shown)
