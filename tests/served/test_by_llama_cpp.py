"""`verify` with llama.cpp's server: the answers of the model here, told as what they are, and nothing rests on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gtqlora.certificate import certify
from gtqlora.cli import main
from gtqlora.errors import ConfigError, FloorError, ModelError
from gtqlora.floor import ledger
from gtqlora.results.verdict import HISTORY, SCORES, VERDICT, read_outcomes, read_verdict
from gtqlora.results.wrapped import WRAPPED
from gtqlora.run import MANIFEST, PATHS, SERVED, Run, stage_hash
from gtqlora.served.server import Completion, Question, Server
from gtqlora.stages.report import report
from gtqlora.stages.verify import verify
from tests import helpers
from tests.served.conftest import Setting

_COMPLETE = Server.complete


@pytest.fixture
def run(served_run: Setting, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(served_run.run, tmp_path / "run"))


@pytest.fixture(scope="module")
def told(served_run: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with a verdict on the servers' answers."""
    path = Path(shutil.copytree(served_run.run, tmp_path_factory.mktemp("told") / "run"))
    with Run(path) as held:
        assert verify(served_run.config(), held) == read_verdict(path / SERVED)
    return path


class Counting:
    """Counts what servers are asked, and breaks off at a number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.asked, self.at = 0, at
        monkeypatch.setattr(Server, "complete", lambda server, asked: self(server, asked))

    def __call__(self, server: Server, asked: Question) -> Completion:
        if self.asked == self.at:
            raise server.fault("nothing listens there")
        self.asked += 1
        return _COMPLETE(server, asked)


Said = dict[tuple[int, str | None], tuple[str, str, bool, str | None]]


def said(folder: Path, name: str) -> Said:
    """What was said to each row, inside each frame."""
    outcomes = read_outcomes(folder, name)
    return {(o.number, o.wrapper): (o.text_before, o.text_after, o.ended_after, o.lost) for o in outcomes}


def test_the_answers_are_those_of_the_model_here(served_run: Setting, told: Path) -> None:
    """And the verdict on them takes no other one's place."""
    here, there = read_verdict(told), read_verdict(told / SERVED)
    assert (there.floor, there.table, there.kl_benign) == (here.floor, here.table, here.kl_benign)
    assert said(told / SERVED, SCORES) == said(told, SCORES)
    framed, every = said(told / SERVED, WRAPPED), said(told, WRAPPED)
    assert len(framed) == 8 * 4 and not [key for key in framed.keys() & every.keys() if framed[key] != every[key]]
    pair = there.served
    assert pair is not None and pair.server == served_run.before and pair.after == f"{served_run.after}#edited"
    assert pair.same_before == pair.same_after == 1 and pair.right == pair.telling >= 5 and pair.probes == 32
    assert there.mediation.reason == "left out: mediation_prompts = 0" and there.ablation is None
    with Run(told) as held:
        page = report(held).read_text()
        certify(held, helpers.JUDGE)
    assert here.served is None
    assert "For information: a server" in page and pair.sentence[1:] in page


