"""4-bit formats: bit for bit what bitsandbytes and compressed-tensors write, and what the parts are worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.experts import int4, nf4
from gtqlora.experts.formats import FORMATS, Format, Int4, Nf4, format_of

ALL = pytest.mark.parametrize("name", FORMATS)
INT4 = pytest.mark.parametrize("name", ["int4-g32", "int4-g128"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
K25 = pytest.mark.parametrize(("rows", "columns"), [(2048, 7168), (7168, 2048)])
"""One expert's matrices in Kimi-K2.5."""


def _matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _nf4() -> Nf4:
    found = format_of("nf4")
    assert isinstance(found, Nf4)
    return found


def _same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert part.dtype == theirs[name].dtype, name
        assert torch.equal(part, theirs[name]), name


# --- packing


_CODES = st.lists(st.integers(0, 15), min_size=8, max_size=64).map(lambda codes: codes[: len(codes) // 8 * 8])


@given(_CODES)
def test_packing_is_a_bijection(codes: list[int]) -> None:
    tensor = torch.tensor(codes, dtype=torch.uint8)
    assert int4.unpack(int4.pack(tensor)).tolist() == codes
    assert nf4.unpack(nf4.pack(tensor)).tolist() == codes
    assert int4.pack(tensor).numel() * 8 == nf4.pack(tensor).numel() * 2 == len(codes)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8))
def test_every_word_is_a_packing(words: list[int]) -> None:
    packed = torch.tensor(words, dtype=torch.int32)
    assert int4.pack(int4.unpack(packed)).tolist() == words
    assert nf4.pack(nf4.unpack(packed.view(torch.uint8))).tolist() == packed.view(torch.uint8).tolist()


def test_packing_by_hand() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)
    assert int4.pack(codes).tolist() == [0x87654321 - 2**32]
    assert nf4.pack(codes).tolist() == [0x12, 0x34, 0x56, 0x78]


# --- nf4 against bitsandbytes


@pytest.fixture(scope="module")
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes, of the extra `test`, is not installed")


def _zero_block(matrix: Tensor) -> Tensor:
    matrix.view(-1)[64:128] = 0
    return matrix


def _outliers(matrix: Tensor) -> Tensor:
    matrix.view(-1)[::1000] *= 1e4
    return matrix


_CONTENTS = {
    "normal": lambda matrix: matrix,
    "tiny": lambda matrix: matrix * 1e-30,
    "a block of zeros": _zero_block,
    "outliers": _outliers,
    "ties": lambda matrix: (matrix * 4).round() / 4,
    "zeros": torch.zeros_like,
    "one value": lambda matrix: torch.full_like(matrix, -0.25),
}
# 1, 2, 24, 165, 300, 1024 and 16384 blocks of 64, nested in blocks of 256; also blocks that run over rows.
_SHAPES = [(4, 16), (2, 64), (48, 32), (33, 320), (300, 64), (32, 2048), (512, 2048)]


def _theirs(bitsandbytes: Any, matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed, state = bitsandbytes.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = {
        "packed": packed.flatten(),
        "absmax": state.absmax,
        "absmax_scale": state.state2.absmax,
        "absmax_offset": state.offset,
    }
    state.shape = torch.Size((1, matrix.numel()))  # rows that are not whole blocks go wrong on CPUs with AVX-512
    return parts, bitsandbytes.dequantize_4bit(packed, state).view(matrix.shape)


@DTYPES
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
@pytest.mark.parametrize("content", _CONTENTS)
def test_nf4_is_bit_for_bit_that_of_bitsandbytes(
    bitsandbytes: Any, shape: tuple[int, int], content: str, dtype: torch.dtype
) -> None:
    matrix = _CONTENTS[content](_matrix(*shape)).to(dtype)
    if not matrix.isfinite().all():
        matrix = matrix.nan_to_num(posinf=6e4, neginf=-6e4)
    parts, values = _theirs(bitsandbytes, matrix)
    ours = _nf4().quantize(matrix)
    _same(ours, parts)
    assert torch.equal(_nf4().dequantize(ours, *shape, dtype), values)


def test_nf4_tables_are_those_of_bitsandbytes(bitsandbytes: Any) -> None:
    assert torch.equal(nf4.levels(torch.device("cpu")), bitsandbytes.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.nested_levels(torch.device("cpu")), bitsandbytes.create_dynamic_map())


def test_nested_values_at_the_edges_of_their_bins(bitsandbytes: Any) -> None:
    """Where a byte changes to the next: halfway between values, and the floats beside."""
    values = nf4.nested_levels(torch.device("cpu"))
    edges = (values[:-1] + values[1:]) / 2
    one = torch.ones(1)
    beside = [torch.cat([torch.nextafter(edges, towards * one), one]) for towards in (-2.0, 2.0)]
    block = torch.cat([edges, one, *beside, -torch.cat([edges, one]), torch.zeros(256)])
    codes, state = bitsandbytes.quantize_blockwise(block, blocksize=256)
    ours, scale = nf4._nested(block.unsqueeze(0))
    assert torch.equal(ours[0], codes)
    assert torch.equal(scale[0], state.absmax)


# --- int4 against compressed-tensors


@pytest.fixture(scope="module")
def compressed_tensors() -> Any:
    reason = "compressed-tensors, of the extra `test`, is not installed"
    return pytest.importorskip("compressed_tensors", reason=reason)


def _arguments(compressed_tensors: Any, group: int) -> Any:
    return compressed_tensors.quantization.QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group
    )


