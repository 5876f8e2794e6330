"""A model's identity: the contents of what is read, and of nothing else; links that lead out are errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gtqlora.errors import ModelError
from gtqlora.families import identify, load_config, load_model, load_tokenizer, pinned, read_files
from gtqlora.families.files import checked_file
from tests import models

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny(tmp_path_factory.mktemp("model") / "m", "qwen3_moe", max_shard_size="60KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "m"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def in_folder(folder: Path, name: str) -> None:
    """Move all shards into a folder of the model folder, and the index with them."""
    (folder / name).mkdir()
    for shard in shards(folder):
        shard.rename(folder / name / shard.name)
    models.edit_json(
        folder / "model.safetensors.index.json",
        lambda old: {**old, "weight_map": {k: f"{name}/{v}" for k, v in old["weight_map"].items()}},
    )


# --- what counts -----------------------------------------------------------------------------------------------------


def test_identity_is_that_of_the_bytes_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    for file in copy.rglob("*"):
        os.utime(file, (1, 1))
    first, second = identify(str(folder)), identify(str(copy))
    assert first.digest == second.digest and first.files == second.files
    assert first.model == str(folder) and first.revision is None and second.folder == copy


@pytest.mark.parametrize(
    "name",
    ["README.md", "LICENSE", "runs/edit/manifest.json", ".cache/huggingface/x", "notes.txt", "modeling_x.py", "x.bin"],
)
def test_what_is_not_read_does_not_count(folder: Path, name: str) -> None:
    before = identify(str(folder)).digest
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    assert identify(str(folder)).digest == before


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_every_small_file_that_is_read_counts(folder: Path, name: str) -> None:
    before = identify(str(folder)).digest
    (folder / name).write_text((folder / name).read_text() + " ")
    assert identify(str(folder)).digest != before


@pytest.mark.parametrize("name", [".w", "w", "a b/ü"])
def test_one_bit_of_a_shard_counts_wherever_the_index_finds_it(folder: Path, name: str) -> None:
    if "/" in name:
        (folder / name).parent.mkdir()
    in_folder(folder, name)
    load_model(str(folder))
    before = identify(str(folder)).digest
    shard = sorted((folder / name).glob("*.safetensors"))[1]
    bytes_, times = bytearray(shard.read_bytes()), shard.stat()
    bytes_[-1] ^= 1
    shard.write_bytes(bytes_)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identify(str(folder)).digest != before


def test_read_files_are_those_of_the_folder(folder: Path) -> None:
    found, names = read_files(str(folder))
    (folder / "README.md").write_text("not read")
    assert found == folder and set(names) == {file.name for file in folder.iterdir()} - {"README.md"}


# --- names -----------------------------------------------------------------------------------------------------------


def test_home_and_relative_paths_mean_the_same_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    assert pinned("~/m") == pinned("m") == pinned("./m") == str(folder)
    assert load_config("~/m")[0].model_type == "qwen3_moe"
    with pytest.raises(ModelError, match="no such home"):
        load_config("~nobody-of-this-name/m")


def hub(cache: Path, commit: str, folder: Path) -> Path:
    """A hub cache with one revision of acme/toy, `main` pointing at it; files are links to blobs, as there."""
    root = cache / "models--acme--toy"
    snapshot = root / "snapshots" / commit
    for part in (root / "refs", root / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = root / "blobs" / f"{commit[0]}-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (root / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_pinned_hub_id_stays_what_it_was_when_main_moves(cache: Path, folder: Path, tmp_path: Path) -> None:
    hub(cache, COMMIT, folder)
    before = identify("acme/toy")
    assert before.model == f"acme/toy@{COMMIT}" and before.revision == COMMIT
    assert before.digest == identify(str(folder)).digest
    other = models.save_tiny(tmp_path / "other", "qwen3_moe", seed=5)
    hub(cache, "b" * 40, other)
    assert identify(before.model) == before
    assert identify("acme/toy").digest == identify("acme/toy@main").digest == identify(str(other)).digest
    load_model(before.model)
    load_tokenizer(before.model)


@pytest.mark.parametrize("revision", ["c" * 40, "no-such-branch", "../../refs/main", "", "a b"])
def test_a_revision_that_is_not_there(cache: Path, folder: Path, revision: str) -> None:
    hub(cache, COMMIT, folder)
    with pytest.raises(ModelError, match="acme/toy@"):
        load_config(f"acme/toy@{revision}")


# --- links and special files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "README.md", "notes.txt", "merges.txt"]
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_that_leads_out_is_an_error(folder: Path, tmp_path: Path, name: str, exists: bool) -> None:
    secret = tmp_path / "secret"
    if exists:
        secret.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    for load in (load_model, load_tokenizer, identify):
        with pytest.raises(ModelError, match=f"{name}: a link that leads out .* {secret}"):
            load(str(folder))


def shard_linked(folder: Path, outside: Path) -> None:
    shard = shards(folder)[0]
    shard.rename(outside)
    shard.symlink_to(outside)


def folder_linked(folder: Path, outside: Path) -> None:
    in_folder(folder, "w")
    (folder / "w").rename(outside)
    (folder / "w").symlink_to(outside, target_is_directory=True)


def chain_linked(folder: Path, outside: Path) -> None:
    shard_linked(folder, outside)
    linked = next(file for file in folder.iterdir() if file.is_symlink())
    linked.rename(folder / "hop")
    linked.symlink_to("hop")


@pytest.mark.parametrize("spoil", [shard_linked, folder_linked, chain_linked])
def test_a_shard_outside_is_an_error(folder: Path, tmp_path: Path, spoil: Callable[[Path, Path], None]) -> None:
    spoil(folder, tmp_path / "outside")
    for load in (load_model, identify):
        with pytest.raises(ModelError, match=f"a link that leads out .*{tmp_path / 'outside'}"):
            load(str(folder))


def test_links_inside_the_folder_and_of_the_folder_are_in_order(folder: Path, tmp_path: Path) -> None:
    (folder / "real").mkdir()
    (folder / "config.json").rename(folder / "real" / "c")
    (folder / "config.json").symlink_to("real/c")
    (tmp_path / "linked").symlink_to(folder)
    assert identify(str(tmp_path / "linked")).files == identify(str(folder)).files
    load_model(str(tmp_path / "linked"))


def test_a_hub_layout_gives_no_way_out_of_its_blobs(cache: Path, folder: Path, tmp_path: Path) -> None:
    snapshot = hub(cache, COMMIT, folder)
    blob = (snapshot / "config.json").resolve()
    blob.rename(tmp_path / "outside")
    blob.symlink_to(tmp_path / "outside")
    with pytest.raises(ModelError, match="leads out"):
        identify(str(snapshot))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "null", "loop"])
def test_what_is_no_ordinary_file_is_refused_unopened(folder: Path, name: str, kind: str) -> None:
    file = folder / name
    file.unlink()
    {
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "null": lambda: file.symlink_to("/dev/null"),
        "loop": lambda: file.symlink_to(file),
    }[kind]()
    for load in (load_model, identify):
        with pytest.raises(ModelError, match=name):
            load(str(folder))


def test_a_pipe_as_the_model_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ModelError, match="not an ordinary file"):
        load_config(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a/../../x", "C:x", "\\x", "..", "", "a\0b"])
def test_a_name_that_leads_out_is_no_file(folder: Path, name: str) -> None:
    with pytest.raises(ModelError):
        checked_file(folder, name)
