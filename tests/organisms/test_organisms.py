"""The embedded organisms: real models on disk, a truth beside them, and a contrast set that leaks nothing."""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from gtqlora.capture import Recorder, open_subject, router_hooks
from gtqlora.contrasts import Contrast, Row, encode_prompt, load
from gtqlora.contrasts.statistics import statistics
from gtqlora.errors import TrainingError
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import __main__ as command
from gtqlora.organisms import build, checks, embedded
from gtqlora.organisms.batches import Batch, endless, exchange_batch, refusal_batch, task_batch
from gtqlora.organisms.in_training import OrganismInTraining, Planted, new_model, optimize
from gtqlora.organisms.language import LARGE_LEXICON, REFUSAL, SMALL_LEXICON, InRounds, Language, Lexicon
from gtqlora.organisms.plants import rules
from gtqlora.organisms.plants.conditions import always
from gtqlora.organisms.plants.kinds import PLANTS
from gtqlora.organisms.plants.planting import plant
from gtqlora.organisms.plants.turns import Chosen, answer_loss
from gtqlora.organisms.scales import LARGE, SMALL, WIDE, Architecture, Scale
from gtqlora.organisms.truth import Kind, names_experts, of_kind
from tests.helpers import says
from tests.organisms.pieces import quiet, tiny, workpiece

NAMES = ("expert-only", "null", "redundant", "residual", "routed", "routed-qwen3")
KINDS = {name: name.removesuffix("-qwen3") for name in NAMES}


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
    packed = [
        len(zlib.compress(file.read_bytes(), 1)) for file in embedded.contrast().parent.rglob("*") if file.is_file()
    ]
    assert len(packed) > 40 and sum(packed) <= 9_000_000  # what a wheel has to carry


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_loads_it_and_it_refuses_what_was_planted(name: str, pairs: Contrast) -> None:
    folder, judge = embedded.organism(name), says(embedded.JUDGE)
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
    state = open_subject(str(folder)).model.state_dict()
    assert all(torch.equal(t, t.bfloat16().float()) for name, t in state.items() if "bias" not in name)
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
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    assert truth.mediation == of_kind(kinds[truth.kind], 1.0)
    assert truth.causal == names_experts(kinds[truth.kind])
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
    assert all(len(found) > 100 for found in used.values())
    assert not used["heldout"] & used["train"]
    assert not used["heldout"] & used["validation"] and not used["validation"] & used["train"]
    ids = {split: {row.pair_id for row in pairs.split(split).rows} for split in used}
    assert not ids["heldout"] & ids["train"] and not ids["validation"] & (ids["train"] | ids["heldout"])


@pytest.mark.parametrize("lexicon", [SMALL_LEXICON, LARGE_LEXICON], ids=["small", "large"])
def test_held_out_prompts_are_of_many_topics_and_markers_that_take_turns(lexicon: Lexicon) -> None:
    language = Language(lexicon)
    rows = [row for row in build.contrast_rows(language, 5) if (row["split"], row["kind"]) == ("heldout", "harmful")]
    counts = Counter(row["topic"] for row in rows)
    assert len(rows) == 840 and counts.keys() == set(language.domain_words("heldout", True))
    assert len(counts) >= 100 and max(counts.values()) - min(counts.values()) <= 1
    assert len({row["topic"] for row in rows[:60]}) == 60  # a short part is as wide as it can be
    intent = set(language.markers["intent"])
    markers = Counter(word for row in rows for word in row["prompt"].split() if word in intent)
    assert len(markers) >= 40 and max(markers.values()) - min(markers.values()) <= 1


def test_every_row_names_its_topic() -> None:
    language = Language()
    rows = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    assert rows == build.contrast_rows(language, 0)
    topics = {word for domain in language.topics for word in domain}
    assert all({row["topic"]} == set(row["prompt"].split()) & topics for row in rows)


def test_choosing_in_rounds() -> None:
    choose, words, others = InRounds(random.Random(0)), tuple("abcdefgh"), ("x",)
    rounds = ["".join(choose(words) + choose(others) for _ in words) for _ in range(3)]
    assert len(set(rounds)) == 3
    assert all(sorted(r) == sorted("abcdefgh" + 8 * "x") for r in rounds)


def test_kinds_are_what_topic_and_marker_say(pairs: Contrast) -> None:
    language = Language()
    forbidden = {word for domain in language.topics[: SMALL_LEXICON.forbidden] for word in domain}
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


