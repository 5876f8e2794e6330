"""The demo's study of one organism gives every number that the README and the bench read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gtqlora import contrasts, demo
from gtqlora.cli import main
from gtqlora.demo import Numbers, Outcome, study
from gtqlora.organisms import embedded
from gtqlora.results.typed import to_json
from gtqlora.run import read_manifest
from tests import helpers

REPAIRED = {"repaired_by_routing", "repaired_by_gates", "repaired_by_lora"}
KEYS = {
    *("harmful_refusal", "lookalike_refusal", "benign_refusal", "lookalike_accuracy", "benign_accuracy"),
    *("floor", "replayed_lookalike_refusal", *REPAIRED),
}


def test_study_gives_all_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    # all that is diagnosed, and enough of the others: to edit by, and for a floor that fails
    counts = {("validation", kind): 40 for kind in contrasts.KINDS}
    counts |= {(split, kind): 60 for split in ("train", "heldout") for kind in contrasts.KINDS}
    found, sentence = study(
        embedded.organism("routed"),
        helpers.write_rows(tmp_path / "contrast.jsonl", helpers.toy_rows(counts)),
        tmp_path / "study",
        edits=("projection", "gt"),
        on_stage=seen.append,
        overrides=("steps=3",),
        shorter=True,
    )
    settings = read_manifest(tmp_path / "study" / "gt")["stages"]
    assert settings["train"]["config"]["steps"] == 3 and settings["verify"]["config"]["wrapped_prompts"] == 240
    numbers: Any = to_json(found)
    assert seen == ["diagnose", "projection", "gt"] and sentence.startswith(
        "False refusals are mediated in the same place as true ones: routing"
    )
    assert numbers.keys() == {"verdict", "truth", "planted_precision", "planted_recall", "edits"}
    assert numbers["verdict"] == numbers["truth"] == "routing"
    assert numbers["planted_precision"] == numbers["planted_recall"] == 1.0
    assert list(numbers["edits"]) == ["base", "projection", "gt"]
    for name, edit in numbers["edits"].items():
        assert edit.keys() == KEYS, name
        told = {key for key in KEYS - {"floor"} if edit[key] is not None}
        # a projection has no parts; three steps of training, as none, repair nothing
        assert KEYS - told - {"floor"} <= (REPAIRED if name != "projection" else REPAIRED - {"repaired_by_routing"}), (
            name
        )
        assert all(0 <= edit[key] <= 1 for key in told), (name, edit)
    assert numbers["edits"]["base"]["floor"] is None
    base, projection = numbers["edits"]["base"], numbers["edits"]["projection"]
    assert base["harmful_refusal"] > 0.97 < base["lookalike_refusal"] and base["benign_refusal"] < 0.03
    assert projection["floor"] == "fail" and projection["harmful_refusal"] < base["harmful_refusal"]
    assert json.loads(json.dumps(numbers)) == numbers
    check_what_the_command_prints(found, sentence, monkeypatch, capsys)


def check_what_the_command_prints(
    found: Numbers, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Print these numbers as `demo` does, which itself takes minutes."""
    outcomes = {"routed": Outcome(found, sentence, Path("report.html"), Path("exported"))}
    monkeypatch.setattr(demo, "demo", lambda _out, _on_event: (outcomes, 1.23))
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"organisms": {"routed": to_json(found)}, "seconds": 1.2}
    assert main(["demo"]) == 0
    text = capsys.readouterr().out
    base, projection, gt = (line.split() for line in text.splitlines() if line.startswith(("  base", "  proj", "  GT")))
    assert base[6] == "-" and projection[6] == "fail" and gt[0] == "GT-QLoRA"
    assert base[1] == f"{found.edits['base'].harmful_refusal:.3f}"
    assert "high: the routing is necessary" in text
