"""Bytes of routed experts in each format, counted before torch is loaded; tests hold them against the formats."""

from __future__ import annotations

from gtqlora.errors import ConfigError
from gtqlora.families.sizes import Sizes

PLAIN, NATIVE = "bf16", "native"
GROUPS = {"int4-g32": 32, "int4-g128": 128}
NF4, _BLOCK, _NESTED = "nf4", 64, 256
FORMATS = (PLAIN, NF4, *GROUPS)


def held_as(sizes: Sizes, asked: str | None) -> str:
    """Return the format that a model's experts are held in, where `--expert-format` says this.

    Raises:
        ConfigError: the checkpoint does not go with it.
    """
    if asked is None or asked == NATIVE:
        if asked == NATIVE and sizes.native is None:
            raise ConfigError(f"--expert-format native: {sizes.model} is not INT4; choose {', '.join(FORMATS)}")
        return sizes.native or PLAIN
    if asked not in FORMATS:
        raise ConfigError(f"--expert-format {asked}: known are {', '.join((*FORMATS, NATIVE))}")
    if sizes.native is not None and asked != sizes.native:
        raise ConfigError(f"--expert-format {asked}: {sizes.model} is {sizes.native} already; only native is loaded")
    return asked


def expert_bytes(sizes: Sizes, held: str) -> int:
    """Return the bytes of one routed expert.

    Raises:
        ConfigError: its matrices do not divide into the format's groups.
    """
    matrices = ((sizes.inner, sizes.hidden), (sizes.inner, sizes.hidden), (sizes.hidden, sizes.inner))
    return sum(_matrix(held, rows, columns, sizes.width) for rows, columns in matrices)


def _matrix(held: str, rows: int, columns: int, width: int) -> int:
    weights = rows * columns
    if held == PLAIN:
        return weights * width
    group = min(GROUPS[held], columns) if held in GROUPS else _BLOCK
    if (columns if held in GROUPS else weights) % group:
        raise ConfigError(f"--expert-format {held}: a matrix {rows} x {columns} does not divide into groups of {group}")
    if held in GROUPS:
        return weights // 2 + weights // group * 2
    blocks = weights // group
    # codes, a byte for each block's scale, and fp32 scales of those with one offset
    return weights // 2 + blocks + -(-blocks // _NESTED) * 4 + 4