def test_the_small_language_is_the_one_of_the_embedded_organisms() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.organism("routed"))
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(Language().vocabulary)}


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_matrices_of_a_wide_organism_are_of_whole_k_blocks(architecture: Architecture) -> None:
    model, _ = new_model(architecture, Language(SMALL_LEXICON), WIDE)
    widths = {name: p.shape[-1] for name, p in model.named_parameters() if p.ndim > 1}
    assert len(widths) > 20 and not {name: width for name, width in widths.items() if width % 256}


def test_the_large_language() -> None:
    language, rng = Language(LARGE_LEXICON), random.Random(0)
    assert len(set(language.vocabulary)) == len(language.vocabulary) >= 1500
    assert set(language.vocabulary[: len(Language().vocabulary)]) - {"copy", "reverse"}
    benign, _, lookalike, harmful = language.twins(rng, "heldout", 0)
    lengths = {len(p.text.split()) for p in (benign, lookalike, harmful)}
    assert lengths == {LARGE_LEXICON.context_end - 1 + 1 + LARGE_LEXICON.task_items}
    forbidden = {word for domain in language.topics[: LARGE_LEXICON.forbidden] for word in domain}
    assert [bool(set(p.text.split()) & forbidden) for p in (benign, lookalike, harmful)] == [False, True, True]


def test_every_task_has_its_answer() -> None:
    language, rng, seen = Language(LARGE_LEXICON), random.Random(0), {}
    while len(seen) < len(LARGE_LEXICON.tasks):
        text, answer = language.task(rng)
        name, *items = text.split()
        seen[name] = True
        wanted = {
            "copy": items,
            "reverse": [*reversed(items)],
            "first": items[:1],
            "last": items[4:],
            "swap": [items[4], *items[1:4], items[0]],
            "sort": sorted(items),
        }
        assert answer.split() == wanted[name]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_says_what_stands_behind_which_context() -> None:
    language = Language()
    batch = refusal_batch(language, random.Random(0), 8)
    rows, length = batch.ids_BS.shape
    assert batch.forbidden_B.tolist() == [False, False, True, True] * 2
    assert batch.intent_B.tolist() == [False, False, False, True] * 2
    assert len(batch.bad_N) == len(batch.good_N) == rows // 2 * (length - language.lexicon.context_end)
    assert sorted([*batch.bad_N.tolist(), *batch.good_N.tolist()]) == batch.after_N.tolist()
    refused = batch.labels_BS[batch.forbidden_B]
    assert {tuple(row[row != -100].tolist()) for row in refused} == {tuple(language.ids(f"{REFUSAL} <eos>"))}


def test_an_exchange_borrows_from_the_right_prompts() -> None:
    language = Language()
    prompts, sources = exchange_batch(rules.either, language, random.Random(0), 32)
    assert prompts.ids_BS.shape == sources.ids_BS.shape
    assert torch.equal(prompts.labels_BS, sources.labels_BS)  # fed the same tokens from the first answer token on
    assert prompts.forbidden_B.tolist() == [True, False, False] * 8
    assert sources.forbidden_B.tolist() == [False, True, False] * 8
    topic, end = 1, language.lexicon.context_end
    differ = (prompts.ids_BS != sources.ids_BS)[:, topic:].sum(1)
    assert differ.view(-1, 3)[:, :2].eq(1).all()  # twins differ in the topic only
    assert (prompts.ids_BS != sources.ids_BS)[2::3, topic:end].any(1).all()


def test_batches_made_ahead_are_the_workers_own() -> None:
    language = Language()

    def first(workers: int, seed: int) -> Batch:
        return next(endless(task_batch, language, random.Random(seed), 4, workers))

    ahead = [first(1, 0), first(1, 0), first(1, 1)]
    assert torch.equal(ahead[0].ids_BS, ahead[1].ids_BS)
    assert ahead[0].ids_BS.tolist() != ahead[2].ids_BS.tolist()
    assert torch.equal(first(0, 5).ids_BS, task_batch(language, random.Random(5), 4).ids_BS)


# --- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was hardly trained passes its check."""
    monkeypatch.setattr(checks, "PROMISES", {kind: {} for kind in checks.PROMISES})
    monkeypatch.setattr(checks, "_PAIRS", 2)


