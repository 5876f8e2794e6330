"""The products for GPUs against exact ones with the dequantized weights: on a GPU, or slowly in Triton's interpreter.

`test_interpreter.py` runs this file interpreted; the variable must be set before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gtqlora.errors import ModelError
from gtqlora.experts import FORMATS, FrozenExperts, format_of
from gtqlora.experts.kernels.reference import reference
from tests import models, warm
from tests.experts.gradients import outputs_and_gradients

pytest.importorskip("triton")
from gtqlora.experts.kernels import chunk, fused, row_kernels
from gtqlora.experts.kernels.layer import Multiply, run
from gtqlora.experts.kernels.rows import Placed, Room

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_GPU = not INTERPRETED and torch.cuda.is_available()

EXPERTS, HIDDEN, INNER, TOP_K = 5, 64, 32, 2
SIZES = [
    *[("int4-g32", 64, 32), ("int4-g32", 96, 64), ("int4-g128", 40, 24), ("int4-g128", 256, 24)],
    *[("nf4", 64, 32), ("nf4", 64, 9)],
]
MOST = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Batch = tuple[Tensor, Tensor, Tensor]


def native(test: Callable[..., None]) -> Callable[..., None]:
    """A test that only a GPU can run."""
    return pytest.mark.gpu(pytest.mark.skipif(not ON_GPU, reason="needs a CUDA GPU")(test))


def either(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs on a GPU and in the interpreter."""
    return test if INTERPRETED else native(test)


def _multiply(product: str) -> Multiply:
    """The portable kernel, whatever `fused` takes on this GPU."""
    return fused.triton_multiply if product == "fused" else chunk.Chunks()


def _needs_bf16_products(product: str, dtype: torch.dtype) -> None:
    if INTERPRETED and product == "fused" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bf16 matrices as integers")


ALL = pytest.mark.parametrize("name", FORMATS)
BOTH = pytest.mark.parametrize("product", ["fused", "chunk"])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _frozen(
    name: str, hidden: int = HIDDEN, inner: int = INNER, n: int = EXPERTS, act_fn: nn.Module | None = None, **held: int
) -> FrozenExperts:
    """Experts with random weights; expert number e has the same ones whatever range is held."""
    sizes: dict[str, Any] = {"n_experts": n, "hidden_size": hidden, "intermediate_size": inner, **held}
    made = FrozenExperts(format=format_of(name), act_fn=act_fn or nn.SiLU(), **sizes)
    for expert in range(made.first, made.first + made.count):
        for place, projection in enumerate(("gate", "up", "down")):
            matrix = torch.randn(made.sizes(projection), generator=_generator(10 * expert + place))
            made.quantize_into(expert, projection, matrix * 0.2 * (1 + expert % 3))
    return made.to(DEVICE)


def _batch(tokens: int = 3, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, n: int = EXPERTS) -> Batch:
    generator = _generator(tokens)
    states = torch.randn(tokens, hidden, generator=generator).to(dtype)
    index = torch.rand(tokens, n, generator=generator).topk(TOP_K).indices
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return states.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)


def _layer(product: str, frozen: FrozenExperts) -> Callable[..., Tensor]:
    return lambda states, index, weights: run(frozen, states, index, weights, _multiply(product))


