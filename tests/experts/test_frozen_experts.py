"""Frozen experts against transformers' own with the same weights; what they keep, refuse and leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gtqlora.errors import ModelError
from gtqlora.experts import FORMATS, FrozenExperts, format_of
from gtqlora.experts.kernels import NAMES, PREFIX
from gtqlora.experts.kernels.rows import combine, gather, sort_rows, spread
from tests import models
from tests.experts.gradients import outputs_and_gradients

ALL = pytest.mark.parametrize("name", FORMATS)
FAMILIES = pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
EXPERTS, HIDDEN, INNER, TOP_K = 8, 32, 16, 2
Batch = tuple[Tensor, Tensor, Tensor]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _frozen(name: str, n: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER, **more: Any) -> FrozenExperts:
    """Experts with random weights; expert number e has the same ones whatever range is held."""
    made = FrozenExperts(
        format=format_of(name), n_experts=n, hidden_size=hidden, intermediate_size=inner, act_fn=nn.SiLU(), **more
    )
    for expert in range(made.first, made.first + made.count):
        for place, projection in enumerate(("gate", "up", "down")):
            sizes = made.sizes(projection)
            made.quantize_into(expert, projection, 0.2 * torch.randn(sizes, generator=_generator(10 * expert + place)))
    return made


def _decoder_moe(model: nn.Module) -> Any:
    return model.get_submodule("model.layers.1.mlp")


def _ordinary(frozen: FrozenExperts, family: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    """The family's own experts module, with what the frozen ones dequantize to."""
    model = models.tiny_model(family)
    model.config._experts_implementation = implementation
    experts = _decoder_moe(model).experts
    experts.gate_up_proj.data = frozen.weights("gate_up", slice(None), dtype)
    experts.down_proj.data = frozen.weights("down", slice(None), dtype)
    return experts.requires_grad_(False)


