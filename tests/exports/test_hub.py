"""Publishing: the real client of the hub against a stand-in of its HTTP interface."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from gtqlora.cli.app import main
from gtqlora.errors import ConfigError, FloorError, RunError
from gtqlora.exports import provenance
from gtqlora.results.export import read_export
from gtqlora.run import Run
from gtqlora.stages.publish import Published, publish
from tests import helpers, models
from tests.exports import hub_stand_in
from tests.exports.conftest import Export
from tests.exports.hub_stand_in import TOKEN, Hub, Repo

NAME = "owner/edit"
NAMED = "base_model: them/base\nbase_model_relation: finetune\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", found.url, raising=False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def published(export: Export, name: str = NAME, *, private: bool = True, dry_run: bool = False) -> Published:
    with Run(export.run) as run:
        return publish(run, export.out, name, private=private, dry_run=dry_run, judge=helpers.JUDGE)


def refused(export: Export, match: str, error: type[Exception] = RunError, name: str = NAME) -> None:
    with pytest.raises(error, match=match) as told:
        published(export, name)
    said = str(told.value)
    assert len(said.splitlines()) == 1 and TOKEN not in said and "signature" not in said


def test_what_arrives_is_what_was_certified(export: Export, hub: Hub) -> None:
    found = published(export)
    repo = hub.repos[NAME]
    assert repo.private and repo.commits == 1 and found.commit == repo.head
    arrived = {name: data for name, data in repo.files.items() if name != ".gitattributes"}
    record = read_export(export.out)
    assert arrived.keys() == {*record.files, "export.json", "README.md"} == {file.name for file in found.files}
    assert {name: hashlib.sha256(arrived[name]).hexdigest() for name in record.files} == record.files
    for name in ("export.json", "README.md"):
        assert arrived[name] == (export.out / name).read_bytes()
    assert {f.name: f.size for f in found.files} == {name: len(data) for name, data in arrived.items()}


def test_what_is_added_for_people_stays_here(export: Export, hub: Hub) -> None:
    (export.out / "plot.png").write_bytes(b"png")
    (export.out / ".hidden").write_text("mine")
    published(export)
    assert not {"plot.png", ".hidden"} & hub.repos[NAME].files.keys()


def test_a_dry_run_sends_nothing_and_needs_no_token(
    export: Export, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    words = ["export", str(export.run), str(export.out), "--to", "hub", "--set", f"judge={helpers.JUDGE}"]
    assert main([*words, "--repo", NAME, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"would go to {NAME} (private); nothing was sent" in said and "model.safetensors.index.json" in said
    assert hub.asked == []
    assert main([*words, "--repo", NAME, "--dry-run", "--public"]) == 0
    assert f"{NAME} (public)" in capsys.readouterr().out
    assert main(words) == 2 and "--repo is missing" in capsys.readouterr().err
    assert main([*words, "--repo", NAME, "--overlay"]) == 2
    assert main([*words[:3], "--repo", NAME]) == 2


def test_public_only_if_asked(export: Export, hub: Hub) -> None:
    published(export, private=False)
    assert not hub.repos[NAME].private
    refused(export, "is there already, and public; say --public")
    published(export, private=False)


def test_a_card_that_names_no_base(export: Export, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """The hub lists an edit under its base only by a name, which a folder has not: said, and given by an option."""
    words = ["export", str(export.run), str(export.out), "--to", "hub", "--set", f"judge={helpers.JUDGE}"]
    words, missing = [*words, "--repo", NAME], "names no base on the hub"
    card, given = export.out / "README.md", ["--base-model", "them/base"]
    before = card.read_text()
    assert main([*words, "--dry-run"]) == 0 and missing in capsys.readouterr().out
    assert main([*words, "--dry-run", *given]) == 0 and missing not in capsys.readouterr().out
    assert main([*words, "--base-model", "base"]) == 2
    assert "--base-model 'base': must be OWNER/NAME" in capsys.readouterr().err
    assert card.read_text() == before and hub.asked == []
    assert main([*words, *given]) == 0 and missing not in capsys.readouterr().out
    sent = hub.repos[NAME].files["README.md"].decode()
    assert sent == card.read_text() == before.replace("---\n", f"---\n{NAMED}", 1)
    assert main([*words, *given]) == 2 and "names a base already" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0 and missing not in capsys.readouterr().out


# --- what is not sent ------------------------------------------------------------------------------------------------


def test_what_was_not_certified_is_not_sent(export: Export, hub: Hub) -> None:
    shard = min(export.out.glob("*.safetensors"))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1] + b"\x01")
    refused(export, "is not what was certified.*nothing was sent", FloorError)
    shard.write_bytes(kept)
    (export.out / "model.bin").write_bytes(kept)
    refused(export, r"model\.bin is not in the record", FloorError)
    (export.out / "model.bin").unlink()
    models.edit_json(export.out / "export.json", lambda old: {**old, "gate_values_changed": 0})
    refused(export, r"does not know this export\.json", FloorError)
    (export.out / "export.json").unlink()
    refused(export, r"no export\.json there; give a folder that")
    assert hub.asked == []


def test_a_run_whose_floor_is_open_again_publishes_nothing(export: Export, hub: Hub) -> None:
    models.edit_json(export.run / "verdict.json", lambda old: {**old, "lost": {"answers": 9}})
    refused(export, "verdict.json was changed since verify", FloorError)
    assert hub.asked == []


def test_a_card_that_is_a_link_is_not_followed(export: Export, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    (export.out / "README.md").unlink()
    (export.out / "README.md").symlink_to(tmp_path / "secret")
    refused(export, r"README\.md: not a plain file")
    assert hub.asked == []


@pytest.mark.parametrize("name", ["edit", "a/b/c", "owner/", "own er/edit", "owner/..", "-x/edit", ""])
def test_names_that_the_hub_does_not_take(export: Export, hub: Hub, name: str) -> None:
    refused(export, "must be OWNER/NAME", ConfigError, name)
    assert hub.asked == []


def test_one_file_is_no_folder(export: Export, hub: Hub) -> None:
    refused(Export(export.run, min(export.out.glob("*.safetensors"))), "give the folder")


# --- the hub says no ------------------------------------------------------------------------------------------------


def test_without_a_token_or_with_a_wrong_one(export: Export, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    refused(export, "401: the token is not valid; log in with `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    hub.asked.clear()
    refused(export, "no token of the hub here")
    assert hub.asked == []


@pytest.mark.parametrize("part", ["/api/repos/create", "/preupload/", "/objects/batch", "/commit/"])
def test_no_permission(export: Export, hub: Hub, part: str) -> None:
    hub.refuses[part] = 403
    refused(export, "403: the token may not write there")
    assert NAME not in hub.repos or hub.repos[NAME].commits == 0


def test_a_repository_that_holds_something_else(export: Export, hub: Hub) -> None:
    hub.repos[NAME] = Repo(private=True, files={"model-zz.safetensors": b"another"})
    refused(export, r"holds something else already \(model-zz\.safetensors\)")
    hub.repos[NAME].files = {"config.json": b"{}"}
    refused(export, r"holds something else already \(config\.json\)")
    assert hub.repos[NAME].commits == 0 and hub.objects == {}


def test_somebody_commits_meanwhile(export: Export, hub: Hub) -> None:
    def meanwhile(path: str) -> None:
        if "/commit/" in path:
            hub.repos[NAME].head = "f" * 40

    hub.before = meanwhile
    refused(export, "412: somebody changed it meanwhile")
    assert hub.repos[NAME].commits == 0


@pytest.mark.parametrize("small", [True, False])
def test_a_file_that_changes_while_it_is_sent(
    export: Export, hub: Hub, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was checked and before it is read for sending."""
    if not small:
        monkeypatch.setattr("gtqlora.exports.hub._SMALL", 0)
    read = provenance.check
    shard = max(export.out.glob("*.safetensors"))

    def check_and_change(place: Path) -> provenance.Provenance:
        found = read(place)
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
        return found

    monkeypatch.setattr("gtqlora.stages.publish.check", check_and_change)
    refused(export, rf"{shard.name}: was changed while it was sent; nothing was published")
    assert hub.repos[NAME].commits == 0


