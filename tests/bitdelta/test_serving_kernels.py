"""The kernels for rows of different variants against exact products: on a GPU, or slowly in Triton's interpreter.

`experts/test_interpreter.py` runs this file interpreted; the variable must be set before Triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

from gtqlora.bitdelta.onebit import OneBit, decode, encode

pytest.importorskip("triton")
from gtqlora.bitdelta import kernels
from gtqlora.bitdelta.layers import Batch, Tiles, VariantLinear
from gtqlora.bitdelta.routed import VariantRouter
from gtqlora.edits.merging import LowRank
from tests import models

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
VARIANTS = 4
MOST = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or Triton's interpreter"
)
ROWS = pytest.mark.parametrize(
    "variants", [[2], [0, 1, 2, 3, 2, 0], [1] * 9, [0, 3] * 3 + [2] * 70], ids=["one", "mixed", "alike", "many"]
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.bfloat16], ids=str
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _one_bit(outputs: int, inputs: int, seed: int) -> OneBit:
    return encode(0.05 * _random(outputs, inputs, seed=seed))


def _close(found: Tensor, expected: Tensor) -> None:
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error <= MOST[found.dtype], float(error)


@DTYPES
@ROWS
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 256), (70, 300), (33, 40)])
def test_one_bit(outputs: int, inputs: int, variants: list[int], dtype: torch.dtype) -> None:
    """Sizes that no tile divides; variant 1 has no difference here, so its rows stay as they are."""
    deltas = {variant: _one_bit(outputs, inputs, variant) for variant in (0, 2, 3)}
    x, y = _random(len(variants), inputs).to(dtype), _random(len(variants), outputs, seed=1).to(dtype)
    expected = y.double()
    for row, variant in enumerate(variants):
        if variant in deltas:
            expected[row] += decode(deltas[variant]).double() @ x[row].double()
    found = y.to(DEVICE)
    signs = kernels.signs_of(deltas, VARIANTS, dtype, DEVICE)
    kernels.add_one_bit(found, x.to(DEVICE), signs, kernels.Groups.of(variants, DEVICE))
    _close(found, expected)
    for row, variant in enumerate(variants):
        assert variant in deltas or torch.equal(found[row].cpu(), y[row])


@DTYPES
@ROWS
@pytest.mark.parametrize("rank", [3, 40])
def test_low_rank(rank: int, variants: list[int], dtype: torch.dtype) -> None:
    inputs, outputs = 100, 70
    a, b = 0.1 * _random(2, rank, inputs), 0.1 * _random(2, outputs, rank, seed=1)
    slot = kernels.slots([0, 2], VARIANTS, DEVICE)
    x, y = _random(len(variants), inputs).to(dtype), _random(len(variants), outputs, seed=2).to(dtype)
    expected = y.double()
    for row, variant in enumerate(variants):
        if variant in (0, 2):
            expected[row] += b[variant // 2].double() @ (a[variant // 2].double() @ x[row].double())
    first, second = (kernels.Matrices(values.to(DEVICE, dtype), slot) for values in (a, b))
    found = y.to(DEVICE)
    kernels.add_low_rank(found, x.to(DEVICE), first, second, kernels.Groups.of(variants, DEVICE))
    _close(found, expected)


def _layer(kernels_used: bool) -> tuple[Batch, VariantLinear]:
    """A linear with one-bit and low-rank variants, the same however it multiplies."""
    batch = Batch(torch.device(DEVICE), VARIANTS, kernels=kernels_used)
    torch.manual_seed(0)
    base = nn.Linear(300, 70).to(DEVICE)
    bits = {variant: _one_bit(70, 300, variant) for variant in (1, 3)}
    moved = {
        variant: OneBit(
            signs_NB=one.signs_NB.to(DEVICE),
            row_N=one.row_N.to(DEVICE, torch.float32),
            column_K=one.column_K.to(DEVICE, torch.float32),
        )
        for variant, one in bits.items()
    }
    ranks = {2: LowRank(_random(3, 300).to(DEVICE), _random(70, 3).to(DEVICE))}
    ranks[3] = LowRank(_random(5, 300, seed=1).to(DEVICE), _random(70, 5, seed=1).to(DEVICE))
    return batch, VariantLinear(base, batch, Tiles(torch.float32, batch.device), moved, ranks)


@ROWS
@torch.no_grad()
def test_layers_multiply_alike(variants: list[int]) -> None:
    """By the kernels what they do in plain torch, for sequences of two tokens."""
    x = _random(len(variants), 2, 300).to(DEVICE)
    (plain_batch, plain), (batch, layer) = _layer(False), _layer(True)
    for each in (plain_batch, batch):
        each.begin(variants)
    assert torch.allclose(layer(x), plain(x), rtol=1e-4, atol=1e-4)


@ROWS
@torch.no_grad()
def test_routers_choose_alike(variants: list[int]) -> None:
    base = models.tiny_model("qwen3_moe").get_submodule("model.layers.1.mlp.gate").to(DEVICE)
    own = {variant: _random(models.EXPERTS, models.HIDDEN, seed=variant).to(DEVICE) for variant in (1, 3)}
    x, found = _random(len(variants), 2, models.HIDDEN).to(DEVICE), []
    for kernels_used in (False, True):
        batch = Batch(torch.device(DEVICE), VARIANTS, kernels=kernels_used)
        batch.begin(variants)
        found.append(VariantRouter(base, batch, own)(x))
    for plain, kernel in zip(*found, strict=True):
        assert torch.allclose(kernel.float(), plain.float(), atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_rows_do_not_hang_on_their_neighbours() -> None:
    """A row's result is the same bits whatever else is in the batch, and however the product is cut."""
    deltas = {variant: _one_bit(512, 2048, variant) for variant in range(3)}
    signs = kernels.signs_of(deltas, VARIANTS, torch.bfloat16, DEVICE)
    x = _random(6, 2048).to(DEVICE, torch.bfloat16)

    def added(rows: list[int], variants: list[int]) -> Tensor:
        y = torch.zeros(len(rows), 512, device=DEVICE, dtype=torch.bfloat16)
        kernels.add_one_bit(y, x[rows], signs, kernels.Groups.of(variants, DEVICE))
        return y

    together = added([0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2])
    assert torch.equal(together[3], added([3], [0])[0])
    assert torch.equal(together[4:], added([4, 5], [1, 2]))
