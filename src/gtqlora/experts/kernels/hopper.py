"""Grouped products on Hopper GPUs (compute capability 9.0): `hopper.cu`, compiled at first use, and how it is launched.

Shape letters: S rows sorted by expert, C contraction, R results, E experts.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

import torch
from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.experts.kernels import cuda, sorting
from gtqlora.experts.kernels.rows import Experts, Placed, place_rows
from gtqlora.experts.layout import Fused
from gtqlora.experts.nf4 import levels, nested_levels
from gtqlora.experts.tiles import TILE

GRAIN = 128
"""Both sizes of a matrix must be multiples of this."""

# Three warpgroups of 128 threads: one copies and dequantizes, two multiply.
_THREADS = 384
_TILE_BYTES, _ROW_BYTES = 2048, 128
_ROWS_TIMES_WIDE = 256
"""More accumulators than these do not fit into the registers."""

_MOST_ROWS_SORTED = 2**15
"""Rows up to which one block sorts them faster than torch, as measured on an H100: 0.02 against 0.07 ms for 8,192."""

_FEW_ROWS = 16
"""Rows per expert up to which a launch costs more than it saves."""
# What a block may have on compute capability 9.0, less 1 KiB to align the first stage.
_SHARED_LIMIT = 227 * 1024 - 1024
_LEVELS_BYTES = 256 * 32 * 4


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One compilation of `hopper.cu`; `wide` is its M, 64-wide tiles of results per warpgroup."""

    nf4: bool
    group: int
    transposed: bool
    wide: int

    @property
    def max_rows(self) -> int:
        """Return how many rows share one dequantization, at most."""
        return _ROWS_TIMES_WIDE // self.wide

    @property
    def tiles(self) -> int:
        """Return the tiles of results per block."""
        return 2 * self.wide

    @property
    def scale_box(self) -> tuple[int, int]:
        """Return how many groups (by tile) and 64-wide rows have scales that one stage needs."""
        if not self.transposed:
            return 1, self.tiles
        return (self.tiles // 2 if self.group == 128 else self.tiles), 1

    @property
    def _stage_bytes(self) -> int:
        scales = self.scale_box[0] * self.scale_box[1] * 2 * _scales_per_tile(self.group)
        return self.max_rows * _ROW_BYTES + self.tiles * _TILE_BYTES + scales + 16

    @property
    def stages(self) -> int:
        """Return how many stages of the pipeline fit into shared memory."""
        return (_SHARED_LIMIT - self.nf4 * _LEVELS_BYTES) // self._stage_bytes

    @property
    def shared_bytes(self) -> int:
        """Return the dynamic shared memory of a block, in bytes."""
        return self.stages * self._stage_bytes + 1024


def _scales_per_tile(group: int) -> int:
    return 128 if group == 32 else 64


@dataclass(frozen=True, kw_only=True)
class Tiled:
    """The matrices [N, K] of E experts in the order of `tiles`; scales are bf16."""

    nf4: bool
    group: int
    rows: int
    columns: int
    codes: Tensor
    scales: Tensor


def _wgmma(rows: int) -> str:
    """Return one specialization of `wgmma`; the assembler wants every accumulator by name."""
    n = rows // 2
    registers = ", ".join(f"%{i}" for i in range(n))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(n))
    return f"""
template <>
__device__ __forceinline__ void wgmma<{rows}>(float (&d)[{n}], const u32 (&a)[4], u64 b) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 "
      "{{{registers}}}, {{%{n}, %{n + 1}, %{n + 2}, %{n + 3}}}, %{n + 4}, 1, 1, 1, 0;"
      : {outputs} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}}"""


def _levels() -> str:
    """Return NF4's levels as the bits of bf16."""
    return ",".join(str(bits & 0xFFFF) for bits in levels(torch.device("cpu")).bfloat16().view(torch.int16).tolist())


def source() -> str:
    """Return the text of `hopper.cu` with its generated instructions."""
    text = resources.files("gtqlora.experts.kernels").joinpath("hopper.cu").read_text(encoding="utf-8")
    return text.replace("//WGMMA//", "".join(_wgmma(rows) for rows in range(16, 257, 16)))


