"""What one pass over prompts shows, against the plain recorder, transformers and finite differences."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gtqlora import routing
from gtqlora.capture import (
    Decision,
    Mask,
    Observation,
    Recorder,
    Subject,
    forward,
    gradient_scores,
    left_padded,
    log_odds,
    observe,
    open_subject,
    router_hooks,
    top_tokens,
)
from gtqlora.config import ModelConfig
from gtqlora.errors import ModelError
from gtqlora.organisms import embedded
from tests import helpers
from tests.models import CORE, FAMILIES, VOCABULARY, save_tiny

RANDOM = np.random.default_rng(0)
PROMPTS = [RANDOM.integers(5, VOCABULARY, size).tolist() for size in (9, 4, 12, 7, 1)]
ANSWERS = [RANDOM.integers(5, VOCABULARY, size).tolist() for size in (3, 0, 2, 5, 4)]
SINCE = [2, 0, 5, 7, 0]


@pytest.fixture(scope="module", params=(*CORE, "qwen3_next"))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(save_tiny(tmp_path_factory.mktemp("tiny"), request.param)))


def _observe(subject: Subject, order: list[int] | None = None, **more: Any) -> Observation:
    order = order or list(range(len(PROMPTS)))
    settings: dict[str, Any] = {"batch_size": 2, "label": "", "answers": [ANSWERS[i] for i in order], **more}
    return observe(subject, [PROMPTS[i] for i in order], since=[SINCE[i] for i in order], **settings)


@torch.no_grad()
def _alone(subject: Subject, index: int, *handlers: Any) -> dict[int, Decision]:
    recorder = Recorder()
    ids = torch.tensor([PROMPTS[index] + ANSWERS[index]])
    with router_hooks(subject.model, subject.anatomy, *handlers, recorder):
        forward(subject, ids, torch.ones_like(ids))
    return recorder.decisions


def _regions(index: int) -> dict[str, range]:
    end = len(PROMPTS[index])
    return {
        "prompt": range(SINCE[index], end),
        "last": range(end - 1, end),
        "answer": range(end, end + len(ANSWERS[index])),
    }


# --- choices


def test_every_region_counts_what_the_routers_decide_token_by_token(subject: Subject) -> None:
    """Against loops over the decisions of each prompt run alone."""
    seen, n_experts = _observe(subject), subject.anatomy.spec.n_experts
    for name in ("prompt", "last", "answer"):
        region = getattr(seen, name)
        weights: dict[tuple[int, int], list[float]] = {}
        tokens = 0
        for index in range(len(PROMPTS)):
            where = _regions(index)[name]
            tokens += len(where)
            for position, decision in _alone(subject, index).items():
                chosen = Counter(int(e) for t in where for e in decision.indices_TK[t])
                for t in where:
                    for expert, weight in zip(decision.indices_TK[t], decision.weights_TK[t], strict=True):
                        weights.setdefault((position, int(expert)), []).append(float(weight))
                rates = [chosen[e] / max(len(where), 1) for e in range(n_experts)]
                np.testing.assert_allclose(region.rates_NLE[index, position], rates, atol=1e-6)
                mass_E = torch.zeros(n_experts).scatter_add_(
                    0, decision.indices_TK[where].flatten(), decision.weights_TK[where].flatten().float()
                )
                share_E = mass_E / mass_E.sum().clamp(min=1e-9)
                np.testing.assert_allclose(region.mass_NLE[index, position], share_E, atol=1e-5)
        assert region.tokens == tokens
        for layer, expert in np.ndindex(region.counts_LE.shape):
            found = weights.get((layer, expert), [])
            assert region.counts_LE[layer, expert] == len(found)
            assert region.weight_LE[layer, expert] == pytest.approx(np.mean(found) if found else 0.0, abs=1e-5)


def test_coactivation_counts_pairs_of_experts(subject: Subject) -> None:
    seen = _observe(subject)
    expected = np.zeros_like(seen.coactivation_LEE)
    for index in range(len(PROMPTS)):
        for position, decision in _alone(subject, index).items():
            for t in _regions(index)["prompt"]:
                for a in decision.indices_TK[t]:
                    for b in decision.indices_TK[t]:
                        expected[position, a, b] += 1
    assert np.array_equal(seen.coactivation_LEE, expected)
    assert np.array_equal(np.diagonal(seen.coactivation_LEE, axis1=1, axis2=2), seen.prompt.counts_LE)


def test_layers_in_several_steps_give_the_same_coactivation(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _observe(subject).coactivation_LEE
    monkeypatch.setattr(routing, "_ONE_HOTS", 1)
    assert np.array_equal(_observe(subject).coactivation_LEE, whole)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1]])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batching_padding_and_order_change_nothing(subject: Subject, order: list[int], batch_size: int) -> None:
    expected, found = _observe(subject), _observe(subject, order, batch_size=batch_size)
    for name in ("prompt", "last", "answer"):
        a, b = getattr(expected, name), getattr(found, name)
        assert np.array_equal(a.counts_LE, b.counts_LE)
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.rates_NLE[order], b.rates_NLE, atol=1e-6)
        np.testing.assert_allclose(a.weight_LE, b.weight_LE, atol=1e-5)
    assert np.array_equal(expected.coactivation_LEE, found.coactivation_LEE)
    torch.testing.assert_close(expected.states_NSD[order], found.states_NSD, rtol=1e-4, atol=1e-4)


def test_without_answers_there_is_no_such_region_and_the_rest_is_the_same(subject: Subject) -> None:
    """A causal model's prompt does not see the answer."""
    expected, found = _observe(subject), _observe(subject, answers=None)
    assert found.answer is None
    assert np.array_equal(found.prompt.counts_LE, expected.prompt.counts_LE)
    torch.testing.assert_close(found.states_NSD, expected.states_NSD, rtol=1e-4, atol=1e-4)


