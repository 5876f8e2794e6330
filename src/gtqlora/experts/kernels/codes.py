"""4-bit parts as Triton kernels read them: both formats alike, words of 8 codes in the order of the flattened matrix.

Shape letters: E experts, M matrices of each (2 for gate and up, 1 for down), N rows and K columns of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.experts import nf4
from gtqlora.experts.formats import Int4, Nf4
from gtqlora.experts.kernels.row_kernels import tl, triton
from gtqlora.experts.kernels.rows import Experts
from gtqlora.experts.layout import Fused, Parts


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The matrices of some experts, as their 4-bit codes and scales.

    Attributes:
        experts, matrices, rows, columns: E, M, N and K.
        nf4: whether codes are NF4 levels with scales in 8 bits, or integers with scales in bf16.
        group: codes that share a scale, counted along the flattened matrix.
        tensors: words (int32), scales, and for NF4 the scales' scales, offsets, levels and the scales' levels.
    """

    experts: int
    matrices: int
    rows: int
    columns: int
    nf4: bool
    group: int
    tensors: tuple[Tensor, ...]

    @property
    def constants(self) -> dict[str, int]:
        """Return what every kernel that reads these codes is compiled with."""
        # NF4 with double quantization: 256 scales share a scale of theirs.
        blocks = self.rows * self.columns // self.group
        return {"NF4": self.nf4, "GROUP": self.group, "BLOCKS": blocks, "NESTED": -(-blocks // 256)}


def codes_of(module: Experts, projection: Fused, experts: slice = slice(None)) -> Codes:
    """Return the experts' matrices as codes, without a copy; `experts` counts from the first one held here.

    Raises:
        ModelError: the kernels do not know the format.
    """
    gate_up = projection == "gate_up"
    rows, columns = module.hidden_size, module.intermediate_size
    rows, columns = (columns, rows) if gate_up else (rows, columns)
    parts, is_nf4 = module.parts(projection, experts), isinstance(module.format, Nf4)
    if not is_nf4 and not isinstance(module.format, Int4):
        raise ModelError(f'this kernel does not know the format {module.format.name}; set kernel = "reference"')
    return Codes(
        experts=len(parts["packed"]),
        matrices=2 if gate_up else 1,
        rows=rows,
        columns=columns,
        nf4=is_nf4,
        group=module.format.group if is_nf4 else min(module.format.group, columns),
        tensors=_nf4_tensors(parts) if is_nf4 else _int4_tensors(parts),
    )


def _int4_tensors(parts: Parts) -> tuple[Tensor, ...]:
    # Kernels have one signature for both formats; what int4 lacks is filled with a tensor that is never read.
    words, scale = parts["packed"], parts["scale"]
    return words, scale, scale, scale, scale, scale


def _nf4_tensors(parts: Parts) -> tuple[Tensor, ...]:
    device = parts["packed"].device
    scales = (parts["absmax"], parts["absmax_scale"], parts["absmax_offset"])
    return parts["packed"].view(torch.int32), *scales, nf4.levels(device), nf4.nested_levels(device)


@triton.jit
def code_at(word, place, NF4: tl.constexpr):
    """Return the codes at `place` 0..7 of words: int4's low nibble is first, NF4's the high one of each byte."""
    if NF4:
        return (word >> ((place * 4) ^ 4)) & 15
    return (word >> (place * 4)) & 15


@triton.jit
def codes_in(word, NF4: tl.constexpr):
    """Return the codes [A, B, 8] of words [A, B].

    Words are split by halves, so that one thread has all 8 codes of a word and writes them at once.
    """
    halves = tl.join(word, word >> 16)
    quarters = tl.join(halves, halves >> 8)
    codes = tl.join(quarters >> 4, quarters) if NF4 else tl.join(quarters, quarters >> 4)
    return tl.reshape(codes & 15, (word.shape[0], word.shape[1], 8))


@triton.jit
def integer(code):
    """Return the integers (fp32) that int4 codes stand for, -8 to 7."""
    # These bits are the fp32 number 2^23 + code: an or and a subtraction are cheaper than a conversion.
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


_L = tl.constexpr(nf4.LEVELS)


@triton.jit
def level(code):
    """Return the NF4 levels (fp32) of codes."""
    # Choices between registers: a table in memory would be read once for every weight.
    one, two, four = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0
    low = tl.where(two, tl.where(one, _L[3], _L[2]), tl.where(one, _L[1], _L[0]))
    next_low = tl.where(two, tl.where(one, _L[7], _L[6]), tl.where(one, _L[5], _L[4]))
    high = tl.where(two, tl.where(one, _L[11], _L[10]), tl.where(one, _L[9], _L[8]))
    next_high = tl.where(two, tl.where(one, _L[15], _L[14]), tl.where(one, _L[13], _L[12]))
    return tl.where((code & 8) != 0, tl.where(four, next_high, high), tl.where(four, next_low, low))


@triton.jit
def scales_of(
    block, matrix, inside, scales, scale_scales, offsets, scale_levels,
    NF4: tl.constexpr, BLOCKS: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Return the scales (fp32) of numbered blocks of numbered matrices; some finite number where not `inside`."""
    found = tl.load(scales + (matrix * BLOCKS + block), mask=inside, other=0)
    if NF4:
        centred = tl.load(scale_levels + found.to(tl.int32))
        spread = tl.load(scale_scales + (matrix * NESTED + block // 256), mask=inside, other=0)
        return centred * spread + tl.load(offsets + matrix, mask=inside, other=0)
    return found.to(tl.float32)