def compile_variant(variant: Variant) -> bytes:
    """Compile a variant to machine code; this needs no GPU."""
    settings = {
        "NF4": int(variant.nf4),
        "GROUP": variant.group,
        "TRANSPOSED": int(variant.transposed),
        "M": variant.wide,
        "STAGES": variant.stages,
        "NF4_LEVELS": _levels(),
    }
    return cuda.compile_source(source(), "hopper.cu", settings, "sm_90a")


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A variant on a GPU, with what each launch needs."""

    variant: Variant
    shared_bytes: int
    most: int
    grouped: cuda.Function
    absmax: cuda.Function


@cache
def _loaded(nf4: bool, group: int, transposed: bool, wide: int, device: int) -> _Loaded:
    variant = Variant(nf4=nf4, group=group, transposed=transposed, wide=wide)
    functions = cuda.load(compile_variant(variant), ("grouped", "absmax"), device)
    cuda.allow_shared_memory(functions["grouped"], variant.shared_bytes)
    return _Loaded(variant=variant, shared_bytes=variant.shared_bytes, most=variant.max_rows, **functions)


@lru_cache(maxsize=4096)
def _maps(
    x: int, n_rows: int, codes: int, scales: int, rows: int, columns: int, n_experts: int, variant: Variant
) -> array[int]:
    """Return the four maps of `Maps` in hopper.cu, as one argument, for arrays at these addresses."""
    # Cached: PyTorch gives the same addresses again and again, and a map takes longer to make than a launch.
    size = (rows if variant.transposed else columns, n_rows)
    lines, across = n_experts * rows // TILE, columns // TILE
    box = (_TILE_BYTES // 8, *((variant.tiles, 1) if variant.transposed else (1, variant.tiles)))
    words = _scales_per_tile(variant.group) * 2 // 8
    scale_columns = across // 2 if variant.group == 128 else across
    maps = (
        cuda.tensor_map(x, "BFLOAT16", size, (TILE, 16), "128B"),
        cuda.tensor_map(x, "BFLOAT16", size, (TILE, 64), "128B"),
        cuda.tensor_map(codes, "UINT64", (_TILE_BYTES // 8, across, lines), box, "NONE"),
        cuda.tensor_map(scales, "UINT64", (words, scale_columns, lines), (words, *variant.scale_box), "NONE"),
    )
    return array("Q", b"".join(maps))


def _check(x_SC: Tensor, weights: Tiled, offsets_E1: Tensor, contraction: int) -> None:
    if weights.rows % GRAIN or weights.columns % GRAIN:
        raise ModelError(
            f"the Hopper kernel needs sizes in multiples of {GRAIN}, not {weights.rows} x {weights.columns}"
        )
    if x_SC.dtype != torch.bfloat16 or x_SC.ndim != 2 or x_SC.shape[1] != contraction or not x_SC.is_contiguous():
        raise ModelError(
            f"the Hopper kernel needs contiguous bf16 rows of {contraction}, not {x_SC.dtype} {list(x_SC.shape)}"
        )
    if offsets_E1.dtype != torch.int32:
        raise ModelError(f"row offsets are {offsets_E1.dtype}, expected int32")


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _wide_for(n_rows: int, n_experts: int, results: int, multiprocessors: int) -> int:
    """Return the fastest width, as `bench/experts.py` measured it on an H200 and an H100."""
    # Many rows leave no registers for many results, and few experts with rows leave multiprocessors without work.
    wanted = _ROWS_TIMES_WIDE // _most_for(n_rows, n_experts)
    while wanted > 1 and 2 * min(n_rows, n_experts) * results < multiprocessors * wanted * GRAIN:
        wanted //= 2
    return next(wide for wide in (4, 2, 1) if wide <= wanted and results % (wide * GRAIN) == 0)


def _most_for(n_rows: int, n_experts: int) -> int:
    """Return how many rows a tile should have at most."""
    mean = n_rows // n_experts
    return 64 if mean <= 48 else 128 if mean <= 128 else 256


def sort(top_k_index_TK: Tensor, first: int, count: int) -> Placed:
    """Sort rows for `multiply`, and cut them into the tiles that most of its products want."""
    n_rows = top_k_index_TK.numel()
    if n_rows > _MOST_ROWS_SORTED:
        return place_rows(top_k_index_TK, first, count)
    return sorting.sort(top_k_index_TK, first, count, _most_for(n_rows, count))


def product(x_SC: Tensor, weights: Tiled, rows: Placed, *, transposed: bool, wide: int | None = None) -> Tensor:
    """Multiply rows by their experts' matrices, in bf16: x W^T, or x W if `transposed`.

    Args:
        rows: whose x is; they may have been cut into tiles of the height that the variant wants.
        wide: the variant's width; by default the fastest one.

    Raises:
        ModelError: a size, dtype or layout the kernel does not take.
    """
    n_experts, s = len(rows.offsets_E1) - 1, len(x_SC)
    results, contraction = (weights.columns, weights.rows) if transposed else (weights.rows, weights.columns)
    _check(x_SC, weights, rows.offsets_E1, contraction)
    out_SR = x_SC.new_empty(s, results)
    if not s:
        return out_SR
    device = x_SC.get_device()
    multiprocessors = _multiprocessors(device)
    wide = wide or _wide_for(s, n_experts, results, multiprocessors)
    loaded = _loaded(weights.nf4, weights.group, transposed, wide, device)
    addresses = (weights.codes.data_ptr(), weights.scales.data_ptr())
    maps = _maps(x_SC.data_ptr(), s, *addresses, weights.rows, weights.columns, n_experts, loaded.variant)
    with torch.cuda.device(device):
        tiles, n_tiles = _tiles(rows, s, loaded.most)
        arguments = (maps, out_SR, tiles, n_tiles, results, contraction)
        cuda.launch(loaded.grouped, multiprocessors, _THREADS, loaded.shared_bytes, *arguments)
    return out_SR


def _tiles(rows: Placed, n_rows: int, most: int) -> tuple[Tensor, Tensor]:
    # Lower tiles do as well, but experts with many rows are then dequantized more often.
    fit = rows.most == most or (rows.most < most and n_rows <= _FEW_ROWS * (len(rows.offsets_E1) - 1))
    if fit and rows.tiles is not None and rows.n_tiles is not None:
        return rows.tiles, rows.n_tiles
    return sorting.cut(rows.offsets_E1, n_rows, most)


def decode_absmax(absmax: Tensor, scale: Tensor, offset: Tensor, offsets_E1: Tensor, rows: int, columns: int) -> Tensor:
    """Decode NF4's scales to bf16, in the order of the tiles; those of experts without rows are left undefined.

    Args:
        absmax: uint8, in the order of the tiles, of E experts with M matrices [rows, columns] each.
        scale: fp32 [E, M, nested blocks]; offset: fp32 [E, M].
        offsets_E1: int32; the rows of expert e are offsets[e] to offsets[e + 1].
    """
    device = absmax.get_device()
    loaded = _loaded(True, 64, False, 1, device)
    out = torch.empty(absmax.numel(), dtype=torch.bfloat16, device=absmax.device)
    experts, matrices = offset.shape
    arguments = (absmax, nested_levels(absmax.device), scale, offset, offsets_E1, out, rows, columns)
    with torch.cuda.device(device):
        cuda.launch(loaded.absmax, (matrices * rows // TILE, experts), 256, 0, *arguments)
    return out


@cache
def _is_hopper(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(module: Experts, hidden_states: Tensor, dtype: torch.dtype) -> bool:
    """Return whether this kernel does it: bf16 on Hopper, sizes in multiples of 128, NVIDIA's bindings installed."""
    sizes = (module.hidden_size, module.intermediate_size)
    return (
        hidden_states.is_cuda
        and dtype == torch.bfloat16
        and module.format.group in (32, 64, 128)
        and module.count <= sorting.MOST_EXPERTS
        and all(size % GRAIN == 0 for size in sizes)
        and _is_hopper(hidden_states.get_device())
        and cuda.available()
    )


