"""Weights in 8-bit floats (e4m3) with a scale for each block of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 have them.

A matrix `x.weight` has its scales in `x.weight_scale_inv`: a weight is its 8-bit float times the scale of its block.
Blocks at the lower and right edge may be smaller (arXiv 2412.19437, section 3.3).

Shape letters: N rows and K columns of a matrix, M and J of its blocks; those of an incomplete block count as whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.core_model_loading import ConversionOps
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from gtqlora.errors import ModelError, RunError
from gtqlora.families.headers import Extent, Header
from gtqlora.families.patching import Block, Change, Tally, blocks, move

BLOCK = 128
DTYPE, ON_DISK = torch.float8_e4m3fn, "F8_E4M3"
"""The type of weights, in torch and as safetensors spells it."""
SCALES = "_scale_inv"
"""What the name of a matrix's scales adds to the matrix's."""
SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_LARGEST = torch.finfo(DTYPE).max
_NAME = "gtqlora-fp8"


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_headers(model: str, headers: Mapping[str, Header]) -> None:
    """Check that every matrix in FP8 has its scales, and that all scales have their matrix.

    Raises:
        ModelError: the message names the tensor.
    """
    stored = {name: header for name, header in headers.items() if header.dtype == ON_DISK}
    if not stored:
        raise ModelError(f"{model}: the checkpoint is quantized (fp8) by its config.json, but no tensor is {ON_DISK}")
    for name in stored:
        check_scales(name, headers)
    for name in headers:
        if name.endswith(SCALES) and name.removesuffix(SCALES) not in stored:
            raise ModelError(f"{model}: tensor {name} scales no {ON_DISK} weight")


def check_scales(name: str, headers: Mapping[str, Header]) -> None:
    """Check that a matrix in FP8 has its scales.

    Raises:
        ModelError: it has none, or of another shape or type.
    """
    matrix, scales = headers[name], headers.get(name + SCALES)
    if len(matrix.shape) != 2 or scales is None or scales.shape != scales_shape(matrix.shape):
        raise ModelError(f"tensor {name} is {ON_DISK}, but has no {name}{SCALES} for blocks of {BLOCK} x {BLOCK}")
    if scales.dtype not in SCALE_DTYPES:
        raise ModelError(f"tensor {name}{SCALES} is {scales.dtype}, not one of {', '.join(SCALE_DTYPES)}")


def dequantized(weight_NK: Tensor, scales_MJ: Tensor) -> Tensor:
    """Return the weights in fp32."""
    return weight_NK.float() * _spread(scales_MJ.float(), tuple(weight_NK.shape))


def _spread(scales_MJ: Tensor, shape: tuple[int, ...]) -> Tensor:
    return scales_MJ.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def requantized(weight_NK: Tensor, scales_MJ: Tensor) -> tuple[Tensor, Tensor]:
    """Return changed weights in FP8, and their scales.

    A block keeps the scale that it had, or gets the one that its largest weight calls for, whichever loses less: with
    the scale kept, weights that did not change stay as they are.
    """
    shape = tuple(weight_NK.shape)
    # The largest weight of a block takes the largest float, as whoever made the checkpoint had it.
    largest_MJ = _by_block(weight_NK.abs()).amax((1, 3))
    fitting_MJ = torch.where(largest_MJ > 0, largest_MJ / _LARGEST, 1.0).to(scales_MJ.dtype)
    losses = [_loss(weight_NK, scales) for scales in (scales_MJ, fitting_MJ)]
    taken_MJ = torch.where(losses[1] < losses[0], fitting_MJ, scales_MJ)
    return _rounded(weight_NK, _spread(taken_MJ.float(), shape)), taken_MJ


def _rounded(weight_NK: Tensor, scale_NK: Tensor) -> Tensor:
    return (weight_NK / scale_NK).clamp(-_LARGEST, _LARGEST).to(DTYPE)


def _loss(weight_NK: Tensor, scales_MJ: Tensor) -> Tensor:
    """Return the squared error_MJ of each block with these scales; infinite where it is none."""
    scale_NK = _spread(scales_MJ.float(), tuple(weight_NK.shape))
    error_NK = _rounded(weight_NK, scale_NK).float() * scale_NK - weight_NK
    return _by_block(error_NK.square()).sum((1, 3)).nan_to_num(torch.inf)


def _by_block(values_NK: Tensor) -> Tensor:
    """Return the values as [M, 128, J, 128], zeros where a block is not whole."""
    rows, columns = (BLOCK * count for count in scales_shape(tuple(values_NK.shape)))
    padded = values_NK.new_zeros(rows, columns)
    padded[: values_NK.shape[0], : values_NK.shape[1]] = values_NK
    return padded.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)


def changed(weight_NK: Tensor, scales_MJ: Tensor, change: Change) -> Tensor:
    """Return a matrix as it is read again once it was changed and written, in fp32; see `patching.changed`.

    Raises:
        RunError: the change is for another shape.
    """
    change.check(tuple(weight_NK.shape))
    out = torch.empty(weight_NK.shape)
    # Cut between rows, at multiples of 128: no block of scales is cut.
    for block in blocks(tuple(weight_NK.shape), by_columns=False):
        scales = scales_MJ[block.rows.start // BLOCK : -(-block.rows.stop // BLOCK)]
        wanted = change(dequantized(weight_NK[block.rows], scales), block.part)
        out[block.rows] = dequantized(*requantized(wanted, scales))
    return out


def patch(
    name: str,
    extents: tuple[Extent, Extent],
    change: Change,
    source: int,
    target: int,
    starts: tuple[int, int],
) -> Tally:
    """Write a changed matrix and its scales into a file, as `patching.patch` does; both are given as a pair.

    Raises:
        RunError: a value of the changed tensor is not finite.
    """
    tally, (weight, scales) = Tally(), extents
    for block in blocks(weight.shape, by_columns=False):
        tiles = slice(block.rows.start // BLOCK, -(-block.rows.stop // BLOCK))
        of_scales = Block(0, tiles, slice(0, scales.shape[1]), tiles)
        before_NK = torch.empty(block.rows.stop - block.rows.start, weight.shape[1], dtype=DTYPE)
        scales_MJ = torch.empty(tiles.stop - tiles.start, scales.shape[1], dtype=SCALE_DTYPES[scales.dtype])
        move(source, weight, weight.start, block, before_NK, write=False)
        move(source, scales, scales.start, of_scales, scales_MJ, write=False)
        exact_NK = dequantized(before_NK, scales_MJ)
        wanted_NK = change(exact_NK, block.part)
        if not bool(wanted_NK.isfinite().all()):
            raise RunError(f"tensor {name} would hold NaN or infinity with the edit; nothing was written")
        written = requantized(wanted_NK, scales_MJ)
        tally.add(exact_NK, wanted_NK, dequantized(*written))
        move(target, weight, starts[0], block, written[0], write=True)
        move(target, scales, starts[1], of_scales, written[1], write=True)
    return tally


# --- loading ---------------------------------------------------------------------------------------------------------


class _Dequantize(Fp8Dequantize):
    """transformers' own takes blocks to be equal, which DeepSeek-V3's `kv_a_proj_with_mqa` (576 rows) has not."""

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        return dequantized(quantized, scales).to(output_dtype or torch.bfloat16)


@register_quantizer(_NAME)
class DequantizingQuantizer(FineGrainedFP8HfQuantizer):
    """Has transformers load FP8 weights into the plain modules of an unquantized model."""

    def __init__(self, quantization_config: FineGrainedFP8Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # whatever the config object says, from which quantization was left out

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return what is done to weights as they are read."""
        return {"dequantize": _Dequantize}

    def update_weight_conversions(self, *arguments: Any) -> list[Any]:
        """Return how weights are read: by our operation, also where transformers (5.17) names its own itself."""
        found = super().update_weight_conversions(*arguments)
        for conversion in found:
            steps = getattr(conversion, "operations", [])
            steps[:] = [_Dequantize(self) if type(step) is Fp8Dequantize else step for step in steps]
        return found


@register_quantization_config(_NAME)
class DequantizedFP8Config(FineGrainedFP8Config):
    """The settings of `DequantizingQuantizer`."""

    def __init__(self) -> None:
        super().__init__(dequantize=True)
        self.quant_method = _NAME  # pyright: ignore[reportAttributeAccessIssue]