def _batch(tokens: int = 33, dtype: torch.dtype = torch.float32, n: int = EXPERTS, hidden: int = HIDDEN) -> Batch:
    """Hidden states_TD, distinct experts_TK and weights_TK (as routers give them: fp32 unless all is fp64)."""
    generator = _generator(tokens)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.rand(tokens, n, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    return states.requires_grad_(), index, weights.requires_grad_()


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative to the whole."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def _assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], most: float) -> None:
    for what, ours, theirs in zip(("output", "states' gradient", "weights' gradient"), found, expected, strict=True):
        assert _error(ours, theirs) <= most, what


# --- the same as transformers


@ALL
@FAMILIES
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_outputs_and_gradients_are_those_of_transformers(
    name: str, family: str, implementation: str, dtype: torch.dtype, most: float
) -> None:
    frozen, batch = _frozen(name), _batch(dtype=dtype)
    ordinary = _ordinary(frozen, family, implementation, dtype)
    _assert_close(outputs_and_gradients(frozen, batch), outputs_and_gradients(ordinary, batch), most)


@ALL
def test_bf16_is_no_farther_from_exact_than_transformers(name: str) -> None:
    frozen, batch = _frozen(name), _batch(tokens=200, dtype=torch.bfloat16)
    states, index, weights = batch
    wide = _ordinary(frozen, "qwen3_moe", "eager", torch.bfloat16).double()
    exact = outputs_and_gradients(wide, (states.double(), index, weights.double()))
    ours, theirs = (
        outputs_and_gradients(frozen, batch),
        outputs_and_gradients(_ordinary(frozen, "qwen3_moe", "eager", torch.bfloat16), batch),
    )
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert (mine - truth).norm() <= 1.1 * (other - truth).norm()


@ALL
@pytest.mark.parametrize("held", [{}, {"first": 1, "count": 2}], ids=["all experts", "a range"])
def test_gradients_are_those_of_finite_differences(name: str, held: dict[str, int]) -> None:
    frozen = _frozen(name, n=4, hidden=16, inner=8, **held)
    states, index, weights = _batch(tokens=5, dtype=torch.float64, n=4, hidden=16)
    assert torch.autograd.gradcheck(lambda s, w: frozen(s, index, w), (states, weights))


def _all_to_one(tokens: int) -> Batch:
    states, index, weights = _batch(tokens)
    return states, torch.full_like(index, 5), weights


def _most_empty(tokens: int) -> Batch:
    states, index, weights = _batch(tokens)
    return states, index % 3 + 4, weights


@ALL
@pytest.mark.parametrize(
    "batch",
    [_batch(1), _batch(7), _all_to_one(9), _all_to_one(1), _most_empty(21)],
    ids=["one token", "odd rows", "all to one expert", "one token twice to one expert", "empty experts"],
)
def test_uneven_routing(name: str, batch: Batch) -> None:
    frozen = _frozen(name)
    _assert_close(
        outputs_and_gradients(frozen, batch),
        outputs_and_gradients(_ordinary(frozen, "deepseek_v3", "eager", torch.float32), batch),
        1e-5,
    )


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(name: str, dtype: torch.dtype) -> None:
    out, states_grad, weights_grad = outputs_and_gradients(_frozen(name), _batch(0, dtype))
    assert out.shape == states_grad.shape == (0, HIDDEN)
    assert weights_grad.shape == (0, TOP_K)
    assert out.dtype == dtype


@ALL
def test_experts_in_small_portions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large layer's experts are dequantized one by one, and those without rows are not."""
    frozen, batch = _frozen(name), _most_empty(21)
    together = outputs_and_gradients(frozen, batch)
    seen: list[slice] = []
    plain = frozen.weights

    def watched(projection: Any, experts: slice, dtype: torch.dtype) -> Tensor:
        seen.append(experts)
        return plain(projection, experts, dtype)

    monkeypatch.setattr("gtqlora.experts.kernels.reference._WEIGHTS_AT_ONCE", 1)
    monkeypatch.setattr(frozen, "weights", watched)
    assert all(torch.equal(one, all_) for one, all_ in zip(outputs_and_gradients(frozen, batch), together, strict=True))
    assert {(experts.start, experts.stop) for experts in seen} == {(4, 5), (5, 6), (6, 7)}


@ALL
def test_half_precision_without_a_gradient_for_one_of_them(name: str) -> None:
    frozen = _frozen(name)
    states, index, weights = _batch(dtype=torch.float16)
    full = outputs_and_gradients(frozen, (states, index, weights))
    for frozen_one in (0, 1):
        given = [states.detach(), weights.detach()]
        given[1 - frozen_one].requires_grad_()
        out = frozen(given[0], index, given[1])
        out.backward(torch.randn(out.shape, generator=_generator(1)).to(out))
        assert given[frozen_one].grad is None
        grad = given[1 - frozen_one].grad
        assert grad is not None and torch.equal(grad, full[2 - frozen_one])


def test_autocast_sets_the_precision() -> None:
    frozen = _frozen("nf4")
    states, index, weights = _batch()
    narrow = frozen(states.bfloat16(), index, weights)
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = outputs_and_gradients(frozen, (states, index, weights))
    assert out.dtype == grads[0].dtype == torch.float32
    assert torch.equal(out, narrow.float())


# --- ranges


@ALL
@pytest.mark.parametrize("bounds", [(0, 4, 8), (0, 1, 6, 8), tuple(range(9))], ids=str)
def test_ranges_add_up_to_the_whole(name: str, bounds: tuple[int, ...]) -> None:
    batch = _batch()
    whole = outputs_and_gradients(_frozen(name), batch)
    ranges = [
        outputs_and_gradients(_frozen(name, first=start, count=stop - start), batch) for start, stop in pairwise(bounds)
    ]
    _assert_close(tuple(torch.stack(parts).sum(0) for parts in zip(*ranges, strict=True)), whole, 1e-5)


@ALL
def test_experts_held_elsewhere_contribute_nothing(name: str) -> None:
    """Also the number after the last expert, which transformers gives to rows of other ranks."""
    states, index, weights = _batch()
    for held, expert in (({"first": 2, "count": 3}, 5), ({"first": 2, "count": 3}, 1), ({}, EXPERTS)):
        found = outputs_and_gradients(_frozen(name, **held), (states, torch.full_like(index, expert), weights))
        assert [float(part.abs().sum()) for part in found] == [0.0, 0.0, 0.0]


def test_the_rest_is_held_if_only_the_first_is_given() -> None:
    frozen = _frozen("nf4", first=5)
    assert (frozen.first, frozen.count, frozen.n_experts) == (5, 3, 8)
    assert frozen.get_buffer("gate_up_packed").shape[:2] == (3, 2)
    assert frozen.get_buffer("down_packed").shape[:2] == (3, 1)
    assert torch.equal(
        frozen.weights("down", slice(1, 2), torch.float32), _frozen("nf4").weights("down", slice(6, 7), torch.float32)
    )


@settings(deadline=None, max_examples=60)
@given(
    index=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=12),
    first=st.integers(0, 7),
    data=st.data(),
)
def test_rows_are_sorted_by_expert_and_come_back(index: list[list[int]], first: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8 - first))
    rows = sort_rows(torch.tensor(index, dtype=torch.int64).view(-1, 3), first, count)
    offsets, flat = rows.offsets_E1.tolist(), [expert for choices in index for expert in choices]
    for held in range(count):
        mine = rows.order_R[offsets[held] : offsets[held + 1]].tolist()
        assert mine == [place for place, expert in enumerate(flat) if expert == first + held]
    assert sorted(rows.order_R.tolist()) == list(range(len(flat)))
    numbers = torch.arange(1.0, len(index) + 1).unsqueeze(-1)
    back = spread(gather(numbers, rows, offsets[-1]), rows)
    expected = [[t + 1.0 if first <= e < first + count else 0.0 for e in choices] for t, choices in enumerate(index)]
    assert back.squeeze(-1).tolist() == expected
    ones = torch.ones(len(index), 3)
    assert combine(gather(numbers, rows, offsets[-1]), ones, rows).squeeze(-1).tolist() == [sum(c) for c in expected]


