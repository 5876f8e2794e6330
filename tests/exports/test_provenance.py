"""Whether a folder, or one file of it, is what was certified: years later, without the run and without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gtqlora.cli.app import main
from gtqlora.errors import RunError
from gtqlora.exports.provenance import check
from gtqlora.results.export import read_export
from gtqlora.run import Run, sha256_file
from gtqlora.stages.publish import provenance
from tests import helpers, models
from tests.exports.conftest import Export

OLD = Path(__file__).parents[1] / "data" / "export_0_1_0.json"


def problems(place: Path) -> str:
    return "; ".join(check(place).problems)


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("*.safetensors"))


def test_what_was_exported_is_what_was_certified(export: Export) -> None:
    found = check(export.out)
    assert found.certified and found.whole and len(shards(export.out)) > 3
    written = {path.name for path in export.out.iterdir()} - {"export.json"}
    assert {file.name for file in found.files} == written
    assert {file.name for file in found.files if file.state != "as recorded"} == {"README.md"}
    assert set(read_export(export.out).files) == written - {"README.md"}


def test_the_hub_s_own_files_and_what_is_for_people_change_nothing(export: Export) -> None:
    (export.out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (export.out / ".cache" / "huggingface").mkdir(parents=True)
    (export.out / ".cache" / "huggingface" / "x.metadata").write_text("x")
    (export.out / "README.md").write_text("in other words")
    (export.out / "plot.png").write_bytes(b"png")
    (export.out / "LICENSE").write_text("free")
    assert check(export.out).certified


def _one_byte(out: Path) -> str:
    data = bytearray(shards(out)[1].read_bytes())
    data[-1] ^= 1
    shards(out)[1].write_bytes(data)
    return f"{shards(out)[1].name} is not what was certified"


def _gone(out: Path) -> str:
    name = shards(out)[0].name
    shards(out)[0].unlink()
    return f"{name} is missing"


def _cut(out: Path) -> str:
    os.truncate(shards(out)[0], 100)
    return f"{shards(out)[0].name} is not what was certified"


def _renamed(out: Path) -> str:
    shard = shards(out)[0]
    shard.rename(out / "model-zzz.safetensors")
    return f"model-zzz.safetensors was {shard.name}"


def _added(name: str) -> Callable[[Path], str]:
    def add(out: Path) -> str:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(shards(out)[0], out / name)
        return f"{name} is not in the record"

    return add


def _template(out: Path) -> str:
    (out / "chat_template.jinja").write_text("{{ 'You obey.' }}")
    return "chat_template.jinja is not what was certified"


def _link(out: Path) -> str:
    (out / "more").symlink_to(out.parent)
    return "more is not in the record"


def _pipe(out: Path) -> str:
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    return "config.json is not what was certified"


SPOILT = [_one_byte, _gone, _cut, _renamed, _template, _link, _pipe]
SPOILT += [
    _added(n) for n in ("model-zz.safetensors", "adapter_config.json", "pytorch_model.bin", "m.py", "sub/x.gguf")
]


@pytest.mark.parametrize("spoil", SPOILT, ids=range(len(SPOILT)))
def test_whatever_a_loader_might_read_otherwise_is_told(export: Export, spoil: Callable[[Path], str]) -> None:
    wanted = spoil(export.out)
    found = check(export.out)
    assert len(found.problems) == 1 and found.problems[0].startswith(wanted) and not found.certified


def test_what_is_no_export_is_told_apart_from_what_was_changed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no export\.json there; give a folder that `gtqlora export` wrote"):
        check(tmp_path)
    (tmp_path / "bitdelta.json").write_text("{}")
    with pytest.raises(RunError, match="bitdelta compress"):
        check(tmp_path)


def test_one_file_is_known_by_what_is_in_it(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shards(export.out)[0]
    assert check(shard).certified and not check(shard).whole
    other = shard.rename(export.out / "another name.safetensors")
    found = check(other)
    assert found.certified and (found.files[0].state, found.files[0].certified_as) == ("renamed", shard.name)
    monkeypatch.chdir(export.out)
    assert check(Path(other.name)).certified
    (export.out / "stranger.safetensors").write_bytes(b"none of these")
    assert "not among the certified files" in problems(export.out / "stranger.safetensors")
    for name in ("README.md", "export.json"):
        assert "check the folder" in problems(export.out / name)
    (export.out / "export.json").unlink()
    with pytest.raises(RunError, match=r"no export\.json in its folder"):
        check(other)


def test_a_whole_model_in_one_gguf_may_be_called_anything(export: Export) -> None:
    for path in export.out.iterdir():
        if path.name not in ("export.json", "README.md"):
            path.unlink()
    (export.out / "model.gguf").write_bytes(b"GGUF weights")
    digest = sha256_file(export.out / "model.gguf")
    _change(export.out, files={"model.gguf": digest})
    (export.out / "model.gguf").rename(export.out / "Mine-Q4_K_M.gguf")
    assert check(export.out).certified
    (export.out / "Mine-Q4_K_M.gguf").write_bytes(b"GGUF weightz")
    assert "model.gguf is missing" in problems(export.out)


# --- the record ------------------------------------------------------------------------------------------------------


def _change(out: Path, **changes: Any) -> None:
    models.edit_json(out / "export.json", lambda old: {**old, **changes})


def _floor(out: Path, **changes: Any) -> None:
    models.edit_json(out / "export.json", lambda old: {**old, "floor": {**old["floor"], **changes}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "fail"}, "the verdict of 'floor' is 'fail'"),
        ({"margin": 0.2}, "does not pass by its own numbers"),
        ({"level": 0.1}, "does not pass by its own numbers"),
        ({"effective": 60.0}, "does not follow from its counts"),
        ({"refused": 3}, "does not follow from its counts"),
        ({"losses": {"value": 0.01, "low": 0.0, "high": 0.0149, "n": 200}}, "does not follow from its counts"),
    ],
    ids=str,
)
def test_a_verdict_that_its_numbers_do_not_bear_out(export: Export, changes: dict[str, Any], message: str) -> None:
    _floor(export.out, **changes)
    assert message in problems(export.out)


def test_a_record_without_a_comparison_or_with_too_little_spent(export: Export) -> None:
    _change(export.out, divergence=None)
    assert "neither a verdict" in problems(export.out)
    _change(export.out, divergence=0.0, spent=0.0)
    assert "'spent' is 0" in problems(export.out)
    _change(export.out, files={}, spent=read_export(export.out).floor.losses.high)
    assert "lists no files" in problems(export.out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"floor": 3}', "{" * 100_000, '{"spent": NaN}'])
def test_a_record_that_is_none_is_one_line(export: Export, text: str) -> None:
    (export.out / "export.json").write_text(text)
    with pytest.raises(RunError, match=r"export\.json: "):
        check(export.out)


def test_a_record_of_an_older_version_is_read(tmp_path: Path) -> None:
    """Version 0.1.0 recorded hashes of weights and JSON only."""
    out = tmp_path / "out"
    out.mkdir()
    old = json.loads(OLD.read_text())
    for name in old["files"]:
        (out / name).write_text(name)
    old["files"] = {name: sha256_file(out / name) for name in old["files"]}
    (out / "export.json").write_text(json.dumps(old))
    assert check(out).certified and check(out).record.expert_format == "bf16"
    (out / "chat_template.jinja").write_text("whose?")
    assert "not in the record (of gtqlora 0.1.0)" in problems(out)


# --- the run ---------------------------------------------------------------------------------------------------------


def of_run(export: Export) -> str:
    with Run(export.run) as run:
        return "; ".join(provenance(run, export.out, judge=helpers.JUDGE).problems)


def test_the_run_knows_what_it_exported(export: Export, tmp_path: Path) -> None:
    assert of_run(export) == ""
    shutil.copytree(export.out, tmp_path / "elsewhere")
    assert of_run(Export(export.run, tmp_path / "elsewhere")) == ""


def test_a_folder_that_was_rewritten_with_its_record_is_seen_by_the_run(export: Export) -> None:
    shard = shards(export.out)[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    _change(export.out, files={**read_export(export.out).files, shard.name: sha256_file(shard)})
    assert check(export.out).certified  # there is no signature, and docs/threats.md says so
    assert "does not know this export.json" in of_run(export)


def test_a_run_that_would_not_export_any_more_says_so(export: Export) -> None:
    models.edit_json(export.run / "verdict.json", lambda old: {**old, "lost": {"answers": 9}})
    assert "verdict.json was changed since verify" in of_run(export)


def test_another_run_s_folder(export: Export) -> None:
    _change(export.out, adapter="another")
    assert "of another edit" in of_run(export)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_says_yes_and_no(export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--check", str(export.out)]) == 0
    said = capsys.readouterr().out
    assert "what was certified" in said and "as recorded" in said and "safety floor" in said
    (export.out / "m.py").write_text("1")
    assert main(["export", "--check", str(export.out), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["certified"] is False and len(found["problems"]) == 1
    assert {"name": "m.py", "state": "not recorded", "certified_as": None} in found["files"]


def test_the_command_line_asks_the_run_too(export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    judged = ["--set", f"judge={helpers.JUDGE}"]
    assert main(["export", str(export.run), "--check", str(export.out), *judged]) == 0
    (export.run / "exports.jsonl").unlink()
    assert main(["export", str(export.run), "--check", str(export.out), *judged]) == 1
    assert "does not know" in capsys.readouterr().out.replace("\n", " ")
    assert main(["export", str(export.run), "--check", str(export.out), "--repo", "a/b"]) == 2
    assert main(["export", str(export.run), "x", "--check", str(export.out)]) == 2
    assert main(["export", "--check", str(export.out / "nowhere")]) == 2


def test_a_check_needs_no_torch(export: Export) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom gtqlora.exports.provenance import check\n"
    code += "assert check(Path(sys.argv[1])).certified\nassert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, str(export.out)], check=True, cwd=helpers.ROOT / "src")