_decoded: dict[int, dict[tuple[int, str], tuple[Tensor, Tensor]]] = {}
"""By device, NF4 scales of the layer that last ran forward, and for which rows: under checkpointing its backward comes
next."""


def _scales(module: Experts, projection: Fused, rows: Placed, transposed: bool) -> Tensor:
    """Return bf16 scales in the order of the tiles, decoded once for a forward pass and its backward."""
    if module.format.name != "nf4":
        return module.get_buffer(f"{projection}_scale")
    absmax = module.get_buffer(f"{projection}_absmax")
    kept, key = _decoded.setdefault(absmax.get_device(), {}), (id(module), projection)
    if transposed and key in kept:
        scales, offsets_E1 = kept.pop(key)
        # Only those of experts that had rows were decoded.
        if offsets_E1.data_ptr() == rows.offsets_E1.data_ptr():
            return scales
    scale, offset = (module.get_buffer(f"{projection}_absmax_{part}") for part in ("scale", "offset"))
    scales = decode_absmax(absmax, scale, offset, rows.offsets_E1, *module.sizes(projection))
    if not transposed:
        for other in [other for other in kept if other[0] != id(module)]:
            del kept[other]
        kept[key] = scales, rows.offsets_E1
    return scales


def tiled_of(module: Experts, projection: Fused, rows: Placed, transposed: bool) -> Tiled:
    """Return a projection of a module whose weights are in tiles, as it is needed for these rows."""
    outputs, columns = module.sizes(projection)
    codes = module.get_buffer(f"{projection}_packed")
    return Tiled(
        nf4=module.format.name == "nf4",
        group=module.format.group,
        rows=codes.shape[1] * outputs,
        columns=columns,
        codes=codes,
        scales=_scales(module, projection, rows, transposed),
    )


def multiply(values_RC: Tensor, module: Experts, projection: Fused, rows: Placed, transposed: bool) -> Tensor:
    """Multiply rows sorted by expert by their experts' matrices, for `layer.run`; put the weights into tiles first."""
    module.arrange(tiled=True)
    weights = tiled_of(module, projection, rows, transposed)
    return product(values_RC.contiguous(), weights, rows, transposed=transposed)
