"""Code runs only if this call says so: what a file names is not imported, what the user named is remembered."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from gtqlora.cli import main
from gtqlora.config import TrainConfig, build
from gtqlora.errors import ConfigError
from gtqlora.judging import trust
from tests import helpers, models

CODE = "def refuses(text):\n    return len(text.split()) != 3\n"
TELLTALE = "from pathlib import Path\nPath({!r}).touch()\n" + CODE


class Judges:
    """A folder on the module path with a judge of the user's own, and one that shows when it was imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran = folder, folder / "RAN"
        (folder / "mine_judge.py").write_text(CODE)
        (folder / "evil_judge.py").write_text(TELLTALE.format(str(self.ran)))


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judges:
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in ("mine_judge", "evil_judge"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Judges(tmp_path / "modules")


@pytest.fixture
def run(toy: helpers.Toy, verified: Any, tmp_path: Path) -> Path:
    """Somebody's run, certified."""
    return Path(shutil.copytree(verified(toy.model("qwen3_moe")), tmp_path / "run"))


def names(run: Path, judge: str) -> None:
    """Let the run's adapter name a judge."""

    def change(info: dict[str, Any]) -> dict[str, Any]:
        info["details"]["config"]["judge"] = judge
        return info

    models.edit_json(run / "adapter" / "gtqlora.json", change)


EVIL = ["evil_judge:refuses", "evil_judge:no_such", "os:system", "builtins:exec", "subprocess:run", "posix:system"]
# no code, but it would be sent harmful prompts and a key
EVIL.append("chat:https://judge.example/v1#m")


@pytest.mark.parametrize("judge", EVIL)
def test_a_judge_that_an_adapter_names_is_not_imported(
    run: Path, judges: Judges, judge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names(run, judge)
    assert main(["verify", str(run)]) == 2
    said = capsys.readouterr().err
    assert f"--set judge={judge}" in said.replace("\n", " ") and "Traceback" not in said
    assert not judges.ran.exists() and "evil_judge" not in sys.modules


@pytest.mark.parametrize("judge", [*EVIL[:3], EVIL[-1]])
def test_a_judge_that_a_manifest_names_is_not_imported_by_export(
    run: Path, judges: Judges, judge: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        record = manifest["stages"]["verify"]
        record["config"]["judge"] = judge
        record["inputs"]["judge"] = trust.identity(judge)
        return manifest

    models.edit_json(run / "manifest.json", change)
    assert main(["export", str(run), str(tmp_path / "out")]) in (2, 4)
    assert not judges.ran.exists() and "evil_judge" not in sys.modules and not (tmp_path / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "[train]\n", "[verify]\n"])
def test_a_judge_that_a_recipe_names_is_not_imported(
    toy: helpers.Toy, judges: Judges, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'{place}judge = "evil_judge:refuses"\n')
    model, contrast = str(toy.model("qwen3_moe")), str(toy.contrast)
    for verb in ("train", "diagnose", "project"):
        if place in ("", f"[{verb}]\n"):
            call = [verb, model, "--contrast", contrast, "--run", str(tmp_path / "r"), "--config", str(recipe)]
            assert main(call) == 2
            assert "--set judge=evil_judge:refuses" in capsys.readouterr().err.replace("\n", " ")
    assert not judges.ran.exists()
    with pytest.raises(ConfigError, match="code runs only if this call says so"):
        build(TrainConfig, file=_top_level(tmp_path), model=model, contrast=contrast)


def _top_level(folder: Path) -> Path:
    (folder / "top.toml").write_text('judge = "evil_judge:refuses"\n')
    return folder / "top.toml"


def trained(toy: helpers.Toy, run: Path, judge: str) -> int:
    quick = {"max_new_tokens": 2, "steps": 2, "batch_size": 4, "rank": 4, "alpha": 8, "warmup": 0, "judge": judge}
    settings = [part for key, value in quick.items() for part in ("--set", f"{key}={value}")]
    model = str(toy.model("qwen3_moe"))
    return main(["train", model, "--contrast", str(toy.contrast), "--run", str(run), *settings])


VERIFY = ["--set", "margin=0.05", "--set", "ablation=0"]


def test_what_the_user_named_is_told_and_remembered_for_this_run_and_source_only(
    toy: helpers.Toy, judges: Judges, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, judge = tmp_path / "run", "mine_judge:refuses"
    assert trained(toy, run, judge) == 0
    assert f"imports {judges.folder / 'mine_judge.py'}" in capsys.readouterr().err.replace("\n", "")
    assert main(["verify", str(run), *VERIFY]) == 0
    assert f"imports {judges.folder / 'mine_judge.py'}" in capsys.readouterr().err.replace("\n", "")
    # a copy of the run elsewhere is another run
    shutil.copytree(run, tmp_path / "copy")
    assert main(["verify", str(tmp_path / "copy"), *VERIFY]) == 2
    assert main(["verify", str(tmp_path / "copy"), *VERIFY, "--set", f"judge={judge}"]) == 0
    # changed code is another judge, and its verdict is stale
    (judges.folder / "mine_judge.py").write_text(CODE + "\n# changed\n")
    capsys.readouterr()
    assert main(["verify", str(run), *VERIFY]) == 2
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "--set judge=mine_judge:refuses" in capsys.readouterr().err.replace("\n", " ")
    assert main(["export", str(run), str(tmp_path / "out"), "--set", f"judge={judge}"]) == 4
    assert "the judge is not the one" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_nothing_is_remembered_where_nothing_can_be(tmp_path: Path, judges: Judges, monkeypatch: Any) -> None:
    for place in (tmp_path / "modules" / "mine_judge.py", Path("/dev/null")):
        monkeypatch.setenv("XDG_STATE_HOME", str(place))
        trust.remember(tmp_path, "mine_judge:refuses")
        assert not trust.is_remembered(tmp_path, "mine_judge:refuses")


@pytest.mark.parametrize("text", ["[", "{}", "[1, null]", "null", "[" * 100_000])
def test_a_broken_memory_remembers_nothing(tmp_path: Path, judges: Judges, text: str) -> None:
    (tmp_path / "state" / "gtqlora").mkdir(parents=True)
    (tmp_path / "state" / "gtqlora" / "judges.json").write_text(text)
    assert not trust.is_remembered(tmp_path, "mine_judge:refuses")


def test_what_a_judge_imports_from_beside_it_is_part_of_it(judges: Judges) -> None:
    helper, package = judges.folder / "its_helper.py", judges.folder / "jp"
    (judges.folder / "single.py").write_text("import its_helper\n" + CODE)
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "j.py").write_text("from jp.h import n\n" + CODE)
    for judge, file in (("single:refuses", helper), ("jp.j:refuses", package / "h.py"), ("jp:x", package / "h.py")):
        file.write_text("n = 3\n")
        before = trust.identity(judge)
        file.write_text("n = 4\n")
        assert trust.identity(judge) != before


def test_a_source_is_found_without_importing(judges: Judges) -> None:
    (judges.folder / "pack").mkdir()
    (judges.folder / "pack" / "__init__.py").write_text(TELLTALE.format(str(judges.ran)))
    (judges.folder / "pack" / "judge.py").write_text(CODE)
    assert trust.source_of("pack.judge:refuses") == judges.folder / "pack" / "judge.py"
    assert trust.source_of("no_such_module:refuses") is None
    assert trust.source_of("pack.no.such:refuses") is None
    assert not judges.ran.exists()
    assert json.dumps(trust.identity("string:a|b")) == '"string:a|b"'


def test_export_takes_no_other_setting(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting in ("margin=0.05", "dtype=float16", "judges=x", "expert_format=nf4"):
        assert main(["export", str(run), str(tmp_path / "out"), "--set", setting]) == 2
        assert "only judge= can be set" in capsys.readouterr().err.replace("\n", " ")
