"""What a step is said to take: bytes of formats, parts of memory, and how they move with the settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtqlora.config import TrainConfig
from gtqlora.errors import ConfigError
from gtqlora.experts import FORMATS
from gtqlora.families.kinds import ROUTED
from gtqlora.families.sizes import Sizes, sizes_of
from gtqlora.planning import formats, memory
from gtqlora.planning.cards import GIB, parse_bytes, parse_cards
from gtqlora.planning.memory import Placement, Step, as_loaded, memory_of, spread, without_keeping
from tests.helpers import bench_module
from tests.planning.shapes import KIMI, SHAPES

H100 = parse_cards("80GB").bytes


def sizes_for(folder: Path, **changes: Any) -> Sizes:
    (folder / "config.json").write_text(json.dumps({**SHAPES["qwen3-30b-a3b"], **changes}))
    return sizes_of(str(folder / "config.json"))


@pytest.fixture
def qwen(tmp_path: Path) -> Sizes:
    return sizes_for(tmp_path)


# --- bytes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("hidden", "inner"), [(2048, 768), (7168, 2048), (96, 64), (4096, 1408)])
def test_bytes_of_experts_are_those_of_the_formats(name: str, hidden: int, inner: int, tmp_path: Path) -> None:
    sizes = sizes_for(tmp_path, hidden_size=hidden, moe_intermediate_size=inner)
    matrices = [(inner, hidden), (inner, hidden), (hidden, inner)]
    if any(columns % min(128, columns) for _, columns in matrices) and name == "int4-g128":
        with pytest.raises(ConfigError, match="does not divide"):
            formats.expert_bytes(sizes, name)
        return
    held = [part.nbytes for shape in matrices for part in FORMATS[name].empty((), *shape, device="meta").values()]
    assert formats.expert_bytes(sizes, name) == sum(held)
    assert formats.expert_bytes(sizes, formats.PLAIN) == 2 * 3 * hidden * inner


def test_kimi_k2_5_is_held_as_published() -> None:
    kimi = sizes_of(str(KIMI))
    experts = len(kimi.moe) * kimi.experts
    assert experts * formats.expert_bytes(kimi, "int4-g32") == 570_760_888_320
    assert experts * formats.expert_bytes(kimi, "nf4") / 1e9 == pytest.approx(523, abs=1)
    assert formats.held_as(kimi, None) == formats.held_as(kimi, "native") == "int4-g32"
    with pytest.raises(ConfigError, match="only native is loaded"):
        formats.held_as(kimi, "nf4")


def test_a_format_that_a_checkpoint_does_not_have_is_refused(qwen: Sizes) -> None:
    assert formats.held_as(qwen, None) == "bf16" and formats.held_as(qwen, "nf4") == "nf4"
    for asked, says in (("native", "is not INT4"), ("int3", "int4-g32")):
        with pytest.raises(ConfigError, match=says):
            formats.held_as(qwen, asked)


# --- a step

PACKED = {"pairs": 8, "shared": 256, "held": "nf4"}
MEASURED = (
    ("qwen3-30b-a3b", PACKED, 21.352),
    ("qwen3-30b-a3b", {**PACKED, "pairs": 2}, 18.629),
    ("qwen3-30b-a3b", {**PACKED, "activation_memory": None}, 48.49),
    ("qwen3-30b-a3b", {**PACKED, "shared": 0}, 22.455),
    ("qwen3-30b-a3b", {**PACKED, "shared": 0, "held": "int4-g32"}, 23.660),
    ("qwen3-30b-a3b", {**PACKED, "shared": 0, "anchored": True}, 22.8),
    ("k2.5", PACKED, 30.47),
)
"""Peaks of docs/claims.md on one H100, in GiB, as the allocator held them."""


@pytest.mark.parametrize(("shape", "settings", "peak"), MEASURED)
def test_predictions_are_near_what_was_measured(
    shape: str, settings: dict[str, Any], peak: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[shape]))
    given = {"tokens": 512, "checkpointing": True, "activation_memory": 0.0, "anchored": False, **settings}
    found = memory_of(sizes_of(str(tmp_path)), Step(**given), Placement(), H100)
    assert (found.total - found.parts[memory.CONTEXT]) / GIB == pytest.approx(peak, rel=0.05)


def test_memory_follows_the_settings(qwen: Sizes) -> None:
    base = Step(tokens=512, pairs=8, held="nf4", checkpointing=True, activation_memory=0.0)

    def total(placed: Placement | None = None, **changes: Any) -> int:
        return memory_of(qwen, replace(base, **changes), placed or Placement(), H100).total

    assert total(shared=256) < total() and total(pairs=4) < total() < total(held="int4-g32") < total(held="bf16")
    assert total(mode="lora") < total() and total(mode="gates") < total() and total(rank=8) < total()
    assert total(anchored=False) < total() < total(activation_memory=4.0) < total(checkpointing=False)
    assert total(Placement(gpus=2)) < total() and total(Placement(on_host=8)) < total()
    assert total(Placement(on_host=1)) == total(Placement(on_host=2)) == total()  # on their way they take as much
    assert memory_of(qwen, base, Placement(on_host=8), H100).host * 6 == 48 * 128 * formats.expert_bytes(qwen, "nf4")


def test_as_many_layers_keep_their_activations_as_fit(qwen: Sizes) -> None:
    step = Step(tokens=512, pairs=8, held="nf4", checkpointing=True)
    kept = [memory_of(qwen, replace(step, pairs=pairs), Placement(), H100).kept for pairs in (1, 8, 16, 128)]
    assert kept[0] == 48 and kept == sorted(kept, reverse=True) and kept[-1] == 0
    found = memory_of(qwen, replace(step, pairs=16), Placement(), H100)
    assert 0 < found.kept < 48 and found.total < H100
    assert memory_of(qwen, without_keeping(step), Placement(), H100).kept == 0
    assert memory_of(qwen, replace(step, checkpointing=False), Placement(), H100).kept == 48


def test_what_the_trainer_decides_by_is_what_is_planned_by() -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    from gtqlora.edits import recomputing

    assert recomputing._SPARE == memory.SPARE
    assert memory.TILE == utils._CHUNKED_LOGPROB_CHUNK_SIZE and memory.TILE_ROWS == chunked_logprob.TOKEN_CHUNK_SIZE


def test_a_step_is_that_of_the_settings() -> None:
    config = TrainConfig(model="m", contrast="c", batch_size=3, rank=16, mode="lora", gradient_checkpointing=True)
    step = Step.of(config, 100, "nf4")
    assert step == Step(tokens=100, pairs=3, held="nf4", rank=16, mode="lora", checkpointing=True)
    assert step.together == 600
    assert not Step.of(replace(config, anchor_harmful=0.0, anchor_benign=0.0), 100, "nf4").anchored


@pytest.mark.parametrize(("experts", "gpus"), [(384, 4), (384, 5), (7, 7), (10, 3), (128, 1)])
def test_every_expert_lies_on_one_gpu(experts: int, gpus: int) -> None:
    ranges = spread(experts, gpus)
    assert [index for start, end in ranges for index in range(start, end)] == list(range(experts))
    held = [end - start for start, end in ranges]
    assert len(held) == gpus and max(held) - min(held) <= 1


# --- how GPUs and memory are written


@pytest.mark.parametrize(
    ("text", "count", "mib"),
    [
        ("80GB", 1, 81_559),
        ("4x141GB", 4, 143_771),
        ("2xH100", 2, 81_559),
        ("h200", 1, 143_771),
        ("8x80gb", 8, 81_559),
    ],
)
def test_cards_have_what_their_driver_shows(text: str, count: int, mib: int) -> None:
    found = parse_cards(text)
    assert (found.count, found.bytes) == (count, mib * 2**20)


def test_other_cards_have_what_their_name_says() -> None:
    assert parse_cards("3x17.5GB").bytes == 17_500_000_000
    assert parse_bytes("512GB", "--host") == 512 * 10**9 and parse_bytes("1.5TiB", "--host") == 3 * 2**39


@pytest.mark.parametrize(
    "text", ["", "0x80GB", "80", "-1x80GB", "4 x", "4xB999", "x80GB", "1.2.3GB", "0GB", "5000xH100"]
)
def test_other_texts_name_no_cards(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpus"):
        parse_cards(text)


@pytest.mark.parametrize("text", ["", "512", "0GB", "..GB", "-3GB", "many"])
def test_other_texts_name_no_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--host"):
        parse_bytes(text, "--host")


# --- the bench


def test_the_bench_predicts_the_weights_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU there is no peak, but the bytes of model and edit are what they are."""
    bench = bench_module("plan")
    assert len(bench.CASES) >= 8
    out = tmp_path / "plan.json"
    assert bench.main(["--device", "cpu", "--tiny", "--cases", "0", "2", "7", "--steps", "1", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["cases"]) == 3 and found["errors"] == {}
    for case in found["cases"]:
        # buffers of a few bytes, such as rotary frequencies, are in no plan
        assert case["weights"] == pytest.approx(case["weights_there"], rel=0.01)
        assert case["measured"] is None and case["predicted"] > case["weights"]
    assert "weights" in capsys.readouterr().out


def test_experts_wait_once_a_model_is_loaded_where_they_do_not_fit_with_a_reserve(qwen: Sizes) -> None:
    step, layer = Step(tokens=512, pairs=1, held="nf4"), 128 * formats.expert_bytes(qwen, "nf4")
    others = (sum(qwen.counts().values()) - qwen.counts()[ROUTED]) * qwen.width
    enough = -(-(48 * layer + others) * 100 // 85)
    assert as_loaded(qwen, step, 1, enough).on_host == 0
    assert as_loaded(qwen, step, 1, enough - 2**20).on_host == 3
    assert as_loaded(qwen, step, 1, 2**30).on_host == 0  # not even two fit, so that nothing would be gained
    # what is set is what is done
    tight = replace(step, expert_memory=10 * layer / GIB)
    assert as_loaded(qwen, tight, 1, enough) == Placement(on_host=48 - 8)
    assert as_loaded(qwen, tight, 2, enough) == Placement(gpus=2, on_host=48 - 18)
    assert as_loaded(qwen, replace(tight, held="bf16"), 1, enough) == Placement()
