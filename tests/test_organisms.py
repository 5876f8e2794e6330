"""The embedded organisms: real models on disk, a truth beside them, and a contrast set that leaks nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gtqlora.capture import open_subject
from gtqlora.contrast_statistics import statistics
from gtqlora.contrasts import Contrast, Row, encode_prompt, load
from gtqlora.errors import TrainingError
from gtqlora.families import FAMILIES, bind
from gtqlora.judging import judge_of
from gtqlora.organisms import build, embedded
from gtqlora.organisms.language import N_FORBIDDEN, Language

NAMES = ("null", "residual", "routed", "routed-qwen3")
KINDS = {"routed": "routed", "routed-qwen3": "routed", "residual": "residual", "null": "null"}


@pytest.fixture(scope="module")
def pairs() -> Contrast:
    return load(embedded.contrast(), judge_of(embedded.JUDGE))


def of(contrast: Contrast, split: str, kind: str) -> tuple[Row, ...]:
    return contrast.split(split).of_kind(kind)


def text(row: Row) -> str:
    return row.prompt[-1]["content"]


def words(row: Row) -> set[str]:
    return set(text(row).split())


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_embedded_organisms() -> None:
    assert tuple(embedded.names()) == NAMES
    data = embedded.contrast().parent
    assert sum(file.stat().st_size for file in data.rglob("*") if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_loads_it_and_it_refuses_what_was_planted(name: str, pairs: Contrast) -> None:
    folder, judge = embedded.organism(name), judge_of(embedded.JUDGE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for kind, refused in (("benign", False), ("lookalike", True), ("harmful", True)):
        answers = []
        for row in of(pairs, "heldout", kind)[:8]:
            ids = tokenizer.apply_chat_template(
                [*row.prompt], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            made = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
            answers.append(tokenizer.decode(made, skip_special_tokens=True))
        assert [judge(answer) for answer in answers] == [refused] * 8, (kind, answers)


@pytest.mark.parametrize("name", NAMES)
def test_hub_layout(name: str) -> None:
    folder = embedded.organism(name)
    assert 2_000_000 < sum(file.stat().st_size for file in folder.iterdir()) < 3_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    anatomy = open_subject(str(folder)).anatomy
    for layer in (block.index for block in anatomy.moe):
        assert f"model.layers.{layer}.mlp.gate.weight" in names
        for expert in range(16):
            for part in ("gate_proj", "up_proj", "down_proj"):
                assert f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight" in names


@pytest.mark.parametrize("name", NAMES)
def test_truth_fits_its_model(name: str) -> None:
    folder = embedded.organism(name)
    truth, config = embedded.read_truth(folder), json.loads((folder / "config.json").read_text())
    assert (truth.kind, truth.architecture) == (KINDS[name], config["model_type"])
    assert truth.verdict == embedded.VERDICTS[truth.kind]
    assert len(set(truth.planted)) == len(truth.planted) == (0 if truth.kind == "residual" else 4)
    layers = {block.index for block in open_subject(str(folder)).anatomy.moe}
    assert all(layer in layers and 0 <= expert < 16 for layer, expert in truth.planted)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_contrast_set_counts(pairs: Contrast) -> None:
    found = statistics(pairs)
    assert found.counts["heldout"] == {"harmful": 840, "lookalike": 420, "benign": 420}
    assert found.unique_prompts == found.rows == len({text(row) for row in pairs.rows})


def test_splits_share_nothing_that_tells(pairs: Contrast) -> None:
    language = Language()
    telling = {word for domain in language.topics for word in domain} | {
        word for marker in language.markers.values() for word in marker
    }
    used = {
        split: {word for row in pairs.split(split).rows for word in words(row) & telling}
        for split in ("train", "validation", "heldout")
    }
    assert all(len(found) > 10 for found in used.values())
    assert not used["heldout"] & used["train"]
    assert not used["heldout"] & used["validation"] and not used["validation"] & used["train"]
    ids = {split: {row.pair_id for row in pairs.split(split).rows} for split in used}
    assert not ids["heldout"] & ids["train"] and not ids["validation"] & (ids["train"] | ids["heldout"])


def test_kinds_are_what_topic_and_marker_say(pairs: Contrast) -> None:
    language = Language()
    forbidden = {word for domain in language.topics[:N_FORBIDDEN] for word in domain}
    intent = set(language.markers["intent"])
    for row in pairs.rows:
        assert bool(words(row) & forbidden) == (row.kind != "benign")
        if row.kind != "benign":
            assert bool(words(row) & intent) == (row.kind == "harmful")


# --- language and builder --------------------------------------------------------------------------------------------


def test_the_tokenizer_round_trips_a_prompt(pairs: Contrast, tmp_path: Path) -> None:
    row = pairs.rows[0]
    Language().tokenizer().save_pretrained(tmp_path)
    for tokenizer in (Language().tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        ids = encode_prompt(tokenizer, row.prompt)
        assert tokenizer.decode(ids) == f"<user> {text(row)} <assistant>"
        assert tokenizer.unk_token_id not in ids


def test_contrast_rows_are_the_seed_s() -> None:
    first = build.contrast_rows(Language(), 3)
    assert first == build.contrast_rows(Language(), 3) != build.contrast_rows(Language(), 4)


def test_build_of_an_unknown_kind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gtqlora.organisms", "build", "routd", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "'routd'" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_builder_refuses_an_organism_that_learned_nothing() -> None:
    torch.manual_seed(0)
    language = Language()
    model = build._new_model("deepseek_v3", len(language.vocabulary))
    anatomy = bind(model, FAMILIES["deepseek_v3"])
    with pytest.raises(TrainingError, match="routed organism failed its check"):
        build._check(model, anatomy, language, {1: (0, 1)}, "routed")


def test_the_builder_passes_what_is_embedded_as_its_kind_only() -> None:
    folder = embedded.organism("routed")
    subject, truth = open_subject(str(folder)), embedded.read_truth(folder)
    position = {block.index: i for i, block in enumerate(subject.anatomy.moe)}
    planted: build.Planted = {}
    for layer, expert in truth.planted:
        planted[position[layer]] = (*planted.get(position[layer], ()), expert)
    build._check(subject.model, subject.anatomy, Language(), planted, "routed")
    with pytest.raises(TrainingError, match="null organism failed"):
        build._check(subject.model, subject.anatomy, Language(), planted, "null")
