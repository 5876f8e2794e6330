"""Triton kernels compile for GPUs that are not here; the interpreter does not see what only the compiler refuses."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton (Linux)")

POINTERS = {
    "values_RC": "*bf16",
    "out_RS": "*bf16",
    "offsets_E1": "*i32",
    "words": "*i32",
    "scale_scales": "*fp32",
    "offsets": "*fp32",
    "_levels": "*fp32",
    "scale_levels": "*fp32",
}
ROWS, COLUMNS = 768, 2048


@pytest.mark.parametrize(
    ("nf4", "group", "capability", "transposed", "blocks"),
    [(True, 64, 90, False, (16, 64, 128)), (False, 32, 80, True, (64, 128, 64))],
)
def test_the_grouped_product_compiles(
    nf4: bool, group: int, capability: int, transposed: bool, blocks: tuple[int, int, int]
) -> None:
    import triton  # not at the top: test_gpu_products sets the interpreter up in a process of its own
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gtqlora.experts.kernels import fused

    kernel: Any = fused._grouped
    names = list(inspect.signature(kernel.fn).parameters)
    n_blocks = ROWS * COLUMNS // group
    constants = {
        "NF4": nf4,
        "GROUP": group,
        "BLOCKS": n_blocks,
        "NESTED": -(-n_blocks // 256),
        "TRANSPOSED": transposed,
    }
    constants |= {"EXPERTS": 128, "EXPERTS_PADDED": 128, "MATRICES": 2, "ROWS": ROWS, "COLUMNS": COLUMNS, "SPAN": group}
    constants |= dict(zip(("M", "N", "K"), blocks, strict=True))
    pointers = {**POINTERS, "scales": "*u8" if nf4 else "*bf16"}
    signature = {name: pointers.get(name, "constexpr") for name in names}
    given = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, given, {}), target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}
    )
    assert f".target sm_{capability}" in compiled.asm["ptx"]
