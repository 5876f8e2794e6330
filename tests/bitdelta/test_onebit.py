"""One bit a weight: what is kept exactly, what is lost, and that the scales are the best there are."""

from __future__ import annotations

import pytest
import torch

from gtqlora.bitdelta.onebit import OneBit, decode, encode, energy_lost, packed, signs


def _delta(*shape: int, size: float = 1e-3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.rand(*shape[:-1], 1, generator=draw), torch.rand(*shape[:-2], 1, shape[-1], generator=draw)
    return torch.randn(*shape, generator=draw) * (0.1 + rows) * (0.1 + columns) * size


@pytest.mark.parametrize("shape", [(5, 8), (64, 70), (1, 1), (3, 16, 9)])
def test_signs_are_kept_for_every_shape(shape: tuple[int, ...]) -> None:
    delta = _delta(*shape)
    found = encode(delta)
    assert found.shape == shape and found.signs_NB.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(signs(found), torch.where(delta >= 0, 1.0, -1.0))
    assert torch.equal(decode(found).sign(), delta.sign())


def test_the_first_column_is_the_lowest_bit() -> None:
    assert packed(torch.tensor([[True, False, True, False, False, False, False, False, True]])).tolist() == [[5, 1]]


def test_a_product_of_signs_and_scales_comes_back() -> None:
    wanted = OneBit(signs_NB=encode(_delta(32, 40)).signs_NB, row_N=torch.rand(32), column_K=torch.rand(40))
    again = encode(decode(wanted))
    assert torch.allclose(decode(again), decode(wanted), rtol=0.02, atol=0)  # scales of 8 bits


@pytest.mark.parametrize("size", [1e-12, 1e-5, 1.0, 1e6])
def test_scales_are_the_best_rank_1_form_of_the_sizes(size: float) -> None:
    delta = _delta(64, 48, size=size)
    first, *_ = torch.linalg.svdvals(delta.abs().double())
    best = 1 - float(first**2 / delta.double().square().sum())
    assert energy_lost(delta, encode(delta)) == pytest.approx(best, abs=1e-4)


def test_row_and_column_scales_beat_the_others() -> None:
    delta = _delta(64, 48)
    one, sign = energy_lost(delta, encode(delta)), delta.sign()
    rows, whole = sign * delta.abs().mean(-1, keepdim=True), sign * delta.abs().mean()
    by_row, by_tensor = (float((delta - other).square().sum() / delta.square().sum()) for other in (rows, whole))
    assert one < by_row - 0.05 and by_row < by_tensor - 0.05


def test_rows_and_columns_without_change_stay_as_they_are() -> None:
    delta = _delta(12, 20)
    delta[3], delta[:, 7] = 0, 0
    found = decode(encode(delta))
    assert not found[3].any() and not found[:, 7].any() and found[2].any()
    assert (
        not decode(encode(torch.zeros(4, 8))).any() and energy_lost(torch.zeros(4, 8), encode(torch.zeros(4, 8))) == 0
    )


def test_experts_of_a_stack_have_scales_of_their_own() -> None:
    stack = _delta(3, 16, 8) * torch.tensor([1.0, 100.0, 0.0])[:, None, None]
    found = encode(stack)
    assert all(torch.equal(decode(found)[i], decode(encode(stack[i]))) for i in range(3))


def test_it_is_fifteen_times_smaller_than_16_bits_at_real_sizes() -> None:
    found = encode(torch.randn(768, 2048))
    assert 2 * 768 * 2048 / found.nbytes > 15
