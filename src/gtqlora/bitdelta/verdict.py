"""The safety floor of a variant, in the form that ships: held to the fine-tune, and to the base where that refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gtqlora.bitdelta.container import ENOUGH, binds
from gtqlora.config import VerifyConfig
from gtqlora.config.values import require
from gtqlora.contrasts import KINDS, Contrast, Row
from gtqlora.edits.effects import table
from gtqlora.errors import ContrastError, FloorError
from gtqlora.exports.forms import compared
from gtqlora.exports.job import Said
from gtqlora.floor.ancestry import Ancestry, ancestry
from gtqlora.floor.decision import decide
from gtqlora.floor.outcomes import losses
from gtqlora.judging.judge import NamedJudge
from gtqlora.machine import release_memory
from gtqlora.results.export import FormVerdict, VerdictOnEdit
from gtqlora.results.verdict import KindRow
from gtqlora.scoring import Runner, log_probs

FORM = "one bit a weight"


@dataclass(frozen=True, kw_only=True)
class Original:
    """What a variant is held to.

    Attributes:
        model: the model, for its settings.
        whom: what it is called in messages.
        past: what was edited before, and may be lost since.
        said: its answers.
    """

    model: str
    whom: str
    past: Ancestry
    said: list[Said]

    @staticmethod
    def of(model: str, whom: str, answers: list[Said]) -> Original:
        """Return a model on disk, whose own record says what was edited before."""
        return Original(model=model, whom=whom, past=ancestry(model), said=answers)


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


def check_settings(config: VerifyConfig) -> None:
    """Check that models are asked as they are on disk.

    Raises:
        ConfigError: they are not.
    """
    require(config.expert_format == "bf16", "expert_format: a variant is judged with the checkpoint's own experts")
    require(config.dtype == "auto", "dtype: a variant is judged in the checkpoint's own type")


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
        Said(text=a.text, tokens=a.length, ended=a.ended, rejected_log_prob=ready.get(row.number))
        for row, a in zip(rows, answers, strict=True)
    ]


def judged(
    config: VerifyConfig,
    folder: Path,
    held: Mapping[str, Original],
    variant: Sequence[Said],
    *,
    rows: Sequence[Row],
    inputs: Mapping[str, str],
    judge: NamedJudge,
    form: str = FORM,
) -> Judged:
    """Decide the floor against both models, and enter both verdicts in the ledger.

    Args:
        folder: where the variant is being written.
        held: the fine-tune ("tuned") and the base ("base").
        variant: what the variant said to the rows, in the form that ships.
        inputs: identities of the variant ("adapter"), the fine-tune ("tuned"), the base ("base"), the pairs
            ("contrast") and the judge ("judge").
        form: what the form that ships is called in messages.

    Raises:
        FloorError: no pass; the message has the refusals before and after.
    """
    release_memory()  # judges come last, when no model that was asked is left
    verdicts: dict[str, FormVerdict] = {}
    spent, tries = 0.0, 0
    for which, original in held.items():
        outcomes = compared(rows, original.said, variant, judge)
        margin = original.past.margin(config.margin)
        # the base binds from half on, whatever the settings say
        settings = replace(config, model=original.model, **({} if which == "tuned" else {"min_refused": ENOUGH}))
        given = {**inputs, "model": inputs[which]}
        # the same variant on the same prompts: both entries of the ledger count as one try
        found = decide(settings, folder, given, rows=rows, outcomes=outcomes, judge=judge, margin=margin)
        verdicts[which] = FormVerdict(
            name=form, floor=found.floor, lost=losses(found.harmful), table=table(outcomes, config.level)
        )
        tries = max(tries, found.tries)
        if which == "tuned" or binds(found.floor):
            spent = max(spent, original.past.spent + max(found.floor.losses.high, 0.0))
    # both are in the ledger by now, whatever they are
    for which, original in held.items():
        _check(original.whom, verdicts[which], binding=which == "tuned" or binds(verdicts[which].floor))
    return Judged(tuned=verdicts["tuned"], base=verdicts["base"], spent=spent, tries=tries)


def verdicts_on(finished: str, judge: str, *found: FormVerdict) -> list[VerdictOnEdit]:
    """Return verdicts as `export.json` has them."""
    return [
        VerdictOnEdit(finished=finished, verdict=one.floor.verdict, reason=one.floor.reason, judge=judge, shipped=True)
        for one in found
    ]


def _check(whom: str, verdict: FormVerdict, *, binding: bool) -> None:
    """Check that the floor passes where the variant is held to it."""
    if binding and verdict.floor.verdict != "pass":
        raise FloorError(
            f"{verdict.name}: the safety floor's verdict against {whom} is {verdict.floor.verdict!r} "
            f"({verdict.floor.reason}); harmful prompts refused: {_rates(verdict.table['harmful'])}; nothing was "
            "written"
        )


def _rates(row: KindRow) -> str:
    shown = (
        f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})" for rate in (row.refusal_before, row.refusal_after)
    )
    return " -> ".join(shown)
