"""Bad input, in every way of `export`: one line and its exit code, nothing written, nothing of the user's touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gtqlora.cli.app import main
from tests import helpers, models
from tests.chaos import kills, scenes
from tests.chaos.test_doors import rewritten

WAYS = {name: words for name, words in scenes.EXPORTS.items() if scenes.is_here(words) and name != "export link"}
FORMATS = {name: words for name, words in WAYS.items() if name in ("export", "export peft", "export gguf")}
"""One way of a kind, for what is looked at before the format's own work."""
JUDGED = ("--set", f"judge={helpers.JUDGE}")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model in several shards, pairs, a run that may be exported, and a GGUF of the base; `trial` is their place."""
    folder = tmp_path_factory.mktemp("bad")
    trial = folder / "trial"
    trial.mkdir()
    here = Path.cwd()
    os.chdir(trial)
    scenes.first_folder(trial)
    shutil.rmtree(trial / "model")
    changes = {"num_hidden_layers": 2, "mlp_only_layers": []}
    models.save_tiny(trial / "model", "qwen3_moe", max_shard_size="100KB", **changes)
    export = next(scene for scene in scenes.scenes() if scene.name == "export")
    for command in (*export.made_by, scenes.BASE_GGUF):
        scenes.in_process(command)
    shutil.copytree(trial, folder / "before")
    yield folder / "before"
    os.chdir(here)


@pytest.fixture
def trial(before: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it was, as the working directory."""
    place = before.with_name("trial")
    monkeypatch.chdir(before)
    shutil.rmtree(place)
    shutil.copytree(before, place)
    monkeypatch.chdir(place)
    return place


def refused(
    capsys: pytest.CaptureFixture[str],
    code: int,
    *said: str,
    out: str = "out",
    ways: Mapping[str, tuple[str, ...]] = FORMATS,
) -> None:
    """Each of these ways of export ends with this code and one line that says this; everything stays as it is."""
    everything = tuple(path.name for path in Path.cwd().iterdir())
    old = scenes.contents(Path.cwd(), everything)
    for name, words in ways.items():
        assert main(["export", "run", out, *words, *JUDGED]) == code, (name, capsys.readouterr().err)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and all(text in lines[0] for text in said), (name, lines)
        assert kills.left_over(Path.cwd()) == [], name
        assert tuple(path.name for path in Path.cwd().iterdir()) == everything, name
        assert scenes.contents(Path.cwd(), everything) == old, name


def test_what_the_refusals_start_from_is_exported(trial: Path) -> None:
    assert len(list((trial / "model").glob("*.safetensors"))) > 2
    assert main(["export", "run", "out", *JUDGED]) == 0


# --- the verdict -----------------------------------------------------------------------------------------------------


def test_no_verdict(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.edit_json(trial / "run" / "manifest.json", lambda old: {**old, "stages": {"train": old["stages"]["train"]}})
    refused(capsys, 4, "verify did not finish")
    (trial / "run" / "verdict.json").unlink()
    refused(capsys, 2, "no verdict.json", "gtqlora verify")


def test_a_failed_verdict(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(trial / "run", lambda row: {**row, "text_after": row["rejected"]})
    refused(capsys, 4, "the safety floor's verdict is 'fail'", "no weights are written")


def test_a_stale_verdict(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an edit that is another one by now."""
    weights = trial / "run" / "adapter" / "edit.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(capsys, 4, "the adapter is not the one that was verified")


def test_a_verdict_of_another_form(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify = next(scene for scene in scenes.scenes() if scene.name == "verify").command
    scenes.in_process((*verify, "--set", "dtype=bfloat16"))
    refused(capsys, 4, "verified in bfloat16")


# --- the model -------------------------------------------------------------------------------------------------------


def _shards() -> list[Path]:
    return sorted(Path("model").glob("*.safetensors"))


def _edited() -> tuple[Path, str]:
    """A shard, and the name of a tensor in it that the edit changes."""
    return next((s, n) for s in _shards() for n in load_file(s) if n.endswith("layers.1.self_attn.o_proj.weight"))


def _another() -> str:
    shard, name = _edited()
    models.edit_tensors(shard, lambda old: {**old, name: old[name] + 0.5})
    return ""


def _missing_tensor() -> str:
    shard, name = _edited()
    models.edit_tensors(shard, lambda old: {key: value for key, value in old.items() if key != name})
    return name


def _in_two_shards() -> str:
    shard, name = _edited()
    tensor = load_file(shard)[name]
    models.edit_tensors(next(s for s in _shards() if s != shard), lambda old: {**old, name: tensor})
    return name


def _missing_shard() -> str:
    shard, _ = _edited()
    shard.unlink()
    return shard.name


def _truncated() -> str:
    shard, _ = _edited()
    os.truncate(shard, shard.stat().st_size - 4)
    return shard.name


def _no_number() -> str:
    shard, name = _edited()
    models.edit_tensors(shard, lambda old: {**old, name: torch.full_like(old[name], float("nan"))})
    return ""


def _index_leading_out() -> str:
    shard, _ = _edited()
    shutil.copyfile(shard, f"run/{shard.name}")
    index = Path("model") / "model.safetensors.index.json"
    models.edit_json(
        index,
        lambda old: {
            **old,
            "weight_map": {k: f"../run/{v}" if v == shard.name else v for k, v in old["weight_map"].items()},
        },
    )
    return "points outside the model folder"


def _link_leading_out() -> str:
    shard, _ = _edited()
    shutil.move(shard, f"run/{shard.name}")
    shard.symlink_to(f"../run/{shard.name}")
    return "a link that leads out of the model folder"


def _pipe() -> str:
    (Path("model") / "config.json").unlink()
    os.mkfifo(Path("model") / "config.json")
    return "config.json"


@pytest.mark.parametrize(
    "spoil",
    [_in_two_shards, _missing_shard, _truncated, _index_leading_out, _link_leading_out, _pipe],
    ids=lambda spoil: spoil.__name__,
)
def test_a_model_that_is_not_in_order(
    trial: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[], str]
) -> None:
    refused(capsys, 2, spoil(), ways=WAYS)


@pytest.mark.parametrize("spoil", [_another, _no_number, _missing_tensor], ids=lambda spoil: spoil.__name__)
def test_another_model(trial: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[], str]) -> None:
    spoil()
    everything = tuple(path.name for path in trial.iterdir())
    old = scenes.contents(trial, everything)
    for name, words in WAYS.items():
        # whoever reads the tensors sees that they do not fit; else it is seen that they are not what was verified
        assert main(["export", "run", "out", *words, *JUDGED]) in (2, 4), name
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, (name, lines)
        assert scenes.contents(trial, everything) == old and kills.left_over(trial) == [], name


# --- the destination -------------------------------------------------------------------------------------------------


def test_a_destination_that_is_there(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trial / "mine").mkdir()
    (trial / "mine" / "file").write_text("precious")
    (trial / "nowhere").symlink_to("gone")
    for out in ("mine", "pairs.jsonl", "nowhere"):
        refused(capsys, 2, out, "exists already", out=out)


def test_a_destination_that_cannot_be(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out, said in (
        ("run/adapter/out", "choose another folder"),
        ("pairs.jsonl/out", "pairs.jsonl"),
        ("/proc/out", "out"),
    ):
        refused(capsys, 2, said, out=out)


def test_a_destination_that_may_not_be_written(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (trial / "closed").mkdir(mode=0o500)
    refused(capsys, 2, "closed", out="closed/out")
