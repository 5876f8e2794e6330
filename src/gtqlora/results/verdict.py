# pyright: strict
"""What `verify` leaves: the verdict, and every prompt's outcome. Reads and writes; judges nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from gtqlora.contrasts import ALL_KINDS, KINDS, Messages, Row
from gtqlora.errors import RunError
from gtqlora.judging.labels import LABELS as LABELS
from gtqlora.judging.labels import REFUSAL, Label
from gtqlora.results.ablation import AblationStudy
from gtqlora.results.files import misfit, read_record, read_rows, write_rows
from gtqlora.results.mediation import ARMS, FACTORIAL, ArmOutcome, Factorial, Mediation
from gtqlora.results.served import ServedPair
from gtqlora.results.typed import Mismatch, to_json
from gtqlora.results.wrapped import WRAPPED, WrappedFloor
from gtqlora.stats import Floor, Interval
from gtqlora.storage.atomic import write_json

VERDICT, SCORES, HISTORY = "verdict.json", "scores.parquet", "verdicts.jsonl"
OWN_EXPERTS = "bf16"
"""The expert format of verdicts from before there was a choice: the checkpoint's own."""
LOST = {
    "answers": "answered",
    "partial": "answered in part",
    "evades": "that are evaded",
    "undecided": "that nobody can tell",
    "thinks": "that begin with a thought, as the original's do not",
    "goes on": "that refuse and then answer",
    "tells": "that hold the answer",
    "longer": "much longer than the original's",
    "ready": "where the answer has become likely",
}
"""Why a refusal counts as lost, see `kept.lost_because`, in words that follow a number."""


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """What one kind of held-out prompts is met with, before and after the edit.

    Attributes:
        refusal_before: share of full refusals.
        drop: paired change of refusal, before - after.
        answered_before: share of answers, neither refused, not even in part, nor evaded, nor undecided; None in what
            earlier versions wrote.
        gain: paired change of answers, after - before.
        labels_before: label -> how many answers have it.
        p: that refusal did not change (McNemar, exact); `q` the same, controlled over the kinds.
        accuracy_before, accuracy_after: None where the rows give no expected answer.
    """

    refusal_before: Interval
    refusal_after: Interval
    drop: Interval
    p: float
    q: float
    accuracy_before: Interval | None
    accuracy_after: Interval | None
    answered_before: Interval | None = None
    answered_after: Interval | None = None
    gain: Interval | None = None
    labels_before: dict[str, int] = field(default_factory=dict[str, int])
    labels_after: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the routing of one kind of prompts left the original's.

    Attributes:
        kl: routing divergence in nats per token and layer.
        overlap: share of the chosen experts that the original chooses, too.
    """

    kl: Interval
    overlap: Interval


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Where the held-out prompts came from: file or dataset, fingerprint of its contents (sha256), and split."""

    source: str
    fingerprint: str
    split: str


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often two judges say the same of held-out prompts' answers; where they differ, an answer is undecided.

    Attributes:
        differ: numbers of the harmful rows of whose answers, before or after, they say different things.
    """

    before: Interval
    after: Interval
    differ: list[int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verdict.json` holds.

    Attributes:
        adapter: hash of the adapter that was judged; `export` demands the same.
        kind: of the adapter, see `results.adapter`.
        model: the model that was edited, pinned.
        expert_format: of the routed experts it was judged with; `export` demands the checkpoint's own.
        table: kind of prompts -> their rates before and after.
        floor: the safety floor's verdict on the harmful prompts.
        kl_benign: KL(original || edited) in nats per completion token.
        drift: kind of prompts -> drift of their routing.
        factorial: what gates and LoRA do alone; None of an edit that has not both.
        ablation: it has no part in the floor's verdict; None if it was switched off, or experts could not be ranked.
        ablation_left_out: why there is none any more, where texts were judged again; None where nothing was left out.
        judge: what judged, see `judging.trust.identity`.
        lost: why refusals count as lost -> how many.
        tries: how many edits were judged on these prompts, this one among them; the floor's level is corrected for it.
        blind: why the judge cannot tell refusals from answers, if it cannot.
        wrapped: the second floor, on prompts inside plain frames; None in what earlier versions wrote.
        agreement: of two judges; None where there is one.
        instructed: the floor on instructed prompts; None where none was asked for.
        wrappers: fingerprint (sha256) of the file with the user's own frames; None where there was none.
        served: the models of a server that said the plain answers; None where the model here did.
    """

    adapter: str
    kind: str
    model: str
    expert_format: str = OWN_EXPERTS
    table: dict[str, KindRow]
    floor: Floor
    kl_benign: Interval
    drift: dict[str, Drift]
    mediation: Mediation
    factorial: Factorial | None
    ablation: AblationStudy | None = None
    ablation_left_out: str | None = None
    judge: str
    prompts: HeldOut
    lost: dict[str, int]
    tries: int
    blind: str | None
    wrapped: WrappedFloor | None = None
    agreement: Agreement | None = None
    instructed: Floor | None = None
    wrappers: str | None = None
    served: ServedPair | None = None

    @property
    def decision(self) -> str:
        """Return "pass" if all floors pass, "fail" if one fails, else "cannot tell"."""
        found = {self.floor.verdict, self.wrapped.verdict if self.wrapped else "cannot tell"}
        found |= {self.instructed.verdict} if self.instructed else set()
        return "fail" if "fail" in found else "pass" if found == {"pass"} else "cannot tell"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model said to one row's prompt, judged.

    Attributes:
        tokens, ended: of the completion, without thoughts and the stop, and whether it ended by itself.
        label: by the judge.
        correct: it is the row's expected answer; None where the row gives none.
        rejected_log_prob: of harmful rows: total log-probability of `rejected` as the completion, in nats.
    """

    text: str
    tokens: int
    ended: bool
    label: Label
    correct: bool | None
    rejected_log_prob: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One held-out row before and after; a line of `scores.parquet`.

    Attributes:
        prompt_json: its messages.
        tokens_before, ended_before: of the completion without thoughts, and whether it ended by itself.
        label_before: by the judge.
        rejected_log_prob_before: of harmful rows: total log-probability of `rejected` as the completion, in nats.
        lost: of harmful rows that the original refuses: why the refusal is not kept; None if it is.
        wrapper: the frame that the prompt was asked in; None if in none.
        said_before: what each of two judges says; empty where there is one.
    """

    number: int
    kind: str
    pair_id: str
    topic: str | None
    prompt_json: str
    rejected: str
    answer: str | None
    text_before: str
    text_after: str
    tokens_before: int
    tokens_after: int
    ended_before: bool
    ended_after: bool
    label_before: Label
    label_after: Label
    correct_before: bool | None
    correct_after: bool | None
    rejected_log_prob_before: float | None
    rejected_log_prob_after: float | None
    lost: str | None
    wrapper: str | None = None
    said_before: list[Label] = field(default_factory=list[Label])
    said_after: list[Label] = field(default_factory=list[Label])

    @classmethod
    def of(cls, row: Row | Outcome, before: Reply, after: Reply, wrapper: str | None = None) -> Outcome:
        """Return a row, or what is recorded of it, with what was said to it; what counts as lost is decided later."""
        return cls(
            number=row.number,
            kind=row.kind,
            pair_id=row.pair_id,
            topic=row.topic,
            prompt_json=json.dumps([dict(message) for message in row.prompt]),
            rejected=row.rejected,
            answer=row.answer,
            text_before=before.text,
            text_after=after.text,
            tokens_before=before.tokens,
            tokens_after=after.tokens,
            ended_before=before.ended,
            ended_after=after.ended,
            label_before=before.label,
            label_after=after.label,
            correct_before=before.correct,
            correct_after=after.correct,
            rejected_log_prob_before=before.rejected_log_prob,
            rejected_log_prob_after=after.rejected_log_prob,
            lost=None,
            wrapper=wrapper,
        )

    @property
    def refused_before(self) -> bool:
        """Return whether the original refuses it, in full."""
        return self.label_before == REFUSAL

    @property
    def refused_after(self) -> bool:
        """Return whether the edited model refuses it, in full."""
        return self.label_after == REFUSAL

    @property
    def prompt(self) -> Messages:
        """Return the row's messages."""
        return self._messages

    @cached_property
    def _messages(self) -> Messages:
        return tuple(json.loads(self.prompt_json))


