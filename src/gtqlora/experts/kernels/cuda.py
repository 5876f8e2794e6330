"""CUDA C++ at run time through NVIDIA's own bindings: compile, load, launch, and describe arrays to the copy engine.

The bindings have no types of their own: their handles are `object` here.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

Function = object
"""A kernel that was loaded onto a GPU, as the driver names it."""

Argument: TypeAlias = "Tensor | int | array[int]"
"""What `launch` passes to a kernel: a pointer, a number, or a structure as the bytes of an array."""

# The size of CUDA's CUtensorMap, which a kernel takes by value.
_MAP_BYTES = 128


@cache
def available() -> bool:
    """Return whether the bindings are installed; torch's own CUDA builds bring them."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@cache
def _driver() -> ModuleType:
    return import_module("cuda.bindings.driver")


def _ok(result: tuple[Any, ...], what: str) -> Any:
    """Return the value of a CUDA call, or raise RuntimeError if its status is an error."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"{what} failed: {status.name}")
    return values[0] if len(values) == 1 else values


def compile_source(text: str, name: str, settings: Mapping[str, int | str], architecture: str) -> bytes:
    """Compile CUDA C++ to machine code; this needs no GPU.

    Args:
        name: what compiler messages call the text.
        settings: macros that the text is compiled with.
        architecture: such as "sm_90a".

    Raises:
        RuntimeError: the text does not compile; the message is the compiler's.
    """
    nvrtc = import_module("cuda.bindings.nvrtc")
    defined = (f"-D{key}={value}".encode() for key, value in settings.items())
    options = [f"-arch={architecture}".encode(), b"-std=c++17", *defined]
    program = _ok(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []), "nvrtcCreateProgram")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        log = b" " * _ok(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile: {log.decode()}")
    code = b" " * _ok(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    _ok(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    return code


def load(code: bytes, names: tuple[str, ...], device: int) -> dict[str, Function]:
    """Load machine code onto a GPU and return its functions by name."""
    driver = _driver()
    with torch.cuda.device(device):
        # The driver loads into the current context, and only using a stream makes PyTorch's the current one.
        torch.cuda.current_stream().synchronize()
        module = _ok(driver.cuModuleLoadData(code), "cuModuleLoadData")
        return {name: _ok(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction") for name in names}


def allow_shared_memory(function: Function, size: int) -> None:
    """Let a function's blocks have `size` bytes of dynamic shared memory; by default they may have 48 KiB."""
    driver = _driver()
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _ok(driver.cuFuncSetAttribute(function, limit, size), "cuFuncSetAttribute")


def launch(function: Function, blocks: int | tuple[int, int], threads: int, shared: int, *arguments: Argument) -> None:
    """Launch a function on PyTorch's stream.

    Args:
        blocks: how many, across or (across, down).
        threads: of each block.
        shared: bytes of dynamic shared memory of each block.
        arguments: tensors go as pointers, ints, none negative, as 32 or 64 bits, arrays by value.
    """
    # Few Python objects, as these are most of what a small layer costs: every value has 8 bytes, and the driver reads
    # as many as the function wants. It takes their addresses, so they must live until it has copied them.
    values = array("Q", [_word(argument) for argument in arguments])
    first = values.buffer_info()[0]
    pointers = array("Q", range(first, first + 8 * len(values), 8))
    for place, argument in enumerate(arguments):
        if isinstance(argument, array):
            pointers[place] = argument.buffer_info()[0]
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    across, down = blocks if isinstance(blocks, tuple) else (blocks, 1)
    sizes = (across, down, 1, threads, 1, 1, shared)
    _ok(_driver().cuLaunchKernel(function, *sizes, stream, pointers.buffer_info()[0], 0), "cuLaunchKernel")


def _word(argument: Argument) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument if isinstance(argument, int) else 0


def tensor_map(address: int, element: str, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: str) -> bytes:
    """Describe to the copy engine how it reads boxes of a contiguous array; what lies past the end reads as zero.

    Args:
        address: of the array.
        element: CUDA's name of the type that `sizes` count, "BFLOAT16" or "UINT64".
        sizes, box: innermost first.
        swizzle: "NONE" or "128B".

    Returns:
        CUDA's CUtensorMap, to be passed to a kernel by value.
    """
    d = _driver()
    u32, u64 = d.cuuint32_t, d.cuuint64_t
    width = {"BFLOAT16": 2, "UINT64": 8}[element]
    found = d.cuTensorMapEncodeTiled(
        getattr(d.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{element}"),
        len(sizes),
        address,
        [u64(size) for size in sizes],
        [u64(width * math.prod(sizes[: i + 1])) for i in range(len(sizes) - 1)],
        [u32(size) for size in box],
        [u32(1)] * len(sizes),
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(d.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return ctypes.string_at(int(_ok(found, "cuTensorMapEncodeTiled").getPtr()), _MAP_BYTES)
