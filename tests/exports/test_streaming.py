"""Merged weights as they are written: in blocks, in their places or in an overlay, and nothing else touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gtqlora.capture import open_layer, open_subject
from gtqlora.certificate import certify
from gtqlora.config import ExportConfig, ModelConfig
from gtqlora.edits.merging import LowRank, Projected, Whole, merged
from gtqlora.errors import GtqloraError, ModelError, RunError
from gtqlora.exports.job import Job, kept_share
from gtqlora.exports.layerwise import validate
from gtqlora.families import identify, load_model, patching
from gtqlora.families.copying import copy_changed
from gtqlora.families.headers import extents, overlay_name, read_headers
from gtqlora.families.patching import Change
from gtqlora.run import Run, sha256_file
from gtqlora.storage import moving
from tests import helpers, models, warm
from tests.helpers import exported

Verified = Callable[..., Path]
GATE, O_PROJ = "model.layers.1.mlp.gate.weight", "model.layers.1.self_attn.o_proj.weight"
INDEX = "model.safetensors.index.json"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """As transformers reads them: of a tensor in two files, that of the one that sorts last."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def model(toy: helpers.Toy) -> Path:
    return toy.model("qwen3_moe", torch.bfloat16, max_shard_size="30KB")


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(model, tmp_path / "model"))


# --- in blocks -------------------------------------------------------------------------------------------------------

NORMAL = torch.Generator().manual_seed(0)
WEIGHT, STACK = torch.randn(37, 50, generator=NORMAL), torch.randn(3, 37, 50, generator=NORMAL)
LOW_RANK = LowRank(torch.randn(2, 50, generator=NORMAL), torch.randn(37, 2, generator=NORMAL))
WRITTEN, EMBEDDED = (torch.nn.functional.normalize(torch.randn(n, generator=NORMAL), dim=0) for n in (37, 50))
CHANGES = {
    "low rank": (WEIGHT, LOW_RANK, WEIGHT + LOW_RANK.b_DR @ LOW_RANK.a_RI),
    "whole": (WEIGHT, Whole(-WEIGHT), -WEIGHT),
    "projected": (WEIGHT, Projected(WRITTEN, False), WEIGHT - torch.outer(WRITTEN, WRITTEN @ WEIGHT)),
    "embedding": (WEIGHT, Projected(EMBEDDED, False, rows=True), WEIGHT - torch.outer(WEIGHT @ EMBEDDED, EMBEDDED)),
    "lengths kept": (STACK, Projected(WRITTEN, True), None),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [0, 2**20])
def test_blocks_on_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, at_once: int
) -> None:
    """Rows, columns and stacks of matrices cut into many blocks: the file is what is judged, and what was meant."""
    monkeypatch.setattr(patching, "_BLOCK", 200)
    monkeypatch.setattr(patching, "_STEP", 4)
    monkeypatch.setattr(patching, "_MATRIX", at_once)
    weight, change, wanted = CHANGES[name]
    weight = weight.to(dtype)
    assert len(list(patching.blocks(tuple(weight.shape), by_columns=change.by_columns))) > 6
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "x": weight, "z": torch.ones(5)}, file)
    before, extent = file.read_bytes(), extents(file)["x"]
    with file.open("rb") as read, file.open("r+b") as write:
        tally = patching.patch("x", extent, change, read.fileno(), write.fileno(), extent.start)
    after = file.read_bytes()
    assert before[: extent.start] == after[: extent.start] and before[extent.stop :] == after[extent.stop :]
    found = load_file(file)["x"]
    assert torch.equal(found, merged(weight, change)) and tally.values == int((found != weight).sum()) > 1000
    if wanted is not None and dtype == torch.float32:
        torch.testing.assert_close(found, wanted)
    if name == "lengths kept":
        torch.testing.assert_close(found.float().norm(dim=1), weight.float().norm(dim=1), rtol=1e-2, atol=0)
    whole = torch.stack([change(part.float()) for part in weight.reshape(-1, 37, 50)]).reshape(weight.shape)
    assert tally.kept == pytest.approx(kept_share(weight.float(), whole, found.float()), abs=1e-4)


# --- in their places -------------------------------------------------------------------------------------------------


def test_only_the_changed_bytes_are_others(model: Path, verified: Verified, tmp_path: Path) -> None:
    result = exported(verified(model), tmp_path / "out")
    old, new, touched = tensors_of(model), tensors_of(tmp_path / "out"), 0
    for file in sorted(model.glob("*.safetensors")):
        before, after = bytearray(file.read_bytes()), (tmp_path / "out" / file.name).read_bytes()
        for name, extent in extents(file).items():
            if name in result.kept:
                before[extent.start : extent.stop] = after[extent.start : extent.stop]
                touched += not torch.equal(old[name], new[name])
        assert before == after
    assert touched > 5
    assert all(0.5 < share <= 1 for share in result.kept.values()) and len(result.kept) == result.tensors_changed