def test_masked_experts_are_seen_as_the_routers_then_decide(subject: Subject) -> None:
    plain = _observe(subject)
    with router_hooks(subject.model, subject.anatomy, Mask(subject.anatomy, {0: (1, 4, 5)})):
        masked = _observe(subject)
    assert not masked.prompt.counts_LE[0, [1, 4, 5]].any()
    assert plain.prompt.counts_LE[0, [1, 4, 5]].any()
    assert masked.prompt.counts_LE.sum() == plain.prompt.counts_LE.sum()


@pytest.mark.parametrize("changes", [{"n_group": 4, "topk_group": 2}, {"n_routed_experts": 2, "n_group": 1}])
def test_experts_in_groups_and_all_of_them_chosen(tmp_path: Path, changes: dict[str, Any]) -> None:
    subject = open_subject(str(save_tiny(tmp_path, "deepseek_v3", **changes)))
    seen = _observe(subject)
    assert (seen.prompt.counts_LE.sum(1) == 2 * seen.prompt.tokens).all()
    if subject.anatomy.spec.n_experts == 2:
        assert (seen.answer.rates_NLE[0] == 1).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_frozen_experts_and_wrapped_models(tmp_path: Path, family: str) -> None:
    """An adapter that was not trained changes nothing, and its gates are where the routers were."""
    folder = save_tiny(tmp_path, family, dtype=torch.bfloat16)
    subject = open_subject(ModelConfig(model=str(folder), expert_format="nf4"))
    plain = _observe(subject)
    config = LoraConfig(target_modules=list(subject.anatomy.attention))
    seen = _observe(replace(subject, model=get_peft_model(subject.model, config)))
    assert np.array_equal(plain.prompt.counts_LE, seen.prompt.counts_LE)
    assert plain.prompt.counts_LE.sum() == plain.prompt.tokens * 2 * len(subject.anatomy.moe)
    assert torch.equal(plain.states_NSD, seen.states_NSD)


# --- states


def test_states_are_those_of_transformers_at_the_last_prompt_token(subject: Subject) -> None:
    states_NSD = _observe(subject).states_NSD
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            output = subject.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False)
        expected = torch.stack([state[0, -1] for state in output.hidden_states])
        torch.testing.assert_close(states_NSD[index], expected, rtol=1e-4, atol=1e-4)


def test_nothing_stays_hooked(subject: Subject) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())

    before = hooks()
    _observe(subject)
    gradient_scores(subject, PROMPTS, [5], batch_size=2, label="")
    assert hooks() == before


