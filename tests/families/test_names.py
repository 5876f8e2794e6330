"""Names on disk: every tensor of a checkpoint is traced to what it is in memory, in whichever layout it lies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from gtqlora.errors import ModelError
from gtqlora.families import FAMILIES, TensorNames, load_model
from gtqlora.families.names import Place
from gtqlora.stages.inspect import inspect
from tests import models

every_family = pytest.mark.parametrize("family", models.FAMILIES)
GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
ROUTER = "model.layers.1.mlp.gate.weight"


def on_disk(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def names_of(family: str, disk: list[str]) -> tuple[PreTrainedModel, TensorNames]:
    model = models.tiny_model(family)
    return model, TensorNames(model, FAMILIES[family], disk)


@every_family
def test_the_checkpoint_makes_every_tensor_of_the_model_and_no_other(tmp_path: Path, family: str) -> None:
    disk = on_disk(models.save_tiny(tmp_path, family))
    model, names = names_of(family, disk)
    assert {place.name for place in names.places.values()} == set(model.state_dict())
    others = set(disk) - names.places.keys()
    assert all(name.startswith(FAMILIES[family].other_towers) for name in others)
    assert bool(others) == (FAMILIES[family].text_key is not None)
    assert not names.twice() and not names.both_forms()


@every_family
def test_where_a_matrix_lies(tmp_path: Path, family: str) -> None:
    disk = on_disk(models.save_tiny(tmp_path, family))
    _, names = names_of(family, disk)
    made = names.makers(GATE_UP, range(8), parts=2)
    assert set(made) <= set(disk) and set(names.makers(DOWN, range(8))) <= set(disk)
    assert names.whole(ROUTER) == models.disk_name(family, ROUTER)
    if family == "qwen3_5_moe":
        assert made == ("model.language_model.layers.1.mlp.experts.gate_up_proj",) and names.is_whole(GATE_UP)
        return
    words = ("w1", "w3") if family == "mixtral" else ("gate_proj", "up_proj")
    stem = models.disk_name(family, "model.layers.1.mlp.experts")
    assert made == tuple(f"{stem}.{expert}.{word}.weight" for expert in range(8) for word in words)


@every_family
def test_a_name_that_lacks_is_the_one_it_would_have(tmp_path: Path, family: str) -> None:
    disk = on_disk(models.save_tiny(tmp_path, family))
    _, names = names_of(family, disk)
    gone = {names.whole("model.norm.weight"), names.makers(DOWN, range(8))[-1]}
    _, without = names_of(family, [name for name in disk if name not in gone])
    found = {without.whole("model.norm.weight"), without.matrix(DOWN, 7, 0) if family != "qwen3_5_moe" else None}
    assert found - {None} <= gone


def test_without_weights_names_are_those_that_transformers_writes() -> None:
    for family, router, down in (
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.gate.weight",
            "model.layers.1.block_sparse_moe.experts.7.w2.weight",
        ),
        ("olmoe", ROUTER, "model.layers.1.mlp.experts.7.down_proj.weight"),
        ("kimi_k25", f"language_model.{ROUTER}", "language_model.model.layers.1.mlp.experts.7.down_proj.weight"),
        (
            "qwen3_5_moe",
            "model.language_model.layers.1.mlp.gate.weight",
            "model.language_model.layers.1.mlp.experts.7.down_proj.weight",
        ),
        ("qwen3_5_moe_text", ROUTER, "model.layers.1.mlp.experts.7.down_proj.weight"),
    ):
        _, names = names_of(family, [])
        assert (names.whole(ROUTER), names.matrix(DOWN, 7, 0)) == (router, down)


def test_parts_of_a_quantized_matrix_are_at_its_place() -> None:
    stem = "model.layers.1.block_sparse_moe.experts.3.w3"
    _, names = names_of("mixtral", [f"{stem}.weight_packed", f"{stem}.weight_scale", f"{stem}.weight_shape"])
    assert set(names.places.values()) == {Place(GATE_UP, 3, 1)}
    assert names.matrix(GATE_UP, 3, 1) == f"{stem}.weight" and not names.twice()


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("mixtral", ROUTER, "same weight"),  # under transformers' own words, beside the hub's
        ("qwen3_5_moe", "model.layers.1.mlp.gate.weight", "same weight"),
        ("qwen3_5_moe", "model.language_model.layers.1.mlp.experts.0.up_proj.weight", "same experts"),
        ("olmoe", GATE_UP, "same experts"),
    ],
)
def test_one_weight_under_two_names_is_refused(tmp_path: Path, family: str, more: str, words: str) -> None:
    folder = models.save_tiny(tmp_path, family)

    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, more: next(iter(tensors.values())).clone()}

    models.edit_tensors(folder / "model.safetensors", add)
    with pytest.raises(ModelError, match=rf"{re.escape(more)}.*{words}|{words}.*{re.escape(more)}"):
        load_model(str(folder))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe", "kimi_k25", "qwen3_moe"])
def test_experts_under_names_that_nobody_knows_are_missing(tmp_path: Path, family: str) -> None:
    """None of them is found, one by one or fused: that is not a checkpoint without experts to look for."""
    folder = models.save_tiny(tmp_path, family)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace(".experts.", ".specialists."): tensor for name, tensor in tensors.items()}

    models.edit_tensors(folder / "model.safetensors", rename)
    with pytest.raises(ModelError, match=r"tensors missing, e\.g\. .*layers\.\d\..*experts"):
        load_model(str(folder))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_5_moe"])
def test_inspect_says_whether_names_are_the_checkpoints(tmp_path: Path, family: str) -> None:
    folder = models.save_tiny(tmp_path, family, max_shard_size="40KB")
    with_index = inspect(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    alone = inspect(str(folder))
    assert (with_index.names_from, alone.names_from) == ("checkpoint", "transformers")
    fused = [next(n for n in found.names if n.memory.endswith("gate_up_proj")).disk for found in (with_index, alone)]
    assert (fused[0] == fused[1]) == (family == "mixtral")  # transformers would write Qwen3.5's experts one by one
