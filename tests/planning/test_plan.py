"""The verb `plan`: what fits where, the cheapest change, and what `train` refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gtqlora import contrasts
from gtqlora.cli import main
from gtqlora.config import TrainConfig, build
from gtqlora.edits.collating import longest_of, most_tokens
from gtqlora.errors import ConfigError, ModelError, TrainingError
from gtqlora.families import load_tokenizer
from gtqlora.families.sizes import sizes_of
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.planning.memory import Placement, Step, memory_of
from gtqlora.planning.plan import Plan
from gtqlora.planning.rates import RATES, TFLOPS, link, nearest
from gtqlora.stages.plan import check_memory, longest_row, plan, refuse_beyond
from tests.planning.shapes import KIMI, SHAPES


@pytest.fixture
def qwen(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-30b-a3b"]))
    return str(tmp_path)


def planned(model: str, gpus: str = "80GB", tokens: int = 512, host: str | None = None, **settings: Any) -> Plan:
    return plan(TrainConfig(model=model, contrast="unread", **settings), gpus=gpus, tokens=tokens, host=host)


# --- what fits


def test_a_plan_that_fits_has_its_parts_and_its_speed(qwen: str) -> None:
    found = planned(qwen, expert_format="nf4", gradient_checkpointing=True, activation_memory=0.0, steps=100)
    assert found.fits and found.change is None and found.streamed is None and found.experts == ((0, 128),)
    assert found.needed == sum(found.memory.values()) < found.usable
    assert sum(found.counts.values()) == found.parameters == 30_532_122_624
    speed = found.speed
    assert speed is not None and speed.bound_by == "compute"
    assert speed.tokens_per_second == pytest.approx(17_656, rel=0.03)  # this very step was measured
    assert "17,656 tokens/s (docs/claims.md" in speed.measured[0]
    assert speed.gpu_hours == pytest.approx(100 * speed.seconds / 3600)
    assert {one.format: one.native for one in found.formats} == {
        "bf16": True,
        "nf4": False,
        "int4-g32": False,
        "int4-g128": False,
    }


def test_rates_are_the_shares_that_they_say() -> None:
    """Tokens a second times operations a token is the share of what the card does."""
    met = {"Qwen3-30B-A3B, NF4": 3.04e9, "Qwen3-235B-A22B, INT4": 21.57e9, "Kimi-K2.5, INT4": 31.69e9}
    for rate in RATES:
        active = rate.share * rate.gpus * TFLOPS / 6 / rate.tokens_per_second
        assert active == pytest.approx(met.get(rate.shape, 2.67e9), rel=0.005)
    assert nearest(2048, 2048, recomputed=True) == RATES[1] and nearest(2048, 8192, recomputed=False) == RATES[2]
    assert nearest(6144, 4096, recomputed=True) == RATES[3] and nearest(7168, 10**6, recomputed=True) == RATES[3]
    assert nearest(64, 8192, recomputed=True) is None and nearest(2048, 64, recomputed=True) is None
    assert link(1) > link(2) == link(8)


def test_host_memory_that_was_named_bounds_what_is_asked_for_by_hand() -> None:
    """Experts, and what layers were given where dense weights are split: both wait there."""
    settings = {"batch_size": 4, "gradient_checkpointing": True, "expert_format": "native", "expert_memory": 40.0}
    there, short = (planned(str(KIMI), "2x80GB", host=host, **settings) for host in ("1TB", "300GB"))
    assert there.fits and there.streamed is not None and there.beside > there.streamed.host > 300 * 10**9
    inputs = 61 * 2 * there.tokens * there.pairs * 7168 * 2  # of all GPUs
    assert there.beside - there.streamed.host == inputs
    assert not short.fits and short.needed == there.needed <= short.usable
    assert short.change is not None and short.change.what[-1].startswith("--host ")
    assert planned(str(KIMI), "2x80GB", **settings).fits  # no host memory was named


def test_experts_wait_in_host_memory_where_gpus_are_too_small() -> None:
    found = planned(str(KIMI), "2x80GB", host="1TB", batch_size=4, gradient_checkpointing=True)
    there = found.streamed
    assert found.fits and there is not None and 0 < there.layers <= 60 and there.host <= 10**12
    assert there.host == there.layers * 384 * 24_772_608
    # at either end of a pass two are there already
    assert there.per_pass == (there.layers - 2) * 192 * 24_772_608
    assert there.seconds == pytest.approx(there.per_pass / 46e9)
    assert found.speed is not None and found.speed.bound_by == "links"
    assert found.speed.seconds == pytest.approx(2 * there.seconds)
    assert any("torchrun --nproc-per-node 2" in note for note in found.notes)
    # what is set by hand is the same
    settings = {"expert_format": "native", "expert_memory": there.expert_memory}
    again = planned(str(KIMI), "2x80GB", batch_size=4, gradient_checkpointing=True, **settings)
    assert again.fits and again.streamed == there and again.memory == found.memory
    # as few layers as have to
    more = planned(str(KIMI), "2x141GB", host="1TB", batch_size=4, gradient_checkpointing=True)
    assert more.streamed is not None and more.streamed.layers < there.layers


def test_experts_that_do_not_divide_are_said_to_lie_unevenly() -> None:
    found = planned(str(KIMI), "5x141GB")
    assert [end - start for start, end in found.experts] == [76, 77, 77, 77, 77]
    assert "4 hold 77 of each layer and 1 hold 76" in found.notes[0]


def test_a_model_is_planned_in_the_dtype_that_it_is_loaded_in(qwen: str) -> None:
    half, whole = planned(qwen, expert_format="nf4"), planned(qwen, expert_format="nf4", dtype="float32")
    assert whole.memory["other weights"] == 2 * half.memory["other weights"]
    assert whole.memory["routed experts"] == half.memory["routed experts"]


def test_no_time_is_told_of_what_is_unlike_all_that_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "organism:routed", "--gpus", "80GB", "--seq-len", "40"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cannot be told" in out and "steps an hour" not in out and "MiB" in out


# --- the cheapest change


def test_another_format_comes_before_anything_that_costs_time(qwen: str) -> None:
    step = {"gradient_checkpointing": True, "activation_memory": 0.0, "batch_size": 1}
    found = planned(qwen, "48GB", **step)
    assert not found.fits and found.speed is None and found.change is not None
    assert found.change.what == ("--expert-format nf4",)
    assert planned(qwen, "48GB", expert_format="nf4", **step).needed == found.change.bytes


def test_recomputation_comes_before_fewer_pairs(qwen: str) -> None:
    found = planned(qwen, expert_format="nf4", batch_size=24)
    assert found.change is not None and found.change.what == ("--set gradient_checkpointing=true",)
    again = planned(qwen, expert_format="nf4", batch_size=24, gradient_checkpointing=True)
    assert again.fits and again.layers_kept < again.layers


def test_fewer_pairs_come_before_more_gpus(qwen: str) -> None:
    found = planned(qwen, "24GB", expert_format="nf4", batch_size=32, gradient_checkpointing=True)
    assert found.change is not None
    assert any(word.startswith("--set batch_size=") for word in found.change.what)
    assert not any(word.startswith(("--gpus", "--host")) for word in found.change.what)


def test_host_memory_comes_before_more_gpus() -> None:
    found = planned(str(KIMI), "4x141GB", gradient_checkpointing=True)
    assert found.change is not None and found.change.bytes <= found.usable
    assert any(word.startswith("--set expert_memory=") for word in found.change.what)
    assert not any(word.startswith("--gpus") for word in found.change.what)


def followed(model: str, gpus: str, found: Plan, **settings: Any) -> Plan:
    """The plan with the options that a change names, as a user types them."""
    assert found.change is not None
    words = " ".join(found.change.what).split()
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "--set":
            key, number = value.split("=")
            settings[key] = True if number == "true" else float(number) if "." in number else int(number)
        elif option == "--expert-format":
            settings["expert_format"] = value
        else:
            assert option == "--gpus"
            gpus = value
    return planned(model, gpus, **settings)


@pytest.mark.parametrize("gpus", ["8GB", "10GB", "12GB", "16GB", "24GB", "48GB", "2x24GB"])
@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": True, "activation_memory": 0.0}, {"batch_size": 64}]
)
def test_the_change_that_is_named_fits_when_it_is_made(qwen: str, gpus: str, settings: dict[str, Any]) -> None:
    found = planned(qwen, gpus, **settings)
    if not found.fits and found.change is not None:
        again = followed(qwen, gpus, found, **settings)
        assert again.fits and again.needed <= found.change.bytes


def test_what_costs_nothing_comes_before_host_memory(qwen: str) -> None:
    found = planned(qwen, "16GB")
    assert found.change is not None and found.change.what[0] == "--expert-format nf4"
    assert any(word.startswith("--set expert_memory=") for word in found.change.what)


def test_machines_each_hold_all_experts() -> None:
    found = planned(str(KIMI), "64x80GB", batch_size=64, gradient_checkpointing=True)
    one = planned(str(KIMI), "8x80GB", batch_size=8, gradient_checkpointing=True)
    assert (
        found.fits
        and one.fits
        and len(found.experts) == 8
        and found.memory["routed experts"] == one.memory["routed experts"]
    )
    assert any("--nnodes 8 --nproc-per-node 8" in note for note in found.notes)
    # Adam's moments are split among all
    assert found.memory["LoRA, with Adam"] < one.memory["LoRA, with Adam"]
    assert found.speed is not None and one.speed is not None
    assert found.speed.seconds == pytest.approx(one.speed.seconds)
    assert found.speed.tokens_per_second == pytest.approx(8 * one.speed.tokens_per_second)


def test_what_goes_between_gpus_takes_its_time(qwen: str) -> None:
    settings = {"expert_format": "nf4", "gradient_checkpointing": True, "activation_memory": 0.0}
    one, two = (planned(qwen, gpus, batch_size=8 * count, **settings) for count, gpus in ((1, "80GB"), (2, "2x80GB")))
    assert one.speed is not None and two.speed is not None
    # 48 layers, six times 8,192 tokens of 2,048 numbers in two bytes
    assert two.speed.seconds - one.speed.seconds == pytest.approx(48 * 6 * 8192 * 2048 * 2 / 225e9)
    assert any("between two H200" in source for source in two.speed.measured)


def test_only_experts_in_4_bits_wait(qwen: str) -> None:
    assert planned(qwen, "24GB", host="1TB").streamed is None
    with pytest.raises(ConfigError, match=r"expert_memory = 0\.1: 2 layers .* set expert_memory = 0\.59"):
        planned(qwen, "24GB", expert_format="nf4", expert_memory=0.1)


def test_speeds_are_told_of_cards_that_were_measured(qwen: str) -> None:
    for gpus in ("8xA100", "24GB", "L40S"):
        found = planned(qwen, gpus, expert_format="nf4", gradient_checkpointing=True)
        assert found.speed is None and not found.rated
        assert not found.fits or any("H100" in note for note in found.notes)
    assert planned(qwen, "80GB", expert_format="nf4", gradient_checkpointing=True).speed is not None


def test_a_checkpoint_in_fp8_is_not_called_bf16(qwen: str) -> None:
    raw = json.loads(Path(qwen, "config.json").read_text())
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    Path(qwen, "config.json").write_text(json.dumps({**raw, "quantization_config": scheme}))
    found = planned(qwen)
    assert not any(one.native for one in found.formats)
    assert any("fp8" in note for note in found.notes)


def test_a_card_too_small_for_the_rest_is_helped_by_no_change() -> None:
    found = planned(str(KIMI), "4GB")
    assert not found.fits and found.change is None


def test_gpus_split_dense_weights_that_are_large_for_one() -> None:
    one, four = (planned(str(KIMI), gpus, gradient_checkpointing=True) for gpus in ("141GB", "4x141GB"))
    assert 3.9 < one.memory["other weights"] / four.memory["other weights"] < 4.1
    assert four.memory["layers on their way"] > 0 and four.memory["tokens of all GPUs"] > 0


# --- bad input


def test_a_machine_of_more_gpus_than_experts_is_refused(qwen: str) -> None:
    raw = json.loads(Path(qwen, "config.json").read_text())
    Path(qwen, "config.json").write_text(json.dumps({**raw, "num_experts": 4, "num_experts_per_tok": 2}))
    with pytest.raises(ConfigError, match="--gpus 8x80GB: a layer has 4 experts, less than one a GPU"):
        planned(qwen, "8x80GB")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "four", "--seq-len", "64"], "4x141GB"),
        (["--gpus", "0x80GB", "--seq-len", "64"], "from 1 to"),
        (["--gpus", "80GB"], "--seq-len is missing"),
        (["--gpus", "80GB", "--seq-len", "300000"], "262,144 tokens at most"),
        (["--gpus", "80GB", "--seq-len", "1"], "at least 2"),
        (["--gpus", "80GB", "--seq-len", "64", "--host", "much"], "512GB"),
        (["--gpus", "80GB", "--seq-len", "64", "--expert-format", "nf4"], "int4-g32 already"),
        (["--gpus", "80GB", "--seq-len", "64", "--pairs", "0"], "batch_size = 0"),
        (["--gpus", "80GB", "--seq-len", "64", "--set", "ranks=3"], "rank"),
    ],
)
def test_bad_input_is_one_line_with_the_fix(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(KIMI), *words]) == 2
    out, err = capsys.readouterr()
    assert says in " ".join(err.split()) and "Traceback" not in err and out == ""


def test_no_plan_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}))
    assert main(["plan", str(tmp_path), "--gpus", "80GB", "--seq-len", "64"]) == 2
    assert "qwen3_moe" in capsys.readouterr().err
    with pytest.raises(ModelError, match="no such"):
        planned(str(tmp_path / "none"))


def test_a_recipe_for_a_gpu_is_planned_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "kimi_k25.toml"
    words = ["plan", str(KIMI), "--gpus", "8x141GB", "--config", str(recipe), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["pairs"], found["fits"]) == (2048, 1, True)  # of the recipe
    assert found["speed"]["steps"] == 300


@pytest.mark.parametrize("width", [40, 60, 200])
def test_tables_are_whole_at_any_width(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", str(KIMI), "--gpus", "2x80GB", "--seq-len", "512", "--host", "10GB"]) == 2
    out = capsys.readouterr().out
    assert "1,014,686,023,680" in out and "1,026,408,209,408" in out and "does not fit" in out and "…" not in out
    assert "left out" not in out


# --- what `train` asks


def test_a_training_that_clearly_does_not_fit_is_refused(qwen: str) -> None:
    config = TrainConfig(model=qwen, contrast="unread", expert_format="nf4", batch_size=8)
    step = Step.of(config, 512, "nf4")
    with pytest.raises(TrainingError) as error:
        refuse_beyond(config, 512, 0, 30 * 2**30)
    assert "30.0 GiB are free" in str(error.value)
    assert "cheapest change that fits: --set gradient_checkpointing=true" in str(error.value)
    with pytest.raises(TrainingError) as error:  # there are neither more GPUs nor host memory
        refuse_beyond(config, 512, 0, 10 * 2**30)
    assert "change" not in str(error.value)
    with pytest.raises(TrainingError, match="--set expert_memory="):  # where there is some
        refuse_beyond(config, 512, 0, 10 * 2**30, 100 * 2**30)
    again = replace(config, gradient_checkpointing=True)
    refuse_beyond(again, 512, 0, 30 * 2**30)
    # a prediction is not exact: what is above by less than a tenth is tried
    needed = memory_of(sizes_of(qwen), step, Placement(), 2**40).total
    refuse_beyond(config, 512, 0, round(needed / 1.05))
    with pytest.raises(TrainingError):
        refuse_beyond(config, 512, 0, round(needed / 1.2))


def test_the_longest_row_is_known_before_the_model_is_loaded() -> None:
    model, pairs = str(embedded.organism("routed")), str(embedded.contrast())
    config = build(TrainConfig, file=embedded.recipe(), model=model, contrast=pairs)
    rows = contrasts.load(pairs, judge_of(config.judge)).split("train")
    tokenizer = load_tokenizer(model)
    encoded = [dict(contrasts.encode_preference(tokenizer, row)) for row in rows.rows]
    longest, prompt = longest_row(config, rows)
    assert longest == longest_of(encoded)
    assert most_tokens(encoded) <= 2 * longest - prompt < 2 * longest
    check_memory(config, rows)  # on a CPU nothing is asked


def test_a_format_that_does_not_go_is_said_by_name(qwen: str) -> None:
    with pytest.raises(ConfigError, match="is not INT4"):
        planned(qwen, expert_format="native")