# --- what is kept for backward


def _saved(run: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return saved


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_rows_are_kept_for_backward(name: str, dtype: torch.dtype) -> None:
    frozen, (states, index, weights) = _frozen(name), _batch(5, dtype)
    saved = [tensor for tensor in _saved(lambda: frozen(states, index, weights)) if tensor.is_floating_point()]
    assert sorted(tuple(tensor.shape) for tensor in saved) == [(5, TOP_K), (5 * TOP_K, 2 * INNER)]
    assert max(tensor.numel() for tensor in saved) < HIDDEN * INNER, "a matrix would fit"


def test_nothing_is_kept_without_gradients() -> None:
    frozen, (states, index, weights) = _frozen("nf4"), _batch(5)
    assert _saved(lambda: frozen(states.detach(), index, weights.detach())) == []
    with torch.no_grad():
        assert _saved(lambda: frozen(states, index, weights)) == []
        assert not frozen(states, index, weights).requires_grad


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activation_checkpointing_changes_no_gradient(name: str, dtype: torch.dtype) -> None:
    frozen, batch = _frozen(name), _batch(dtype=dtype)
    plain = outputs_and_gradients(frozen, batch)
    again = outputs_and_gradients(lambda *inputs: checkpoint(frozen, *inputs, use_reentrant=False), batch)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


# --- the module


def _bits(frozen: FrozenExperts) -> dict[str, Tensor]:
    return {name: part.clone() for name, part in frozen.named_buffers()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@ALL
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
        lambda m: m.type(torch.float16),
        lambda m: m.cpu(),
    ],
)
def test_casts_leave_the_bits_alone(name: str, cast: Callable[[nn.Module], nn.Module]) -> None:
    frozen = _frozen(name)
    before = _bits(frozen)
    parent = nn.ModuleDict({"experts": frozen, "other": nn.Linear(2, 2)})
    cast(parent)
    assert _same(_bits(frozen), before)


