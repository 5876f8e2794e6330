"""Rows sorted by expert and cut into tiles by `sort_rows.cu`, in one launch each, on Hopper GPUs.

Shape letters as in `rows`; E1 = E + 1.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import torch
from torch import Tensor

from gtqlora.experts.kernels import cuda
from gtqlora.experts.kernels.rows import Placed

MOST_EXPERTS = 1023
"""There is a thread for each expert, and one for the rows of those held elsewhere."""

_GRAIN = 16
"""Tiles have a multiple of this many rows, but for an expert's last one."""

_THREADS, _WARPS = 1024, 32


def compile_source() -> bytes:
    """Compile `sort_rows.cu` to machine code; this needs no GPU."""
    text = resources.files("gtqlora.experts.kernels").joinpath("sort_rows.cu").read_text(encoding="utf-8")
    return cuda.compile_source(text, "sort_rows.cu", {}, "sm_90a")


@cache
def _loaded(device: int) -> dict[str, cuda.Function]:
    functions = cuda.load(compile_source(), ("sort_rows", "cut_rows"), device)
    cuda.allow_shared_memory(functions["sort_rows"], _shared_bytes(MOST_EXPERTS))
    return functions


def _shared_bytes(count: int) -> int:
    return 4 * _WARPS * (count + 1)


def _empty_tiles(n_rows: int, count: int, most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Each expert with rows has one tile, and one more for every `most` of them.
    tiles = torch.empty(min(n_rows, count) + n_rows // most, 4, dtype=torch.int32, device=device)
    return tiles, torch.empty(1, dtype=torch.int32, device=device)


def sort(top_k_index_TK: Tensor, first: int, count: int, most: int) -> Placed:
    """Sort rows as `rows.place_rows` does, and cut them into tiles of at most so many rows."""
    index_TK = top_k_index_TK.long().contiguous()
    n_rows, device = index_TK.numel(), index_TK.device
    order_R = torch.empty(n_rows, dtype=torch.int32, device=device)
    places_TK = torch.empty(index_TK.shape, dtype=torch.int32, device=device)
    offsets_E1 = torch.empty(count + 1, dtype=torch.int32, device=device)
    tiles, n_tiles = _empty_tiles(n_rows, count, most, device)
    results = (order_R, places_TK, offsets_E1, tiles, n_tiles)
    numbers = (n_rows, first, count, most, _GRAIN)
    function = _loaded(index_TK.get_device())["sort_rows"]
    cuda.launch(function, 1, _THREADS, _shared_bytes(count), index_TK, *results, *numbers)
    return Placed(
        order_R=order_R,
        offsets_E1=offsets_E1,
        top_k=index_TK.shape[-1],
        places_TK=places_TK,
        tiles=tiles,
        n_tiles=n_tiles,
        most=most,
    )


def cut(offsets_E1: Tensor, n_rows: int, most: int) -> tuple[Tensor, Tensor]:
    """Return the tiles, and their number, of rows that are sorted already; see `rows.Placed`."""
    count = len(offsets_E1) - 1
    tiles, n_tiles = _empty_tiles(n_rows, count, most, offsets_E1.device)
    function = _loaded(offsets_E1.get_device())["cut_rows"]
    cuda.launch(function, 1, _THREADS, 0, offsets_E1, tiles, n_tiles, count, most, _GRAIN)
    return tiles, n_tiles
