"""Records to JSON and back: nothing that a file holds is taken at its word, and every error says where it stands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from gtqlora.errors import RunError
from gtqlora.families.files import PROVENANCE
from gtqlora.judging.labels import Label
from gtqlora.results.ablation import AblationPoint, AblationStudy
from gtqlora.results.association import read_associations
from gtqlora.results.diagnosis import read_diagnosis
from gtqlora.results.experts import ExpertId
from gtqlora.results.export import FILE, ExportRecord, VerdictOnEdit, public_name, read_export, write_export
from gtqlora.results.mediation import ArmOutcome, read_arms
from gtqlora.results.metrics import read_metrics
from gtqlora.results.typed import Mismatch, from_json, to_json
from gtqlora.results.verdict import HeldOut, Verdict, read_outcomes, read_verdict, write_verdict
from gtqlora.results.wrapped import WRAPPED
from gtqlora.run import Run, write_json
from gtqlora.stats import Interval, floor
from tests import report_runs

POINT = AblationPoint(ablated=1, targeted=Interval(0.5, 0.25, 0.75, 8), random=None)
STUDY = AblationStudy(
    ranked_against="twins",
    ranked_prompts=4,
    controls=0,
    experts=[ExpertId(1, 2)],
    before=[POINT],
    after=[replace(POINT, random=POINT.targeted)],
    after_reranked=[],
)


@dataclass(frozen=True)
class Everything:
    """A field of each kind that records have."""

    number: float
    whole: int
    flag: bool
    label: Label
    text: str | None
    either: bool | str
    pair: tuple[float, ...]
    named: dict[str, list[ExpertId]]
    anything: object = None
    optional: list[int] = field(default_factory=list[int])


EVERYTHING = Everything(0.5, 2, True, "partial", None, "x", (1.0, 2.0), {"a": [ExpertId(1, 2)]}, {"free": [1]}, [3])


@pytest.mark.parametrize("record", [STUDY, EVERYTHING], ids=["nested", "every kind of field"])
def test_a_record_survives_its_file(record: Any) -> None:
    assert from_json(type(record), json.loads(json.dumps(to_json(record)))) == record


def test_what_has_a_default_may_be_left_out() -> None:
    less = {key: value for key, value in to_json(EVERYTHING).items() if key not in ("anything", "optional")}
    assert from_json(Everything, less) == replace(EVERYTHING, anything=None, optional=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": True}, "'number' is true or false, not a number"),
        ({"number": float("nan")}, "'number' is nan, not a number"),
        ({"number": 10**400}, "'number' is a whole number, not a number"),
        ({"number": "0.5"}, "'number' is text, not a number"),
        ({"whole": 1.0}, "'whole' is a number, not a whole number"),
        ({"whole": True}, "'whole' is true or false, not a whole number"),
        ({"flag": 1}, "'flag' is a whole number, not true or false"),
        ({"label": "part"}, "'label' is 'part', none of 'refusal', 'partial', 'answer', 'evasion', 'undecided'"),
        ({"label": None}, "'label' is None, none of 'refusal', 'partial', 'answer', 'evasion', 'undecided'"),
        ({"text": 7}, "'text' is a whole number, not text"),
        ({"either": None}, "'either' is null, not true or false"),
        ({"pair": {"0": 1.0}}, "'pair' is an object, not a list"),
        ({"pair": [1.0, None]}, "'pair[1]' is null, not a number"),
        ({"named": []}, "'named' is a list, not an object"),
        ({"named": {"a": [3]}}, "'named.a[0]' is a whole number, not an object"),
        ({"named": {"a": [{"layer": 1}]}}, "named.a[0] has no 'expert'"),
        ({"named": {"a": [{"layer": 1, "expert": 2, "x": 3}]}}, "named.a[0] has 'x', which this version does not know"),
        ({"silencing": {}}, "has 'silencing', which this version does not know"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Mismatch) as error:
        from_json(Everything, {**to_json(EVERYTHING), **change})
    assert str(error.value) == message


@pytest.mark.parametrize("value", [None, 3, "x", [], [{}]], ids=str)
def test_what_is_no_object(value: object) -> None:
    with pytest.raises(Mismatch, match=r"holds .*, no object"):
        from_json(ExpertId, value)


# --- the artefacts of a run


def test_every_artefact_is_read_as_it_was_written(tmp_path: Path) -> None:
    with report_runs.whole_run(tmp_path / "run") as run:
        found, outcomes = read_verdict(run.path), read_outcomes(run.path)
        arms = [ArmOutcome(number=1, kind="harmful", arm="gates", text="no", does="refuses")]
        inside = [replace(outcome, wrapper="a frame") for outcome in outcomes]
        write_verdict(run.path, replace(found, ablation=STUDY), outcomes, inside, arms)
        assert read_outcomes(run.path, WRAPPED) == inside
        assert read_arms(run.path) == arms
        assert (read_verdict(run.path), read_outcomes(run.path)) == (replace(found, ablation=STUDY), outcomes)
        assert to_json(found) == report_runs.verdict_of(run)
        diagnosis = read_diagnosis(run.path)
    assert to_json(diagnosis) == report_runs.diagnosis()
    assert [asdict(a) for a in read_associations(tmp_path / "run")] == report_runs.association(2, 4)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [10, 20, 30, 40, 50]


def test_what_is_not_there_names_its_command(tmp_path: Path) -> None:
    with Run(tmp_path / "run"):
        pass
    for read, verb in (
        (read_verdict, "verify"), (read_outcomes, "verify"), (read_diagnosis, "diagnose"),
        (read_associations, "diagnose"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=f"run `gtqlora {verb}` first"):
            read(tmp_path / "run")


@pytest.mark.parametrize("key", ["table", "drift"])
def test_a_verdict_has_every_kind_of_prompts_and_no_other(tmp_path: Path, key: str) -> None:
    with report_runs.whole_run(tmp_path / "run") as run:
        whole = report_runs.verdict_of(run)
        write_json(run / "verdict.json", {**whole, key: {k: v for k, v in whole[key].items() if k != "benign"}})
        with pytest.raises(RunError, match=rf"{key} has no 'benign' .*; run `gtqlora verify` again"):
            read_verdict(run.path)
        write_json(run / "verdict.json", {**whole, key: {**whole[key], "other": whole[key]["benign"]}})
        with pytest.raises(RunError, match=rf"{key} has 'other', which is no kind .*; run `gtqlora verify` again"):
            read_verdict(run.path)


def _record(verdict: Verdict) -> ExportRecord:
    return ExportRecord(
        base="model",
        base_fingerprint="f",
        ancestors=["model"],
        spent=0.01,
        adapter=verdict.adapter,
        expert_format="bf16",
        judge="string",
        prompts=HeldOut(source="pairs.jsonl", fingerprint="f", split="heldout"),
        floor=floor([True] * 200, [True] * 200, margin=0.05),
        lost={},
        tries=1,
        verdicts=[VerdictOnEdit(finished="now", verdict="pass", reason="", judge="string", shipped=True)],
        tensors_changed=3,
        gate_values_changed=4,
        divergence=0.0,
        versions={"gtqlora": "9.9.9"},
        files={"config.json": "f"},
    )


def test_what_is_said_beside_exported_weights(tmp_path: Path) -> None:
    with report_runs.whole_run(tmp_path / "run") as run:
        record = _record(read_verdict(run.path))
    write_export(tmp_path, record)
    assert read_export(tmp_path) == record
    write_json(tmp_path / "export.json", {**to_json(record), "spent": "little"})
    with pytest.raises(RunError, match=r"'spent' is text, not a number \(written by gtqlora 9\.9\.9\).*gtqlora export"):
        read_export(tmp_path)
    assert FILE == PROVENANCE  # so that a model's own record is among the files that are read of it
    assert [public_name(name) for name in ("/home/me/pairs.jsonl", "owner/name")] == ["pairs.jsonl", "owner/name"]
