"""CUDA C++ at run time through NVIDIA's own bindings: compile, load, launch, and describe arrays to the copy engine."""

from __future__ import annotations

import ctypes
import math
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy
import torch
from torch import Tensor

_MAP_BYTES = 128


def available() -> bool:
    """Whether the bindings are installed; torch's own CUDA builds bring them."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@cache
def _bindings(name: str) -> Any:
    return import_module(f"cuda.bindings.{name}")


def _ok(result: tuple[Any, ...], what: str) -> Any:
    """The value of a CUDA call."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"{what} failed: {status.name}")
    return values[0] if len(values) == 1 else values


def compile_source(text: str, name: str, settings: dict[str, Any], architecture: str) -> bytes:
    """Machine code; needs no GPU.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    nvrtc = _bindings("nvrtc")
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


def load(code: bytes, names: tuple[str, ...], device: int) -> dict[str, Any]:
    """Functions of the code, on a GPU."""
    driver = _bindings("driver")
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context current
        module = _ok(driver.cuModuleLoadData(code), "cuModuleLoadData")
        return {name: _ok(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction") for name in names}


def allow_shared_memory(function: Any, size: int) -> None:
    """Let a function's blocks have this many bytes of dynamic shared memory."""
    driver = _bindings("driver")
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _ok(driver.cuFuncSetAttribute(function, limit, size), "cuFuncSetAttribute")


def launch(function: Any, blocks: int | tuple[int, int], threads: int, shared: int, *arguments: Any) -> None:
    """Launch on PyTorch's stream; tensors go as pointers, ints as 32 bits, ctypes values as they are."""
    values = [_value(argument) for argument in arguments]
    pointers = numpy.array([ctypes.addressof(value) for value in values], dtype=numpy.uint64)
    stream = torch.cuda.current_stream().cuda_stream
    across, down = blocks if isinstance(blocks, tuple) else (blocks, 1)
    sizes = (across, down, 1, threads, 1, 1, shared)
    _ok(_bindings("driver").cuLaunchKernel(function, *sizes, stream, pointers.ctypes.data, 0), "cuLaunchKernel")


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else argument


def tensor_map(tensor: Tensor, element: str, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: str) -> bytes:
    """How the copy engine reads boxes of a contiguous array; what lies past the end reads as zero.

    Args:
        element: CUDA's name of the type that `sizes` count, "BFLOAT16" or "UINT64".
        sizes, box: innermost first.
        swizzle: "NONE" or "128B".
    """
    return _tensor_map(tensor.data_ptr(), element, sizes, box, swizzle)


@lru_cache(maxsize=4096)
def _tensor_map(address: int, element: str, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: str) -> bytes:
    """Kept by address, as PyTorch gives the same ones again and again and a map takes longer to make than a launch."""
    d = _bindings("driver")
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
