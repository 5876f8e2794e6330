"""The diagnosis against organisms whose ground truth is known, and its verdict against made-up outcomes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from gtqlora.capture import Recorder, Subject, open_subject, routers_tapped
from gtqlora.config import DiagnoseConfig, build
from gtqlora.contrasts import load
from gtqlora.diagnose import Diagnosis, diagnose, read_diagnosis, selection_rates
from gtqlora.errors import ContrastError
from gtqlora.judging import judge_of
from gtqlora.localise import MIN_PAIRS, Pair, control_prompts, pairs_of, random_like, verdict_of
from gtqlora.organisms import embedded
from gtqlora.run import Run, read_parquet

ORGANISMS = ("routed", "residual", "null", "routed-qwen3")
# A swap garbles one answer in five of this one, so that routing's share is about 80 % and takes more pairs to tell.
MANY_PAIRS = {"routed-qwen3": 250}


def _config(organism: str, contrast: Path, **given: Any) -> DiagnoseConfig:
    settings = {"model": embedded.organism(organism), "contrast": contrast, "random_controls": 1, "max_pairs": 500}
    return build(DiagnoseConfig, file=embedded.recipe(), **settings | given)


def _write_contrast(
    path: Path, change: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda _i, row: row, groups: int = 40
) -> Path:
    """Groups of a benign row, a lookalike and a harmful one, each row changed."""
    rows = [json.loads(line) for line in embedded.contrast().read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "validation"][: 3 * groups]
    path.write_text("\n".join(json.dumps(change(i, row)) for i, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def contrast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_contrast(tmp_path_factory.mktemp("contrast") / "c.jsonl")


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory: pytest.TempPathFactory, contrast: Path) -> Callable[[str], tuple[Diagnosis, Path]]:
    @cache
    def of(organism: str) -> tuple[Diagnosis, Path]:
        path = tmp_path_factory.mktemp(organism)
        groups = MANY_PAIRS.get(organism)
        rows = contrast if groups is None else _write_contrast(path / "c.jsonl", groups=groups)
        with Run(path / "run") as run:
            return diagnose(_config(organism, rows), run), run.path

    return of


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject(str(embedded.organism("routed")))


@pytest.fixture(scope="module")
def pairs(subject: Subject, contrast: Path) -> list[Pair]:
    return pairs_of(load(contrast, judge_of(embedded.JUDGE)), subject, 60, seed=0)


# --- against the ground truth


@pytest.mark.parametrize("organism", ORGANISMS)
def test_the_verdict_is_the_truth(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    truth = embedded.read_truth(embedded.organism(organism))
    assert found.verdict == truth.verdict
    assert found.sentence.startswith(found.verdict.capitalize())
    n = 2 * MANY_PAIRS.get(organism, 40)  # each group has a lookalike and a harmful row
    assert (found.n_pairs, found.n_aligned) == (n, n)
    share = found.share_routing
    assert share["low"] <= share["value"] <= share["high"]
    assert share["value"] > 0.7 if truth.verdict == "routing" else share["value"] < 0.1


@pytest.mark.parametrize("organism", ["routed", "routed-qwen3"])
def test_the_planted_experts_are_found_and_no_other(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    truth = embedded.read_truth(embedded.organism(organism))
    assert sorted((e["layer"], e["expert"]) for e in found.top_experts) == sorted(truth.planted)


def _named(found: Diagnosis, start: str) -> dict[str, Any]:
    (one,) = (i for i in found.interventions if i["name"].startswith(start))
    return one


@pytest.mark.parametrize("organism", ["routed", "routed-qwen3"])
def test_masking_tells_planted_experts_from_random_ones(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    mask, control = _named(found, "mask the 4 associated"), _named(found, "mask 4 random")
    assert (mask["control"], control["control"]) == (False, True)
    assert mask["effect"]["low"] > 0.5 > control["effect"]["high"]


def test_association_without_cause(diagnosed: Any) -> None:
    """`null`: the planted experts follow the flag, masking them changes nothing, and the verdict is not routing."""
    found, _ = diagnosed("null")
    truth = embedded.read_truth(embedded.organism("null"))
    assert set(truth.planted) <= {(e["layer"], e["expert"]) for e in found.top_experts}
    mask = _named(found, "mask the")
    assert mask["effect"]["low"] <= 0 <= mask["effect"]["high"]
    assert found.verdict == "residual"


@pytest.mark.parametrize("organism", ORGANISMS)
def test_the_untouched_model_refuses_flagged_prompts_and_no_twin(diagnosed: Any, organism: str) -> None:
    found, _ = diagnosed(organism)
    assert _named(found, "as it is")["refusal"]["value"] > 0.9
    assert _named(found, "as it is")["effect"]["value"] == 0
    assert _named(found, "twin as it is")["refusal"]["value"] < 0.1


# --- what it leaves


def test_association_rows_are_well_formed(diagnosed: Any) -> None:
    _, path = diagnosed("routed")
    rows = read_parquet(path / "diagnosis" / "association.parquet")
    assert sorted({(row["layer"], row["expert"]) for row in rows}) == [(i, e) for i in range(1, 5) for e in range(16)]
    assert len(rows) == 64
    for row in rows:
        assert row["difference"] == pytest.approx(row["rate_flagged"] - row["rate_twin"], abs=1e-6)
        assert row["low"] <= row["difference"] + 1e-9 and row["difference"] <= row["high"] + 1e-9
        assert 0 <= row["rate_flagged"] <= 1 and 0 <= row["rate_twin"] <= 1 and 0 <= row["q"] <= 1
    for layer in range(1, 5):  # every token picks two experts
        assert sum(r["rate_flagged"] for r in rows if r["layer"] == layer) == pytest.approx(2, abs=1e-4)
    planted = embedded.read_truth(embedded.organism("routed")).planted
    assert max(r["q"] for r in rows if (r["layer"], r["expert"]) in planted) < 1e-3


def test_the_direction_is_written_and_separates(diagnosed: Any) -> None:
    found, path = diagnosed("routed")
    direction = load_file(path / "diagnosis" / "directions.safetensors")["direction"]
    assert direction.shape == (6, 64)
    torch.testing.assert_close(direction[1:].norm(dim=-1), torch.ones(5))
    assert [d["layer"] for d in found.directions] == list(range(6))
    assert found.directions[-1]["separation"]["value"] > 0.95
    assert found.directions[-1]["separation"]["n"] == 80


def test_a_second_diagnosis_reads_the_first(diagnosed: Any, contrast: Path) -> None:
    found, path = diagnosed("routed")
    file = path / "diagnosis" / "diagnosis.json"
    before = file.stat().st_mtime_ns
    with Run(path) as run:
        assert diagnose(_config("routed", contrast), run) == found == read_diagnosis(run)
    assert file.stat().st_mtime_ns == before


def test_it_repeats_by_seed(tmp_path: Path, contrast: Path) -> None:
    found, rows = [], []
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        with Run(tmp_path / name) as run:
            found.append(diagnose(_config("routed", contrast, max_pairs=20, seed=seed), run))
        rows.append(read_parquet(tmp_path / name / "diagnosis" / "association.parquet"))
    assert found[0] == found[1] != found[2]
    assert rows[0] == rows[1] != rows[2]


# --- sets it cannot judge


def test_a_set_without_twins_is_an_error(tmp_path: Path) -> None:
    contrast = _write_contrast(tmp_path / "c.jsonl", lambda i, row: {**row, "twin": None, "pair_id": f"p{i}"})
    with Run(tmp_path / "run") as run, pytest.raises(ContrastError, match="split 'validation' has no twins"):
        diagnose(_config("routed", contrast), run)
    assert not (tmp_path / "run" / "diagnosis").exists()


@pytest.mark.parametrize("max_pairs", [1, 12])
def test_too_few_pairs_cannot_tell(tmp_path: Path, contrast: Path, max_pairs: int) -> None:
    """And it says how many are needed."""
    with Run(tmp_path) as run:
        found = diagnose(_config("routed", contrast, max_pairs=max_pairs), run)
    assert found.verdict == "cannot tell"
    assert f"and {MIN_PAIRS} are needed" in found.sentence
    assert found.n_pairs == max_pairs
    assert found.n_aligned == (max_pairs if max_pairs > 1 else 0)  # a lone pair has no control


def test_twins_of_other_lengths_cannot_tell(tmp_path: Path) -> None:
    def longer(_i: int, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "twin": row["twin"] and f"{row['twin']} {row['twin'].split()[0]}"}

    contrast = _write_contrast(tmp_path / "c.jsonl", longer)
    with Run(tmp_path / "run") as run:
        found = diagnose(_config("routed", contrast), run)
    assert (found.verdict, found.n_aligned, found.share_routing) == ("cannot tell", 0, {})
    assert "add twins of equal token count" in found.sentence
    assert found.n_pairs == 80
    assert found.top_experts  # the association needs no equal lengths


# --- selection rates


def test_selection_rates_do_not_depend_on_the_batch(subject: Subject, pairs: list[Pair]) -> None:
    prompts = [pair.prompt + pair.prompt[1 : 1 + i % 4] for i, pair in enumerate(pairs)]
    skip = [pair.common for pair in pairs]
    whole = selection_rates(subject, prompts, skip, 64, "")
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    shuffled = selection_rates(subject, [prompts[i] for i in order], [skip[i] for i in order], 7, "")
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-6)
    np.testing.assert_allclose(whole.sum(-1), 2, atol=1e-5)


def test_selection_rates_by_hand(subject: Subject, pairs: list[Pair]) -> None:
    pair, recorder = pairs[0], Recorder()
    with torch.no_grad(), routers_tapped(subject.model, subject.anatomy, recorder):
        subject.model(input_ids=torch.tensor([pair.prompt]), use_cache=False)
    skip = pair.common
    assert 0 < skip < len(pair.prompt)
    found = selection_rates(subject, [pair.prompt, pair.prompt * 2], [skip, 0], 2, "")[0]
    for position, decision in recorder.decisions.items():
        counts = torch.bincount(decision.indices_TK[skip:].flatten(), minlength=16) / (len(pair.prompt) - skip)
        np.testing.assert_allclose(found[position], counts.numpy(), atol=1e-6)


# --- pairs and controls


def test_a_pair_differs_after_its_common_start(pairs: list[Pair]) -> None:
    assert len(pairs) == 60
    for pair in pairs:
        assert pair.aligned
        assert pair.prompt[: pair.common] == pair.twin[: pair.common]
        assert pair.prompt[pair.common] != pair.twin[pair.common]


def test_control_prompts_are_flagged_siblings_of_the_same_length(pairs: list[Pair]) -> None:
    groups = {pair.row.pair_id for pair in pairs}
    assert len(groups) == 30  # lookalike and harmful of each
    flagged = {tuple(pair.prompt): pair.row.pair_id for pair in pairs}
    for pair, control in zip(pairs, control_prompts(pairs, 0), strict=True):
        assert control is not None
        assert len(control) == len(pair.prompt)
        assert control != pair.prompt
        assert flagged[tuple(control)] == pair.row.pair_id
    lone = [pair for pair in pairs if pair.row.kind == "harmful"]
    for pair, control in zip(lone, control_prompts(lone, 0), strict=True):
        assert control is not None
        assert tuple(control) in flagged
        assert control != pair.prompt
    assert control_prompts(pairs[:1], 0) == [None]


@given(
    seed=st.integers(0, 1000),
    masked=st.dictionaries(
        st.integers(0, 2), st.sets(st.integers(0, 15), min_size=1, max_size=6).map(sorted).map(tuple), min_size=1
    ),
)
def test_random_controls_match_a_mask(seed: int, masked: dict[int, tuple[int, ...]]) -> None:
    frequency = np.random.default_rng(seed).random((3, 16))
    control = random_like(masked, frequency, random.Random(seed))
    assert control.keys() == masked.keys()
    for layer, experts in masked.items():
        assert len(set(control[layer])) == len(experts)
        assert not set(control[layer]) & set(experts)


def test_random_controls_are_of_like_frequency() -> None:
    frequency = np.array([[0.9, 0.88, 0.86, 0.84, 0.82, *[0.0] * 11]])
    drawn = {random_like({0: (0,)}, frequency, random.Random(seed))[0][0] for seed in range(60)}
    assert drawn >= {1, 2, 3, 4}
    assert len(drawn) <= 5


# --- the verdict on made-up outcomes


@pytest.mark.parametrize(
    ("moved", "by_control", "n", "verdict"),
    [
        (100, 0, 100, "routing"),
        (90, 0, 100, "routing"),
        (0, 0, 100, "residual"),
        (15, 0, 100, "residual"),
        (50, 0, 200, "residual"),
        (100, 0, 200, "both"),
        (70, 0, 100, "cannot tell"),
        (65, 0, 100, "cannot tell"),
        (40, 0, 100, "cannot tell"),
        (33, 0, 100, "cannot tell"),
        (100, 50, 100, "cannot tell"),  # another flagged prompt's routing does half of it too
        (0, 0, MIN_PAIRS, "residual"),
        (MIN_PAIRS - 1, 0, MIN_PAIRS - 1, "cannot tell"),
        (0, 0, 0, "cannot tell"),
    ],
)
def test_verdicts(moved: int, by_control: int, n: int, verdict: str) -> None:
    found = verdict_of([i < moved for i in range(n)], [i < by_control for i in range(n)])
    assert found.verdict == verdict
    assert found.n_pairs == n
    assert found.sentence.startswith(f"{verdict.capitalize()}: ")
    if n:
        assert found.share_routing.value == pytest.approx((moved - by_control) / n)
    if n < MIN_PAIRS:
        assert f"only {n} aligned pairs" in found.sentence


def test_where_any_swap_removes_the_refusal_one_cannot_tell() -> None:
    """Nothing is known of a twin's routing when another flagged prompt's does the same."""
    assert verdict_of([True] * 100, [True] * 100).verdict == "cannot tell"


@pytest.mark.parametrize(("share", "verdict"), [(0.95, "routing"), (0.5, "both"), (0.1, "residual")])
def test_noisy_outcomes_give_the_verdict_of_their_share(share: float, verdict: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        noise = rng.random(300) < 0.05
        found = verdict_of(((rng.random(300) < share) | noise).tolist(), noise.tolist())
        assert found.verdict == verdict