# --- NaN


@pytest.mark.parametrize(("writer", "layer"), [("mlp.gate", 1), ("attention", 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_nan_is_an_error_that_names_the_layer(tmp_path: Path, family: str, writer: str, layer: int) -> None:
    subject = open_subject(str(save_tiny(tmp_path, family)))
    of_layer = [path for path in subject.anatomy.residual_writers if path.startswith(f"model.layers.{layer}.")]
    path = of_layer[0] if writer == "attention" else f"model.layers.{layer}.{writer}"
    with torch.no_grad():
        subject.model.get_submodule(path).weight[3] = float("nan")
    with pytest.raises(ModelError, match=f"layer {layer}: its routing or its output holds NaN"):
        _observe(subject)


def test_nan_in_the_padding_is_none(subject: Subject) -> None:
    """Some attention kernels leave NaN where nothing may be attended to."""
    tokens = sorted((p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)), key=len)
    _, mask_BS = left_padded(tokens, subject.pad_id, subject.device)
    last = len(subject.anatomy.moe) - 1

    def spoil(position: int, _module: nn.Module, decision: Decision) -> Decision | None:
        spoiled_TK = decision.weights_TK.masked_fill(mask_BS.flatten()[:, None] == 0, float("nan"))
        return Decision(decision.logits_TE, spoiled_TK, decision.indices_TK) if position == last else None

    with router_hooks(subject.model, subject.anatomy, spoil):
        found = _observe(subject, batch_size=len(PROMPTS))
    np.testing.assert_allclose(found.prompt.weight_LE, _observe(subject).prompt.weight_LE, atol=1e-5)


# --- gradients


@pytest.fixture(scope="module", params=["routed", "routed-qwen3"])
def organism(request: pytest.FixtureRequest) -> Subject:
    return open_subject(str(embedded.organism(request.param)))


def _readout(subject: Subject) -> list[int]:
    return subject.tokenizer.convert_tokens_to_ids(["refuse", "sorry"])  # type: ignore[return-value]


@torch.no_grad()
def _log_odds(subject: Subject, prompts: list[list[int]], *handlers: Any) -> Tensor:
    with router_hooks(subject.model, subject.anatomy, *handlers):
        logits = forward(subject, *left_padded(prompts, subject.pad_id, subject.device))[:, -1]
    return log_odds(logits, torch.tensor(_readout(subject)))


def test_log_odds_are_those_of_the_probability() -> None:
    logits_BV = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    p = logits_BV.softmax(-1)[:, [1, 4]].sum(-1)
    torch.testing.assert_close(log_odds(logits_BV, torch.tensor([1, 4])), (p / (1 - p)).log())


def test_gradient_scores_are_finite_differences(organism: Subject) -> None:
    """An expert's weights scaled by 1 +- h, all other decisions replayed: the derivative in h is the score."""
    prompts = [RANDOM.integers(5, VOCABULARY, size).tolist() for size in (6, 9)]
    found = gradient_scores(organism, prompts, _readout(organism), batch_size=1, label="")
    recorder, h = Recorder(), 1e-2
    _log_odds(organism, prompts, recorder)

    def scaled(layer: int, expert: int, factor: float) -> Tensor:
        def handler(position: int, _module: nn.Module, decision: Decision) -> Decision:
            base = recorder.decisions[position]
            ours = (base.indices_TK == expert) & (position == layer)
            return Decision(decision.logits_TE, base.weights_TK * torch.where(ours, factor, 1.0), base.indices_TK)

        return _log_odds(organism, prompts, handler)

    largest = np.abs(found).max()
    assert largest > 0.1
    for layer, expert in np.argwhere(np.abs(found).max(0) > 0.05 * largest).tolist():
        difference = scaled(layer, expert, 1 + h) - scaled(layer, expert, 1 - h)
        np.testing.assert_allclose(found[:, layer, expert], difference / (2 * h), atol=5e-3 * largest)


def test_gradient_scores_do_not_depend_on_batches(organism: Subject) -> None:
    one, all_of_them = (gradient_scores(organism, PROMPTS, [5, 6], batch_size=n, label="") for n in (1, 5))
    np.testing.assert_allclose(one, all_of_them, atol=1e-4)


def test_gradient_scores_leave_the_parameters_as_they_were(subject: Subject) -> None:
    parameters = list(subject.model.parameters())
    parameters[0].requires_grad_(False)
    with torch.no_grad():
        gradient_scores(subject, PROMPTS[:2], [5], batch_size=2, label="")
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(p.grad is None for p in parameters)
    parameters[0].requires_grad_(True)


@pytest.mark.parametrize("expert_format", ["bf16", "nf4"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_gradient_scores_in_bf16_and_through_frozen_experts(tmp_path: Path, family: str, expert_format: str) -> None:
    folder = save_tiny(tmp_path, family, dtype=torch.bfloat16)
    subject = open_subject(ModelConfig(model=str(folder), expert_format=expert_format))  # type: ignore[arg-type]
    found = gradient_scores(subject, PROMPTS, [5, 6], batch_size=2, label="")
    assert np.abs(found).max(axis=(1, 2)).all()
    assert ((found != 0) <= (_rates(subject) > 0)).all()


def _rates(subject: Subject) -> np.ndarray:
    return observe(subject, PROMPTS, since=[0] * len(PROMPTS), batch_size=2, label="").prompt.rates_NLE


def test_gradients_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    subject = open_subject(str(save_tiny(tmp_path, "qwen3_moe")))
    with torch.no_grad():
        subject.model.lm_head.weight[3] = float("nan")
    with pytest.raises(ModelError, match="gradients of the routing weights"):
        gradient_scores(subject, PROMPTS, [5], batch_size=2, label="")
    with pytest.raises(ValueError, match="no readout tokens"):
        gradient_scores(subject, PROMPTS, [], batch_size=2, label="")


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(helpers.ROOT / "bench"))
    sizes = ["--tiny", "--prompts", "2", "--tokens", "8", "--batches", "1", "--rounds", "1"]
    helpers.bench_module("capture").main(["--device", "cpu", *sizes])
    assert "2 MoE layers x 8 experts" in (told := capsys.readouterr().out)
    assert float(told.split()[-1]) > 0


# --- tokens


def test_top_tokens_count_occurrences(subject: Subject) -> None:
    """Against loops over the decisions of each prompt run alone."""
    some = np.random.default_rng(1).integers(20, 26, (12, 9)).tolist()
    since, experts = [i % 4 for i in range(12)], [(0, 2), (1, 5)]
    found = top_tokens(subject, some, since, experts, batch_size=5, limit=100)
    for (layer, expert), rates in zip(experts, found, strict=True):
        met, chosen = Counter[str](), Counter[str]()
        for tokens, first in zip(some, since, strict=True):
            recorder, ids = Recorder(), torch.tensor([tokens])
            with torch.no_grad(), router_hooks(subject.model, subject.anatomy, recorder):
                forward(subject, ids, torch.ones_like(ids))
            for t in range(first, len(tokens)):
                word = str(subject.tokenizer.decode([tokens[t]]))
                met[word] += 1
                chosen[word] += int(expert in recorder.decisions[layer].indices_TK[t])
        overall = chosen.total() / met.total()
        expected = {w: (n / met[w], n / met[w] / overall) for w, n in chosen.items() if n and met[w] >= 5}
        assert {r.token: r.rate for r in rates} == pytest.approx({w: rate for w, (rate, _) in expected.items()})
        assert {r.token: r.lift for r in rates} == pytest.approx({w: lift for w, (_, lift) in expected.items()})
        assert [r.rate for r in rates] == sorted((r.rate for r in rates), reverse=True)


def test_tokens_met_too_seldom_are_left_out_and_the_rest_cut(subject: Subject) -> None:
    often, seldom = [[30, 31, 32]] * 5, [[40, 41, 42]] * 4
    (found,) = top_tokens(subject, often + seldom, [0] * 9, [(0, 1)], batch_size=9, limit=100)
    words = {str(subject.tokenizer.decode([token])) for token in (30, 31, 32)}
    assert {r.token for r in found} <= words
    every = top_tokens(subject, often, [0] * 5, [(0, e) for e in range(8)], batch_size=9, limit=1)
    assert {len(one) for one in every} <= {0, 1}
    assert any(every)