@ALL
def test_devices_change_and_dtypes_stay(name: str) -> None:
    frozen = _frozen(name)
    before = _bits(frozen)
    frozen.to("meta", torch.float16)
    assert {part.device.type for part in frozen.buffers()} == {"meta"}
    frozen.to_empty(device="cpu").load_state_dict(before)
    assert _same(_bits(frozen), before)


@ALL
def test_nothing_trains_and_everything_is_saved(name: str) -> None:
    frozen = _frozen(name)
    assert list(frozen.parameters()) == []
    assert frozen.state_dict().keys() == dict(frozen.named_buffers()).keys()
    layout = frozen.format.layout(INNER, HIDDEN)
    assert frozen.state_dict().keys() == {f"{fused}_{part}" for fused in ("gate_up", "down") for part in layout}
    other = FrozenExperts(
        format=frozen.format, n_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INNER, act_fn=nn.SiLU()
    )
    other.load_state_dict(frozen.state_dict())
    assert _same(_bits(other), _bits(frozen))


@ALL
def test_a_deep_copy_is_independent(name: str) -> None:
    frozen, batch = _frozen(name), _batch()
    twin, before = copy.deepcopy(frozen), _bits(frozen)
    assert all(
        torch.equal(one, other)
        for one, other in zip(outputs_and_gradients(twin, batch), outputs_and_gradients(frozen, batch), strict=True)
    )
    twin.quantize_into(0, "gate", torch.zeros(INNER, HIDDEN))
    assert _same(_bits(frozen), before)
    assert not _same(_bits(twin), before)


def _weights(frozen: FrozenExperts) -> dict[str, Tensor]:
    everything = slice(None)
    return {
        "gate_up": frozen.weights("gate_up", everything, torch.float32),
        "down": frozen.weights("down", everything, torch.float32),
    }


@ALL
@pytest.mark.parametrize(
    ("projection", "fused", "rows"),
    [("gate", "gate_up", slice(0, 16)), ("up", "gate_up", slice(16, 32)), ("down", "down", slice(None))],
)
def test_put_writes_one_matrix(name: str, projection: Any, fused: Any, rows: slice) -> None:
    frozen = _frozen(name, first=2)
    sizes = frozen.sizes(projection)
    matrix = torch.randn(sizes, generator=_generator(77))
    parts = frozen.format.quantize(matrix)
    expected = _weights(frozen)
    expected[fused][3, rows] = frozen.format.dequantize(parts, *sizes, torch.float32)
    frozen.put(5, projection, parts)
    assert _same(_weights(frozen), expected)


@ALL
def test_parts_are_views(name: str) -> None:
    frozen = _frozen(name)
    views = {"gate_up": frozen.parts("gate_up", slice(2, 5)), "down": frozen.parts("down", slice(2, 5))}
    for fused, matrices in (("gate_up", 2), ("down", 1)):
        for part, view in views[fused].items():
            whole = frozen.get_buffer(f"{fused}_{part}")
            assert view.shape[:2] == (3, matrices)
            assert view.data_ptr() == whole[2].data_ptr()


