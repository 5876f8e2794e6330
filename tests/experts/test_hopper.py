"""The Hopper kernel: it compiles for every variant (no GPU needed), and multiplies right (on one)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from gtqlora.errors import ModelError
from gtqlora.experts import FORMATS, FrozenExperts, format_of
from gtqlora.experts.kernels import cuda, hopper, layer, reference, rows, sorting
from gtqlora.experts.kernels.hopper import Variant

GROUPS = {"int4-g32": 32, "int4-g128": 128, "nf4": 64}
ROWS = ((0, 1, 33, 0, 300, 17), (64,) * 6, (1000, 3, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1), (15, 16, 17, 127, 128, 129))

needs_compiler = pytest.mark.skipif(
    not (cuda.available() and find_spec("nvidia")), reason="needs cuda-bindings and nvidia-cuda-nvrtc (Linux)"
)


def _variants() -> list[Variant]:
    choices = itertools.product(GROUPS.items(), (False, True), (1, 2, 4))
    return [Variant(nf4=name == "nf4", group=group, transposed=t, wide=wide) for (name, group), t, wide in choices]


@needs_compiler
@pytest.mark.parametrize(("transposed", "name"), [(False, "nf4"), (True, "int4-g32")])
def test_it_compiles_without_a_gpu(transposed: bool, name: str) -> None:
    code = hopper.compile_variant(Variant(nf4=name == "nf4", group=GROUPS[name], transposed=transposed, wide=2))
    assert code[:4] == b"\x7fELF"


@needs_compiler
def test_sorting_compiles_without_a_gpu() -> None:
    assert sorting.compile_source()[:4] == b"\x7fELF"


@needs_compiler
def test_the_compilers_complaint_is_shown() -> None:
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile.*undefined"):
        cuda.compile_source('extern "C" __global__ void f() { undefined(); }', "broken.cu", {}, "sm_90a")


def test_the_ring_fits_into_shared_memory() -> None:
    for variant in _variants():
        static = 256 * 32 * 4 if variant.nf4 else 0
        assert variant.stages >= 4
        assert variant.shared_bytes + static <= 227 * 1024


@pytest.mark.parametrize(
    ("n_rows", "results", "expected"),
    [(21 * 384, 4096, 4), (85 * 384, 4096, 2), (170 * 384, 4096, 1), (21 * 384, 768, 2), (8, 4096, 2), (8, 1536, 1)],
)
def test_the_width_follows_the_rows(n_rows: int, results: int, expected: int) -> None:
    assert hopper._wide_for(n_rows, 384, results, 132) == expected


def _module(name: str, hidden: int, inner: int, n_experts: int = 6, device: str = "cpu") -> FrozenExperts:
    torch.manual_seed(0)
    module = FrozenExperts(
        format=format_of(name),
        n_experts=n_experts,
        hidden_size=hidden,
        intermediate_size=inner,
        act_fn=nn.SiLU(),
        device=device,
    )
    for expert in range(n_experts):
        for projection in ("gate", "up", "down"):
            matrix = torch.randn(module.sizes(projection), device=device) * 0.05
            module.quantize_into(expert, projection, matrix)
    return module


def test_it_leaves_to_others_what_it_cannot_do() -> None:
    module, hidden = _module("nf4", 128, 128, 2), torch.zeros(1, 128, dtype=torch.bfloat16)
    assert not hopper.takes(module, hidden, torch.bfloat16)  # on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("wide", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_dequantized_weights(name: str, transposed: bool, wide: int) -> None:
    module = _module(name, 1024, 512, device="cuda")
    weights = module.weights("gate_up", slice(None), torch.bfloat16).float()
    weights = weights if transposed else weights.mT
    module.arrange(tiled=True)
    for counts in ROWS:
        expert_R = torch.arange(6, device="cuda").repeat_interleave(torch.tensor(counts, device="cuda"))
        placed = hopper.sort(expert_R.unsqueeze(-1), 0, 6)
        x = torch.randn(sum(counts), weights.shape[1], device="cuda", dtype=torch.bfloat16)
        tiled = hopper.tiled_of(module, "gate_up", placed, transposed)
        found = hopper.product(x, tiled, placed, transposed=transposed, wide=wide)
        expected = torch.cat([part.float() @ w for part, w in zip(x.split(counts), weights, strict=True)])
        assert _error(found, expected) < (4e-3 if name != "nf4" else 6e-3)


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3)])
def test_the_layer_and_its_gradients(name: str, first: int, count: int) -> None:
    whole = _module(name, 512, 256, device="cuda")
    module = FrozenExperts(
        format=whole.format,
        n_experts=6,
        first=first,
        count=count,
        hidden_size=512,
        intermediate_size=256,
        act_fn=nn.SiLU(),
        device="cuda",
    )
    for key, buffer in module.named_buffers():
        buffer.copy_(whole.get_buffer(key)[first : first + count])
    before = {key: buffer.clone() for key, buffer in module.state_dict().items()}
    index = torch.stack([torch.randperm(6, device="cuda")[:2] for _ in range(300)])
    grad = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)

    def run(dtype: torch.dtype, multiply: layer.Multiply | None) -> list[Tensor]:
        torch.manual_seed(1)
        hidden = torch.randn(300, 512, device="cuda").bfloat16().to(dtype).requires_grad_()
        share = torch.rand(300, 2, device="cuda").bfloat16().to(dtype).requires_grad_()
        if multiply is None:
            out = reference.reference(module, hidden, index, share)
        else:
            out = layer.run(module, hidden, index, share, multiply, hopper.sort)
        return [out, *torch.autograd.grad(out, (hidden, share), grad.to(dtype))]

    expected, found = run(torch.float32, None), run(torch.bfloat16, hopper.multiply)
    assert all(_error(ours, theirs) < 1e-2 for ours, theirs in zip(found, expected, strict=True))
    assert module.tiled
    assert all(torch.equal(before[key], buffer) for key, buffer in module.state_dict().items())


@pytest.mark.gpu
def test_wrong_rows_are_refused() -> None:
    module = _module("int4-g32", 256, 128, device="cuda")
    module.arrange(tiled=True)
    placed = hopper.sort(torch.zeros(4, 1, dtype=torch.long, device="cuda"), 0, 6)
    tiled, x = hopper.tiled_of(module, "down", placed, False), torch.zeros(4, 128, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="rows of 128"):
        hopper.product(x.repeat(1, 2), tiled, placed, transposed=False)
    with pytest.raises(ModelError, match="int32"):
        hopper.product(x, tiled, replace(placed, offsets_E1=placed.offsets_E1.long()), transposed=False)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (3, 1), (300, 8), (20_000, 8)])
@pytest.mark.parametrize(("first", "count"), [(0, 200), (50, 100), (199, 1)])
def test_rows_are_sorted_and_cut(tokens: int, top_k: int, first: int, count: int) -> None:
    index = torch.rand(tokens, 200, device="cuda").topk(top_k).indices
    found, expected = sorting.sort(index, first, count, 64), rows.place_rows(index, first, count)
    for name in ("order_R", "offsets_E1", "places_TK"):
        assert torch.equal(getattr(found, name).long(), getattr(expected, name).long()), name
    for most, made in (
        (found.most, (found.tiles, found.n_tiles)),
        (128, sorting.cut(found.offsets_E1, index.numel(), 128)),
    ):
        assert made[0] is not None and made[1] is not None
        _check_tiles(made[0][: int(made[1])].tolist(), found.offsets_E1.tolist(), most)


def _check_tiles(tiles: list[list[int]], offsets: list[int], most: int) -> None:
    """They cover all rows of each expert, in order, evenly, and begin at multiples of 16 rows of an expert."""
    row = offsets[0]
    for expert, begin, height, _ in tiles:
        assert begin == row and offsets[expert] <= begin < begin + height <= offsets[expert + 1]
        assert height <= most and (begin - offsets[expert]) % 16 == 0
        row = begin + height
    assert row == offsets[-1]
    assert len(tiles) == sum(-(-(stop - start) // most) for start, stop in itertools.pairwise(offsets))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_is_captured_and_repeats_bitwise(name: str) -> None:
    """Replayed on another routing than the captured one, also where experts lost all their rows."""
    module = _module(name, 512, 256, device="cuda")
    hidden = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    index, share = torch.rand(5, 6, device="cuda").topk(2).indices, torch.rand(5, 2, device="cuda").bfloat16()
    with torch.no_grad():
        module(hidden, index, share)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(hidden, index, share)
        for routing in (torch.rand(5, 6, device="cuda").topk(2).indices, torch.full_like(index, 3)):
            index.copy_(routing)
            graph.replay()
            assert torch.equal(out, module(hidden, index, share))


@pytest.mark.gpu
def test_scales_of_experts_that_had_no_rows_are_decoded_when_they_have() -> None:
    """The scales that a forward pass leaves for its backward are those of another routing by then."""
    module = _module("nf4", 512, 256, device="cuda")
    hidden = torch.randn(3, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    share = torch.ones(3, 1, device="cuda", dtype=torch.bfloat16)
    one, other = (torch.full((3, 1), expert, device="cuda") for expert in (1, 4))
    (expected,) = torch.autograd.grad(module(hidden, one, share).float().sum(), hidden)
    out = module(hidden, one, share)
    module(hidden.detach(), other, share)
    (found,) = torch.autograd.grad(out.float().sum(), hidden)
    assert torch.equal(found, expected)