def test_a_verdict_on_a_servers_answers_certifies_nothing(told: Path, tmp_path: Path) -> None:
    """Not even where its files and its record are put in the places of those of another one."""
    run = Path(shutil.copytree(told, tmp_path / "run"))
    (entry,) = ledger.read(run / SERVED / HISTORY)
    assert entry.verdict == "pass" and not entry.decided and not entry.shipped
    manifest = json.loads((run / MANIFEST).read_text())
    record = manifest["stages"].pop(SERVED)
    record["outputs"] = {name.removeprefix("served/"): digest for name, digest in record["outputs"].items()}
    manifest["stages"]["verify"] = record
    (run / MANIFEST).write_text(json.dumps(manifest))
    for file in (run / SERVED).iterdir():
        shutil.copy(file, run / file.name)
    with Run(run) as held, pytest.raises(FloorError, match=r"by the answers of a server, which certify nothing; run"):
        certify(held, helpers.JUDGE)
    # Its settings alone do not open the door either.
    record["config"] = {**record["config"], "generate_with": None, "served_before": None, "served_after": None}
    record["hash"] = stage_hash(record["config"], record["inputs"], PATHS)
    (run / MANIFEST).write_text(json.dumps(manifest))
    with Run(run) as held, pytest.raises(FloorError, match=r"verdict.json and the record of verify differ"):
        certify(held, helpers.JUDGE)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("after", "before", "it is not the original: of the .* tokens"),
        ("before", "before", "it is not the edited model: of the .* tokens"),
    ],
)
def test_another_model_is_found_out(served_run: Setting, run: Path, before: str, after: str, message: str) -> None:
    names = {"served_before": f"{getattr(served_run, before)}#a", "served_after": f"{getattr(served_run, after)}#b"}
    with Run(run) as held, pytest.raises(ModelError, match=message):
        verify(served_run.config(**names), held)
    assert not (run / SERVED / VERDICT).exists() and (run / VERDICT).exists()


def test_models_that_say_nearly_the_same_are_told_apart(
    served_run: Setting, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each says enough of what the other says, too, the tokens decide that only one of them says."""
    monkeypatch.setattr("gtqlora.served.identity.SAME", 0.0)
    names = {"served_before": f"{served_run.after}#a", "served_after": f"{served_run.before}#b"}
    for wrong in (names, {"served_after": f"{served_run.before}#b"}):
        with Run(run) as held, pytest.raises(ModelError, match="are the two names exchanged, or do both mean one"):
            verify(served_run.config(**wrong), held)
    for limit, value, message in (
        ("_FEWEST", 9999, r"\d+ tokens tell them apart; it takes"),
        ("PROBES", 0, "nothing shows"),
    ):
        monkeypatch.setattr(f"gtqlora.served.identity.{limit}", value)
        with Run(run) as held, pytest.raises(ModelError, match=message):
            verify(served_run.config(), held)


def test_what_a_server_said_before_it_failed_is_not_asked_again(
    served_run: Setting, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Run(run) as held:
        broken = Counting(monkeypatch, at=150)
        with pytest.raises(ModelError, match="nothing listens there"):
            verify(served_run.config(batch_size=1), held)
        (answers,) = (run / SERVED).glob("answers-*")
        assert answers.stat().st_mode & 0o077 == 0 and not (run / SERVED / VERDICT).exists()
        rest = Counting(monkeypatch)
        verdict = verify(served_run.config(), held)
        # both models: 32 probes twice, 216 rows, and 8 in each of 4 frames
        assert (broken.asked, rest.asked) == (150, 2 * (136 + 32 + 32 + 32) - 150)
        assert not answers.exists()
        none = Counting(monkeypatch)
        assert verify(served_run.config(), held) == verdict and none.asked == 0


def test_from_the_command_line(served_run: Setting, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--before", f"{served_run.before}#a", "--after", f"{served_run.after}#b"]
    words = ["verify", str(run), "--generate-with", served_run.before, *models]
    lean = [w for s in ("mediation_prompts=0", "ablation=0", "wrapped_prompts=8") for w in ("--set", s)]
    assert main([*words, *helpers.VERIFY[:-4], *lean]) == FloorError.exit_code  # so few inside frames
    said = " ".join(capsys.readouterr().out.split())
    assert f"plain answers are those of {served_run.before}" in said and "no certificate rests on its answers" in said
    assert "next: gtqlora export" not in said
    assert main([*words, "--rejudge"]) == ConfigError.exit_code
    for given, missing in ((6, "--after (served_after)"), (4, "--before (served_before) and --after (served_after)")):
        assert main([*words[:given], *helpers.VERIFY[:-4]]) == ConfigError.exit_code
        assert f"error: {missing} missing: the name that" in capsys.readouterr().err.replace("\n", " ")
