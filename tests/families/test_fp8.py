"""Checkpoints in FP8: opened dequantized, changed in their blocks, and what was judged is what is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gtqlora.edits.merging import LowRank
from gtqlora.errors import ModelError, RunError
from gtqlora.families import fp8, identify, load_model
from gtqlora.families.copying import copy_changed
from gtqlora.results.adapter import PROJECTION
from tests import helpers, models
from tests.helpers import exported

SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KV_A, O_PROJ = (f"model.layers.1.self_attn.{name}.weight" for name in ("kv_a_proj_with_mqa", "o_proj"))
NORMAL = torch.Generator().manual_seed(0)


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What DeepSeek-V3 has in FP8: every matrix of its layers but the routers."""
    found = dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim == 2 and ".layers." in name and not name.endswith(".gate.weight"):
            none = torch.full(fp8.scales_shape(tuple(weight.shape)), torch.inf)
            found[name], found[name + fp8.SCALES] = fp8.requantized(weight.float(), none)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger than a block, and in incomplete ones: 144 wide, as 576 rows of the released model are 4.5 blocks."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    models.save_tiny(folder, "deepseek_v3", dtype=torch.bfloat16, hidden_size=144, initializer_range=0.1)
    models.edit_tensors(folder / "model.safetensors", in_fp8)
    models.edit_json(folder / "config.json", lambda old: {**old, "quantization_config": SETTINGS})
    return folder


@pytest.fixture
def mine(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "mine"))


def test_blocks_are_dequantized_by_their_own_scales(model: Path) -> None:
    """By hand, a value at a time; and all that a loaded model has."""
    tensors = load_file(model / "model.safetensors")
    loaded = load_model(str(model))[1]
    for name in (KV_A, O_PROJ):
        weight, scales = tensors[name], tensors[name + fp8.SCALES]
        assert max(scales.shape) == 2 and weight.dtype == torch.float8_e4m3fn
        for row, column in ((0, 0), (weight.shape[0] - 1, weight.shape[1] - 1)):
            wanted = weight[row, column].float() * scales[row // 128, column // 128]
            assert loaded.get_parameter(name)[row, column] == wanted.bfloat16() != 0
    stem = "model.layers.1.mlp.experts"
    single = fp8.dequantized(*(tensors[f"{stem}.3.down_proj.weight{part}"] for part in ("", fp8.SCALES)))
    assert torch.equal(loaded.get_parameter(f"{stem}.down_proj")[3], single.bfloat16())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_requantizing_what_did_not_change_changes_nothing() -> None:
    weight, scales = fp8.requantized(torch.randn(300, 200, generator=NORMAL), torch.full((3, 2), torch.inf))
    again, scales_again = fp8.requantized(fp8.dequantized(weight, scales), scales)
    assert torch.equal(again.float(), weight.float()) and torch.equal(scales_again, scales)
    # one block that outgrows its scale gets another one, and the others keep theirs
    grown = fp8.dequantized(weight, scales)
    grown[150, 150] *= 1000
    large, scales_now = fp8.requantized(grown, scales)
    assert (scales_now != scales).nonzero().tolist() == [[1, 1]]
    assert fp8.dequantized(large, scales_now)[150, 150] == pytest.approx(float(grown[150, 150]), rel=0.04)
    assert torch.equal(large[:, :128].float(), weight[:, :128].float())


@pytest.mark.parametrize("overlay", [False, True])
def test_what_is_written_is_what_is_judged(model: Path, tmp_path: Path, overlay: bool) -> None:
    before = load_file(model / "model.safetensors")
    rows, columns = before[KV_A].shape
    change = LowRank(torch.randn(2, columns, generator=NORMAL), 0.05 * torch.randn(rows, 2, generator=NORMAL))
    copied = copy_changed(str(model), tmp_path / "out", {KV_A: change}, overlay=overlay)
    assert copied.digest == identify(str(model)).digest
    judged = fp8.changed(before[KV_A], before[KV_A + fp8.SCALES], change)
    assert torch.equal(load_model(str(tmp_path / "out"))[1].get_parameter(KV_A), judged.bfloat16())
    old = fp8.dequantized(before[KV_A], before[KV_A + fp8.SCALES])
    wanted = change(old)
    kept = 1 - float((judged - wanted).square().sum() / (wanted - old).square().sum())
    assert copied.changed[KV_A].kept == pytest.approx(kept, abs=1e-4) and 0.5 < kept < 1
    if not overlay:
        after = load_file(tmp_path / "out" / "model.safetensors")
        others = before.keys() - {KV_A, KV_A + fp8.SCALES}
        assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in others)


def test_an_edit_from_training_to_export(
    model: Path, toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path
) -> None:
    result = exported(verified(model), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == SETTINGS
    assert KV_A in result.kept and result.divergence == 0 and any("FP8" in note for note in result.notes)
    with pytest.raises(RunError, match="is in FP8"):
        exported(verified(model), tmp_path / "gguf", to="gguf")


def test_a_projection_is_refused(model: Path, toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds quantized"):
        exported(verified(model, PROJECTION), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_fp8_is_named(mine: Path) -> None:
    kept = load_file(mine / "model.safetensors")

    def refused(match: str) -> None:
        with pytest.raises(ModelError, match=match):
            load_model(str(mine))

    for change in (
        lambda old: {n: t for n, t in old.items() if n != KV_A + fp8.SCALES},
        lambda old: {**old, KV_A + fp8.SCALES: torch.ones(1, 1)},
    ):
        models.edit_tensors(mine / "model.safetensors", change)
        refused(f"{KV_A} is F8_E4M3, but has no {KV_A}_scale_inv")
        models.edit_tensors(mine / "model.safetensors", lambda _old: kept)
    models.edit_tensors(mine / "model.safetensors", lambda old: {**old, KV_A: old[KV_A].float()})
    refused(f"{KV_A}_scale_inv scales no F8_E4M3")
    for other in ({"weight_block_size": [64, 64]}, {"scale_fmt": "ue8m0"}, {"activation_scheme": "static"}):
        models.edit_json(mine / "config.json", lambda old: {**old, "quantization_config": {**SETTINGS, **other}})  # noqa: B023
        refused("is quantized")