def test_a_copy_without_the_kernel_is_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot, at once or after some bytes, this process copies the rest."""
    call, calls = os.copy_file_range, 0

    def fails_later(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise OSError(18, "Invalid cross-device link")
        return call(arguments[0], arguments[1], 1000, *arguments[3:])

    monkeypatch.setattr(os, "copy_file_range", fails_later)
    copy_changed(str(model), tmp_path / "out", {})
    assert calls > 4
    for file in model.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_linked_files_are_the_bases_and_changed_ones_are_not(model: Path, verified: Verified, tmp_path: Path) -> None:
    out, hashes = tmp_path / "out", {file.name: sha256_file(file) for file in model.iterdir()}
    run = verified(model)
    # of this edit every shard changes, but for some: nothing of those may be written to
    result = exported(run, out, link=True)
    same = {file.name for file in model.glob("*.safetensors") if os.path.samefile(file, out / file.name)}
    changed = {file.name for file in model.glob("*.safetensors") if extents(file).keys() & result.kept.keys()}
    assert not same & changed and changed
    if not moving._reflink(model / "config.json", tmp_path / "probe"):
        assert same == {file.name for file in model.glob("*.safetensors")} - changed != set()
        assert f"{len(same)} weight files are hard links" in " ".join(result.notes)
        assert f"{len(same)} weight files are hard links" in (out / "export.json").read_text()
    assert {file.name: sha256_file(file) for file in model.iterdir()} == hashes
    facts = json.loads((out / "export.json").read_text())
    assert facts["files"] == {name: sha256_file(out / name) for name in facts["files"]}


def test_a_change_that_rounding_eats_is_told(model: Path, tmp_path: Path) -> None:
    small = LowRank(torch.full((1, 32), 1e-3), torch.full((32, 1), 1e-3))
    copied = copy_changed(str(model), tmp_path / "out", {O_PROJ: small})
    assert copied.changed[O_PROJ].kept < 0.5


# --- an overlay ------------------------------------------------------------------------------------------------------

LOAD = """
import sys
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    state = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, f"{sys.argv[1]}/{folder.rpartition('/')[2]}.loaded")
"""


def in_fresh_transformers(place: Path, *folders: Path) -> list[dict[str, Tensor]]:
    """What transformers loads where gtqlora was never imported."""
    done = warm.process(LOAD, place, *folders)
    assert done.returncode == 0, done.stderr
    return [load_file(place / f"{folder.name}.loaded") for folder in folders]


def in_plain_transformers(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_overlay_is_the_merged_model(model: Path, verified: Verified, tmp_path: Path) -> None:
    run = verified(model)
    whole, over = exported(run, tmp_path / "whole"), exported(run, tmp_path / "over", overlay=True)
    assert over.kept == whole.kept and over.gate_values_changed == whole.gate_values_changed
    (extra,) = {p.name for p in over.folder.glob("*.safetensors")} - {p.name for p in model.glob("*.safetensors")}
    assert extra == max(p.name for p in over.folder.glob("*.safetensors"))
    bytes_changed = sum(tensors_of(model)[name].nbytes for name in over.kept)
    header = min(extent.start for extent in extents(over.folder / extra).values())
    assert (over.folder / extra).stat().st_size == bytes_changed + header
    loaded, merged, base = in_fresh_transformers(tmp_path, over.folder, whole.folder, model)
    assert same(loaded, merged) and not same(loaded, base)
    assert same(loaded, open_raw(over.folder))


def open_raw(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in load_model(str(folder))[1].state_dict().items()}


def test_of_two_files_the_one_that_sorts_last_counts(model: Path, tmp_path: Path) -> None:
    """What an overlay's name is for. Under another one the edit would be lost in silence, so that is refused."""
    half = {O_PROJ: Whole(tensors_of(model)[O_PROJ] / 2)}
    copy_changed(str(model), tmp_path / "out", half, overlay=True)
    assert torch.equal(in_plain_transformers(tmp_path / "out")[O_PROJ], half[O_PROJ].value)
    assert torch.equal(open_raw(tmp_path / "out")[O_PROJ], half[O_PROJ].value)
    (tmp_path / "out" / "zz-overlay-01.safetensors").rename(tmp_path / "out" / "aa-overlay-01.safetensors")
    index = (tmp_path / "out" / INDEX).read_text().replace("zz-overlay", "aa-overlay")
    (tmp_path / "out" / INDEX).write_text(index)
    assert torch.equal(in_plain_transformers(tmp_path / "out")[O_PROJ], tensors_of(model)[O_PROJ])
    with pytest.raises(ModelError, match=r"is in .* and in .*; remove one"):
        load_model(str(tmp_path / "out"))