def _exact(frozen: FrozenExperts, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The reference in fp64, which rounds nothing."""
    states, index, weights = batch
    return outputs_and_gradients(lambda *inputs: reference(frozen, *inputs), (states.double(), index, weights.double()))


def _assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], most: float) -> None:
    for what, ours, exact in zip(("output", "states' gradient", "weights' gradient"), found, expected, strict=True):
        assert ours.shape == exact.shape
        assert float((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)) <= most, what


# --- products of rows


def _rows(counts: list[int]) -> Placed:
    """Rows that are sorted already."""
    offsets_E1 = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=DEVICE)
    order_R = torch.arange(sum(counts), device=DEVICE)
    return Placed(order_R=order_R, offsets_E1=offsets_E1, top_k=1, places_TK=order_R.unsqueeze(-1))


def _check_products(product: str, frozen: FrozenExperts, counts: list[int], dtype: torch.dtype) -> None:
    """All four products, with rows for experts held elsewhere behind the others."""
    for projection in ("gate_up", "down"):
        weights = frozen.weights(projection, slice(None), torch.float32).double()
        for transposed in (False, True):
            matrices = weights if transposed else weights.mT
            values = torch.randn(sum(counts) + 3, matrices.shape[1], generator=_generator()).to(DEVICE, dtype)
            values[sum(counts) :] = torch.nan
            groups = values[: sum(counts)].double().split(counts)
            expected = torch.cat([rows @ matrix for rows, matrix in zip(groups, matrices, strict=True)])
            found = _multiply(product)(values, frozen, projection, _rows(counts), transposed)
            assert found.dtype == dtype and found.is_contiguous() and len(found) == len(values)
            error = (found[: sum(counts)].double() - expected).norm() / expected.norm()
            assert error <= MOST[dtype], (projection, transposed)


@either
@BOTH
@pytest.mark.parametrize(("name", "hidden", "inner"), SIZES)
def test_products_for_all_sizes(product: str, name: str, hidden: int, inner: int) -> None:
    """Uneven rows, also more than a tile of them, experts without any, and sizes that no tile divides."""
    _check_products(product, _frozen(name, hidden, inner), [0, 1, 35, 0, 5], torch.float32)


@either
@BOTH
@pytest.mark.parametrize("name", ["nf4"] if INTERPRETED else FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_in_half_precision(product: str, name: str, dtype: torch.dtype) -> None:
    _needs_bf16_products(product, dtype)
    _check_products(product, _frozen(name), [0, 1, 35, 0, 5], dtype)


@either
@BOTH
@pytest.mark.parametrize("counts", [[0, 0, 0, 33, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 2]], ids=str)
def test_products_with_all_rows_for_one_expert(product: str, counts: list[int]) -> None:
    _check_products(product, _frozen("nf4"), counts, torch.float32)


@either
@BOTH
def test_products_with_several_nested_blocks(product: str) -> None:
    """More than 256 blocks of 64 weights in a matrix; in the last one, rows are no whole blocks."""
    _check_products(product, _frozen("nf4", 256, 65, n=2), [0, 3], torch.float32)


@native
@BOTH
@ALL
@pytest.mark.parametrize("tokens", [3, 40, 500, 3000])
def test_products_at_real_sizes(product: str, name: str, tokens: int) -> None:
    """From a few rows per expert to several tiles; two products and an activation, each rounded to bf16."""
    frozen = FrozenExperts(
        format=format_of(name), n_experts=32, hidden_size=2048, intermediate_size=768, act_fn=nn.SiLU(), device=DEVICE
    )
    for expert in range(32):
        for projection in ("gate", "up", "down"):
            frozen.quantize_into(expert, projection, 0.02 * torch.randn(frozen.sizes(projection), device=DEVICE))
    batch = _batch(tokens, torch.bfloat16, 2048, 32)
    _assert_close(outputs_and_gradients(_layer(product, frozen), batch), _exact(frozen, batch), 2e-2)


# --- layers


def _to_one(batch: Batch, expert: int) -> Batch:
    return batch[0], torch.full_like(batch[1], expert), batch[2]


@either
@BOTH
@ALL
def test_outputs_and_gradients(product: str, name: str) -> None:
    frozen, batch = _frozen(name), _batch(5)
    _assert_close(outputs_and_gradients(_layer(product, frozen), batch), _exact(frozen, batch), 1e-5)


@either
@BOTH
@pytest.mark.parametrize("tokens", [1, 5])
def test_all_tokens_to_one_expert(product: str, tokens: int) -> None:
    frozen, batch = _frozen("int4-g32"), _to_one(_batch(tokens), 3)
    _assert_close(outputs_and_gradients(_layer(product, frozen), batch), _exact(frozen, batch), 1e-5)


@either
@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_outputs_and_gradients_in_half_precision(product: str, dtype: torch.dtype) -> None:
    _needs_bf16_products(product, dtype)
    frozen, batch = _frozen("nf4"), _batch(dtype=dtype)
    found = outputs_and_gradients(_layer(product, frozen), batch)
    assert [part.dtype for part in found] == [dtype, dtype, torch.float32]
    _assert_close(found, _exact(frozen, batch), 2 * MOST[dtype] if INTERPRETED else MOST[dtype])


@either
def test_another_activation() -> None:
    frozen, batch = _frozen("int4-g32", act_fn=nn.GELU(), first=1, count=3), _batch()
    _assert_close(outputs_and_gradients(_layer("fused", frozen), batch), _exact(frozen, batch), 1e-5)


@either
@BOTH
def test_ranges_add_up_to_the_whole(product: str) -> None:
    batch, bounds = _batch(2), (0, 1, 4, EXPERTS)
    ranges = [
        outputs_and_gradients(_layer(product, _frozen("nf4", first=start, count=stop - start)), batch)
        for start, stop in pairwise(bounds)
    ]
    total = tuple(torch.stack(parts).sum(0) for parts in zip(*ranges, strict=True))
    _assert_close(total, _exact(_frozen("nf4"), batch), 1e-5)


@either
@BOTH
@pytest.mark.parametrize("room", ["all", "exact", "share"])
@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU()], ids=str)
def test_experts_held_elsewhere_contribute_nothing(product: str, act_fn: nn.Module, room: str) -> None:
    """Memory is filled with NaN first: rows of other experts are left as they were, or have none."""
    frozen, batch = _frozen("int4-g32", act_fn=act_fn, first=2, count=2), _batch(4)
    frozen.room = None if room == "all" else Room(0.99, frozen.device)
    limited = nullcontext() if frozen.room is None else frozen.room.limited(room == "share")
    with _filled_memory(), limited:
        for expert in (1, 4, EXPERTS):
            found = outputs_and_gradients(_layer(product, frozen), _to_one(batch, expert))
            assert [float(part.abs().sum()) for part in found] == [0.0, 0.0, 0.0]
        found = outputs_and_gradients(_layer(product, frozen), batch)
    _assert_close(found, _exact(frozen, batch), 1e-5)


@either
@BOTH
def test_rows_without_room_are_left_out_and_seen(product: str) -> None:
    frozen, batch = _frozen("int4-g32", first=2, count=2), _to_one(_batch(4), 2)
    whole = outputs_and_gradients(_layer(product, frozen), batch)
    frozen.room = Room(0.5, frozen.device)
    with _filled_memory(), frozen.room.limited():
        found = outputs_and_gradients(_layer(product, frozen), batch)
    share = float(frozen.room.seen_1)
    assert 0.5 < share <= 1.0
    for part, of_all in zip(found, whole, strict=True):
        assert bool(torch.isfinite(part).all()) and not torch.equal(part, of_all)
    frozen.room.share = share
    with _filled_memory(), frozen.room.limited():
        _assert_close(outputs_and_gradients(_layer(product, frozen), batch), whole, 1e-5)


@either
@BOTH
def test_a_real_model_s_activation_takes_the_fused_gate(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has a class of its own for SiLU; taken for another activation it would run in torch, slowly."""
    act_fn = models.tiny_model("qwen3_moe").get_submodule("model.layers.1.mlp.experts.act_fn")
    frozen, batch, ran = _frozen("int4-g32", act_fn=act_fn), _batch(4), []
    for name in ("gated", "gated_backward"):
        kernel = getattr(row_kernels, name)
        monkeypatch.setattr(row_kernels, name, lambda *given, n=name, k=kernel: (ran.append(n), k(*given))[1])
    found = outputs_and_gradients(_layer(product, frozen), batch)
    assert ran == ["gated", "gated_backward"]
    _assert_close(found, _exact(frozen, batch), 1e-5)


class _filled_memory:
    """New tensors hold NaN, or the largest integers, until they are written."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]

    def __exit__(self, *_error: object) -> None:
        torch.use_deterministic_algorithms(False)


@either
@pytest.mark.parametrize("needed", [0, 2])
def test_a_gradient_for_one_of_them(needed: int) -> None:
    frozen, batch = _frozen("int4-g128"), _batch(1)
    full = outputs_and_gradients(_layer("fused", frozen), batch)
    inputs = [part.clone().requires_grad_(place == needed) for place, part in enumerate(batch)]
    out = _layer("fused", frozen)(*inputs)
    out.backward(torch.randn(out.shape, generator=_generator(1)).to(out))
    assert [part.grad is not None for part in inputs] == [place == needed for place in range(3)]
    grad = inputs[needed].grad
    assert grad is not None and torch.equal(grad, full[1 if needed == 0 else 2])


@either
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(product: str, dtype: torch.dtype) -> None:
    out, states_grad, weights_grad = outputs_and_gradients(_layer(product, _frozen("nf4")), _batch(0, dtype))
    assert out.shape == states_grad.shape == (0, HIDDEN)
    assert weights_grad.shape == (0, TOP_K)
    assert out.dtype == dtype


@either
def test_activation_checkpointing_changes_no_gradient() -> None:
    layer, batch = _layer("chunk", _frozen("nf4")), _batch(2)
    plain = outputs_and_gradients(layer, batch)
    again = outputs_and_gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False), batch)  # type: ignore[arg-type]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@either
def test_autocast_sets_the_precision() -> None:
    layer, (states, index, weights) = _layer("fused", _frozen("nf4")), _batch()
    with torch.autocast(DEVICE, torch.float16):
        out, *grads = outputs_and_gradients(layer, (states, index, weights))
    assert out.dtype == grads[0].dtype == torch.float32
    assert torch.equal(out, layer(states.half(), index, weights).float())


@either
def test_only_the_rows_are_kept_for_backward() -> None:
    layer, (states, index, weights) = _layer("chunk", _frozen("nf4")), _batch(5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda kept: kept):
        layer(states, index, weights)
        assert saved == []
        layer(states.requires_grad_(), index, weights.requires_grad_())
    shapes = sorted(tuple(tensor.shape) for tensor in saved if tensor.is_floating_point())
    assert shapes == [(5, TOP_K), (5 * TOP_K, 2 * INNER)]


@either
def test_an_unsupported_precision_is_named() -> None:
    states, index, weights = _batch()
    with pytest.raises(ModelError, match=r"torch\.float64.*reference"):
        _layer("fused", _frozen("nf4"))(states.double(), index, weights)


@either
@pytest.mark.parametrize("product", ["fused", "chunk", "reference"])
def test_the_module_takes_the_product_it_is_told(product: str) -> None:
    frozen, batch = _frozen("int4-g32"), _batch()
    frozen.kernel = product
    _assert_close(outputs_and_gradients(frozen, batch), _exact(frozen, batch), 1e-5)


# --- in portions


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Tensor]:
    """Room for two experts' gate and up."""
    made: dict[Any, Tensor] = {}
    monkeypatch.setattr(chunk, "_workspaces", made)
    monkeypatch.setattr(chunk, "WORKSPACE_BYTES", 2 * 2 * HIDDEN * INNER * 4)
    return made


@either
def test_chunks_in_a_small_workspace(small_workspace: dict[Any, Tensor]) -> None:
    frozen, batch = _frozen("nf4"), _batch(5)
    _assert_close(outputs_and_gradients(_layer("chunk", frozen), batch), _exact(frozen, batch), 1e-5)
    assert [len(workspace) for workspace in small_workspace.values()] == [chunk.WORKSPACE_BYTES]


@either
def test_experts_without_rows_are_not_dequantized(
    small_workspace: dict[Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = chunk.dequantize

    def watched(codes: Any, dtype: torch.dtype) -> Tensor:
        seen.append(codes.experts)
        return plain(codes, dtype)

    monkeypatch.setattr(chunk, "dequantize", watched)
    outputs_and_gradients(_layer("chunk", _frozen("nf4")), _to_one(_batch(2), 3))
    assert seen == [1, 1, 1, 1]


# --- on a GPU


@native
def test_the_fused_product_never_waits_for_the_gpu() -> None:
    layer, batch = _layer("fused", _frozen("nf4", first=1, count=3)), _batch()
    gradient = torch.randn_like(batch[0])
    for mode in ("default", "error"):  # kernels are compiled the first time
        states, weights = batch[0].clone().requires_grad_(), batch[2].clone().requires_grad_()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer(states, batch[1], weights).backward(gradient)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@native
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@BOTH
def test_a_gpu_that_is_not_the_current_one(product: str) -> None:
    frozen, batch = _frozen("nf4"), _batch()
    expected = outputs_and_gradients(_layer(product, frozen), batch)
    states, index, weights = (part.to("cuda:1") for part in batch)
    elsewhere = outputs_and_gradients(_layer(product, frozen.to("cuda:1")), (states, index, weights))
    assert all(torch.equal(one, other.to("cuda:0")) for one, other in zip(expected, elsewhere, strict=True))


# --- without one


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from gtqlora.errors import ModelError
from gtqlora.experts import FrozenExperts, format_of
import torch
sizes = dict(n_experts=2, hidden_size=64, intermediate_size=32)
frozen = FrozenExperts(format=format_of("nf4"), act_fn=torch.nn.SiLU(), **sizes)
for expert in range(2):
    for projection in ("gate", "up", "down"):
        frozen.quantize_into(expert, projection, torch.ones(frozen.sizes(projection)))
batch = torch.ones(1, 64), torch.tensor([[0, 1]]), torch.ones(1, 2)
assert frozen(*batch).shape == (1, 64)
for frozen.kernel in ("fused", "chunk"):
    try:
        frozen(*batch)
    except ModelError as error:
        print(error)
"""


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_triton_is_needed_by_these_products_only() -> None:
    done = warm.process(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install triton") == 2