_INT4_SHAPES = [(16, 32), (48, 96), (7, 256), (64, 2048)]


@INT4
@pytest.mark.parametrize("shape", _INT4_SHAPES, ids=str)
@pytest.mark.parametrize("content", _CONTENTS)
def test_int4_codes_are_those_of_compressed_tensors(
    compressed_tensors: Any, name: str, shape: tuple[int, int], content: str
) -> None:
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    found, matrix = format_of(name), _CONTENTS[content](_matrix(*shape))
    parts = found.quantize(matrix)
    arguments = _arguments(compressed_tensors, min(found.group, shape[1]))
    codes = quantize(x=matrix, scale=parts["scale"], zero_point=None, args=arguments, dtype=torch.int8)  # pyright: ignore[reportArgumentType]
    assert torch.equal(parts["packed"], pack_to_int32(codes, 4))
    assert torch.equal(int4.unpack(parts["packed"]).to(torch.int8) - 8, codes)
    values = dequantize(unpack_from_int32(parts["packed"], 4, torch.Size(shape)), parts["scale"], args=arguments)
    assert values.dtype == torch.bfloat16
    assert torch.equal(found.dequantize(parts, *shape, torch.bfloat16), values)


@INT4
@pytest.mark.parametrize("content", _CONTENTS)
def test_int4_scales_are_those_of_compressed_tensors(compressed_tensors: Any, name: str, content: str) -> None:
    from compressed_tensors.quantization.utils import calculate_qparams

    found, matrix = format_of(name), _CONTENTS[content](_matrix(24, 256)).bfloat16()
    groups = matrix.unflatten(-1, (-1, found.group))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), _arguments(compressed_tensors, found.group))
    assert torch.equal(found.quantize(matrix)["scale"], scale)


# --- what the parts are worth


def _exact(found: Format, parts: dict[str, Tensor], columns: int) -> Tensor:
    """Weights in fp64 from the definition of each format."""
    if isinstance(found, Int4):
        codes = int4.unpack(parts["packed"]).double() - 8
        return codes * parts["scale"].double().repeat_interleave(min(found.group, columns), dim=-1)
    assert isinstance(found, Nf4)
    levels = nf4.levels(torch.device("cpu"))[nf4.unpack(parts["packed"]).int()]
    scales = found.absmax(parts).repeat_interleave(found.group, dim=-1)
    return (levels * scales).double().unflatten(-1, (-1, columns))


@ALL
@pytest.mark.parametrize("shape", [(16, 32), (48, 128), (3, 5, 64), (2, 3, 4, 256)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-6], ids=["normal", "subnormal in fp16"])
def test_values_are_rounded_once(name: str, shape: tuple[int, ...], size: float) -> None:
    found, rows, columns = format_of(name), shape[-2], shape[-1]
    parts = found.quantize(size * _matrix(*shape))
    exact = _exact(found, parts, columns)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        values = found.dequantize(parts, rows, columns, dtype)
        assert values.shape == shape
        assert values.dtype == dtype
        assert torch.equal(values, exact.to(dtype)), dtype


@ALL
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), scale=st.floats(1e-6, 1e6))
def test_values_are_near_the_weights(name: str, seed: int, scale: float) -> None:
    """Within half a step of int4 (clipped ends included) or half the widest gap of nf4, and what rounded scales add."""
    found, matrix = format_of(name), scale * _matrix(8, 256, seed=seed)
    error = (found.dequantize(found.quantize(matrix), 8, 256, torch.float32) - matrix).abs()
    most = matrix.unflatten(-1, (-1, found.group)).abs().amax(-1, keepdim=True)
    allowed = 1.06 * 0.5 / 7.5 if isinstance(found, Int4) else 1.1 * (1 - 0.6961928) / 2
    assert bool((error.unflatten(-1, (-1, found.group)) <= allowed * most).all())


