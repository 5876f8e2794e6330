"""The tiled order: a bijection that nobody sees from outside, and the order that the kernel expects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gtqlora.experts import FORMATS, FrozenExperts, format_of, tiles


def _module(name: str, hidden: int = 256, inner: int = 128, n_experts: int = 3) -> FrozenExperts:
    torch.manual_seed(0)
    module = FrozenExperts(
        format=format_of(name), n_experts=n_experts, hidden_size=hidden, intermediate_size=inner, act_fn=nn.SiLU()
    )
    for expert in range(n_experts):
        for projection in ("gate", "up", "down"):
            module.quantize_into(expert, projection, torch.randn(module.sizes(projection)))
    return module


def _copies(module: FrozenExperts) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_codes_come_back(matrices: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (matrices, 64 * rows, 64 * columns), generator=generator, dtype=torch.uint8)
    tiled = tiles.tile_codes(codes)
    assert tiled.shape == (matrices, codes[0].numel() // 2)
    assert torch.equal(tiles.untile_codes(tiled, 64 * rows, 64 * columns), codes)


@pytest.mark.parametrize(("columns", "groups"), [(192, 6), (192, 3), (256, 2)])
def test_scales_come_back(columns: int, groups: int) -> None:
    scales = torch.arange(2 * 128 * groups).view(2, 128, groups)
    tiled = tiles.tile_scales(scales, columns)
    assert sorted(tiled[0].tolist()) == list(range(128 * groups))
    assert torch.equal(tiles.untile_scales(tiled, 128, columns, groups), scales)


def test_a_unit_is_one_threads_share() -> None:
    """Nibble 2i + j of unit (a, u), block (p, q), tile (r, c): output 64r + 16p + 8i + a, input 64c + 16q + 8j + u."""
    codes = torch.zeros(1, 128, 192, dtype=torch.uint8)
    r, c, p, q, a, u, i, j = 1, 2, 3, 1, 5, 6, 1, 0
    codes[0, 64 * r + 16 * p + 8 * i + a, 64 * c + 16 * q + 8 * j + u] = 9
    units = tiles.tile_codes(codes)[0].view(torch.int16).view(2, 3, 4, 4, 8, 8)
    (place,) = units.nonzero().tolist()
    assert place == [r, c, p, q, a, u]
    assert int(units[tuple(place)]) & 0xFFFF == 9 << 4 * (2 * i + j)


def test_scales_lie_beside_those_used_with_them() -> None:
    """The scale of output 64r + 16p + 8i + 2b + c in group g of tile (r, t) is at [r, t, g, p, b, i, c]."""
    scales = torch.zeros(1, 128, 6)
    r, t, g, p, b, i, c = 1, 2, 1, 3, 2, 1, 0
    scales[0, 64 * r + 16 * p + 8 * i + 2 * b + c, 2 * t + g] = 1
    assert tiles.tile_scales(scales, 192).view(2, 3, 2, 4, 4, 2, 2).nonzero().tolist() == [[r, t, g, p, b, i, c]]


@pytest.mark.parametrize("name", FORMATS)
def test_the_module_can_be_tiled_and_back(name: str) -> None:
    module = _module(name)
    plain = _copies(module)
    module.arrange(tiled=True)
    assert module.tiled
    assert any(not torch.equal(buffer, plain[key]) for key, buffer in module.named_buffers())
    for key, buffer in module.named_buffers():
        assert torch.equal(buffer.flatten().sort().values, plain[key].flatten().sort().values) or "packed" in key
    module.arrange(tiled=False)
    assert all(torch.equal(buffer, plain[key]) for key, buffer in module.named_buffers())


@pytest.mark.parametrize("name", FORMATS)
def test_nobody_sees_the_tiles(name: str) -> None:
    """Saved, loaded, dequantized, multiplied: always the plain order."""
    module = _module(name)
    plain, weights = _copies(module), module.weights("gate_up", slice(None), torch.float32)
    hidden, index, share = torch.randn(5, 256), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    expected = module(hidden, index, share)
    module.arrange(tiled=True)
    assert torch.equal(module(hidden, index, share), expected)
    module.arrange(tiled=True)
    assert torch.equal(module.weights("gate_up", slice(None), torch.float32), weights)
    module.arrange(tiled=True)
    saved = module.state_dict()
    assert all(torch.equal(saved[key], plain[key]) for key in plain)
    other = _module(name)
    other.arrange(tiled=True)
    other.load_state_dict({key: torch.zeros_like(buffer) for key, buffer in plain.items()})
    other.arrange(tiled=True)
    other.load_state_dict(saved)
    assert all(torch.equal(buffer, plain[key]) for key, buffer in other.named_buffers())


def test_tiling_is_no_change_of_the_weights_to_autograd() -> None:
    module = _module("int4-g32")
    versions = [buffer._version for buffer in module.buffers()]
    module.arrange(tiled=True)
    module.arrange(tiled=False)
    assert [buffer._version for buffer in module.buffers()] == versions
