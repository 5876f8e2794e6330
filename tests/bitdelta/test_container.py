"""A variant on disk: what is written comes back, and nothing else is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gtqlora.bitdelta import container
from gtqlora.bitdelta.container import RECORD, Record, Shards, Size, read_variant, write_record
from gtqlora.bitdelta.onebit import decode, encode
from gtqlora.errors import ModelError
from gtqlora.results.export import FormVerdict
from gtqlora.results.verdict import HeldOut
from gtqlora.run import sha256_file
from gtqlora.stats import floor
from tests import models

LINEAR, EXPERTS, GATE = "model.q_proj.weight", "model.experts.down_proj", "model.gate.weight"


def record(files: dict[str, str], **changes: Any) -> Record:
    """A record of a variant that passed."""
    passed = FormVerdict(name="one bit", floor=floor([True] * 200, [True] * 200, margin=0.05), lost={}, table={})
    settings: dict[str, Any] = {
        **{"format": 1, "name": "polite", "base": "base", "base_fingerprint": "b", "tuned": "tuned"},
        **{
            "tuned_fingerprint": "t",
            "ancestors": ["base"],
            "spent": 0.01,
            "finished": "2026-11-25",
            "judge": "string",
            "tries": 1,
        },
        **{"prompts": HeldOut(source="c.jsonl", fingerprint="f", split="heldout"), "distilled": False},
        **{"against_tuned": passed, "against_base": passed, "energy_lost": 0.2, "lost": {LINEAR: 0.2}},
        **{"size": Size(one_bit=1, covered=16, dense=2), "versions": {}, "files": files},
    }
    return Record(**{**settings, **changes})


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = {LINEAR: (8, 12), EXPERTS: (4, 6, 10), GATE: (4, 12)}
    return {name: torch.randn(*shape, generator=draw) for name, shape in sizes.items()}


@pytest.fixture
def variant(tmp_path: Path) -> Path:
    shards, found = Shards(tmp_path), tensors()
    shards.add_bits(LINEAR, encode(found[LINEAR]))
    shards.add_bits(EXPERTS, encode(found[EXPERTS]))
    shards.add_dense(GATE, found[GATE].bfloat16())
    shards.flush()
    write_record(tmp_path, record(shards.files))
    return tmp_path


def test_what_is_written_comes_back(variant: Path) -> None:
    found, wanted = read_variant(variant), tensors()
    assert (found.name, found.base_fingerprint, list(found.dense)) == ("polite", "b", [GATE])
    assert torch.equal(found.dense[GATE], wanted[GATE].bfloat16())
    assert set(found.bits) == {LINEAR, EXPERTS} and not found.lora
    for name, delta in found.bits.items():
        assert torch.equal(decode(delta), decode(encode(wanted[name]))) and delta.shape == wanted[name].shape
    with pytest.raises(KeyError):
        _ = found.bits[GATE]


def test_large_ones_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "_SHARD", 100)
    shards = Shards(tmp_path)
    for name, tensor in tensors().items():
        shards.add_bits(name, encode(tensor))
    shards.flush()
    shards.flush()
    write_record(tmp_path, record(shards.files))
    assert len(shards.files) > 1 and set(read_variant(tmp_path).bits) == tensors().keys()


def _rehashed(folder: Path, held: dict[str, torch.Tensor]) -> None:
    """Put other tensors into a variant, with a record that fits them."""
    save_file(held, folder / "deltas-00001.safetensors")
    write_record(folder, record({"deltas-00001.safetensors": sha256_file(folder / "deltas-00001.safetensors")}))


def _one_bit(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    one = encode(torch.randn(8, 12))
    parts = {"signs": one.signs_NB, "row": one.row_N, "column": one.column_K, **changes}
    return {f"{LINEAR}:{part}": tensor for part, tensor in parts.items()}


def _everything(folder: Path) -> list[object]:
    found = read_variant(folder)
    return [*found.bits.values(), *found.dense.values()]


NAN = torch.full((12,), float("nan"), dtype=torch.bfloat16)
WRONG: list[tuple[dict[str, torch.Tensor], str]] = [
    (_one_bit(column=NAN), "NaN or infinity"),
    (_one_bit(row=torch.full((8,), float("inf"), dtype=torch.bfloat16)), "NaN or infinity"),
    (_one_bit(row=torch.full((8,), -1.0, dtype=torch.bfloat16)), "a scale below 0"),
    (_one_bit(row=torch.ones(7, dtype=torch.bfloat16)), "do not fit"),
    (_one_bit(column=torch.ones(17, dtype=torch.bfloat16)), "do not fit"),
    (_one_bit(column=torch.ones((), dtype=torch.bfloat16)), "do not fit"),
    (_one_bit(row=torch.ones(8)), "is none of this format's"),
    (_one_bit(other=torch.ones(8)), "is none of this format's"),
    ({**_one_bit(), f"{LINEAR}:whole": torch.ones(8, 12)}, "has the parts"),
    ({f"{LINEAR}:signs": torch.ones(8, 2, dtype=torch.uint8)}, "has the parts signs"),
    ({"weight": torch.ones(2)}, "is none of this format's"),
    ({f"{GATE}:whole": torch.tensor([float("nan")])}, "NaN or infinity"),
]


@pytest.mark.parametrize(("held", "match"), WRONG)
def test_tensors_that_are_not_in_order(variant: Path, held: dict[str, torch.Tensor], match: str) -> None:
    _rehashed(variant, held)
    with pytest.raises(ModelError, match=match):
        _everything(variant)


def _edited(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda old: {**old, **changes}


def _failed(old: dict[str, Any]) -> dict[str, Any]:
    return {
        **old,
        "against_tuned": {**old["against_tuned"], "floor": {**old["against_tuned"]["floor"], "verdict": "fail"}},
    }


def _better(old: dict[str, Any]) -> dict[str, Any]:
    """A failed verdict that somebody called a pass."""
    numbers = {**old["against_base"]["floor"], "losses": {"value": 0.1, "low": 0.06, "high": 0.04, "n": 200}}
    return {**old, "against_base": {**old["against_base"], "floor": numbers}}


RECORDS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (_edited(surprise=1), "does not know"),
    (lambda old: {key: value for key, value in old.items() if key != "spent"}, "has no 'spent'"),
    (_edited(format=2), "format 2"),
    (_edited(spent="none"), "'spent' is text"),
    (_edited(files={"../deltas.safetensors": "x"}), "points outside"),
    (_edited(files={"deltas-9.safetensors": "x"}), "no deltas-9.safetensors there"),
    (_failed, "did not pass the safety floor .*'fail'"),
    (_better, "against_base.losses' does not follow from its counts"),
]


@pytest.mark.parametrize(("change", "match"), RECORDS)
def test_records_that_are_not_in_order(
    variant: Path, change: Callable[[dict[str, Any]], dict[str, Any]], match: str
) -> None:
    models.edit_json(variant / RECORD, change)
    with pytest.raises(ModelError, match=match):
        read_variant(variant)


def test_files_that_are_not_in_order(variant: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        read_variant(tmp_path / "nowhere")
    weights = variant / "deltas-00001.safetensors"
    data = weights.read_bytes()
    for wrong in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(wrong)
        with pytest.raises(ModelError, match="was changed since"):
            read_variant(variant)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="leads out"):
        read_variant(variant)
    (variant / RECORD).write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        read_variant(variant)