@ALL
def test_what_does_not_fit_is_named(name: str) -> None:
    frozen = _frozen(name, first=2, count=3)
    bad = torch.full((INNER, HIDDEN), float("nan"))
    with pytest.raises(ModelError, match=f"expert 3 up: {name}: .* holds NaN"):
        frozen.quantize_into(3, "up", bad)
    with pytest.raises(ModelError, match=r"expert 3 down: a matrix \[16, 32\], expected \[32, 16\]"):
        frozen.quantize_into(3, "down", torch.zeros(INNER, HIDDEN))
    for expert in (1, 5):
        with pytest.raises(ModelError, match=f"expert {expert} is not among 2 to 4"):
            frozen.quantize_into(expert, "gate", torch.zeros(INNER, HIDDEN))
    parts = frozen.format.quantize(torch.zeros(INNER, 2 * HIDDEN))
    with pytest.raises(ModelError, match=f"expert 4 gate: {name}: .* 16 x 32 matrix"):
        frozen.put(4, "gate", parts)
    pair = frozen.format.quantize(torch.zeros(2, INNER, HIDDEN))
    with pytest.raises(ModelError, match=f"expert 4 gate: {name}: parts of \\[2\\] matrices"):
        frozen.put(4, "gate", pair)


@pytest.mark.parametrize("held", [{"first": -1}, {"first": 8}, {"first": 4, "count": 5}, {"count": 0}], ids=str)
def test_a_range_outside_the_layer(held: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="not a range of 8 experts"):
        _frozen("nf4", **held)


def test_sizes_that_the_format_cannot_hold() -> None:
    with pytest.raises(ModelError, match="int4-g32: 48 columns"):
        _frozen("int4-g32", inner=48)


def test_a_layer_of_any_size_on_meta() -> None:
    frozen = FrozenExperts(
        format=format_of("int4-g32"),
        n_experts=384,
        hidden_size=7168,
        intermediate_size=2048,
        act_fn=nn.SiLU(),
        device="meta",
    )
    bits = 8 * sum(part.nbytes for part in frozen.buffers())
    assert bits / (384 * 3 * 7168 * 2048) == 4.5
    assert "int4-g32, n_experts=384" in repr(frozen)


# --- in a model


def test_products_are_registered_with_transformers() -> None:
    assert {PREFIX + name for name in NAMES} <= set(ALL_EXPERTS_FUNCTIONS)


@FAMILIES
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_inside_a_model_whatever_its_other_experts_use(family: str, implementation: str) -> None:
    """Two equal models, one with frozen experts in a layer: the same logits and the same router gradients."""
    frozen = _frozen("nf4")
    found = []
    for experts in (frozen, _ordinary(frozen, family, "eager", torch.float32)):
        model = models.tiny_model(family)
        _decoder_moe(model).experts = experts
        model.config._experts_implementation = implementation
        logits = model(models.some_tokens()).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), _decoder_moe(model).gate.weight.grad))
    for ours, theirs in zip(*found, strict=True):
        assert _error(ours, theirs) <= 1e-4


def test_the_chosen_product_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, (states, index, weights) = _frozen("nf4"), _batch(3)
    monkeypatch.setitem(type(ALL_EXPERTS_FUNCTIONS)._global_mapping, "frozen_mine", lambda _m, s, _i, _w: s + 1)
    frozen.kernel = "mine"
    assert torch.equal(frozen(states, index, weights), states + 1)
    frozen.kernel = "reference"
    expected = frozen(states, index, weights)
    frozen.kernel = "auto"
    assert torch.equal(frozen(states, index, weights), expected)


# --- on a GPU


@pytest.mark.gpu
@ALL
def test_the_reference_on_cuda_is_that_on_the_cpu(name: str) -> None:
    frozen, batch = _frozen(name), _batch(200)
    expected = outputs_and_gradients(frozen, batch)
    weights = frozen.weights("gate_up", slice(None), torch.bfloat16)
    frozen.kernel = "reference"
    found = outputs_and_gradients(frozen.cuda(), (batch[0].cuda(), batch[1].cuda(), batch[2].cuda()))
    assert torch.equal(frozen.weights("gate_up", slice(None), torch.bfloat16).cpu(), weights)
    _assert_close(tuple(part.cpu() for part in found), expected, 1e-4)