def test_an_index_that_looks_past_the_overlay_is_refused(model: Path, tmp_path: Path) -> None:
    copy_changed(str(model), tmp_path / "out", {O_PROJ: Whole(tensors_of(model)[O_PROJ] / 2)}, overlay=True)
    shutil.copy(model / INDEX, tmp_path / "out" / INDEX)
    mapped = json.loads((model / INDEX).read_text())["weight_map"]
    read_headers(tmp_path / "out", sorted(set(mapped.values())), mapped)  # the base, in which no overlay is named
    models.edit_json(
        tmp_path / "out" / INDEX,
        lambda old: {**old, "weight_map": {**old["weight_map"], GATE: "zz-overlay-01.safetensors"}},
    )
    with pytest.raises(ModelError, match="the index puts tensor"):
        load_model(str(tmp_path / "out"))


def test_an_overlay_is_a_model_like_any_other(
    model: Path, toy: helpers.Toy, verified: Verified, tmp_path: Path
) -> None:
    """Verified and exported again, in its places and under one more overlay; its identity covers all of its files."""
    first = exported(verified(model), tmp_path / "first", overlay=True).folder
    assert {p.name for p in first.glob("*.safetensors")} <= identify(str(first)).files.keys()
    run = helpers.verified_run(toy, first, "gt-qlora", tmp_path / "run")
    whole, over = exported(run, tmp_path / "whole").folder, exported(run, tmp_path / "over", overlay=True).folder
    assert (over / "zz-overlay-02.safetensors").exists()
    assert same(open_raw(whole), open_raw(over)) and not same(open_raw(whole), open_raw(first))
    assert same(open_raw(over), in_plain_transformers(over))


def test_an_overlay_of_a_single_file(toy: helpers.Toy, tmp_path: Path) -> None:
    """Loaders look for `model.safetensors` first, so that name has to go."""
    model = toy.model("qwen3_moe", torch.bfloat16)
    half = {O_PROJ: Whole(tensors_of(model)[O_PROJ] / 2), GATE: Whole(tensors_of(model)[GATE] + 1)}
    copied = copy_changed(str(model), tmp_path / "out", half, overlay=True, share=True)
    assert copied.digest == identify(str(model)).digest
    assert not (tmp_path / "out" / "model.safetensors").exists()
    found = in_plain_transformers(tmp_path / "out")
    assert same({**open_raw(model), **{name: change.value for name, change in half.items()}}, found)
    size = sum(tensor.nbytes for tensor in tensors_of(model).values())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == size


@pytest.mark.parametrize("taken", ["model-1.safetensors", "zz.safetensors", "zzz-overlay.safetensors", "~.safetensors"])
def test_an_overlays_name_sorts_last(taken: str) -> None:
    if taken.startswith("~"):
        with pytest.raises(ModelError, match="sorts after"):
            overlay_name([taken])
        return
    first = overlay_name([taken])
    assert taken < first < overlay_name([taken, first])


# --- layer by layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*models.CORE, *models.OTHERS])
def test_layers_one_after_the_other_are_the_model(toy: helpers.Toy, family: str) -> None:
    """Each is loaded alone, and together they compute what the model does, padding, masks and all."""
    model = toy.model(family, torch.float32, max_shard_size="30KB")
    whole, ids = open_subject(str(model)), models.some_tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
    parameters, last = 0, models.LAYERS - 1
    with torch.no_grad():
        wanted, states = whole.model(input_ids=ids, **given).logits, None
        for index in range(models.LAYERS):
            layer = open_layer(ModelConfig(model=str(model)), whole.anatomy, whole.tokenizer, index).model
            parameters += sum(p.numel() for p in layer.parameters())
            given["inputs_embeds" if index else "input_ids"] = states if index else ids
            given.pop("input_ids" if index else "", None)
            states = layer(**given).logits if index == last else layer.model(**given).last_hidden_state
    assert parameters == sum(p.numel() for p in whole.model.parameters())
    assert states is not None and torch.equal(states[mask.bool()], wanted[mask.bool()])


