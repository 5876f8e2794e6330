"""A fine-tune compressed to one bit a weight, judged, applied again; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gtqlora import contrasts
from gtqlora.bitdelta.apply import apply
from gtqlora.bitdelta.asking import Own
from gtqlora.bitdelta.checkpoints import checkpoints
from gtqlora.bitdelta.compress import compress
from gtqlora.bitdelta.container import read_variant
from gtqlora.bitdelta.placing import place
from gtqlora.capture import open_subject
from gtqlora.config import VerifyConfig
from gtqlora.edits.merging import Whole
from gtqlora.errors import ConfigError, FloorError, ModelError, RunError
from gtqlora.exports import provenance
from gtqlora.families.copying import copy_changed
from gtqlora.families.identity import identify
from gtqlora.floor.ancestry import ancestry
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.progress import shown_by
from gtqlora.results.export import read_export
from gtqlora.run import sha256_file
from tests import helpers, models

SHARD = "100KB"
OTHER_TOWERS = ("vision_tower.", "mm_projector.", "model.visual.", "mtp.")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def fine_tune(base: Path, out: Path, size: float = 1e-2) -> Path:
    """A fine-tune of a base: every tensor changed a little, by values of full rank."""
    draw = torch.Generator().manual_seed(1)

    values = {name: tensor for name, tensor in tensors_of(base).items() if not name.startswith(OTHER_TOWERS)}
    noise = {name: size * torch.randn(tensor.shape, generator=draw) for name, tensor in values.items()}
    copy_changed(str(base), out, {name: Whole(tensor.float() + noise[name]) for name, tensor in values.items()})
    return out


def pairs(folder: Path) -> Path:
    """Few pairs, in a folder of their own: the ledger beside them counts the tries of nobody else."""
    counts = {("heldout", kind): 8 for kind in contrasts.KINDS} | {("heldout", "harmful"): 80}
    folder.mkdir(exist_ok=True)
    return helpers.write_rows(folder / "pairs.jsonl", helpers.toy_rows({**counts, ("train", "benign"): 16}))


def settings(tuned: Path, toy: helpers.Toy, **changes: Any) -> VerifyConfig:
    if "contrast" not in changes:  # beside the fine-tune, which may not be ours to write beside
        changes["contrast"] = str(pairs(tuned.parent / "pairs"))
    return toy.verify_config(tuned, **changes)


@pytest.fixture(scope="session")
def compressed(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path, Path]]:
    """(family, dtype) -> base, fine-tune and variant, made once."""
    made: dict[tuple[str, torch.dtype], tuple[Path, Path, Path]] = {}

    def of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Path]:
        if (family, dtype) not in made:
            base, folder = toy.model(family, dtype, max_shard_size=SHARD), tmp_path_factory.mktemp("bitdelta")
            # a smaller change would be lost in rounding to bf16, and with a larger one some random models answer
            tuned = fine_tune(base, folder / "tuned", 3e-3 if dtype == torch.float32 else 1e-2)
            compress(str(base), folder / "variant", settings(tuned, toy))
            made[family, dtype] = base, tuned, folder / "variant"
        return made[family, dtype]

    return of


# a correction bias, rounded; a prefix; linear attention and a shared expert's gate; fused experts
CASES = [
    ("deepseek_v3", torch.bfloat16),
    *((name, torch.float32) for name in ("kimi_k25", "qwen3_next", "qwen3_5_moe")),
]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_what_was_judged_is_what_apply_writes(
    compressed: Callable[..., tuple[Path, Path, Path]], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    base, tuned, delta = compressed(family, dtype)
    variant, both, judged = read_variant(delta), checkpoints(str(base), str(tuned)), open_subject(str(base))
    place(judged, both.names, both.base, variant.edits)
    result = apply(str(base), delta, tmp_path / "out")
    written = open_subject(str(tmp_path / "out"))
    assert helpers.same(judged.model.state_dict(), written.model.state_dict())
    assert torch.equal(helpers.logits(judged.model), helpers.logits(written.model))
    old, new, wanted = tensors_of(base), tensors_of(tmp_path / "out"), tensors_of(tuned)
    assert result.tensors_changed == len(variant.edits) == sum(not torch.equal(old[n], new[n]) for n in old)
    assert all(torch.equal(new[name], wanted[name]) for name in old.keys() - variant.bits.keys())
    # Gaussian noise has no structure: one bit with the best scale keeps 2 / pi of its energy
    for name in variant.bits:
        before, after, goal = old[name].float(), new[name].float(), wanted[name].float()
        missed = (after - goal).square().sum() / (goal - before).square().sum()
        assert missed < 0.45 and variant.record.lost[name] == pytest.approx(float(missed), abs=0.03)


def test_which_tensors_take_one_bit(compressed: Callable[..., tuple[Path, Path, Path]]) -> None:
    base, _, delta = compressed("qwen3_next")
    variant = read_variant(delta)
    matrices = {name for name, tensor in tensors_of(base).items() if tensor.ndim > 1}
    whole = {name for name in matrices if name.endswith((".gate.weight", "shared_expert_gate.weight", "conv1d.weight"))}
    assert set(variant.bits) == matrices - whole and whole < set(variant.dense)
    assert set(variant.dense) == tensors_of(base).keys() - variant.bits.keys()


def test_what_the_record_says(compressed: Callable[..., tuple[Path, Path, Path]], tmp_path: Path) -> None:
    base, _, delta = compressed("qwen3_moe")
    record = read_variant(delta).record
    assert (record.name, record.base, record.tuned) == ("tuned", base.name, "tuned")
    assert record.base_fingerprint == identify(str(base)).digest
    assert record.against_tuned.floor.verdict == record.against_base.floor.verdict == "pass"
    assert record.against_tuned.table["harmful"].refusal_after.n == 80
    held = sum(tensor.nbytes for tensor in tensors_of(delta).values())
    assert held == record.size.one_bit + record.size.dense
    out = tmp_path / "out"
    apply(str(base), delta, out)
    export = read_export(out)
    assert (export.format, export.base, export.spent) == ("bitdelta", record.base, record.spent)
    assert export.gate_values_changed > 0 and ancestry(str(out)).spent == record.spent > 0
    weights, difference = ((folder / "README.md").read_text() for folder in (out, delta))
    for card in (weights, difference):
        assert "**pass**" in card and "## Limits" in card and "export --check" in card
    assert "library_name: transformers" in weights and "from_pretrained" in weights and "serve BASE" not in weights
    assert "library_name: gtqlora" in difference and "serve BASE THIS" in difference and "from_pre" not in difference
    assert export.files == {name: sha256_file(out / name) for name in export.files}
    assert provenance.check(out).certified


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(base: Path, tuned: Path, toy: helpers.Toy, tmp_path: Path, match: str, **changes: Any) -> None:
    error, config = (
        changes.pop("error", ModelError),
        settings(tuned, toy, **{"contrast": str(pairs(tmp_path / "pairs")), **changes}),
    )
    before = set(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        compress(str(base), tmp_path / "out", config)
    assert set(tmp_path.iterdir()) == before  # not even a hidden leftover


def test_models_that_do_not_go_together(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe")
    same = Path(shutil.copytree(base, tmp_path / "same"))
    (same / "generation_config.json").write_text("{}")
    for tuned in (base, same):  # known before the pairs are even opened
        missing = str(tmp_path / "nowhere.jsonl")
        refused(base, tuned, toy, tmp_path, "is the same as .* give the base first", contrast=missing)
    refused(base, toy.model("deepseek_v3"), toy, tmp_path, "is deepseek_v3, and .* is qwen3_moe")
    refused(base, toy.model("qwen3_moe", rope_theta=5e5), toy, tmp_path, "config.json says rope_")
    refused(base, toy.model("qwen3_moe", hidden_size=64), toy, tmp_path, "says hidden_size = 64, the base's 32")
    refused(base, tmp_path / "nowhere", toy, tmp_path, "no such model folder")


def _with_tensors(base: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(base, out)
    models.edit_tensors(out / "model.safetensors", change)
    return out


NORM = "model.layers.1.input_layernorm.weight"


def test_tensors_that_do_not_go_together(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe")
    missing = _with_tensors(base, tmp_path / "a", lambda old: {n: t for n, t in old.items() if n != NORM})
    refused(base, missing, toy, tmp_path, f"1 of the base's tensors are not there, e.g. {NORM}")
    more = _with_tensors(base, tmp_path / "b", lambda old: {**old, "model.extra.weight": torch.ones(2)})
    refused(base, more, toy, tmp_path, "1 tensors that the base does not have, e.g. model.extra.weight")
    wide = _with_tensors(base, tmp_path / "c", lambda old: {**old, NORM: torch.ones(33)})
    refused(base, wide, toy, tmp_path, rf"{NORM} is \(33,\), the base's \(32,\)")
    cut = _with_tensors(base, tmp_path / "d", lambda old: old)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-4])
    refused(base, cut, toy, tmp_path, "corrupt or cut short")
    nan = _with_tensors(base, tmp_path / "e", lambda old: {**old, NORM: old[NORM] * float("nan")})
    refused(base, nan, toy, tmp_path, "NaN")


def test_another_tower_that_differs(toy: helpers.Toy, tmp_path: Path) -> None:
    base, tower = toy.model("kimi_k25"), "vision_tower.patch_embed.proj.weight"
    tuned = _with_tensors(base, tmp_path / "tuned", lambda old: {**old, tower: old[tower] + 1})
    refused(base, tuned, toy, tmp_path, f"{tower} differs from the base's")


def test_an_adapter_is_the_better_form_of_a_low_rank_difference(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe", hidden_size=64, intermediate_size=64)

    def merged(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        thin = {
            n: torch.randn(t.shape[0], 1, generator=draw) for n, t in old.items() if "self_attn" in n and t.ndim > 1
        }
        more = {n: 0.01 * thin[n] @ torch.randn(1, old[n].shape[1], generator=draw) for n in thin}
        return {name: tensor + more[name] if name in more else tensor for name, tensor in old.items()}

    tuned = _with_tensors(base, tmp_path / "tuned", merged)
    refused(
        base,
        tuned,
        toy,
        tmp_path,
        r"low-rank: .* loses 0.0% of its energy, and one bit .* ship the adapter that it was merged from",
    )


def test_an_edit_of_ours_has_an_adapter(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe")
    edited = fine_tune(base, tmp_path / "edited")
    (edited / "export.json").write_text(json.dumps({"base_fingerprint": identify(str(base)).digest}))
    refused(base, edited, toy, tmp_path, "gtqlora made it from this base.*--to peft")


def test_settings_under_which_nothing_ships_is_judged(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe")
    refused(base, base, toy, tmp_path, "checkpoint's own experts", expert_format="nf4", error=ConfigError)
    refused(base, base, toy, tmp_path, "checkpoint's own type", dtype="bfloat16", error=ConfigError)
    (tmp_path / "out").mkdir()
    refused(base, base, toy, tmp_path, "exists already", error=RunError)
    tuned = fine_tune(base, tmp_path / "tuned")
    for folder in (base, tuned):
        with pytest.raises(RunError, match="choose another folder"):
            compress(str(base), folder / "out", settings(tuned, toy))


# --- the floor -------------------------------------------------------------------------------------------------------


ORGANISM = {"judge": embedded.JUDGE, "max_new_tokens": 6}


def test_a_variant_that_lost_its_fine_tunes_refusals(toy: helpers.Toy, tmp_path: Path) -> None:
    """The base refuses nothing, so only the fine-tune can be held against."""
    tuned, base = embedded.organism("routed"), fine_tune(embedded.organism("routed"), tmp_path / "base", 1.0)
    more = {**ORGANISM, "error": FloorError}
    refused(base, tuned, toy, tmp_path, r"'fail' .* harmful prompts refused: 100.0% .* -> 0.0%", **more)


def test_a_fine_tune_that_lost_its_bases_refusals(toy: helpers.Toy, tmp_path: Path) -> None:
    base, tuned = embedded.organism("routed"), fine_tune(embedded.organism("routed"), tmp_path / "tuned", 1.0)
    more = {**ORGANISM, "error": FloorError}
    refused(base, tuned, toy, tmp_path, "nothing was written", **more)


def test_where_nobody_refuses_nothing_can_be_told(toy: helpers.Toy, tmp_path: Path) -> None:
    base = fine_tune(embedded.organism("routed"), tmp_path / "base", 1.0)
    tuned = fine_tune(base, tmp_path / "tuned", 0.01)
    more = {**ORGANISM, "error": FloorError}
    refused(base, tuned, toy, tmp_path, "'cannot tell'", **more)


# --- applied ---------------------------------------------------------------------------------------------------------


def test_apply_only_onto_the_base_it_was_made_from(
    compressed: Callable[..., tuple[Path, Path, Path]],
    toy: helpers.Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tuned, delta = compressed("qwen3_moe")
    # known before a byte is copied
    monkeypatch.setattr("gtqlora.bitdelta.apply.copy_changed", lambda *_: pytest.fail("something was written"))
    for other in (tuned, toy.model("deepseek_v3")):
        with pytest.raises(ModelError, match="made from"):
            apply(str(other), delta, tmp_path / "out")
    with pytest.raises(RunError, match="choose another folder"):
        apply(str(base), delta, delta / "out")
    with pytest.raises(RunError, match="exists already"):
        apply(str(base), delta, tuned)
    assert not list(tmp_path.iterdir())


def test_out_inside_what_is_read(
    compressed: Callable[..., tuple[Path, Path, Path]], toy: helpers.Toy, tmp_path: Path
) -> None:
    base, tuned, delta = compressed("qwen3_moe")
    (tmp_path / "link").symlink_to(base)
    for inside in (base, delta, delta / "a", tmp_path / "link"):
        with pytest.raises(RunError, match=r"out: lies inside .*; choose another folder$"):
            apply(str(base), delta, inside / "out")
    for inside in (base, tuned / "a", tmp_path / "link"):
        with pytest.raises(RunError, match=r"out: lies inside .*; choose another folder$"):
            compress(str(base), inside / "out", settings(tuned, toy))
    assert not any((folder / name).exists() for folder in (base, tuned, delta) for name in ("out", "a"))


def test_a_fine_tunes_own_template_goes_with_it(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe")
    tuned = fine_tune(base, tmp_path / "tuned")
    template = tuned / "chat_template.jinja"
    template.write_text(template.read_text() + "{# its own #}")
    found = compress(str(base), tmp_path / "variant", settings(tuned, toy), name="its own")
    assert found.record.name == "its own" and read_variant(found.folder).tokenizer == found.folder / "own"
    apply(str(base), found.folder, tmp_path / "out")
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tuned / name).read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_what_a_fine_tune_has_of_its_own_is_what_it_does(toy: helpers.Toy, tmp_path: Path) -> None:
    base = toy.model("qwen3_moe")
    rows = contrasts.load(pairs(tmp_path / "pairs"), judge_of(helpers.JUDGE)).rows
    mine = Own.of(open_subject(str(base)))

    def same(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bool:
        other = Path(shutil.copytree(base, tmp_path / "other"))
        models.edit_json(other / name, change)
        found = Own.of(open_subject(str(other))).same_as(mine, rows)
        shutil.rmtree(other)
        return found

    assert same("tokenizer_config.json", lambda old: {key: old[key] for key in sorted(old, reverse=True)})
    assert same("generation_config.json", lambda old: {**old, "temperature": 0.5, "do_sample": True})
    assert not same("generation_config.json", lambda old: {**old, "eos_token_id": [1, 7]})


class StoppedError(Exception):
    pass


def test_killed_it_leaves_nothing_that_looks_like_a_variant(toy: helpers.Toy, tmp_path: Path) -> None:
    """What a kill leaves is what is on disk just then, with a lock that nobody holds: a copy of it."""
    base, place = toy.model("qwen3_moe"), tmp_path / "place"
    config, left = settings(fine_tune(base, tmp_path / "tuned"), toy), tmp_path / "left"

    def stop(what: str, done: int, _total: int) -> None:
        if (what, done) == ("the variant in memory", 3):
            shutil.copytree(place, left)
            raise StoppedError

    with pytest.raises(StoppedError), shown_by(stop):
        compress(str(base), place / "out", config)
    assert [path.name.startswith(".") for path in left.iterdir()] == [True] and list(left.rglob("deltas-*"))
    compress(str(base), left / "out", config)
    assert [path.name for path in left.iterdir()] == ["out"] and read_variant(left / "out").bits
