"""The chunk kernel: some experts at a time are dequantized into one workspace and multiplied by torch's own kernels.

The bounds of the experts' rows are needed on the host: one wait for the GPU per layer and forward pass.
Shape letters as in `rows`; C contraction, S results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from gtqlora.experts.kernels.codes import Codes, code_at, codes_of, integer, scales_of
from gtqlora.experts.kernels.layer import run
from gtqlora.experts.kernels.row_kernels import launch, tl, triton
from gtqlora.experts.kernels.rows import Experts, Placed, fused_sizes
from gtqlora.experts.layout import Fused

WORKSPACE_BYTES = 1_500_000_000
"""Dequantized weights that are in memory at a time, at most, unless one expert has more."""

_WORDS, _TURNS = 256, 4
"""Words of a program at a time, one a thread so that neighbours write neighbouring 16 bytes, and how often at most."""

_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def chunk(module: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sums_TD of the experts' outputs.

    Raises:
        ModelError: a dtype or format that the kernels do not take.
    """
    return run(module, hidden_states, top_k_index, top_k_weights, Chunks())


@dataclass(kw_only=True)
class Chunks:
    """A `layer.Multiply` for one layer and pass, which remembers the rows' bounds for its other projections."""

    bounds: list[int] = field(default_factory=list)

    def __call__(
        self,
        values_RC: Tensor,
        module: Experts,
        projection: Fused,
        rows: Placed,
        transposed: bool,
    ) -> Tensor:
        offsets_E1 = rows.offsets_E1
        self.bounds = self.bounds or offsets_E1.tolist()
        outputs, inputs = fused_sizes(module, projection)
        out_RS = values_RC.new_empty(len(values_RC), inputs if transposed else outputs)
        for experts in _spans(self.bounds, outputs * inputs * values_RC.element_size()):
            weights = dequantize(codes_of(module, projection, experts), values_RC.dtype)
            weights = weights if transposed else weights.mT
            bounds = self.bounds[experts.start : experts.stop + 1]
            held = slice(bounds[0], bounds[-1])
            ends_E = offsets_E1[experts.start + 1 : experts.stop + 1] - bounds[0]
            _products(values_RC[held], weights, ends_E, [bound - bounds[0] for bound in bounds], out_RS[held])
        return out_RS


def _spans(bounds: list[int], bytes_each: int) -> Iterator[slice]:
    """Yield equally many experts at a time, as the workspace holds; those without rows at either end are left out."""
    count = len(bounds) - 1
    portions = -(-count // max(1, WORKSPACE_BYTES // bytes_each))
    step = -(-count // portions)
    for start in range(0, count, step):
        hit = [expert for expert in range(start, min(start + step, count)) if bounds[expert] < bounds[expert + 1]]
        if hit:
            yield slice(hit[0], hit[-1] + 1)


def _products(values_RC: Tensor, weights_ECS: Tensor, ends_E: Tensor, bounds: list[int], out_RS: Tensor) -> None:
    """Multiply the rows bounds[e] to bounds[e + 1] by the matrix of e."""
    if _takes_groups(values_RC, out_RS):
        out_RS.copy_(torch.nn.functional.grouped_mm(values_RC, weights_ECS, offs=ends_E))
        return
    for weights_CS, (start, stop) in zip(weights_ECS.unbind(), pairwise(bounds), strict=True):
        if start < stop:
            torch.mm(values_RC[start:stop], weights_CS, out=out_RS[start:stop])


def _takes_groups(values_RC: Tensor, out_RS: Tensor) -> bool:
    """Return whether torch has a grouped product for it: bf16, tensor cores, sizes in multiples of 16 bytes."""
    if values_RC.dtype != torch.bfloat16 or values_RC.device.type != "cuda":
        return False
    fit = values_RC.shape[1] % 8 == 0 and out_RS.shape[1] % 8 == 0
    return fit and torch.cuda.get_device_capability(values_RC.device) >= (8, 0)


@triton.jit
def _dequantize(
    out, words, scales, scale_scales, offsets, levels, scale_levels,
    NF4: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
    ALL: tl.constexpr, WORDS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Word by word; ALL words of a matrix, which is the program's second number."""
    matrix = tl.program_id(1).to(tl.int64)
    words += matrix * ALL
    out += matrix * ALL * 8
    place = tl.arange(0, 8)[None, :]
    for turn in tl.static_range(TURNS):  # pyright: ignore[reportGeneralTypeIssues]
        word = (tl.program_id(0) * TURNS + turn) * WORDS + tl.arange(0, WORDS)
        inside = word < ALL
        found = tl.load(words + word, mask=inside, other=0)
        block = word // (GROUP // 8)
        number = tl.zeros((WORDS,), tl.int64) + matrix
        scale = scales_of(block, number, inside, scales, scale_scales, offsets, scale_levels, NF4, BLOCKS, NESTED)
        code = code_at(found[:, None], place, NF4)
        value = (tl.load(levels + code) if NF4 else integer(code)) * scale[:, None]
        tl.store(out + word[:, None] * 8 + place, value.to(out.dtype.element_ty), mask=inside[:, None])


def dequantize(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Weights [E, M * N, K] in the workspace: the next call overwrites them."""
    matrices, weights = codes.experts * codes.matrices, codes.rows * codes.columns
    words = weights // 8
    out = _workspace(codes.tensors[0].device, matrices * weights * dtype.itemsize).view(dtype)[: matrices * weights]
    turns = min(_TURNS, -(-words // _WORDS))
    grid = (-(-words // (_WORDS * turns)), matrices)
    constants = {**codes.constants, "ALL": words, "WORDS": _WORDS, "TURNS": turns}
    launch(_dequantize, grid, out, *codes.tensors, **constants, num_warps=8)
    return out.view(codes.experts, codes.matrices * codes.rows, codes.columns)


@torch.inference_mode(False)
def _workspace(device: torch.device, n_bytes: int) -> Tensor:
    """Bytes that only the current stream uses; they grow to the need and stay."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _workspaces.get((device, stream))
    if found is None or len(found) < n_bytes:
        _workspaces.pop((device, stream), None)
        found = _workspaces[device, stream] = torch.empty(-(-n_bytes // 16) * 16, dtype=torch.uint8, device=device)
    return found