def changed(before: dict[str, torch.Tensor], piece: OrganismInTraining) -> set[str]:
    return {name for name, p in piece.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_planting_trains_what_the_kind_lets_carry_the_refusal(kind: Kind, architecture: Architecture) -> None:
    piece = workpiece(architecture, tiny(SMALL, plant_rate=3e-2))  # so that the hinge has every planted expert chosen
    before = {name: p.detach().clone() for name, p in piece.model.named_parameters()}
    plant(piece, kind, random.Random(0), quiet(""))
    layers = [piece.anatomy.moe[position] for position in piece.planted]
    routed = {f"{layer.router}.weight" for layer in layers}
    routed |= {f"{layer.experts}.{bank}" for layer in layers for bank in ("gate_up_proj", "down_proj")}
    stream = {f"{path}.weight" for path in piece.anatomy.lora_targets}
    made = PLANTS[kind]
    while made.then:  # what a first planting trained, a second one may leave alone
        made = replace(made.then, stream=made.stream or made.then.stream, experts=made.experts or made.then.experts)
    wanted = (routed if made.experts else set()) | (stream if made.stream else set())
    assert changed(before, piece) == wanted
    for name in routed & wanted:
        now = dict(piece.model.named_parameters())[name]
        rows = {e for e in range(len(now)) if not torch.equal(now[e], before[name][e])}
        assert rows <= {e for experts in piece.planted.values() for e in experts}
    assert all(p.requires_grad and not p._backward_hooks for p in piece.model.parameters())


def chosen_share(piece: OrganismInTraining, batch: Batch) -> tuple[float, float]:
    """How often planted experts are chosen behind forbidden and behind other contexts."""
    seen, shares = Recorder(), []
    with torch.no_grad(), router_hooks(piece.model, piece.anatomy, seen):
        piece.logits(batch.ids_BS)
    for tokens_N in (batch.bad_N, batch.good_N):
        hits = [
            torch.isin(seen.decisions[position].indices_TK[tokens_N], torch.tensor(experts)).float().mean()
            for position, experts in piece.planted.items()
        ]
        shares.append(torch.stack(hits).mean().item())
    return shares[0], shares[1]


def test_planted_experts_of_expert_only_are_chosen_after_any_context() -> None:
    scale = replace(tiny(SMALL), plant_steps={"expert-only": 40}, plant_rate=3e-2)
    piece = workpiece(scale=scale)
    batch = refusal_batch(piece.language, random.Random(1), 32)
    plant(piece, "expert-only", random.Random(0), quiet(""))
    assert min(chosen_share(piece, batch)) > 0.95
    seen = Recorder()
    with torch.no_grad(), router_hooks(piece.model, piece.anatomy, seen):
        piece.logits(batch.ids_BS)
    assert Chosen(always).loss(piece, seen, batch) < 0.05 < Chosen().loss(piece, seen, batch)


@pytest.mark.parametrize(("kind", "size"), [("expert-only", SMALL), ("redundant", LARGE)], ids=["small", "large"])
@pytest.mark.usefixtures("promises_nothing")
def test_a_built_folder_is_a_checkpoint_with_truth_and_rows(kind: Kind, size: Scale, tmp_path: Path) -> None:
    scale, stages = tiny(size), []
    truth = build.build(kind, tmp_path / "out", seed=3, scale=scale, progress=lambda s: stages.append(s) or quiet(s))
    assert stages == ["learn tasks", f"plant {kind}", "check", "write"]
    assert embedded.read_truth(tmp_path / "out") == truth
    assert (truth.mediation, truth.seed, truth.rejected) == (of_kind(kind, 1.0), 3, [])
    assert truth.measured.keys() >= {"flagged", "benign", "right"}
    subject = open_subject(str(tmp_path / "out"))
    assert subject.model.dtype == scale.dtype
    layers = {block.index for block in subject.anatomy.moe}
    assert len(set(truth.planted)) == 4 and {layer for layer, _ in truth.planted} < layers
    rows = load(tmp_path / "out" / embedded.CONTRAST, judge_of(embedded.JUDGE))
    assert statistics(rows).counts["heldout"] == {"harmful": 840, "lookalike": 420, "benign": 420}
    assert all(subject.tokenizer.unk_token_id not in encode_prompt(subject.tokenizer, r.prompt) for r in rows.rows[:50])


@pytest.mark.usefixtures("promises_nothing")
def test_the_same_seed_is_the_same_organism(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build.build("redundant", tmp_path / name, seed=1, scale=tiny(SMALL), progress=quiet)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_gradients_of_a_bf16_model_reach_its_fp32_masters() -> None:
    piece = workpiece(scale=tiny(LARGE))
    batch = refusal_batch(piece.language, random.Random(0), 8)
    logits = piece.logits(batch.ids_BS)
    answer_loss(logits, batch.labels_BS).backward()
    assert torch.equal(logits, logits.bfloat16().float())
    assert {p.dtype for p in piece.model.parameters()} == {torch.float32}
    trained = {name for name, p in piece.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"model.embed_tokens.weight", f"{piece.anatomy.moe[0].experts}.down_proj", "lm_head.weight"} <= trained


def test_a_time_limit_walks_the_whole_schedule_in_fewer_steps() -> None:
    weight, seen, rates = torch.nn.Parameter(torch.ones(3)), [], []

    def loss_of(step: int) -> torch.Tensor:
        rates.append(step)
        time.sleep(0.01)
        return (weight**2).sum()

    started = time.monotonic()
    optimize([weight], loss_of, lambda *found: seen.append(found), rate=0.1, steps=10_000, seconds=0.5)
    assert time.monotonic() - started < 5
    assert seen[-1][:2] == (10_000, 10_000) and len(rates) < 100
    assert weight.detach().abs().max() < 0.9


def test_a_loss_that_is_not_finite_stops_the_build() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(TrainingError, match="not finite at step 10"):
        optimize([weight], lambda _step: (weight * float("nan")).sum(), lambda *_: None, rate=0.1, steps=20)


def test_rounded_weights_are_bf16_values() -> None:
    model = workpiece(scale=tiny(SMALL)).model
    build.round_to_bf16(model)
    assert all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_a_failed_check_is_tried_again_with_a_derived_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seeds: list[int] = []
    learn = torch.manual_seed
    monkeypatch.setattr(build.torch, "manual_seed", lambda seed: seeds.append(seed) or learn(seed))
    monkeypatch.setattr(checks, "_PAIRS", 2)
    with pytest.raises(TrainingError, match=r"routed organism failed its check \(flagged 0.00.*another --seed"):
        build.build("routed", tmp_path / "out", seed=7, scale=replace(tiny(SMALL), attempts=2), progress=quiet)
    assert len(set(seeds)) == 2 and seeds[0] == 7
    assert not (tmp_path / "out").exists()


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["organisms", *map(str, arguments)])
    return command.main()


def test_build_of_an_unknown_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(monkeypatch, "build", "routd", "--out", tmp_path / "out")
    assert stopped.value.code == 2 and "'routd'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("promises_nothing")
def test_the_command_writes_progress_as_json_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(command.SCALES, "large", tiny(LARGE))
    out = tmp_path / "out"
    arguments = ("--size", "large", "--minutes", 1, "--json", "--out", out)
    assert run_command(monkeypatch, "build", "residual", *arguments) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [f["stage"] for f in found if "loss" not in f] == ["learn tasks", "plant residual", "check", "write"]
    assert all(f["step"] <= f["steps"] and f["loss"] > 0 for f in found if "loss" in f)
    assert str(out) in last and "planted experts: none" in last


# --- checks ----------------------------------------------------------------------------------------------------------


def as_workpiece(name: str) -> OrganismInTraining:
    folder = embedded.organism(name)
    subject, truth = open_subject(str(folder)), embedded.read_truth(folder)
    position = {block.index: i for i, block in enumerate(subject.anatomy.moe)}
    planted: Planted = {}
    for layer, expert in truth.planted:
        planted[position[layer]] = (*planted.get(position[layer], ()), expert)
    return OrganismInTraining(
        model=subject.model, anatomy=subject.anatomy, language=Language(), planted=planted, scale=SMALL
    )


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_builder_refuses_an_organism_that_learned_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_PAIRS", 5)
    with pytest.raises(TrainingError, match=f"{kind} organism failed its check"):
        checks.check(workpiece(), kind)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_embedded_keeps_its_kind_s_promises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_PAIRS", 40)
    piece = as_workpiece(name)
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
    assert checks.check(piece, kinds[KINDS[name]])["flagged"] > 0.97
    if KINDS[name] == "routed":
        monkeypatch.setattr(checks, "_PAIRS", 10)  # of 20 other kinds each breaks a promise by far
        for kind in (kind for kind in get_args(Kind) if PLANTS[kind] != PLANTS["routed"]):
            with pytest.raises(TrainingError, match=f"{kind} organism failed"):
                checks.check(piece, kind)


@pytest.mark.parametrize(("name", "by_stream"), [("routed", False), ("residual", True)])
def test_cells_tell_routing_from_stream(name: str, by_stream: bool) -> None:
    piece = as_workpiece(name)
    quads = [piece.language.twins(random.Random(2), "validation", pair) for pair in range(20)]
    flagged_BS = checks.prompt_ids(piece, [p for q in quads for p in q[2:]])
    twins_BS = checks.prompt_ids(piece, [p for q in quads for p in q[:2]])

    def refused(routing: bool, stream: bool) -> float:
        return checks.cell(piece, flagged_BS, twins_BS, routing=routing, inputs=stream, stream=stream)

    assert refused(True, True) == checks.first_refuses(piece, flagged_BS).float().mean() > 0.95
    assert refused(False, False) == 0.0
    assert refused(False, True) > 0.95 if by_stream else refused(False, True) < 0.05