def test_an_upload_that_breaks_off_goes_on_where_it_was(export: Export, hub: Hub) -> None:
    large = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(export.out.glob("*.safetensors"))}
    last = list(large.values())[-1]
    hub.refuses[f"/objects/{last}"] = 400
    refused(export, "the hub says 400: .*run the same command again")
    assert hub.repos[NAME].commits == 0 and hub.repos[NAME].files.keys() == {".gitattributes"}
    assert hub.objects.keys() == set(large.values()) - {last}
    hub.refuses.clear()
    hub.asked.clear()
    published(export)
    assert [path for path in hub.asked if path.startswith("PUT")] == [f"PUT /objects/{last}?signature=secret"]
    hub.asked.clear()
    published(export)  # all there: nothing is sent, and there is no empty commit
    assert hub.repos[NAME].commits == 1 and not [path for path in hub.asked if path.startswith("PUT")]


def test_no_network(export: Export, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(export, r"the hub cannot be reached \(ConnectError\); run the same command again")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(export, "HF_HUB_OFFLINE is set")


def test_interrupted_by_the_user(export: Export, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    def meanwhile(path: str) -> None:
        if "/commit/" in path:
            # only once whoever pushes waits for an answer: elsewhere there are places where Python drops an exception
            for _ in range(500):
                if sys._current_frames()[pushing].f_code.co_name in ("read", "readinto"):
                    break
                time.sleep(0.01)
            signal.pthread_kill(pushing, signal.SIGINT)
            time.sleep(0.2)

    pushing = threading.get_ident()
    hub.before = meanwhile
    words = ["export", str(export.run), str(export.out), "--to", "hub", "--set", f"judge={helpers.JUDGE}"]
    assert main([*words, "--repo", NAME]) == 130
    assert "run the same command to go on" in capsys.readouterr().err
