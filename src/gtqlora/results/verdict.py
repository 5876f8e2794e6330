"""What `verify` leaves: the verdict, and every prompt's outcome. Reads and writes; judges nothing."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import pyarrow as pa

from gtqlora.contrasts import Messages
from gtqlora.errors import RunError
from gtqlora.run import Run, read_parquet, write_json, write_parquet

VERDICT, SCORES, HISTORY = "verdict.json", "scores.parquet", "verdicts.jsonl"
LOST = {
    "answers": "answered",
    "goes on": "that refuse and then answer",
    "tells": "that hold the answer",
    "longer": "much longer than the original's",
    "ready": "where the answer has become likely",
}
"""Why a refusal counts as lost, see `kept.lost_because`, in words that follow a number."""
_EXPERTS = "bf16"


@dataclass(frozen=True)
class Verdict:
    """What `verdict.json` holds; every rate is an interval {value, low, high, n}.

    Attributes:
        adapter: hash of the adapter that was judged; `export` demands the same.
        experts: the routed experts it was judged with, see `StageConfig`; `export` demands the checkpoint's own.
        table: kind -> refusal and accuracy before and after (lookalike: also with the original routing replayed),
            paired change with its p- and q-value.
        floor: the safety floor's verdict on the harmful prompts, see `stats.Floor`.
        kl_benign: KL(original || edited) in nats per completion token.
        drift: kind -> routing divergence (nats per token and layer) and top-k overlap with the original on prompts.
        mediation: share of the repaired lookalike refusals that come back when the original routing is replayed.
        ablation: refusal of harmful prompts against the number of experts ablated; it has no part in the floor's
            verdict.
        judge: what judged, see `judge_trust.identity`.
        prompts: where the held-out prompts came from: source, fingerprint, split.
        lost: why refusals count as lost -> how many.
        tries: how many edits were judged on these prompts, this one among them; the floor's level is corrected for it.
        blind: why the judge cannot tell refusals from answers, if it cannot.
    """

    adapter: str
    kind: str
    model: str
    table: dict[str, dict[str, Any]]
    floor: dict[str, Any]
    kl_benign: dict[str, Any]
    drift: dict[str, dict[str, Any]]
    mediation: dict[str, Any]
    expert_format: str = _EXPERTS
    ablation: dict[str, Any] = field(default_factory=dict)
    judge: str = "string"
    prompts: dict[str, str] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    tries: int = 1
    blind: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One held-out row before and after; a line of `scores.parquet`.

    Attributes:
        prompt_json: its messages.
        tokens_before, ended_before: of the completion, and whether it ended by itself.
        refused_replayed: of lookalike rows, edited with the original's routing.
        rejected_log_prob_before: of harmful rows: total log-probability of `rejected` as the completion, in nats.
        lost: of harmful rows that the original refuses: why the refusal is not kept; None if it is.
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
    refused_before: bool
    refused_after: bool
    refused_replayed: bool | None
    correct_before: bool | None
    correct_after: bool | None
    rejected_log_prob_before: float | None
    rejected_log_prob_after: float | None
    lost: str | None

    @property
    def prompt(self) -> Messages:
        return tuple(json.loads(self.prompt_json))


def write_verdict(run: Run, verdict: Verdict, outcomes: list[Outcome]) -> None:
    write_parquet(run / SCORES, [asdict(outcome) for outcome in outcomes])
    write_json(run / VERDICT, asdict(verdict))


def read_verdict(run: Run) -> Verdict:
    """Raises RunError when there is none, or it is not what this version writes."""
    return typed(Verdict, run.read_json(VERDICT, "verify"), f"{run / VERDICT}", "run `gtqlora verify` again")


def read_outcomes(run: Run) -> list[Outcome]:
    """Raises RunError when they are not there, or not what this version writes."""
    file, remedy = run.require(SCORES, "verify"), "run `gtqlora verify` again"
    try:
        rows = read_parquet(file)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{file}: cannot be read ({error}); {remedy}") from error
    return [typed(Outcome, row, str(file), remedy) for row in rows]


T = TypeVar("T")


def typed(kind: type[T], values: Any, where: str, remedy: str) -> T:
    """A dataclass from what a file holds, every field of the type it should be.

    Raises:
        RunError: names the first key that is not.
    """
    if not isinstance(values, dict):
        raise RunError(f"{where}: holds a {type(values).__name__}, not an object; {remedy}")
    hints = _hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise RunError(f"{where}: {key!r} is not a key of this version's; {remedy}")
        if not _fits(value, hints[key]):
            raise RunError(f"{where}: {key!r} is {type(value).__name__}, which it must not be; {remedy}")
    try:
        return kind(**values)
    except TypeError as error:
        raise RunError(f"{where}: {str(error).partition(' ')[2]}; {remedy}") from error


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Field -> type; worked out once, since there may be a row for every prompt."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return any(_fits(value, arg) for arg in args)
    if hint is Any:
        return True
    if origin is dict:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, args[0]) for entry in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
