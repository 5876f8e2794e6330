"""GGUF files for tests, quantized by ggml itself (from xllamacpp's library), and rebuilt with whatever is wrong."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gtqlora.exports.gguf.header import header, padded
from gtqlora.exports.gguf.reading import STRING, UINT32, Gguf, Value, raw_bytes, read_gguf
from gtqlora.exports.gguf.types import BY_NAME, GgmlType, dequantized, quantized

Raw = tuple[GgmlType, tuple[int, ...], bytes]


@cache
def _quantize_chunk() -> Any:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    function = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("*.so")))).ggml_quantize_chunk
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.restype, function.argtypes = (
        ctypes.c_size_t,
        [
            *(ctypes.c_int, pointer, pointer, number, number, number, pointer),
        ],
    )
    return function


def by_ggml(values: Tensor, kind: GgmlType, imatrix: bool = False) -> bytes:
    """Rows as ggml quantizes them, with an importance matrix of random weights or without one."""
    rows = np.ascontiguousarray(values.numpy(), np.float32)
    out = np.empty(kind.n_bytes(rows.shape), np.uint8)
    weights = np.exp(np.random.default_rng(0).standard_normal(rows.shape[1])).astype(np.float32)
    _quantize_chunk()(
        *(kind.number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape),
        weights.ctypes.data if imatrix else None,
    )
    return out.tobytes()


def tensors_of(source: Gguf) -> dict[str, Raw]:
    return {name: (info.kind, info.shape, raw_bytes(info)) for name, info in source.tensors.items()}


def array(raw: Raw) -> Tensor:
    """The values of a tensor."""
    kind, shape, data = raw
    return dequantized(data, kind, shape[-1]).view(shape)


def save(path: Path, metadata: dict[str, Value], tensors: dict[str, Raw]) -> Path:
    out = bytearray(header(metadata, {name: raw[:2] for name, raw in tensors.items()}))
    for *_, data in tensors.values():
        out += data
        out += bytes(padded(len(out)) - len(out))
    path.write_bytes(out)
    return path


def quantize(source: Path, target: Path, pick: Callable[[str], str], *, imatrix: bool = False) -> Path:
    """A copy of an F32 file with matrices, but not routers, in the type picked for them, where it fits their rows."""
    given = read_gguf(source)
    more = {"quantize.imatrix.file": Value(STRING, "a.dat")} if imatrix else {}
    tensors = {}
    for name, (kind, shape, data) in tensors_of(given).items():
        wanted = BY_NAME[pick(name)]
        if len(shape) == 1 or "_inp" in name or "conv1d" in name or shape[-1] % wanted.block:
            tensors[name] = kind, shape, data
        else:
            values = dequantized(data, kind, shape[-1])
            made = quantized(values, wanted) if wanted.is_plain else by_ggml(values, wanted, imatrix)
            tensors[name] = wanted, shape, made
    return save(target, {**given.metadata, **more}, tensors)


def split(source: Path, folder: Path, count: int) -> Path:
    """The file in several parts, as llama.cpp splits them; the first part's path."""
    given = read_gguf(source)
    every = list(tensors_of(given).items())
    paths = [folder / f"part-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    for n, path in enumerate(paths):
        numbers = {"split.no": n, "split.count": count, "split.tensors.count": len(every)}
        own = {key: Value(UINT32, value) for key, value in numbers.items()}
        save(path, {**(given.metadata if n == 0 else {}), **own}, dict(every[n::count]))
    return paths[0]