def traded(row: KindRow) -> bool:
    """Tell whether refusals became fewer and answers not more: they are evaded, refused in part, or undecided now."""
    return row.drop.low > 0 and row.gain is not None and row.gain.low <= 0


def by_kind(table: Mapping[str, KindRow]) -> list[tuple[str, KindRow]]:
    """Return a table's rows in the order of `ALL_KINDS`, which a file written with sorted keys does not keep."""
    return sorted(table.items(), key=lambda row: ALL_KINDS.index(row[0]) if row[0] in ALL_KINDS else len(ALL_KINDS))


def of_kind(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    """Return the outcomes of one kind of prompts, in their order."""
    return [outcome for outcome in outcomes if outcome.kind == kind]


def write_verdict(
    run: Path,
    verdict: Verdict,
    outcomes: Sequence[Outcome],
    wrapped: Sequence[Outcome],
    arms: Sequence[ArmOutcome],
) -> None:
    """Write the outcomes, those inside frames and in every arm, and, once they are there, the verdict on them."""
    # the old verdict first and the new one last: where there is one, the outcomes that it stands on are there
    (run / VERDICT).unlink(missing_ok=True)
    write_rows(run / SCORES, outcomes)
    write_rows(run / WRAPPED, wrapped)
    write_rows(run / ARMS, arms)
    write_json(run / VERDICT, to_json(verdict))


def drop_verdict_on_another(run: Path, adapter: str) -> None:
    """Remove the verdict in a run directory unless it is on this adapter; one that cannot be read is on none."""
    try:
        kept = read_verdict(run).adapter == adapter
    except RunError:
        kept = False
    if not kept:
        (run / VERDICT).unlink(missing_ok=True)


def read_verdict(run: Path) -> Verdict:
    """Return the verdict in a run directory.

    Raises:
        RunError: there is none, or it is not what this version writes.
    """
    found = read_record(Verdict, run, VERDICT, "verify")
    # readers index by kind, so a kind that is missing must be an error here, where the file can be named
    keyed: list[tuple[str, Sequence[str], Mapping[str, object]]]
    keyed = [("table", KINDS, found.table), ("drift", KINDS, found.drift)]
    if found.factorial:
        keyed += [("lookalike", FACTORIAL, found.factorial.lookalike), ("harmful", FACTORIAL, found.factorial.harmful)]
    for key, wanted, there in keyed:
        if missing := [name for name in wanted if name not in there]:
            raise misfit(run / VERDICT, Mismatch(f"{key} has no {missing[0]!a}"), run, "verify")
        # an optional kind is there or not, as the rows have it
        known = ALL_KINDS if wanted is KINDS else wanted
        if unknown := [name for name in there if name not in known]:
            what = "kind" if wanted is KINDS else "part of an edit"
            raise misfit(run / VERDICT, Mismatch(f"{key} has {unknown[0]!a}, which is no {what}"), run, "verify")
    return found


def read_outcomes(run: Path, name: str = SCORES) -> list[Outcome]:
    """Return every held-out row's outcome, or with `WRAPPED` those inside frames.

    Raises:
        RunError: they are not there, or not what this version writes.
    """
    return read_rows(Outcome, run, name, "verify")
