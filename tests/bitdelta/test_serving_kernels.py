"""The kernels for rows of different variants against exact products: on a GPU, or slowly in Triton's interpreter.

`test_serving_interpreter.py` runs this file interpreted; the variable must be set before Triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from gtqlora.bitdelta.onebit import OneBit, decode, encode

pytest.importorskip("triton")
from gtqlora.bitdelta import kernels

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