def test_one_flipped_bit_is_caught(model: Path, verified: Verified, tmp_path: Path) -> None:
    """The smallest bit of a changed weight, which no behaviour would show, and one of a weight that nothing changed."""
    with Run(verified(model)) as run:
        job = Job.of(certify(run, helpers.JUDGE), ExportConfig())
    copy_changed(str(model), tmp_path / "out", job.edits)
    assert validate(tmp_path / "out", job) == 0
    for name in (O_PROJ, "model.layers.2.mlp.experts.3.up_proj.weight"):
        (file,) = [f for f in (tmp_path / "out").glob("*.safetensors") if name in extents(f)]
        data = bytearray(file.read_bytes())
        data[extents(file)[name].start] ^= 1
        file.write_bytes(data)
        with pytest.raises(RunError, match="not those of the edit that was verified"):
            validate(tmp_path / "out", job)
        data[extents(file)[name].start] ^= 1
        file.write_bytes(data)


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(source: Path, out: Path, changes: dict[str, Change], match: str, error: type[GtqloraError]) -> None:
    """Nothing is written but what was planned, and nothing is planned that is not in order."""
    with pytest.raises(error, match=match) as caught:
        copy_changed(str(source), out, changes)
    assert "\n" not in str(caught.value) and not out.exists()


def test_what_is_not_there_or_does_not_fit(mine: Path, tmp_path: Path) -> None:
    gate = {GATE: Whole(tensors_of(mine)[GATE])}
    refused(mine, tmp_path / "o", {**gate, "x.weight": LOW_RANK}, r"1 edited tensors .* e\.g\. x\.weight", RunError)
    for wrong in (LOW_RANK, Whole(WEIGHT), Projected(WRITTEN, False)):
        refused(mine, tmp_path / "o", {GATE: wrong}, f"tensor {GATE}: the adapter does not fit", RunError)


def test_a_tensor_in_two_files(mine: Path, tmp_path: Path) -> None:
    home = next(f for f in mine.glob("*.safetensors") if GATE in extents(f))
    other = max(f for f in mine.glob("*.safetensors") if f != home)
    models.edit_tensors(other, lambda old: {**old, GATE: torch.zeros(8, 32)})
    refused(mine, tmp_path / "o", {GATE: Whole(torch.zeros(8, 32))}, f"tensor {GATE} is in .*; remove one", ModelError)


def test_a_file_cut_short(mine: Path, tmp_path: Path) -> None:
    file = max(mine.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)
    refused(mine, tmp_path / "o", {}, f"{file.name}: corrupt or cut short", ModelError)


def test_an_index_that_leads_out_and_links(mine: Path, tmp_path: Path) -> None:
    kept = (mine / INDEX).read_text()
    models.edit_json(mine / INDEX, lambda old: {**old, "weight_map": {**old["weight_map"], GATE: "../x.safetensors"}})
    refused(mine, tmp_path / "o", {}, "points outside the model folder", ModelError)
    (mine / INDEX).write_text(kept)
    file = max(mine.glob("*.safetensors"))
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(mine, tmp_path / "o", {}, "a link that leads out of the model folder", ModelError)


def test_a_quantized_tensor(mine: Path, tmp_path: Path) -> None:
    file = next(f for f in mine.glob("*.safetensors") if O_PROJ in extents(f))
    models.edit_tensors(file, lambda old: {**old, O_PROJ: old[O_PROJ].to(torch.float8_e4m3fn)})
    refused(mine, tmp_path / "o", {O_PROJ: Whole(torch.zeros(32, 32))}, f"tensor {O_PROJ} is F8_E4M3", ModelError)


def test_values_that_are_none(model: Path, toy: helpers.Toy, tmp_path: Path) -> None:
    """NaN in the edit, and what the checkpoint's type is too narrow for; `export` drops what was begun."""
    half = toy.model("qwen3_moe", torch.float16, max_shard_size="30KB")
    for source, value in ((model, float("nan")), (half, 1e5)):
        with pytest.raises(RunError, match=f"tensor {GATE} would hold NaN or infinity"):
            copy_changed(str(source), tmp_path / source.name, {GATE: Whole(torch.full((8, 32), value))})


def test_a_base_that_changes_meanwhile(mine: Path, tmp_path: Path) -> None:
    """Also through a hard link, which is made first and is the very file."""

    class Meddling(Whole):
        def __call__(self, weight_NK: Tensor, part: slice = slice(None)) -> Tensor:
            file = next(f for f in mine.glob("*.safetensors") if GATE in extents(f))
            os.utime(file)
            return super().__call__(weight_NK, part)

    for overlay in (False, True):
        meddling = {GATE: Meddling(torch.zeros(8, 32))}
        with pytest.raises(ModelError, match="was changed while it was copied"):
            copy_changed(str(mine), tmp_path / f"{overlay}", meddling, share=overlay, overlay=overlay)
        copy_changed(str(mine), tmp_path / f"{overlay} undisturbed", {}, share=overlay, overlay=False)


def test_destinations_that_cannot_be(verified: Verified, model: Path, tmp_path: Path) -> None:
    run, place = verified(model), tmp_path / "place"
    place.mkdir()
    (place / "taken").symlink_to("nowhere")
    with pytest.raises(RunError, match="exists already"):
        exported(run, place / "taken", overlay=True)
    assert [p.name for p in place.iterdir()] == ["taken"]
