"""Rates that were measured, and what follows from them for other models: the one table of speeds."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

TFLOPS = 790e12
"""Operations a second that H100 and H200 do in bf16 matrix products; shares below are of it."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A measured step of training.

    Attributes:
        hidden: the model's width; `tokens`: those that ran together.
        recomputed: whether every layer was computed again.
        gpus: that ran it; `tokens` are of each, and `tokens_per_second` of all.
        split: whether each had a part of the dense weights, which are gathered as they are wanted.
        share: of `TFLOPS`, at six operations a token for every parameter that it meets.
        source: where the figure stands.
    """

    shape: str
    card: str
    hidden: int
    tokens: int
    recomputed: bool
    tokens_per_second: int
    share: float
    gpus: int = 1
    split: bool = False
    source: str = "docs/claims.md, bench/step.py"

    def __str__(self) -> str:
        how = "every layer computed again" if self.recomputed else "activations kept"
        many = "one" if self.gpus == 1 else self.gpus
        return (
            f"{self.shape} on {many} {self.card}, {self.tokens:,} tokens together, {how}: "
            f"{self.tokens_per_second:,} tokens/s ({self.source})"
        )


_QWEN, _KIMI = "Qwen3-30B-A3B, NF4", "Kimi-K2.5's width, 1 dense and 2 MoE layers, NF4"
RATES = tuple(
    Rate(shape=shape, card="H100", hidden=hidden, tokens=tokens, recomputed=again, tokens_per_second=rate, share=share)
    for shape, hidden, tokens, again, rate, share in (
        (_QWEN, 2048, 11_503, True, 17_656, 0.407),
        (_QWEN, 2048, 2_889, True, 13_816, 0.319),
        (_QWEN, 2048, 11_503, False, 24_534, 0.567),
        (_KIMI, 7168, 11_868, True, 37_071, 0.752),
    )
)
RATES += (
    Rate(
        **{"shape": "Qwen3-235B-A22B, INT4", "card": "H200", "hidden": 4096, "tokens": 4_096, "recomputed": True},
        **{"tokens_per_second": 7_188, "share": 0.589, "gpus": 2, "split": True},
        source="docs/claims.md, bench/scale.py",
    ),
    Rate(
        **{"shape": "Kimi-K2.5, INT4", "card": "H200", "hidden": 7168, "tokens": 3_072, "recomputed": True},
        **{"tokens_per_second": 8_630, "share": 0.519, "gpus": 4, "split": True},
        source="docs/claims.md, bench/trillion.py",
    ),
)
_FARTHEST = 8
"""How many times narrower than what was measured, or with how many times fewer tokens, a step may be."""
# Bytes a second from pinned host memory: of one GPU alone, and of each of several, of which two were measured.
LINK_ALONE, LINK_EACH = 50e9, 46e9
LINKS = "50 GB/s from pinned host memory to one H100 alone, 46 GB/s to each of two (measured on one host)"


# Bytes a second that a GPU is sent by another of its machine while it sends as many.
GPU_EACH = 225e9
BETWEEN = "225 GB/s between two H200 of a host, each way (bench/links.py)"


def nearest(hidden: int, tokens: int, *, recomputed: bool, split: bool = False) -> Rate | None:
    """Return the measured step that is most like one: by width first, and by how many tokens run together.

    None if none is like it: narrow models and few tokens wait for launches, which no share of the matrix rate tells.
    """

    def apart(rate: Rate) -> float:
        width, batch = abs(log2(rate.hidden / hidden)), abs(log2(rate.tokens / tokens))
        return 2 * width + batch + (rate.recomputed != recomputed)

    found = min((rate for rate in RATES if rate.split == split), key=apart)
    near = found.hidden <= _FARTHEST * hidden and found.tokens <= _FARTHEST * tokens
    return found if near else None


def link(gpus: int) -> float:
    """Return the bytes a second that each GPU reads from pinned host memory."""
    return LINK_ALONE if gpus == 1 else LINK_EACH