@ALL
def test_leading_dimensions_are_matrices_of_their_own(name: str) -> None:
    found, matrices = format_of(name), _matrix(2, 3, 40, 64)
    together = found.quantize(matrices)
    _same(together, _stacked([_stacked([found.quantize(matrix) for matrix in row]) for row in matrices]))
    empty = found.empty((2, 3), 40, 64)
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {k: (v.shape, v.dtype) for k, v in together.items()}


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


@ALL
def test_quantizing_keeps_no_graph_and_not_the_caller_s_numbers(name: str) -> None:
    matrix = _matrix(16, 128).requires_grad_()
    before = matrix.detach().clone()
    parts = format_of(name).quantize(matrix)
    assert not any(part.requires_grad for part in parts.values())
    assert torch.equal(matrix, before)


@ALL
def test_first_use_inside_inference_mode_on_meta_leaves_the_tables_in_order(name: str) -> None:
    found, matrix = format_of(name), _matrix(16, 128)
    expected = found.dequantize(found.quantize(matrix), 16, 128, torch.float32)
    for table in (int4._values, nf4.levels, nf4.nested_levels, nf4._pairs, nf4._nested_codes):
        table.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        inside = found.dequantize(found.quantize(matrix), 16, 128, torch.float32)
    assert torch.equal(inside, expected)
    assert not found.dequantize(found.quantize(matrix), 16, 128, torch.float32).is_inference()
    assert torch.equal(found.dequantize(found.quantize(matrix), 16, 128, torch.float32), expected)


# --- sizes


@K25
def test_bits_per_weight(rows: int, columns: int) -> None:
    assert format_of("nf4").bits(rows, columns) <= 4.13
    assert format_of("int4-g32").bits(rows, columns) == 4.5
    assert format_of("int4-g128").bits(rows, columns) == 4.125


@ALL
@K25
def test_bits_are_those_that_lie_in_memory(name: str, rows: int, columns: int) -> None:
    found = format_of(name)
    parts = found.empty((384,), rows, columns, device="meta")
    assert {part.device.type for part in parts.values()} == {"meta"}
    measured = sum(part.untyped_storage().nbytes() for part in parts.values()) * 8 / (384 * rows * columns)
    assert measured == pytest.approx(found.bits(rows, columns), abs=1e-9)


def test_a_row_shorter_than_the_group_is_one_group() -> None:
    found, matrix = format_of("int4-g128"), _matrix(6, 64)
    parts = found.quantize(matrix)
    assert parts["scale"].shape == (6, 1)
    assert torch.equal(parts["scale"][:, 0], (matrix.abs().amax(-1) / 7.5).bfloat16())


# --- what cannot be held


def test_unknown_format() -> None:
    with pytest.raises(ModelError, match=r"'int4-g64'; known: nf4, int4-g32, int4-g128"):
        format_of("int4-g64")


@pytest.mark.parametrize(
    ("name", "rows", "columns", "message"),
    [
        ("int4-g32", 4, 48, "48 columns .* groups of 32"),
        ("int4-g128", 4, 192, "192 columns .* groups of 128"),
        ("int4-g32", 4, 20, "4 x 20 .* multiples of 8"),
        ("nf4", 3, 40, "3 x 40 .* blocks of 64"),
        ("nf4", 0, 64, "0 x 64"),
        ("int4-g32", 0, 64, "0 x 64"),
    ],
)
def test_sizes_that_do_not_divide(name: str, rows: int, columns: int, message: str) -> None:
    found = format_of(name)
    for attempt in (
        lambda: found.check(rows, columns),
        lambda: found.empty((2,), rows, columns),
        lambda: found.quantize(torch.zeros(rows, columns)),
        lambda: found.bits(rows, columns),
    ):
        with pytest.raises(ModelError, match=f"{name}: .*{message}"):
            attempt()


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(name: str, bad: float) -> None:
    matrix = _matrix(16, 128)
    matrix[3, 5] = bad
    with pytest.raises(ModelError, match=f"{name}: .*16 x 128 holds NaN or infinity"):
        format_of(name).quantize(matrix)


def _without_scale(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"packed": parts["packed"]}


@ALL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_scale, r"parts are \['packed'\], expected"),
        (lambda parts: {**parts, "zero": parts["packed"]}, "zero"),
        (lambda parts: {**parts, "packed": parts["packed"].to(torch.int64)}, "packed .* torch.int64"),
        (lambda parts: {**parts, "packed": parts["packed"][..., 1:]}, r"packed of a 16 x 128 matrix is .* expected"),
        (lambda parts: {name: torch.stack([part] * (1 + (name == "packed"))) for name, part in parts.items()}, "of a"),
    ],
)
def test_parts_of_something_else(name: str, change: Any, message: str) -> None:
    found = format_of(name)
    with pytest.raises(ModelError, match=f"{name}: .*{message}"):
        found.dequantize(change(found.quantize(_matrix(16, 128))), 16, 128, torch.float32)
